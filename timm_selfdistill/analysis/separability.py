"""Separability: how well the features in front of each classifier tell the classes apart ("Be Your Own Teacher",
arXiv:1905.08094, "more discriminating features")."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..cost import evaluating
from ..inference.labelled import check_finite, labelled_batches
from ..model import SelfDistillModel
from ..pictures import SERIES, create_figure
from .exits import need_exits

CLASSES_DRAWN = 10
IMAGES_DRAWN = 100
"""Of each class, in the picture."""


@dataclass
class ExitSeparability:
    exit: int
    module: str
    dims: int
    """D, of the feature."""
    sse: float
    """Sum of squared distances of the features to the mean of their class."""
    ssb: float
    """Sum of squared distances of the means of the classes to the mean of all, each times its number of images."""

    @property
    def ratio(self) -> float | None:
        """SSE / SSB: lower tells classes apart better. None where all classes have the same mean."""
        return self.sse / self.ssb if self.ssb > 0 else None


@dataclass
class SeparabilityReport:
    """Sums of squares of the features in front of each classifier.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_separability
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_separability(model, loader)
        >>> [(row.exit, row.module) for row in report.rows]
        [(0, 'layer1'), (1, 'layer2'), (2, 'layer3'), (3, 'layer4')]
    """

    rows: list[ExitSeparability]
    images: int
    classes: int
    """Those that have images."""
    samples: list[Tensor]
    """For the picture: features (M, D) of each exit, of some images of some classes."""
    sample_labels: Tensor
    """(M,)"""

    def to_dict(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "classes": self.classes,
            "exits": [vars(row) | {"ratio": row.ratio} for row in self.rows],
        }

    def __rich__(self) -> Table:
        table = Table(
            title=f"features of {self.images} images of {self.classes} classes",
            title_justify="left",
            caption="SSE within classes, SSB between them; lower SSE / SSB tells them apart better",
            caption_justify="left",
        )
        for name in ("exit", "stage", "dimensions", "SSE", "SSB", "SSE / SSB"):
            table.add_column(name, justify="left" if name in ("exit", "stage") else "right")
        for row in self.rows:
            table.add_row(str(row.exit), row.module, str(row.dims), f"{row.sse:,.2f}", f"{row.ssb:,.2f}", _ratio(row))
        return table


class ClassSums:
    """Counts, sums and sums of squares of features by class, in one pass.

    They are kept in float64 of features less the mean of the first batch: squares of features that lie far from zero
    would cancel.

    Args:
        classes: K.
    """

    def __init__(self, classes: int):
        self.count = torch.zeros(classes, dtype=torch.double)
        self.sums = torch.zeros(classes, 0, dtype=torch.double)
        """(K, D), once there are features."""
        self.squares = 0.0
        self.shift = torch.zeros(0, dtype=torch.double)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Count features (B, D) of the classes (B,), on the CPU."""
        features = features.double()
        if not self.count.any():
            self.shift = features.mean(0)
            self.sums = torch.zeros(len(self.count), features.shape[1], dtype=torch.double)
        features = features - self.shift
        self.count += torch.bincount(labels, minlength=len(self.count))
        self.sums.index_add_(0, labels, features)
        self.squares += float(features.square().sum())

    def sums_of_squares(self) -> tuple[float, float]:
        """SSE and SSB."""
        seen = self.count > 0
        count, sums = self.count[seen], self.sums[seen]
        of_means = float((sums.square().sum(1) / count).sum())
        of_mean = float(sums.sum(0).square().sum() / count.sum())
        return max(0.0, self.squares - of_means), max(0.0, of_means - of_mean)


def measure_separability(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    classes: Sequence[int] | None = None,
) -> SeparabilityReport:
    """Sums of squares within and between classes at every exit, in eval mode, with one forward pass over the images.

    Features are what the fully connected layer of each classifier is given; where a classifier has none, the spatial
    mean of its feature map.

    Args:
        model: a `SelfDistillModel`.
        loader: gives (images (B, C, H, W), class indices (B,)).
        classes: to draw, see `plot_separability`; None are the first ten.

    Raises:
        ValueError: the model has no exits, the loader gives no images, or those of one class only, or not two of any
            class, or none of a class to draw; labels are missing or out of range, or logits are no finite numbers.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_separability
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_separability(model, loader)
        >>> report.images, all(row.ratio > 0 for row in report.rows)
        (32, True)
    """
    model = need_exits(model, "separability")
    _check_classes(classes, model.num_classes)
    sums = [ClassSums(model.num_classes) for _ in model.exits]
    samples: list[list[Tensor]] = [[] for _ in model.exits]
    sample_labels = []
    room = dict.fromkeys(range(min(CLASSES_DRAWN, model.num_classes)) if classes is None else classes, IMAGES_DRAWN)
    with evaluating(model), torch.no_grad(), classifier_inputs(model) as inputs:
        for x, y in labelled_batches(model, loader):
            output, y = model.forward_exits(x), y.cpu()
            check_finite(output.logits)
            kept = _take(room, y)
            sample_labels.append(y[kept])
            vectors = [_as_vectors(inputs.pop(exit, None), maps) for exit, maps in enumerate(output.features)]
            on_cpu = torch.cat(vectors, 1).cpu()  # waits for a GPU once
            for exit, features in enumerate(on_cpu.split([part.shape[1] for part in vectors], 1)):
                sums[exit].update(features, y)
                samples[exit].append(features[kept].float())
    count = sums[0].count
    _check_counts(count, classes)
    rows = [
        ExitSeparability(exit, name, part.sums.shape[1], *part.sums_of_squares())
        for exit, (name, part) in enumerate(zip(model.exits, sums))
    ]
    return SeparabilityReport(
        rows,
        int(count.sum()),
        int((count > 0).sum()),
        [torch.cat(parts) for parts in samples],
        torch.cat(sample_labels),
    )


@contextmanager
def classifier_inputs(model: SelfDistillModel) -> Iterator[dict[int, Tensor]]:
    """What the last fully connected layer of each exit was given in the last forward pass, by exit."""
    inputs: dict[int, Tensor] = {}
    handles = []
    for exit, classifier in enumerate([*model.heads, model.get_classifier()]):
        parts = classifier.modules() if isinstance(classifier, nn.Module) else ()
        layers = [part for part in parts if isinstance(part, nn.Linear) and part.out_features == model.num_classes]
        if layers:
            handles.append(
                layers[-1].register_forward_pre_hook(lambda _, args, exit=exit: inputs.__setitem__(exit, args[0]))
            )
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def project(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features (M, D) on their two principal axes, (M, 2), and the share of the variance on each, (2,)."""
    centred = (features - features.mean(0)).double()
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    points = torch.zeros(len(features), 2, dtype=torch.double)
    axes = min(2, len(values))
    points[:, :axes] = left[:, :axes] * values[:axes]
    shares = torch.zeros(2, dtype=torch.double)
    shares[:axes] = values[:axes].square() / values.square().sum().clamp(min=1e-30)
    return points, shares


def plot_separability(path: str | Path, report: SeparabilityReport, class_names: Sequence[str] | None = None) -> None:
    """Draw the features of each exit on their two principal axes, a colour a class.

    Args:
        class_names: of all K classes.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_separability, plot_separability
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> plot_separability("separability.png", measure_separability(model, loader))
    """
    columns = min(2, len(report.rows))
    lines = -(-len(report.rows) // columns)
    figure = create_figure(max(4.0, 3.5 * columns), 3.4 * lines + 0.8)
    figure.set_layout_engine("constrained")
    labels, before = report.sample_labels, None
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, row, features in zip(panels, report.rows, report.samples):
        axes.set(title=f"exit {row.exit} ({row.module})\nSSE / SSB {_ratio(row)}", xticks=[], yticks=[])
        if not len(features):
            continue
        points, shares = project(features)
        if before is not None:  # which way an axis points is arbitrary: as nearly as may be that of the exit before
            points = torch.where((points * before).sum(0) < 0, -points, points)
        before = points
        for index, label in enumerate(labels.unique().tolist()):
            name = class_names[label] if class_names else f"class {label}"
            across, up = points[labels == label].T.numpy()
            marker, color = "o^sv"[index // len(SERIES) % 4], SERIES[index % len(SERIES)]
            axes.scatter(across, up, s=9, alpha=0.7, linewidths=0, marker=marker, color=color, label=name)
        axes.set(xlabel=f"first axis, {shares[0]:.0%} of the variance", ylabel=f"second axis, {shares[1]:.0%}")
    for axes in panels:  # of an odd number of exits
        axes.set_visible(False)
    handles, names = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=min(len(names), 4),
            fontsize=10,
            markerscale=2,
            frameon=False,
        )
    figure.savefig(path, dpi=120)


def _as_vectors(given: Tensor | None, feature_map: Tensor) -> Tensor:
    """One vector for each image, (B, D)."""
    return given if given is not None and given.ndim == 2 else feature_map.mean((2, 3))


def _take(room: dict[int, int], labels: Tensor) -> list[int]:
    """Positions of images (B,) of whose class there is room for more in the picture, which is then used up."""
    kept = []
    for position, label in enumerate(labels.tolist() if room else ()):
        if label in room:
            kept.append(position)
            room[label] -= 1
            if not room[label]:
                del room[label]
    return kept


def _check_classes(classes: Sequence[int] | None, num_classes: int) -> None:
    if classes is not None and not (
        classes and all(isinstance(label, int) and 0 <= label < num_classes for label in classes)
    ):
        raise ValueError(f"classes to draw must be class indices from 0 to {num_classes - 1}, got {list(classes)}")


def _check_counts(count: Tensor, classes: Sequence[int] | None) -> None:
    """Raise ValueError for images (K,) of too few classes, or none of one of those to draw."""
    seen = count[count > 0]
    if len(seen) < 2:
        raise ValueError(
            f"all {int(count.sum())} images are of class {int(count.argmax())}; separability needs two or more"
        )
    if not (seen > 1).any():
        raise ValueError(f"each of the {len(seen)} classes has one image; separability needs two images of a class")
    if empty := [label for label in classes or () if not count[label]]:
        raise ValueError(f"classes to draw must have images, {empty} have none; choose others")


def _ratio(row: ExitSeparability) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.3f}"
