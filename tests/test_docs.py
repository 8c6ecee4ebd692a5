"""Every code block of README.md and docs/ runs as written; training commands on a smaller network and fewer images."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models import load_state_dict

from timm_selfdistill import SelfDistillModel

from .programs import HANGS, ROOT, Programs

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
LOOPS = "docs/own_loop.md"
GUIDES = ["docs/index.md", *(page for page in PAGES if page.startswith("docs/guides/"))]
"""Pages that are followed from top to bottom: commands first, whose files the Python blocks read."""
QUICK = ["README.md"]
"""Pages whose commands run in every test run; those of the others take long."""
SMALL = "--epochs 1 --data-dir {images} -b 32 -j 0 --img-size 32"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def pages_with(language: str) -> list[str]:
    """Those whose blocks are independent of each other."""
    return [page for page in PAGES if blocks(page, language) and page not in (LOOPS, *GUIDES)]


def commands(page: str) -> list[str]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip()]


def unlaunched(program: str, *arguments: str) -> tuple[int, tuple[str, ...]]:
    """How many processes a launcher would start, and of what; test_examples.py runs the launchers themselves."""
    if program == "torchrun":
        assert arguments[0] == "--nproc_per_node"
        return int(arguments[1]), arguments[2:]
    if program == "accelerate":
        assert arguments[0] == "launch"
        return 1, arguments[1:]
    return 1, (program, *arguments)


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks(page, workplace, hub_programs):
    found = blocks(page, "python")
    (workplace / "blocks.py").write_text("\n".join(found))
    done = hub_programs.run("blocks.py", cwd=workplace, PYTHONPATH=str(workplace))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("python"))
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
    "page",
    [pytest.param(page, marks=() if page in QUICK else pytest.mark.slow) for page in [*pages_with("bash"), LOOPS]],
)
def test_commands(page, workplace, environment, hub_programs):
    """In the order of the page: a later command may go on where an earlier one stopped."""
    run_commands(page, workplace, environment, hub_programs)


@pytest.mark.slow
@pytest.mark.parametrize("page", GUIDES)
def test_guides(page, photos, environment, hub_programs):
    assert blocks(page, "bash")
    run_commands(page, photos, environment, hub_programs)
    (photos / "blocks.py").write_text("\n".join(blocks(page, "python")))
    done = hub_programs.run("blocks.py", cwd=photos, PYTHONPATH=str(photos))
    assert done.returncode == 0, done.stderr


def run_commands(page: str, workplace: Path, environment: dict[str, str], hub_programs: Programs) -> None:
    for command in commands(page):
        program, *arguments = shlex.split(command)
        if program == "make":
            arguments.append("--dry-run")  # the demo is trained in test_examples.py, and the tests are these
        elif program == "pip":
            arguments += ["--no-deps", "--no-build-isolation", "--dry-run", "--no-index"]
        elif "examples/train.py" in arguments or "train" in arguments:
            arguments = smaller(arguments, workplace)
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


def smaller(arguments: list[str], workplace: Path) -> list[str]:
    """A training command with a smaller network, fewer images and one epoch, without weights from the Hub."""
    images = "photos" if "photos" in arguments else workplace / "examples/data"
    model = dict(pairwise(arguments)).get("--model", "")
    arguments = [argument for argument in arguments if argument != "--pretrained" or ":" in model]
    arguments += shlex.split(SMALL.format(images=images))
    if not {"--pretrained", "--initial-checkpoint"} & set(arguments):
        arguments += ["--model", "test_resnet"]
    if "--resume" in arguments and "auto" not in arguments:
        arguments += ["--epochs", "2"]
    return arguments


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", text):
        assert not target or ((ROOT / page).parent / target).exists(), target
