"""Gradients: how much of the loss reaches each section of the backbone ("Be Your Own Teacher", arXiv:1905.08094,
"vanishing gradients")."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..cost import evaluating
from ..inference.labelled import labelled_batches
from ..model import SelfDistillModel
from ..pictures import SERIES, create_figure, finish
from ..stages import select_stages
from ..timm_model import TimmModel, as_timm


@dataclass
class GradientReport:
    """Mean absolute gradient of the weights of each section, shallow to deep.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_gradients
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_gradients(task, loader)
        >>> len(report.gradients), report.batches, report.batch_size
        (4, 1, 32)
    """

    sections: list[str]
    """Names of the modules that end them."""
    gradients: list[float | None]
    """Mean over the elements of a section's weights, and over the batches; None where none of them learns."""
    weights: list[int]
    """Elements in each section that learn."""
    loss: float
    """Mean over the batches."""
    batches: int
    images: int
    batch_size: int
    """On which the gradients hang."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(
            title=f"loss {self.loss:.4f}, {self.batches} batches of {self.batch_size} images", title_justify="left"
        )
        for name in ("stage", "weights", "mean |gradient|"):
            table.add_column(name, justify="left" if name == "stage" else "right")
        for name, count, value in zip(self.sections, self.weights, self.gradients):
            table.add_row(f"to {name}", f"{count:,}", "-" if value is None else f"{value:.3e}")
        return table


def measure_gradients(
    task: TrainingTask,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    exits: Sequence[int | str] | None = None,
) -> GradientReport:
    """Mean absolute gradient of each section of the backbone, at the weights as they are, in training mode.

    A section is what lies between one exit and the next; its weights are those of convolutions and fully connected
    layers, without the classifier's. The gradient is that of each batch's loss, as in a training step, so it falls with
    the size of the batches; those that are smaller than the first, such as a short last one, are left out, as in
    training. Nothing of the task changes: weights, gradients, buffers and random states are as before, and it may be
    called once an epoch from a training loop.

    Args:
        task: a `SelfDistillTask`, `timm.task.ClassificationTask(model, torch.nn.CrossEntropyLoss())`, or any other of a
            timm model; where two networks learn, as in `MutualLearningTask`, that of the student is measured.
        loader: gives (images (B, C, H, W), class indices (B,)).
        exits: that end the sections, as of `wrap_self_distill`. None are the model's own; of a plain network those that
            `wrap_self_distill` would choose.

    Raises:
        TypeError: `task` is no `TrainingTask`.
        ValueError: the loader gives no images, labels are missing or out of range, the loss is no finite number,
            or the backbone is frozen, or nothing in it learns.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_gradients
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_gradients(task, loader)
        >>> all(value > 0 for value in report.gradients)
        True
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(
            f"expected a timm.task.TrainingTask, got {type(task).__name__}; give SelfDistillTask(model), or of a plain"
            " network timm.task.ClassificationTask(model, torch.nn.CrossEntropyLoss())"
        )
    model = unwrap_model(task.get_eval_model())
    if isinstance(model, SelfDistillModel) and model.freeze_backbone:
        raise ValueError("the model was trained with a frozen backbone, whose weights get no gradients")
    sections: dict[str, list[Tensor]] = {}
    sums = torch.zeros((), dtype=torch.double)
    losses: list[float] = []
    images, batch_size = 0, 0
    with training_for_a_while(task):
        for x, y in labelled_batches(model, loader):
            if not sections:
                sections, batch_size = find_sections(model, x[:1], exits), len(x)
            if len(x) < batch_size:
                continue
            loss = task(x, y.to(x.device))["loss"]
            if not loss.isfinite():
                raise ValueError(
                    f"the loss is {float(loss.detach())}, no finite number; the weights or the images are damaged"
                )
            sums = sums + torch.tensor(section_gradients(loss, sections.values()), dtype=torch.double)
            losses.append(float(loss.detach()))
            images += len(x)
    counts = [sum(weight.numel() for weight in weights) for weights in sections.values()]
    means = [value / len(losses) if count else None for value, count in zip(sums.tolist(), counts)]
    return GradientReport(list(sections), means, counts, sum(losses) / len(losses), len(losses), images, batch_size)


def section_gradients(loss: Tensor, sections: Iterable[Sequence[Tensor]]) -> list[float]:
    """Mean absolute gradient of a loss over the elements of each section's weights; 0 where there are none.

    The weights' own gradients stay as they are, and so does the graph of the loss.

    Examples:
        >>> import torch
        >>> from timm_selfdistill.analysis import section_gradients
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> section_gradients((3 * weight).sum(), [[weight]])
        [3.0]
    """
    sections = list(sections)
    gradients = iter(
        torch.autograd.grad(
            loss, [weight for weights in sections for weight in weights], retain_graph=True, allow_unused=True
        )
    )
    means = []
    for weights in sections:
        found = [gradient for _ in weights if (gradient := next(gradients)) is not None]
        total = sum((gradient.abs().sum(dtype=torch.float32) for gradient in found), start=loss.new_zeros(()).float())
        means.append(total / max(1, sum(weight.numel() for weight in weights)))
    return torch.stack(means).tolist()  # waits for a GPU once


def find_sections(model: nn.Module, x: Tensor, exits: Sequence[int | str] | None = None) -> dict[str, list[Tensor]]:
    """The weights that learn in each section of a backbone, by the name of the module that ends it.

    Which weights a feature map needs is read from autograd, whatever the order in which a network registers its layers.

    Args:
        x: an image (1, C, H, W).
        exits: see `measure_gradients`.

    Raises:
        ValueError: nothing learns.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill.analysis import find_sections
        >>> backbone = timm.create_model("test_resnet", num_classes=10)
        >>> list(find_sections(backbone, torch.randn(1, 3, 64, 64)))
        ['layer1', 'layer2', 'layer3', 'layer4']
    """
    backbone = as_timm(model)
    if isinstance(model, SelfDistillModel):
        backbone = model.backbone
        exits = [stage.index for stage in model.stages] if exits is None else exits
    stages = select_stages(backbone, exits)
    left = _learning_weights(backbone)
    if not left:
        raise ValueError(
            f"nothing in the backbone {type(backbone).__name__} learns, so it has no gradients;"
            " requires_grad_(True) lets its weights learn"
        )
    sections = {}
    with evaluating(backbone), torch.enable_grad():
        maps = backbone.forward_intermediates(
            x, indices=[stage.index for stage in stages[:-1]], intermediates_only=True
        )
        for stage, feature_map in zip(stages, maps):
            gradients: Sequence[Tensor | None] = [None] * len(left)
            if left and feature_map.requires_grad:
                gradients = torch.autograd.grad(feature_map.sum(), left, retain_graph=True, allow_unused=True)
            sections[stage.name] = [weight for weight, gradient in zip(left, gradients) if gradient is not None]
            left = [weight for weight, gradient in zip(left, gradients) if gradient is None]
    return sections | {stages[-1].name: left}


@contextmanager
def training_for_a_while(task: nn.Module) -> Iterator[None]:
    """Training mode; afterwards every module is in the mode it was in, and buffers and random states are as before."""
    modes = {module: module.training for module in task.modules()}
    buffers = {buffer: buffer.clone() for buffer in task.buffers()}
    devices = {buffer.device for buffer in [*task.parameters(), *buffers] if buffer.is_cuda}
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            task.train()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)


def plot_gradients(path: str | Path, reports: Mapping[str, GradientReport]) -> None:
    """Draw the mean absolute gradient of each section, a line a model.

    Args:
        reports: by the model's name, with sections of the same names.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_gradients, plot_gradients
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> plot_gradients("gradients.png", {"self-distilled": measure_gradients(task, loader)})
    """
    figure = create_figure(7, 4.5)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(name for report in reports.values() for name in report.sections))
    for index, (name, report) in enumerate(reports.items()):
        values = dict(zip(report.sections, report.gradients))
        axes.plot(
            range(len(names)),
            [values.get(section) or float("nan") for section in names],
            marker="o",
            color=SERIES[index % len(SERIES)],
            label=name,
        )
    finish(
        axes,
        xticks=range(len(names)),
        xticklabels=[f"to {name}" for name in names],
        yscale="log",
        ylabel="mean absolute gradient of the weights",
        title="gradients by section of the backbone",
    )
    axes.legend(fontsize=10)
    figure.savefig(path, dpi=120)


def plot_gradient_history(
    path: str | Path,
    histories: Mapping[str, Sequence[GradientReport]],
    updates: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Draw the mean absolute gradient over training, a panel a section, a line a model.

    Args:
        histories: by the model's name, reports with sections of the same names.
        updates: by the model's name, how many updates had been made at each report; None: there is one an epoch.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_gradients, plot_gradient_history
        >>> task = SelfDistillTask(wrap_self_distill(timm.create_model("test_resnet", num_classes=10)))
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> history = [measure_gradients(task, loader) for epoch in range(2)]
        >>> plot_gradient_history("gradient_history.png", {"self-distilled": history})
    """
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for history in histories.values() for name in history[0].sections))
    figure = create_figure(max(4, 2.1 * len(names)), 3.6)
    figure.set_layout_engine("constrained")
    for axes, section in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        for index, (name, history) in enumerate(histories.items()):
            if section in history[0].sections:
                place = history[0].sections.index(section)
                axes.plot(
                    updates[name] if updates else range(1, len(history) + 1),
                    [report.gradients[place] or float("nan") for report in history],
                    marker=".",
                    color=SERIES[index % len(SERIES)],
                    label=name,
                )
        finish(axes, title=f"to {section}", xlabel="updates" if updates else "epoch", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    figure.axes[0].set_ylabel("mean absolute gradient")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10)
    figure.savefig(path, dpi=120)


def _learning_weights(backbone: TimmModel) -> list[Tensor]:
    """Of convolutions and fully connected layers, without the classifier."""
    classifier = backbone.get_classifier()
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    skipped = {id(p) for part in parts if isinstance(part, nn.Module) for p in part.parameters()}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights = [module.weight for module in backbone.modules() if isinstance(module, kinds)]
    return [weight for weight in dict.fromkeys(weights) if weight.requires_grad and id(weight) not in skipped]
