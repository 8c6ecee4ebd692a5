"""What contributors are told is true: commands exist, files are what their readers expect."""

import re
import shlex
import subprocess

import pytest
import yaml

from .programs import ROOT

GITHUB = ROOT / ".github"
in_a_clone = pytest.mark.skipif(not GITHUB.exists(), reason="a source distribution has no .github")
PAGES = ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"]


def commands() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_make_knows_its_targets_and_tests_exist():
    assert len(commands()) >= 5
    for command in commands():
        program, *arguments = shlex.split(command)
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, check=True)
        for path in re.findall(r"tests/\w+\.py", command):
            assert (ROOT / path).is_file(), path
    table = re.findall(r"^\| `make ([\w-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert {name for name in phony if name.startswith("test")} == set(table)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", (ROOT / page).read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@in_a_clone
def test_yaml_files_can_be_read():
    files = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) >= 9
    for path in files:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


@in_a_clone
def test_workflows_have_limits_and_no_more_rights_than_they_need():
    for path in (GITHUB / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert workflow["permissions"] == {"contents": "read"}, path
        for name, job in workflow["jobs"].items():
            assert "uses" in job or job["timeout-minutes"] <= 60, (path, name)
            assert job.get("permissions", {}) in ({}, {"id-token": "write"}), (path, name)


@in_a_clone
def test_the_tests_run_on_every_python_that_is_supported():
    job = yaml.safe_load((GITHUB / "workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_the_last_release():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(
        r"^## (\d\S*) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert (citation["version"], str(citation["date-released"])) == releases[0]
