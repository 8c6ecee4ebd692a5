"""docs/models.md: what `sweep.py` found, a row a class."""
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

PAGE = Path("docs/models.md")
TEXT = """# Networks

`wrap_self_distill` has no code for single networks: it reads `feature_info` and calls `forward_intermediates` and
`forward_head`, which every timm model has. `benchmarks/sweep.py` tries it on all of timm {timm}, with torch {torch}:

- **shapes**: every name of `timm.list_models()`, on the meta device: wrap, forward in training mode, loss, backward,
  eval. {meta_passed} of {meta_count} pass.
- **values**: the smallest network of every class, on real tensors: one step that moves the heads and the backbone,
  eval logits equal to the plain network's to the last bit, `predict(x, k)` equal to `forward_exits(x).logits[k]`, saved
  and loaded again, also by plain timm. {real_passed} of {real_count} pass.

The commands are `python benchmarks/sweep.py` and then `python benchmarks/sweep.py --real`, the figures are in
[sweep_meta.json](../benchmarks/results/sweep_meta.json) and [sweep_real.json](../benchmarks/results/sweep_real.json).

## What does not pass

{failures}

## Where the exits stand

The rule is the docstring of `timm_selfdistill.stages.choose_exits`; `exits=[...]` overrides it. The columns
*smallest*, *exits* and *share of compute* are of the smallest network of the class, *head cost* is the median over its
networks: the multiply-adds of all "bottleneck" heads over the plain network's.

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
        for kind, rows in (("shapes", meta["rows"]), ("values", real["rows"])) for row in rows if row["error"]
    ]
    text = TEXT.format(
        timm=meta["hardware"]["timm"], torch=meta["hardware"]["torch"].split("+")[0],
        meta_passed=passed(meta["rows"]), meta_count=len(meta["rows"]),
        real_passed=passed(real["rows"]), real_count=len(real["rows"]),
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
    costs = sorted(row["head_macs"] / row["macs"] for row in good)
    return start + f"| {smallest['name']} | {exits} | {shares} / 100% | {costs[len(costs) // 2]:.1%} |"


def passed(rows: list[dict[str, Any]]) -> int:
    return sum(not row["error"] for row in rows)
