"""The source distribution and the wheel, built once without network, and a program that has nothing but the wheel."""

import email
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
from PIL import Image

from timm_selfdistill.version import __version__

from .conftest import ENVIRONMENT
from .programs import HANGS, ROOT

NAME = f"timm_selfdistill-{__version__}"
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "mkdocs.yml",
    "pyproject.toml",
    "setup.py",
)
FOLDERS = ("benchmarks", "configs", "docs", "examples", "tests", "timm_selfdistill")
"""Of a clone, which may hold anything else."""
GENERATED = {"PKG-INFO", "setup.cfg"}
RELATIVE = re.compile(r"\]\((?!https?://)[^)]*\)")


class Packages(NamedTuple):
    """A copy of the clone's `FILES` and `FOLDERS`, and what is built of it."""

    source: Path
    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def packages(tmp_path_factory) -> Packages:
    folder = tmp_path_factory.mktemp("package")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=not_in_git)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    return Packages(folder / "source", folder / f"dist/{NAME}.tar.gz", folder / f"dist/{NAME}-py3-none-any.whl")


@pytest.fixture(scope="session")
def metadata(packages) -> Message:
    with zipfile.ZipFile(packages.wheel) as wheel:
        return email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What a new process prints."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT | environment, text=True, capture_output=True, timeout=HANGS
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def not_in_git(folder: str, names: list[str]) -> set[str]:
    """Of the names of files in a folder those that .gitignore has."""
    runs = {name for name in names if Path(folder, name).is_dir()} if folder == str(ROOT / "benchmarks/results") else {}
    notebooks = {"quickstart"} if folder == str(ROOT / "examples") else {}
    return {name for name in names if name.startswith(".") or name == "__pycache__" or name in {*runs, *notebooks}}


def files_in(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        if not {"__pycache__", "timm_selfdistill.egg-info"} & set(path.parts)
    }


def test_twine_finds_nothing(packages):
    run(sys.executable, "-m", "twine", "check", "--strict", packages.sdist, packages.wheel, cwd=packages.source)


def test_the_source_distribution_holds_all_that_its_tests_need(packages):
    with tarfile.open(packages.sdist) as sdist:
        names = {member.name.removeprefix(f"{NAME}/") for member in sdist if member.isfile()}
    names = {name for name in names if not name.startswith("timm_selfdistill.egg-info/")}
    assert names - GENERATED == files_in(packages.source)
    for needed in (
        "Makefile",
        "tests/conftest.py",
        "tests/data/typefaces/test.parquet",
        "examples/data/train.parquet",
        "benchmarks/results/evidence.jsonl",
        "docs/images/exits.png",
        "configs/multi_gpu.yaml",
        "CHANGELOG.md",
    ):
        assert needed in names


def test_the_wheel_holds_the_package_and_nothing_else(packages):
    with zipfile.ZipFile(packages.wheel) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
    assert names == {f"timm_selfdistill/{name}" for name in files_in(packages.source / "timm_selfdistill")}
    for needed in ("py.typed", "hub/card_template.md", "recipes/cifar100_resnet18.yaml", "__main__.py"):
        assert f"timm_selfdistill/{needed}" in names


def test_the_metadata_are_complete(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("timm-selfdistill", __version__)
    assert metadata["Author"] == "The timm-selfdistill developers"
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata["Requires-Python"] == ">=3.10"
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls["Homepage"] == "https://pypi.org/project/timm-selfdistill/"
    assert all(url.startswith("https://") for url in urls.values())


def test_the_readme_stands_alone_on_an_index(packages, metadata):
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload()
    assert description.startswith("# timm-selfdistill\n")
    assert len(description) > 0.9 * len((ROOT / "README.md").read_text(encoding="utf-8"))
    assert RELATIVE.findall(description) == []
    with tarfile.open(packages.sdist) as sdist:
        other = email.message_from_binary_file(sdist.extractfile(f"{NAME}/PKG-INFO"))
    assert other.get_payload() == description


def describe() -> Callable[[str, str | None], str]:
    """That of setup.py."""
    return runpy.run_path(str(ROOT / "setup.py"))["describe"]


@pytest.mark.parametrize(
    ("repository", "expected"),
    [
        (None, "One page (docs/a.md), docs/a.md, [paper](https://arxiv.org), .\n"),
        (
            "https://host/user/name",
            "[One page](https://host/user/name/blob/HEAD/docs/a.md#part), [docs/a.md](https://host/user/name/blob/HEAD/docs/"
            "a.md), [paper](https://arxiv.org), ![Curve](https://host/user/name/raw/HEAD/docs/a.png).\n",
        ),
    ],
)
def test_links_of_the_readme(repository, expected):
    readme = "[One page](docs/a.md#part), [docs/a.md](docs/a.md), [paper](https://arxiv.org), ![Curve](docs/a.png).\n"
    assert describe()(readme, repository).startswith(expected)


def test_every_extra_is_documented(metadata):
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == metadata.get_all("Provides-Extra")


def test_a_release_has_its_part_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "dev" in __version__ or re.search(
        rf"^## {re.escape(__version__)} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE
    )
    assert changelog.index("## Unreleased") < changelog.index("## 0.1.0")


@pytest.fixture
def wheel_alone(packages, tmp_path) -> Callable[..., str]:
    """Runs a program of a new environment, which has the libraries of this one, but of this package the wheel alone,
    in an empty folder; what it prints."""
    place, empty = tmp_path / "environment", tmp_path / "empty"
    venv.create(place, with_pip=False)
    python = place / "bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        packages.wheel,
        cwd=tmp_path,
    )
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    # The folders are searched after the environment's own, and without the .pth files in them, that is, the clone.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(own, "libraries.pth").write_text("\n".join(sorted(libraries)))
    empty.mkdir()

    def call(program: str, *arguments: object) -> str:
        return run(place / "bin" / program, *arguments, cwd=empty, PYTHONPATH="")

    where = call("python", "-c", "import timm_selfdistill; print(timm_selfdistill.__file__)")
    assert Path(where).is_relative_to(place)
    return call


def write_photos(folder: Path) -> None:
    """JPEGs of two classes, dark and bright."""
    random = np.random.default_rng(0)
    for split, images in (("train", 24), ("val", 150)):
        for name, mean in (("dark", 80), ("bright", 170)):
            (folder / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = random.normal(mean, 30, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.jpg")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_alone_does_everything(wheel_alone, tmp_path):
    write_photos(tmp_path / "photos")
    empty = tmp_path / "empty"
    flags = ("--data-dir", "../photos", "--model", "test_resnet", "--img-size", 32, "-b", 16, "-j", 1, "--lr", 0.02)

    def command(*arguments: object) -> str:
        return wheel_alone("timm-selfdistill", *arguments)

    assert command("--version") == f"{__version__}\n"
    assert "cifar100_resnet18" in command("recipes")
    assert "epoch 1, the best of 1" in command("train", *flags, "--epochs", 1, "--output", "run")
    assert "of 3" in command("train", *flags, "--epochs", 3, "--resume", "run")
    assert "ensemble" in command("evaluate", "run")
    assert "saved in calibrated" in command("calibrate", "run", "--max-accuracy-drop", 100, "--output", "calibrated")
    assert "wrote exit0.onnx" in command("export", "run", "--exit", 0, "--output", "exit0.onnx")
    command("export", "calibrated", "--staged", "--output", "stages")
    assert "bright" in command("predict", "run", "../photos/val/bright/0.jpg")
    assert timm.create_model(f"local-dir:{empty}/run/best", pretrained=True).num_classes == 2
    for output, *launcher in (
        ("launched", "accelerate.commands.accelerate_cli", "launch"),
        ("two", "torch.distributed.run", "--standalone", "--nproc_per_node", 2),
    ):
        printed = wheel_alone(
            "python", "-m", *launcher, "-m", "timm_selfdistill", "train", *flags, "--epochs", 1, "--output", output
        )
        assert "epoch 1, the best of 1" in printed
    assert {path.name for path in empty.iterdir()} == {"run", "calibrated", "exit0.onnx", "stages", "launched", "two"}
