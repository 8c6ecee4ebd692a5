"""Every code block of README.md and docs/ runs as written; training commands on a smaller network and fewer images."""

import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict

from timm_selfdistill import SelfDistillModel, load_images

from .conftest import EMBEDDED
from .programs import HANGS, ROOT

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page not in ("docs/models.md", "docs/architecture.md")]  # which have no blocks
LOOPS = "docs/own_loop.md"
QUICK = ["README.md", "docs/hub.md", "docs/install.md"]
"""Pages whose commands run in every test run; those of the others take long."""
OTHERS = [page for page in GUIDES if page != LOOPS]
SMALL = "--epochs 1 --data-dir {images} -b 32 -j 0 --img-size 32"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def workplace(tmp_path):
    """A folder that looks like the repository, with few images in examples/data."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py", "README.md", "LICENSE", "timm_selfdistill"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples" / "data").mkdir(parents=True)
    for name in (
        "train.py",
        "predict.py",
        "early_exit.py",
        "onnx_early_exit.py",
        "efficientnet_lite0.py",
        "add_exits.py",
        "ankle_boot.png",
    ):
        (folder / "examples" / name).symlink_to(ROOT / "examples" / name)
    images = load_images(EMBEDDED)
    images.train.select(range(64)).to_parquet(folder / "examples/data/train.parquet")
    images.val.select(range(320)).to_parquet(folder / "examples/data/test.parquet")
    return folder


def unlaunched(program: str, *arguments: str) -> tuple[int, tuple[str, ...]]:
    """How many processes a launcher would start, and of what; test_examples.py runs the launchers themselves."""
    if program == "torchrun":
        assert arguments[0] == "--nproc_per_node"
        return int(arguments[1]), arguments[2:]
    if program == "accelerate":
        assert arguments[0] == "launch"
        return 1, arguments[1:]
    return 1, (program, *arguments)


@pytest.mark.parametrize("page", OTHERS)
def test_python_blocks(page, workplace, hub_programs):
    found = blocks(page, "python")
    assert found
    (workplace / "blocks.py").write_text("\n".join(found))
    done = hub_programs.run("blocks.py", cwd=workplace, PYTHONPATH=str(workplace))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", OTHERS)
def test_python_blocks_in_a_new_process(page, workplace, environment):
    """In which nothing has been imported that the page does not import."""
    (workplace / "blocks.py").write_text("\n".join(blocks(page, "python")))
    done = subprocess.run(
        [sys.executable, "blocks.py"], cwd=workplace, env=environment, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_loops_of_other_libraries(workplace, environment):
    """And that each checkpoint gives the same weights as the model that was saved at the end of its loop."""
    (workplace / "blocks.py").write_text("\n".join(blocks(LOOPS, "python")))
    for script in (ROOT / "tests/timm_train.py", "blocks.py"):
        done = subprocess.run(
            [sys.executable, script], cwd=workplace, env=environment, capture_output=True, text=True, timeout=HANGS
        )
        assert done.returncode == 0, done.stderr
    saved = {path.name: SelfDistillModel.from_pretrained(path).state_dict() for path in workplace.glob("from-*")}
    assert_same(saved["from-timm"], load_state_dict(str(workplace / "output/distilled/model_best.pth.tar")))
    assert_same(saved["from-accelerate"], saved["from-state"])
    assert_same(saved["from-transformers"], saved["from-checkpoint"])
    assert_same(saved["from-lightning"], saved["from-ckpt"])
    kept = load_file(workplace / "states/0/model.safetensors")
    assert_same(saved["from-state"], {name.removeprefix("trainable_module."): value for name, value in kept.items()})


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page in QUICK else pytest.mark.slow) for page in GUIDES]
)
def test_commands(page, workplace, environment, hub_programs):
    """In the order of the page: a later command may go on where an earlier one stopped."""
    assert commands(page)
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            arguments.append("--dry-run")  # the demo is trained in test_examples.py, and the tests are these
        elif program == "pip":
            arguments += ["--no-deps", "--no-build-isolation", "--dry-run", "--no-index"]
        elif "examples/train.py" in arguments or arguments[0] == "train":
            arguments += shlex.split(SMALL.format(images=workplace / "examples/data"))
            if not {"--pretrained", "--initial-checkpoint"} & set(arguments):
                arguments += ["--model", "test_resnet"]
            if "--resume" in arguments:
                arguments += ["--epochs", "2"]
        elif "flat-minima" in arguments:
            arguments += ["--draws", "1"]
        elif "--max-accuracy-drop" in arguments:
            arguments += ["--max-accuracy-drop", "100"]  # a network that has hardly learned anything
        if program in ("make", "pip"):
            done = subprocess.run(
                [program, *arguments], cwd=workplace, env=environment, capture_output=True, text=True, timeout=HANGS
            )
        else:
            processes, script = unlaunched(program, *arguments)
            done = hub_programs.run(*script, processes=processes, cwd=workplace)
        assert done.returncode == 0, command + "\n" + done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", (ROOT / page).read_text()):
        assert not target or ((ROOT / page).parent / target).exists(), target
