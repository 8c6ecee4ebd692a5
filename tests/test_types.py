"""Types: those of the package, and those that a client's mypy sees."""

import re
import subprocess
import sys

import pytest

from .conftest import ENVIRONMENT
from .programs import ROOT

REVEALED = """
from timm_selfdistill import EarlyExit, SelfDistillModel, Trainer, load_images, wrap_self_distill
import timm, torch
model = wrap_self_distill(timm.create_model("resnet18"))
reveal_type(model)
reveal_type(SelfDistillModel.from_pretrained("user/name"))
reveal_type(model.predict(torch.zeros(1, 3, 32, 32)))
reveal_type(model.forward_exits(torch.zeros(1, 3, 32, 32)).logits)
reveal_type(load_images("photos"))
"""
EXPECTED = [
    "timm_selfdistill.model.SelfDistillModel",
    "timm_selfdistill.model.SelfDistillModel",
    "torch._tensor.Tensor",
    "tuple[torch._tensor.Tensor, ...]",
    "timm_selfdistill.training.data.splits.ImageSplits",
]


@pytest.mark.slow
def test_the_package_and_its_clients_have_types_that_hold(tmp_path, monkeypatch):
    """One run of mypy over the package, the Python of README.md, and what calls come to."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    readme, revealed = tmp_path / "readme_blocks.py", tmp_path / "revealed.py"
    readme.write_text("\n".join(blocks))
    revealed.write_text(REVEALED)
    monkeypatch.chdir(ROOT)
    flags = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"), "--no-incremental"]
    command = [sys.executable, "-m", "mypy", *flags, "timm_selfdistill", str(readme), str(revealed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)  # whose memory ends
    stdout, stderr, code = done.stdout, done.stderr, done.returncode
    errors = [line for line in stdout.splitlines() if ": error: " in line]
    assert not errors, "\n".join(errors)
    assert code == 0, stderr
    found = re.findall(r'revealed\.py:\d+: note: Revealed type is "(.*)"', stdout)
    assert found == EXPECTED
