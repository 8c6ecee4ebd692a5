"""Every code block of README.md and docs/ runs as written; training commands on a smaller network and fewer images."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from timm_selfdistill import load_images

from .conftest import EMBEDDED
from .hub.server import TOKEN, HubServer
from .programs import HANGS, ROOT, Programs

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page != "docs/models.md"]  # which is a table of results
SMALL = "--epochs 1 --data-dir {images} -b 32 -j 0"


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
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE", "timm_selfdistill", "recipes"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples" / "data").mkdir(parents=True)
    for name in ("train.py", "predict.py", "early_exit.py", "onnx_early_exit.py", "efficientnet_lite0.py",
                 "add_exits.py", "ankle_boot.png"):
        (folder / "examples" / name).symlink_to(ROOT / "examples" / name)
    images = load_images(EMBEDDED)
    images.train.select(range(160)).to_parquet(folder / "examples/data/train.parquet")
    images.val.select(range(320)).to_parquet(folder / "examples/data/test.parquet")
    return folder


@pytest.fixture
def environment(tmp_path):
    """Of a reader who is logged in to a Hub."""
    with HubServer() as hub:
        yield {**os.environ, "OMP_NUM_THREADS": "1", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache"),
               "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("page", GUIDES)
def test_python_blocks(page, workplace, environment):
    found = blocks(page, "python")
    assert found
    subprocess.run([sys.executable, "-c", "\n".join(found)], cwd=workplace, check=True, timeout=HANGS, env=environment)


@pytest.fixture
def programs(environment):
    with Programs(environment) as programs:
        yield programs


@pytest.mark.parametrize("page", GUIDES)
def test_commands(page, workplace, environment, programs):
    """In the order of the page: a later command may go on where an earlier one stopped."""
    environment["PET_MASTER_PORT"] = str(29700 + PAGES.index(page))  # torchrun's, apart for pages that run at once
    assert commands(page)
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            arguments.append("--dry-run")  # the demo is trained in test_examples.py, and the tests are these
        elif program == "pip":
            arguments += ["--no-deps", "--no-build-isolation", "--dry-run", "--no-index"]
        elif "examples/train.py" in arguments:
            arguments += shlex.split(SMALL.format(images=workplace / "examples/data"))
            if not {"--pretrained", "--initial-checkpoint"} & set(arguments):
                arguments += ["--model", "test_resnet"]
            if "--resume" in arguments:
                arguments += ["--epochs", "2"]
        elif "flat-minima" in arguments:
            arguments += ["--draws", "1"]
        elif "--max-accuracy-drop" in arguments:
            arguments += ["--max-accuracy-drop", "100"]  # a network that has hardly learned anything
        if program in ("python", "timm-selfdistill"):
            done = programs.run(program, *arguments, cwd=workplace)
        else:
            done = subprocess.run([program, *arguments], cwd=workplace, env=environment, capture_output=True,
                                  text=True, timeout=HANGS)
        assert done.returncode == 0, command + "\n" + done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", (ROOT / page).read_text()):
        assert not target or ((ROOT / page).parent / target).exists(), target
