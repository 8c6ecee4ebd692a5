import warnings
from pathlib import Path

import pytest

from timm_selfdistill.cli.main import main


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """An empty folder for images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    return Path("photos")


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs timm-selfdistill in the working directory; its exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["timm-selfdistill", *map(str, arguments)])
        capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run
