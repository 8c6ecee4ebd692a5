"""Where a run stands, and what it came to."""
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TrainResult:
    """What a run came to."""

    output: Path
    """The run directory."""
    history: list[dict[str, Any]]
    """A row per finished epoch, as in history.csv."""
    summary: dict[str, Any] | None = None
    """As in summary.json; None where the run was interrupted."""
    interrupted_by: signal.Signals | None = None


@dataclass
class TrainState:
    """Where the run stands; travels in checkpoints."""

    epoch: int = 0
    images: int = 0
    """Images of this epoch that are behind us, over all processes."""
    updates: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Sums over the updates of this epoch."""
    best_top1: float = -1.0
    history: list[dict[str, Any]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
