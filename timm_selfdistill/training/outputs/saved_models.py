"""best/ and last/ of a run: saved models, with a record of how they were trained."""

import platform
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from ... import hub
from ...hub import ExitRow, TrainingRecord
from ...hub.replace import finish_replacing, replacing_files
from ...model import SelfDistillModel
from ...truncated import TruncatedModel
from ...version import __version__
from ..config import TrainConfig
from ..data.labels import is_labelled
from ..data.loaders import image_count
from ..data.streams import RunImages
from ..runtime.accelerator import device_name
from ..state.checkpoint import UNWRITABLE, warn_unwritten
from .metrics import ExitMetrics, exit_costs, merge_rows, model_name, with_speedups
from .run_directory import RunSummary, Unlabelled, write_json

PRIVATE_SETTINGS = {"output", "resume", "data_dir", "initial_checkpoint", "pretrained_path"}
"""Settings that are local paths, which are left out of files that may be published."""
EpochMetrics = tuple[int, list[ExitMetrics]]
PACKAGES = ("torch", "timm", "accelerate", "datasets", "huggingface-hub")


def network_args(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `timm.create_model` in the settings that cannot be read back from the model."""
    own = {name: settings[name] for name in ("bn_momentum", "bn_eps") if settings.get(name) is not None}
    return own | (settings.get("model_kwargs") or {})


class SavedModels:
    """Saves the models of a run, from its main process.

    Args:
        val_data: validation dataset. Its attributes `source` (see `ImageSplits`) and `data_config` (how its images are
            read) are recorded if it has them.
        input_size: (channels, height, width) of the validation images.
    """

    def __init__(
        self,
        output: Path,
        config: TrainConfig,
        accelerator: Accelerator,
        train_data: RunImages,
        val_data: RunImages,
        input_size: tuple[int, int, int],
    ):
        self.output, self.input_size = output, input_size
        self.data_config = {**(getattr(val_data, "data_config", None) or {}), "input_size": input_size}
        self.unsaved: dict[str, int] = {}
        """Names of models that could not be written, and their epochs."""
        self.costs: list[ExitRow] = []
        counts = [image_count(train_data), image_count(val_data)]
        self.images = [] if None in counts else [count for count in counts if count is not None]
        """Numbers of training and validation images; empty if a stream's length is unknown."""
        self.val_images = 0
        """Number of images behind the metrics."""
        source = getattr(val_data, "source", None)
        described = isinstance(source, dict) and {"name", "type", "split"} <= source.keys()
        self.val_labelled = is_labelled(val_data)
        self.reference: Unlabelled = {} if self.val_labelled else {"reference": "deepest"}
        self.model_args = network_args(config.settings)
        self.license = config.hub_license or _initial_license(config.settings)
        self.facts: TrainingRecord = {
            "dataset": source if described else None,
            **self.reference,
            "settings": {
                key: value
                for key, value in config.to_dict().items()
                if key not in PRIVATE_SETTINGS and not _has_path(value)
            },
            "versions": {
                "timm-selfdistill": __version__,
                "Python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "hardware": f"{accelerator.num_processes} x {device_name(accelerator.device)}",
        }

    def take_over(self, run: Path, epoch: int) -> bool:
        """Copy the best model of a run that is resumed in another directory.

        Returns:
            Whether there is a best/ from an epoch up to the checkpoint. After resuming from an older checkpoint it may
            be from a later epoch, which will be repeated.
        """
        best, other = self.output / "best", run / "best"
        if not best.exists() and other.is_dir() and _epoch_of(other) <= epoch:
            finish_replacing(other)
            with replacing_files(best) as fresh:
                for path in other.iterdir():
                    if path.is_file():
                        shutil.copyfile(path, fresh / path.name)  # not the mode, which may be read-only
        return best.exists() and _epoch_of(best) <= epoch

    @property
    def best_epoch(self) -> int:
        """Epoch of the best model, from 1; 0 if not recorded."""
        return _epoch_of(self.output / "best")

    def save(
        self, name: str, model: nn.Module, epoch: int, metrics: list[ExitMetrics] | None, required: bool = False
    ) -> bool:
        """Save a model under its name, without its plot.

        The first model, which has no metrics, is loaded again as a check. If a later one cannot be written, e.g.
        because the disk is full, a warning is issued, the earlier model stays and the run continues.

        Args:
            required: raise instead, as for the first model; used at the end of a run.

        Returns:
            Whether the model was saved.
        """
        folder, first = self.output / name, metrics is None
        record = self._record(model, epoch, metrics)
        try:
            if isinstance(model, (SelfDistillModel, TruncatedModel)):
                model.save_pretrained(folder, metrics=record, check=first, picture=False, data_config=self.data_config)
            elif hasattr(model, "pretrained_cfg"):
                hub.save_timm_model(
                    model,
                    folder,
                    metrics=record,
                    rows=record["exits"],
                    check=first,
                    picture=False,
                    data_config=self.data_config,
                    model_args=self.model_args,
                )
            else:
                hub.save_weights(model, folder)
        except UNWRITABLE as error:
            if first or required:
                raise
            self.unsaved[name] = epoch
            warn_unwritten(folder, error)
            return False
        self.unsaved.pop(name, None)
        return True

    def save_missing(self, model: nn.Module, epoch: int, metrics: list[ExitMetrics]) -> list[str]:
        """At the end of a run, save models that are missing: they could not be written before, or the run was resumed
        in another directory.

        Returns:
            The names of the models.

        Raises:
            OSError, SafetensorError: a model still cannot be written.
        """
        missing = [
            name for name in ("last", "best") if not (self.output / name).exists() or self.unsaved.get(name) == epoch
        ]
        for name in missing:
            self.save(name, model, epoch, metrics, required=True)
        return missing

    def _record(self, model: nn.Module, epoch: int, metrics: list[ExitMetrics] | None) -> TrainingRecord:
        """Return what is recorded about a model; before training, costs without metrics."""
        self.costs = self.costs or exit_costs(model, self.input_size)
        record: TrainingRecord = {"exits": self.costs, **self._origin(model), **self.facts}
        if getattr(model, "freeze_backbone", False):
            record["frozen"] = True
        if self.images:
            record["images"] = self.images
        if metrics is not None:
            record |= {"epoch": epoch, "exits": merge_rows(metrics, self.costs)}
            if record["dataset"]:
                record["dataset"] = record["dataset"] | {"images": self.val_images}
        return record

    def summarize(self, model: nn.Module, best: EpochMetrics, last: EpochMetrics) -> RunSummary:
        """Measure the speed-up of every exit at the end of the run, write summary.json and exits.png of the best model,
        and record the speed-ups in the saved models.

        Args:
            best, last: the epoch, from 1, and its metrics.
        """
        costs = with_speedups(model, self.costs or exit_costs(model, self.input_size), self.input_size)
        rows = {epoch: merge_rows(metrics, costs) for epoch, metrics in (best, last)}
        summary: RunSummary = {
            "model": model_name(model),
            "epoch": best[0],
            "epochs": last[0],
            "input_size": list(self.input_size),
            **self.reference,
            "exits": rows[best[0]],
            "last": {"epoch": last[0], "exits": rows[last[0]]},
        }
        write_json(self.output / "summary.json", summary)
        picture = self.output / hub.PICTURE
        hub.plot_exits(
            picture, summary["model"], summary["exits"], agreement=not self.val_labelled, images=self.val_images
        )
        for folder, record in self._records():
            record |= {"exits": [row | cost for row, cost in zip(record["exits"], costs, strict=True)]}
            hub.save_metrics(folder, record, picture if record["exits"] == summary["exits"] else None)
        return summary

    def draw_missing(self) -> None:
        """Draw exits.png for saved models that have none yet."""
        for folder, record in self._records():
            if (folder / hub.PICTURE).exists():
                continue
            try:
                hub.save_metrics(folder, record)
            except UNWRITABLE as error:
                warn_unwritten(folder, error)

    def _records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield folder and record of each saved model that has a record."""
        for folder in (self.output / "best", self.output / "last"):
            if record := hub.read_metrics(folder):
                yield folder, record

    def _origin(self, model: nn.Module) -> TrainingRecord:
        """Return the license and the weights that training started from, as far as they are known."""
        backbone = model.backbone if isinstance(model, SelfDistillModel) else model
        pretrained = self.facts["settings"].get("pretrained")
        base_model = getattr(backbone, "pretrained_cfg", {}).get("hf_hub_id") if pretrained else None
        origin: TrainingRecord = {}
        if base_model:
            origin["base_model"] = base_model
        if self.license:
            origin["license"] = self.license
        return origin


def _initial_license(settings: Mapping[str, Any]) -> str | None:
    """Return the license of the weights that training started from; None if timm's pretrained weights define it."""
    if settings.get("initial_checkpoint") or settings.get("pretrained_path"):
        return "unknown"
    return "apache-2.0" if settings.get("pretrained") is False else None


def _epoch_of(folder: Path) -> int:
    """Return the epoch of a saved model; 0 if not recorded."""
    return (hub.read_metrics(folder) or {}).get("epoch", 0)


def _has_path(value: Any) -> bool:
    """Whether a setting contains a local path, which should not be published."""
    if isinstance(value, dict):
        return any(map(_has_path, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_path, value))
    value = str(value)
    named = value in (".", "..") or value.startswith(("/", "~", "./", "../", "local-dir:"))
    return named or "\\" in value or ("/" in value and Path(value).exists())
