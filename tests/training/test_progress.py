from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from timm_selfdistill.training.runtime import progress
from timm_selfdistill.training.runtime.progress import ProgressReporter


def report(terminal: bool, monkeypatch) -> str:
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with ProgressReporter(10, 0, enabled=True, console=console) as reporter:
        for _ in range(5):
            reporter.advance()
        reporter.note(0, 2, 1.25, 321.0)
        reporter.bar.refresh()
        reporter.say("epoch 1/2 done")
    return out.getvalue()


def test_plain_lines_when_output_is_piped(monkeypatch):
    first, second = report(False, monkeypatch).splitlines()
    assert first.startswith("epoch 1/2  5/10  loss 1.250  321 images/s  left 0:00:")
    assert second == "epoch 1/2 done"


def test_a_bar_with_rate_and_time_left_on_a_terminal(monkeypatch):
    text = report(True, monkeypatch)
    for part in ("5/10", "loss 1.250", "321 images/s", "left", "━", "epoch 1/2 done"):
        assert part in text


def test_the_other_processes_are_silent(capsys):
    with ProgressReporter(10, 0, enabled=False) as reporter:
        reporter.advance()
        reporter.say("a line")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_waiting_shows_how_long_it_takes(terminal, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: 7.0))
    answers, out = [False, False, True], StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    ProgressReporter(1, 0, enabled=True, console=console).wait("uploading, 5.0 MB", lambda seconds: answers.pop(0))
    assert not answers
    assert "uploading, 5.0 MB" in out.getvalue()
    assert terminal or out.getvalue().splitlines() == ["uploading, 5.0 MB", *["uploading, 5.0 MB, 0:00:00"] * 2]
