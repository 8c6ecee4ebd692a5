"""What each exit costs, as a table."""

from io import StringIO
from typing import TYPE_CHECKING, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .cost import CostCounter
from .stages import Stage

if TYPE_CHECKING:
    from .model import SelfDistillModel


class ExitSummary(NamedTuple):
    """One row of `SelfDistillModel.summary()`."""

    exit: int | str
    """0..C-1, or "ensemble"."""
    module: str
    """The module that ends the exit's stage."""
    feature_shape: tuple[int, int, int]
    """(channels, height, width) of the stage's feature map."""
    head_params: int
    """Parameters of the shallow classifier; 0 for the deepest, whose classifier is the backbone's; for the ensemble, of
    all shallow classifiers."""
    head_macs: int
    """Multiply-adds of the same for one image."""
    params: int
    """Parameters that the exit needs, backbone up to its stage and head."""
    macs: int
    """Multiply-adds for one image, convolutions and matrix products."""
    share: float
    """`macs` over those of the plain network."""


class Summary(tuple[ExitSummary, ...]):
    """Rows of a summary, shallow to deep, then the ensemble; printable as a table, with rich or without.

    The last row is the total, the one before it the plain network.
    """

    @property
    def plain(self) -> ExitSummary:
        """The deepest exit: the plain network alone."""
        return self[-2]

    @property
    def total(self) -> ExitSummary:
        """Everything: the ensemble. A training step with a hint costs a little more, since it makes the features."""
        return self[-1]

    def __rich__(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("exit", "stage"):
            table.add_column(name, overflow="fold")
        for name in ("feature", "head params", "head MACs", "params", "MACs", "share"):
            table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
        for row in self:
            if row is self.total:
                table.add_section()
            table.add_row(
                str(row.exit),
                row.module,
                "x".join(map(str, row.feature_shape)),
                _millions(row.head_params),
                _millions(row.head_macs),
                _millions(row.params),
                _millions(row.macs),
                f"{row.share:.1%}",
            )
        return table

    def __str__(self) -> str:
        text = StringIO()
        # In a notebook rich would display the table and leave the text empty.
        Console(file=text, width=100, color_system=None, force_jupyter=False).print(self)
        return text.getvalue().rstrip()


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M" if count else "-"


def summarize(
    model: "SelfDistillModel", stages: list[Stage], input_size: tuple[int, int, int] | None = None
) -> Summary:
    """The summary of a `SelfDistillModel`, see its method.

    Args:
        stages: of all its classifiers.
    """
    expected = model.input_size
    input_size = expected if input_size is None else input_size
    if not isinstance(input_size, (tuple, list)) or len(input_size) != 3 or input_size[0] != expected[0]:
        raise ValueError(f"input_size must be ({expected[0]}, height, width), got {input_size!r}")
    counter = CostCounter(model)
    maps = counter.count(
        input_size,
        lambda model, x: model.backbone.forward_intermediates(
            x, indices=[stage.index for stage in stages], intermediates_only=True
        ),
    ).output
    shapes: list[tuple[int, int, int]] = [tuple(feature_map.shape[1:]) for feature_map in maps]
    heads = [
        counter.count(shape, lambda model, x, exit=exit: model.run_head(exit, x)[0])
        for exit, shape in enumerate(shapes[: len(model.heads)])
    ]
    ensemble_cost, *costs = (
        counter.count(input_size, lambda model, x, exit=exit: model.predict(x, exit))
        for exit in ("ensemble", *range(len(stages)))
    )
    rows = [
        ExitSummary(
            exit=exit,
            module=stage.name,
            feature_shape=shape,
            head_params=heads[exit].params if exit < len(heads) else 0,
            head_macs=heads[exit].macs if exit < len(heads) else 0,
            params=cost.params,
            macs=cost.macs,
            share=cost.macs / costs[-1].macs,
        )
        for exit, (stage, shape, cost) in enumerate(zip(stages, shapes, costs))
    ]
    ensemble = ExitSummary(
        exit="ensemble",
        module=stages[-1].name,
        feature_shape=shapes[-1],
        head_params=sum(head.params for head in heads),
        head_macs=sum(head.macs for head in heads),
        params=ensemble_cost.params,
        macs=ensemble_cost.macs,
        share=ensemble_cost.macs / costs[-1].macs,
    )
    return Summary([*rows, ensemble])
