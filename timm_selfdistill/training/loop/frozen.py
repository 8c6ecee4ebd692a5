"""Runs with a frozen backbone, and the cache of its features."""

import shutil
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.task import TrainingTask
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from ...loss import SelfDistillLoss
from ...mapped_file import TensorFile, create_files
from ...output import BackboneOutput
from ...task import FrozenBackbone, FrozenBackboneTask, SelfDistillTask, eval_model
from ..config import TrainConfig
from ..data.labels import is_labelled
from ..data.loaders import end_workers, known_batch_size, loader_settings
from ..data.sampling import Draw, IndexedImages, TrainImages
from ..data.streams import RunImages
from ..runtime.accelerator import ask_main_process
from ..runtime.interrupt import InterruptRequest
from ..runtime.progress import ProgressReporter
from .update import Updater

IMAGES_READ = 16
"""Number of images read twice to detect augmentation."""


def learns_in_parts(task: TrainingTask, config: TrainConfig) -> bool:
    """Whether trainable parameters are without gradients, always or in some epochs: during `head_warmup_epochs`, or if
    without labels and with alpha=0 only the hint trains."""
    features_alone = config.unlabelled and isinstance(task, SelfDistillTask) and not task.criterion.alpha
    return config.head_warmup_epochs > 0 or features_alone


def check_frozen_settings(task: TrainingTask, config: TrainConfig, train_data: RunImages, val_data: RunImages) -> None:
    """Check the settings of runs with a frozen backbone.

    Raises:
        ValueError: a setting needs a frozen backbone and there is none, or there is nothing to train or to learn from.
        TypeError: the task does not train the exits of a frozen backbone.
    """
    frozen = getattr(eval_model(task), "freeze_backbone", False)
    for name, reason in (
        ("unlabelled", "since only such a backbone can teach without labels"),
        ("cache_features", "since otherwise features change in every epoch"),
    ):
        flag = f"{name} (--{name.replace('_', '-')})"
        if getattr(config, name) and not frozen:
            raise ValueError(
                f"{flag} needs a model with a frozen backbone, {reason};"
                " use wrap_self_distill(model, freeze_backbone=True) (--freeze-backbone)"
            )
        if getattr(config, name) and not isinstance(task, FrozenBackboneTask):
            raise TypeError(
                f"{flag} needs a SelfDistillTask, which trains the exits on the deepest exit's output;"
                f" {type(task).__name__} trains the whole network on labels"
            )
    if frozen and not config.head_lr_scale:
        raise ValueError(
            "the backbone is frozen and head_lr_scale is 0: nothing would be trained; leave one of them out"
        )
    if config.cache_features:
        _check_unchanging(train_data, val_data)
    if config.unlabelled and isinstance(task, FrozenBackboneTask):
        _check_teaching(task.criterion)
    elif not is_labelled(train_data):
        raise ValueError(
            "the training images have no labels; give images with labels, or with a frozen backbone set"
            " unlabelled=True (--unlabelled)"
        )


def _check_teaching(loss: SelfDistillLoss) -> None:
    if loss.teacher != "deepest":
        raise ValueError(f'unlabelled needs the teacher "deepest", since teacher {loss.teacher!r} learns from labels')
    if not loss.alpha and (not loss.beta or loss.hint is None):
        raise ValueError("without labels, alpha=0 and no hint there is nothing to learn from; set alpha, beta or hint")
    if not loss.alpha:
        warnings.warn(
            "with alpha=0 and no labels only the features of the exits are trained, not their classifiers",
            stacklevel=2,
        )


def _check_unchanging(train_data: RunImages, val_data: RunImages) -> None:
    """Raise ValueError for images whose features cannot be cached: streamed ones, or augmented ones, which is taken
    from the dataset or tested on some images."""
    if isinstance(train_data, IterableDataset) or isinstance(val_data, IterableDataset):
        raise ValueError(
            "cache_features does not work with streaming, where images have no index; leave out streaming or"
            " cache_features"
        )
    augmented = getattr(train_data, "augmented", None)
    if augmented is None:
        step = -(-len(train_data) // IMAGES_READ)
        augmented = not all(
            torch.equal(*(TrainImages(train_data, "raise")[Draw(seed, index)][0] for seed in range(2)))
            for index in range(0, len(train_data), step)
        )
    if augmented:
        raise ValueError(
            "cache_features stores the features of each image once, but the training images are augmented and differ"
            " each time they are read; create them with no_aug=True (--no-aug)"
        )


FOLDER = ".features"
"""Folder of the cached features in the run directory."""


class FeatureCache(Dataset):
    """Dataset of (BackboneOutput, label) for each image; until it is filled, of the images themselves.

    Args:
        data: map-style dataset of (image (C, H, W), label).
        full_precision: compute features without mixed precision, as in validation.
    """

    def __init__(self, data: IndexedImages, full_precision: bool = False):
        self.data, self.full_precision = data, full_precision
        self.files: list[TensorFile] = []
        self.tensors: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.data)

    @property
    def is_filled(self) -> bool:
        return bool(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not self.is_filled:
            return self.data[index]
        if not self.tensors:
            self.tensors = [file.open() for file in self.files]
        *maps, logits, label = (tensor[index] for tensor in self.tensors)
        return BackboneOutput(tuple(maps), logits), label

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a DataLoader worker, which maps the files itself."""
        return {**vars(self), "tensors": []}

    def plan(self, update: Updater, frozen: FrozenBackbone, folder: Path) -> list[TensorFile]:
        """Return the files to be filled, with shapes and dtypes found by running the first image."""
        first = self._compute(update, frozen, *default_collate([self.data[0]]))
        return [
            TensorFile(str(folder / f"{index}.bin"), len(self), tuple(value.shape[1:]), value.dtype)
            for index, value in enumerate(first)
        ]

    def fill(
        self,
        update: Updater,
        frozen: FrozenBackbone,
        files: list[TensorFile],
        config: TrainConfig,
        progress: ProgressReporter,
        interrupt: InterruptRequest,
    ) -> None:
        """Run the backbone over the images, unless the processes agree to stop. Call it on every process; each computes
        a part."""
        rank, world = update.accelerator.process_index, update.accelerator.num_processes
        settings = loader_settings(config, update.accelerator) | {"persistent_workers": False}
        batch_size = known_batch_size(config)
        part = Subset(self, range(rank, len(self), world))  # not filled yet, so it returns images
        loader = DataLoader(part, batch_size, **settings)
        tensors, begin, batches = [file.open() for file in files], rank, iter(loader)
        try:
            for step in range(-(-len(self) // (world * batch_size))):
                batch = next(batches, None)  # None at the last step if only other processes have images left
                if batch is not None:
                    for tensor, value in zip(tensors, self._compute(update, frozen, *batch)):
                        tensor[begin::world][: len(value)] = value
                    begin += world * len(batch[0])
                progress.count("features of", min(begin, len(self)), len(self))
                interrupt.agree(step)
                if interrupt.agreed:
                    return
        finally:
            end_workers(batches)
        update.accelerator.wait_for_everyone()
        self.files, self.tensors = files, tensors

    def empty(self) -> None:
        self.files, self.tensors = [], []

    @torch.no_grad()
    def _compute(self, update: Updater, frozen: FrozenBackbone, x: Tensor, label: Tensor) -> list[Tensor]:
        x, _ = update.to_device(x, label)
        with nullcontext() if self.full_precision else update.accelerator.autocast():
            maps, logits = frozen(x)
        return [*(value.cpu() for value in (*maps, logits)), label]


def create_caches(config: TrainConfig, train_data: RunImages, val_data: RunImages) -> list[FeatureCache]:
    """Create the caches for training and validation images; an empty list without `cache_features`, or for streams,
    which `check_frozen_settings` has refused."""
    if not config.cache_features or isinstance(train_data, IterableDataset) or isinstance(val_data, IterableDataset):
        return []
    return [FeatureCache(train_data), FeatureCache(val_data, full_precision=True)]


def fill_caches(
    caches: list[FeatureCache],
    update: Updater,
    output: Path,
    config: TrainConfig,
    progress: ProgressReporter,
    interrupt: InterruptRequest,
) -> None:
    """Fill the caches, unless all processes agree to stop. The files are in the run directory, which every process must
    be able to access.

    Raises:
        OSError: there is not enough disk space.
    """
    task = update.task
    if not caches or not isinstance(task, FrozenBackboneTask):
        return
    folder = output / FOLDER
    plans = [cache.plan(update, task.frozen, folder / name) for cache, name in zip(caches, ("train", "val"))]
    files = list(chain(*plans))
    remedy = "leave out cache_features, or use another output, fewer images or a smaller image size"
    ask_main_process(update.accelerator, partial(create_files, folder, files, "the features of the images", remedy))
    progress.say(
        f"caching the features of {sum(map(len, caches)):,} images:"
        f" {sum(file.bytes for file in files) / 1e6:,.0f} MB in {folder}, removed at the end of the run"
    )
    for cache, plan in zip(caches, plans):
        if not interrupt.agreed:
            cache.fill(update, task.frozen, plan, config, progress, interrupt)
    progress.restart_clock()


def drop_caches(caches: list[FeatureCache], output: Path, accelerator: Accelerator) -> None:
    """Empty the caches and remove their files at the end of a run."""
    for cache in caches:
        cache.empty()
    if caches and accelerator.is_main_process:
        remove_features(output)


def remove_features(output: Path) -> None:
    """Remove the files, including those left by a killed run."""
    shutil.rmtree(output / FOLDER, ignore_errors=True)
