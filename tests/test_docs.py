"""Every code block of README.md and docs/ runs as written; training commands on a smaller network and fewer images."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from timm_selfdistill import load_images

from .conftest import EMBEDDED, ROOT

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
SMALL = "--model test_resnet --epochs 1 --data-dir {images} -b 32 -j 0"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository, with few images in examples/data."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "timm_selfdistill"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples" / "data").mkdir(parents=True)
    (folder / "examples" / "train.py").symlink_to(ROOT / "examples" / "train.py")
    images = load_images(EMBEDDED)
    images.train.select(range(160)).to_parquet(folder / "examples/data/train.parquet")
    images.val.select(range(64)).to_parquet(folder / "examples/data/test.parquet")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page, workplace, tmp_path):
    found = blocks(page, "python")
    assert found
    (tmp_path / "examples").symlink_to(workplace / "examples")
    subprocess.run([sys.executable, "-c", "\n".join(found)], cwd=tmp_path, check=True, timeout=300,
                   env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("page", "command"), [(page, command) for page in PAGES for command in commands(page)])
def test_commands(page, command, workplace):
    program, *arguments = shlex.split(command)
    if program == "make":
        arguments.append("--dry-run")  # the demo is trained in test_examples.py, and the tests are these
    elif program == "pip":
        arguments += ["--no-deps", "--no-build-isolation", "--dry-run", "--no-index"]
    else:
        arguments += shlex.split(SMALL.format(images=workplace / "examples/data"))
        if "--epochs 3" in command and "--output" in command:
            arguments += ["--epochs", "2"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                   "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run([program, *arguments], cwd=workplace, env=environment, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", (ROOT / page).read_text()):
        assert not target or ((ROOT / page).parent / target).exists(), target
