"""Agreement: which exits err on the same images."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from ..cost import evaluating
from ..inference.labelled import check_finite, labelled_batches
from ..pictures import create_figure
from .exits import need_exits

Matrix = list[list[float | None]]
"""A row and a column per exit, shallow to deep."""


@dataclass
class AgreementReport:
    """How the answers of the C exits go together. All shares are 0 to 1.

    Examples:
        >>> import torch
        >>> from timm_selfdistill.analysis import compare_answers
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> answers = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 0]])  # of two exits

        >>> report = compare_answers(answers, labels)
        >>> report.top1, report.any_right, report.same_answer[0][1]
        ([50.0, 75.0], 75.0, 0.75)
    """

    exits: list[str]
    """Names of their modules."""
    images: int
    top1: list[float]
    """Of each exit, per cent."""
    same_answer: Matrix
    """Share of the images to which both exits say the same class, right or wrong."""
    both_wrong: Matrix
    """Share of the images on which both err; the diagonal is the error of each exit."""
    error_overlap: Matrix
    """Images on which both err over those on which at least one errs (Jaccard index); None where none errs."""
    error_kappa: Matrix
    """Cohen's kappa of right and wrong, "error consistency" (arXiv:2006.16736): 1 where both err on the same images, 0
    where no more often than by chance at their accuracies; None where chance alone makes them agree."""
    overthought: list[list[int]]
    """For each shallow exit the positions of the images that it gets right and the deepest exit wrong, in the order of
    the loader (arXiv:1810.07052 calls it overthinking)."""
    any_right: float
    """Per cent of the images that at least one exit gets right."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Table:
        table = Table(
            title=f"exits on {self.images} images",
            title_justify="left",
            caption_justify="left",
            caption=f"at least one exit is right on {self.any_right:.2f} %; overthought: right here, wrong at the"
            " deepest; same answer, same errors (Jaccard) and their kappa: with the deepest",
        )
        for name in ("exit", "stage", "top-1 %", "overthought", "same answer", "same errors", "kappa"):
            table.add_column(name, justify="left" if name in ("exit", "stage") else "right")
        for exit, name in enumerate(self.exits):
            shallow = exit < len(self.overthought)
            table.add_row(
                str(exit),
                name,
                f"{self.top1[exit]:.2f}",
                f"{len(self.overthought[exit]) / self.images:.2%}" if shallow else "",
                *(
                    _number(matrix[exit][-1]) if shallow else ""
                    for matrix in (self.same_answer, self.error_overlap, self.error_kappa)
                ),
            )
        return table


def measure_agreement(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> AgreementReport:
    """Compare the answers of all exits, in eval mode, with one forward pass over the images.

    Args:
        model: a `SelfDistillModel`.
        loader: gives (images (B, C, H, W), class indices (B,)), in a fixed order if positions are to mean anything.

    Raises:
        ValueError: the model has no exits, the loader gives no images, labels are missing or out of range, or logits
            are no finite numbers.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import wrap_self_distill
        >>> from timm_selfdistill.analysis import measure_agreement
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).eval()
        >>> loader = [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))]
        >>> report = measure_agreement(model, loader)
        >>> report.exits, report.images
        (['layer1', 'layer2', 'layer3', 'layer4'], 32)
    """
    model = need_exits(model, "agreement")
    answers, labels = [], []
    with evaluating(model), torch.no_grad():
        for x, y in labelled_batches(model, loader):
            logits = model.forward_exits(x, with_features=False).logits
            check_finite(logits)
            answers.append(torch.stack([part.argmax(1) for part in logits]).cpu())
            labels.append(y.cpu())
    return compare_answers(torch.cat(answers, 1), torch.cat(labels), list(model.exits))


def compare_answers(answers: Tensor, labels: Tensor, exits: list[str] | None = None) -> AgreementReport:
    """Compare answers that are at hand.

    Args:
        answers: the class that each exit says, (C, N), shallow to deep.
        labels: (N,).
        exits: names of the exits; None numbers them.

    Raises:
        ValueError: the shapes do not fit, or there is no image.

    Examples:
        >>> import torch
        >>> from timm_selfdistill.analysis import compare_answers
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> answers = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 0]])  # of two exits

        >>> compare_answers(answers, labels, exits=["layer2", "layer4"]).error_overlap[0][1]
        0.5
    """
    if answers.ndim != 2 or labels.shape != answers.shape[1:] or not labels.numel():
        raise ValueError(
            f"expected answers (C, N) and labels (N,), N >= 1, got {tuple(answers.shape)} and {tuple(labels.shape)}"
        )
    wrong = (answers != labels).double()
    same_answer = (answers[:, None] == answers[None]).double().mean(2)
    both_wrong = wrong @ wrong.T / len(labels)
    error = both_wrong.diagonal()
    either_wrong = error[:, None] + error - both_wrong
    agree = 1 - error[:, None] - error + 2 * both_wrong
    chance = torch.outer(error, error) + torch.outer(1 - error, 1 - error)
    overthought = [((row == 0) & (wrong[-1] == 1)).nonzero()[:, 0].tolist() for row in wrong[:-1]]
    return AgreementReport(
        exits=exits or [str(exit) for exit in range(len(answers))],
        images=len(labels),
        top1=(100 * (1 - error)).tolist(),
        same_answer=same_answer.tolist(),
        both_wrong=both_wrong.tolist(),
        error_overlap=_ratio(both_wrong, either_wrong),
        error_kappa=_ratio(agree - chance, 1 - chance),
        overthought=overthought,
        any_right=100 * float((wrong.sum(0) < len(wrong)).double().mean()),
    )


def plot_agreement(path: str | Path, report: AgreementReport) -> None:
    """Draw heat maps of the same answers, of errors in common and of their kappa, each on a scale of its own.

    Examples:
        >>> import torch
        >>> from timm_selfdistill.analysis import compare_answers, plot_agreement
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> answers = torch.tensor([[0, 1, 0, 0], [0, 1, 2, 0]])  # of two exits

        >>> plot_agreement("agreement.png", compare_answers(answers, labels))
    """
    figure = create_figure(8.4, 3.6)
    figure.set_layout_engine("constrained")
    panels = (
        ("same answer", report.same_answer),
        ("errors in common (Jaccard)", report.error_overlap),
        ("errors beyond chance (kappa)", report.error_kappa),
    )
    names = [f"exit {exit}\n{top1:.1f} %" for exit, top1 in enumerate(report.top1)]
    for axes, (title, matrix) in zip(figure.subplots(1, 3), panels):
        lowest = min([0.9, *(value for row in matrix for value in row if value is not None)])
        values = [[lowest if value is None else value for value in row] for row in matrix]
        axes.imshow(values, cmap="Blues", vmin=lowest, vmax=1)
        for row, line in enumerate(matrix):
            for column, value in enumerate(line):
                axes.text(
                    column,
                    row,
                    _number(value),
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if values[row][column] > 0.4 * lowest + 0.6 else "black",
                )
        axes.set(title=title, xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
        axes.tick_params(length=0, labelsize=8)
        axes.title.set_fontsize(10)
    figure.suptitle(f"agreement of the exits on {report.images:,} images; below each exit its top-1", fontsize=11)
    figure.savefig(path, dpi=120)


def _ratio(values: Tensor, others: Tensor) -> Matrix:
    """values / others, None where that would divide by zero."""
    return [
        [value / other if other > 1e-12 else None for value, other in zip(*rows)]
        for rows in zip(values.tolist(), others.tolist())
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
