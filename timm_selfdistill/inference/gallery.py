"""A picture of which images leave at which exit."""

from pathlib import Path

import torch
from torch import Tensor

from ..pictures import ORANGE, create_figure
from .batch_run import EarlyExitOutput


def choose_images(output: EarlyExitOutput, columns: int) -> dict[int, list[int]]:
    """For each exit that was taken, up to `columns` of the images that left there, evenly spaced from the most to the
    least confident."""
    rows = {}
    for exit in output.exit.unique().tolist():
        members = (output.exit == exit).nonzero()[:, 0]
        members = members[output.confidence[members].argsort(descending=True)]
        steps = torch.linspace(0, len(members) - 1, min(columns, len(members))).round().long()
        rows[exit] = members[steps].tolist()
    return rows


def plot_gallery(
    path: Path,
    images: dict[int, Tensor],
    rows: dict[int, list[int]],
    output: EarlyExitOutput,
    labels: Tensor,
    class_names: list[str],
) -> None:
    """Draw the chosen images, a row an exit, each with the predicted class, and the right one where that is another.

    Args:
        images: (C, H, W) from 0 to 1, by their positions.
        rows: of `choose_images`.
        labels: (N,).
    """
    columns = max(map(len, rows.values()))
    figure = create_figure(1.1 * columns + 0.9, 1.55 * len(rows) + 0.4)
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (exit, row), cells in zip(rows.items(), grid):
        share = float((output.exit == exit).double().mean())
        cells[0].set_ylabel(f"exit {exit}\n{share:.1%} of\nthe images", rotation=0, ha="right", va="center", fontsize=9)
        for cell in cells:
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
        for position, cell in zip(row, cells):
            image = images[position].permute(1, 2, 0)
            cell.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray", vmin=0, vmax=1)
            said, truth = int(output.logits[position].argmax()), int(labels[position])
            text = f"{_short(class_names[said])}\n{output.confidence[position]:.0%}"
            if said != truth:
                text += f", is {_short(class_names[truth])}"
            cell.set_title(text, fontsize=8, color="black" if said == truth else ORANGE)
    figure.suptitle("easy to hard: the surest on the left; wrong answers in orange", fontsize=11)
    figure.savefig(path, dpi=120)


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"
