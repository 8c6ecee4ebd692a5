"""Where a run stands, and what it came to."""
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .class_names import listed
from .metrics import ExitMetrics
from .upload import UploadResult


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
    upload: UploadResult | None = None
    """Of the main process, where the run pushes to the Hub."""


DRAWS = "seed and epoch"
"""What order and augmentation of the images depend on; their sum, in checkpoints that do not tell."""


@dataclass
class TrainState:
    """Where the run stands; travels in checkpoints."""

    global_batch: int
    """Images of a forward pass, over all processes."""
    epoch_images: int
    """Images of an epoch."""
    backbone: str = ""
    """SHA-256 of a frozen one, or of a teacher, which checkpoints do not hold."""
    class_names: list[str] = field(default_factory=list)
    """In the order of the class indices; empty where they are not known."""
    drawn_from: str = ""
    """Fingerprint of the images from which those for validation were drawn; empty where they were not."""
    epoch: int = 0
    images: int = 0
    """Images of this epoch that are behind us, over all processes."""
    updates: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    """Sums over the updates of this epoch."""
    loss_updates: dict[str, int] = field(default_factory=dict)
    """How many updates each of these sums is of: a task may have a loss in some of them only."""
    replaced_samples: int = 0
    """Images that could not be read and gave their place to others."""
    skipped_updates: int = 0
    """Updates that were left out because their gradients were not finite."""
    best_metric: float = float("-inf")
    """By which the best model so far was chosen; of a loss the negative."""
    best_epoch: int = 0
    """From 1, of the best model; 0 where there is none yet."""
    draws: str = DRAWS
    history: list[dict[str, Any]] = field(default_factory=list)

    def troubles(self) -> str:
        """How many images and updates were left out, for the line of an epoch."""
        return (f"  images replaced {self.replaced_samples}" if self.replaced_samples else "") + (
            f"  updates left out {self.skipped_updates}" if self.skipped_updates else "")

    def metrics_of(self, epoch: int) -> list[ExitMetrics]:
        """Of a finished epoch, from 1."""
        row = next(row for row in self.history if row["epoch"] == epoch)
        labels = [key.removeprefix("top1_") for key in row if key.startswith("top1_")]
        return [ExitMetrics(label if label == "ensemble" else int(label.removeprefix("exit_")),
                            row[f"top1_{label}"], row[f"top5_{label}"], row[f"loss_{label}"]) for label in labels]

    def add_losses(self, losses: dict[str, float]) -> None:
        """Those of one update."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
            self.loss_updates[name] = self.loss_updates.get(name, 0) + 1

    def end_epoch(self, lr: float, metrics: list[ExitMetrics]) -> dict[str, Any]:
        """Go to the next epoch; the row of this one.

        Args:
            lr: of its last update.
            metrics: empty where it was not measured.

        Raises:
            FloatingPointError: all of its updates were left out.
        """
        if not self.losses:
            raise FloatingPointError(f"no update of epoch {self.epoch + 1} had finite gradients; try a lower lr")
        row: dict[str, Any] = {"epoch": self.epoch + 1, "lr": lr}
        row |= {f"train_{name}": total / self.loss_updates[name] for name, total in self.losses.items()}
        for metric in metrics:
            row |= {f"top1_{metric.label}": metric.top1, f"top5_{metric.label}": metric.top5,
                    f"loss_{metric.label}": metric.loss}
        self.history.append(row)
        self.epoch, self.images, self.losses = self.epoch + 1, 0, {}
        self.loss_updates = {}
        return row

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raise ValueError where a run cannot go on with this frozen backbone, or an epoch that was begun with other
        batches or data cannot be finished with these."""
        before = state.get("backbone", "")
        if bool(before) != bool(self.backbone):
            which = "a teacher or a frozen backbone, and this run has none" if before else (
                "neither a teacher nor a frozen backbone, and this run has one")
            raise ValueError(f"the checkpoint is of a run with {which}; resume with what the run began with")
        if before != self.backbone:
            raise ValueError("the checkpoint is of a run with a teacher or a frozen backbone, which had other weights"
                             " than this one; resume with the model, the teacher and the pretrained weights that the"
                             " run began with")
        names = state.get("class_names")
        if names and self.class_names and names != self.class_names:
            raise ValueError(f"the checkpoint is of a run on {listed(names, self.class_names)}, and the images have"
                             f" {listed(self.class_names, names)}; resume with the classes that the run began with")
        if state.get("drawn_from") and self.drawn_from and state["drawn_from"] != self.drawn_from:
            raise ValueError("the images have other names, labels or numbers than when the run began, so that others"
                             " would be left out for validation, and the run was trained on most of these; resume with"
                             " the images as they were, or start a new run")
        if state["images"] and state.get("draws") != DRAWS:
            raise ValueError("the checkpoint stands in the middle of an epoch whose images an older version of"
                             " timm-selfdistill ordered in another way; resume from one at the end of an epoch")
        saved, own = ((place["global_batch"], place["epoch_images"]) for place in (state, vars(self)))
        if state["images"] and saved != own:
            raise ValueError(
                f"the checkpoint stands in the middle of an epoch of {saved[1]} images in batches of {saved[0]}"
                f" (batch_size times processes), this run has {own[1]} in batches of {own[0]}; resume with the same"
            )
        own_names = self.class_names or names or []
        vars(self).update(
            state, global_batch=own[0], epoch_images=own[1], draws=DRAWS, class_names=own_names)


def diverged(what: str, newest: Path | None) -> FloatingPointError:
    """The error of a run that cannot go on.

    Args:
        newest: checkpoint.
    """
    kept = f"{newest} stays" if newest else "there was no checkpoint yet"
    return FloatingPointError(
        f"{what}; {kept}; try a lower lr, clip_grad, or bfloat16 instead of float16")
