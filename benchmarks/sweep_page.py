"""docs/models.md: what `sweep.py` found, a row a class."""

import json
import os
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path("docs/models.md")
TEXT = """# Supported networks

This page lists all classes of timm models, with their default exits and the cost of the heads.

`wrap_self_distill` contains no code for individual networks. It uses `feature_info`, `forward_intermediates` and
`forward_head`, which every timm model has. `benchmarks/sweep.py` tests all networks of timm {timm} with torch {torch}:

**Shapes**: every name of `timm.list_models()` is wrapped on the meta device. The test runs a forward pass in training
mode, the loss, a backward pass, and eval mode. {meta_passed} of {meta_count} names pass.

**Values**: the smallest network of every class runs on real tensors. {real_passed} of {real_count} classes pass these
checks:

- a training step changes the heads and the backbone,
- the eval logits are bit-identical to those of the plain network,
- `predict(x, k)` equals `forward_exits(x).logits[k]`, and
- the saved model can be loaded again, also by plain timm.

The commands are, in this order:

    {meta_command}
    {real_command}

The figures are in [sweep_meta.json](../benchmarks/results/sweep_meta.json) and
[sweep_real.json](../benchmarks/results/sweep_real.json).

## What does not pass

{failures}

## Exits and head costs

The docstring of `timm_selfdistill.stages.choose_exits` describes how the default exits are chosen. `exits=[...]`
selects others.

- *Smallest* is the smallest network of the class; *exits* and *share of compute* belong to it.
- *Head cost* is the multiply-adds of all `bottleneck` heads, divided by those of the plain network: median and maximum
  of the class. It was computed with timm-selfdistill {version}.

An image that leaves at an exit saves the rest of the compute. Early exit saves little in the following classes, because
the first exit needs more than 75 % of the compute in most of their networks: {late}.

| class | shapes | values | smallest | exits | share of compute | head cost |
|---|---|---|---|---|---|---|
{rows}
"""


def write_page(results: Path) -> None:
    """Write the page from the two JSON files; where one is missing, there is nothing to write yet."""
    files = [results / "sweep_meta.json", results / "sweep_real.json"]
    if not all(path.exists() for path in files):
        return
    meta, real = (json.loads(path.read_text()) for path in files)
    classes: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in meta["rows"]:
        classes[row["class"]].append(row)
    values = {row["class"]: row for row in real["rows"]}
    failures = [
        f"- `{row['name']}` ({kind}): {row['error'].split(';')[0]}"
        for kind, rows in (("shapes", meta["rows"]), ("values", real["rows"]))
        for row in rows
        if row["error"]
    ]
    text = TEXT.format(
        timm=meta["hardware"]["timm"],
        version=meta["hardware"]["timm_selfdistill"],
        torch=meta["hardware"]["torch"].split("+")[0],
        meta_command=meta["command"],
        real_command=real["command"],
        meta_passed=passed(meta["rows"]),
        meta_count=len(meta["rows"]),
        real_passed=passed(real["rows"]),
        real_count=len(real["rows"]),
        late=", ".join(sorted(name for name, rows in classes.items() if first_share(rows) > 0.75)),
        failures="\n".join(failures) or "Nothing.",
        rows="\n".join(class_row(name, classes[name], values.get(name)) for name in sorted(classes, key=str.lower)),
    )
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {os.fspath(PAGE)}")


def class_row(name: str, rows: list[dict[str, Any]], real: dict[str, Any] | None) -> str:
    good = sorted((row for row in rows if not row["error"]), key=lambda row: row["params"])
    checked = "-" if real is None else "failed" if real["error"] else "passed"
    start = f"| {name} | {len(good)} of {len(rows)} | {checked} "
    if not good:
        known = f"{real['name']} | {', '.join(real['exits'])}" if checked == "passed" else " | "
        return f"{start}| {known} | | |"
    smallest = good[0]
    exits = ", ".join(smallest["exits"])
    shares = " / ".join(f"{share:.0%}" for share in smallest["shares"])
    costs = [row["head_macs"] / row["macs"] for row in good]
    return f"{start}| {smallest['name']} | {exits} | {shares} / 100% | {median(costs):.1%}, {max(costs):.1%} |"


def first_share(rows: list[dict[str, Any]]) -> float:
    """Share of the compute that the first exit takes, median of the networks that passed."""
    return median([row["shares"][0] for row in rows if not row["error"]] or [0.0])


def passed(rows: list[dict[str, Any]]) -> int:
    return sum(not row["error"] for row in rows)
