"""The model card: what a model is, how good each exit is, how to load it, and how it was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .files import ExitSettings
from .records import ExitRow, ImageSource

PLACEHOLDER = "user/name"
"""Stands for the repository's id in the card of a model that has none yet."""
MARK = "Written by timm-selfdistill. Remove this line to keep your edits when the model is saved here again."
TAGS = ("timm", "image-classification")
PAPER = '["Be Your Own Teacher"](https://arxiv.org/abs/1905.08094)'
TAUGHT_BY = {
    "dsn": "by deep supervision: from the labels alone ([arXiv:1409.5185](https://arxiv.org/abs/1409.5185))",
    "dks": "by knowledge synergy: each is taught by every other while all learn from the labels"
    " ([arXiv:1906.00675](https://arxiv.org/abs/1906.00675))",
    "deepest": f"by self distillation: the deepest teaches the shallow ones while all learn from the labels ({PAPER})",
    "ensemble": "by self distillation: the mean of all logits teaches them while they learn from the labels"
    f" ({PAPER}, with the teacher of [arXiv:2104.00299](https://arxiv.org/abs/2104.00299))",
    "memory": "by self distillation: the mean of all logits that they gave for an image in earlier epochs teaches them"
    f" while they learn from the labels ({PAPER}, with the memory of [arXiv:1610.02242]"
    "(https://arxiv.org/abs/1610.02242))",
    "unlabelled": f"by self distillation: the deepest taught them, without labels ({PAPER})",
}
"""How classifiers were trained, by method or teacher."""
HUB_LICENSES = {
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "cc-by-4.0",
    "cc-by-nc-4.0",
    "apple-ascl",
    "apple-amlr",
    "gemma",
    "unknown",
}
"""Those that timm names and the Hub knows."""


def create_card(
    config: dict[str, Any],
    rows: list[ExitRow],
    metrics: Mapping[str, Any] | None = None,
    *,
    repo_id: str = PLACEHOLDER,
    picture: bool = False,
    **card_data: Any,
) -> ModelCard:
    """A card from a model's config.json and what is known of its training.

    Args:
        config: content of config.json.
        rows: of every classifier and the ensemble.
        metrics: as `Trainer` records them, all optional; reference where the accuracies are not against labels.
        picture: exits.png lies beside the card.
        card_data: further metadata, or other than what is found, e.g. `license="mit"`.
    """
    metrics = metrics if isinstance(metrics, dict) else {}
    settings: ExitSettings | None = config.get("self_distill")
    training, versions = _dict(metrics.get("settings")), _dict(metrics.get("versions"))
    dataset = _dataset(metrics)
    method = _method(training)
    self_distilled = bool(settings) and method not in ("dsn", "dks")
    exit = None if not settings or settings.get("truncated_to") is None else _exit_name(settings["truncated_to"])
    name = config["architecture"] + "-self-distilled" * self_distilled + (f"-{exit.replace(' ', '-')}" if exit else "")
    agreement = metrics.get("reference") is not None
    results = _eval_results(rows, dataset) if dataset and not agreement else []
    tags = [*TAGS, *(["self-distillation"] * self_distilled), *(["timm-selfdistill"] * bool(settings))]
    data = _metadata(config, metrics, dataset, results, {"tags": tags, "model_name": name, **card_data})
    return ModelCard(
        _template().render(
            card_data=data.to_yaml(),
            mark=MARK,
            model_name=name,
            repo_id=repo_id,
            architecture=config["architecture"],
            exits=len(settings["exits"]) + 1 if settings else 0,
            truncated=exit,
            frozen=metrics.get("frozen") is True,
            taught_by=TAUGHT_BY.get(method),
            self_distilled=self_distilled,
            agreement=agreement,
            own_head=settings["head"] is None if settings else False,
            early_exit=early_exit_words(_dict(settings).get("early_exit")),
            num_classes=config["num_classes"],
            input_size=config["pretrained_cfg"]["input_size"],
            rows=[_table_row(row) for row in rows],
            has_speedup=any("speedup" in row for row in rows),
            picture=picture,
            dataset=dataset,
            epoch=metrics.get("epoch"),
            epochs=training.get("epochs"),
            training_yaml=yaml.safe_dump(training, sort_keys=False).strip() if training else "",
            hardware=metrics.get("hardware"),
            versions=versions,
        )
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    return environment.from_string((Path(__file__).parent / "card_template.md").read_text(encoding="utf-8"))


def _metadata(
    config: dict[str, Any],
    metrics: Mapping[str, Any],
    dataset: ImageSource,
    results: list[EvalResult],
    more: dict[str, Any],
) -> ModelCardData:
    """The YAML at the top of a card; `more` wins."""
    found = {
        **_license(metrics.get("license") or config["pretrained_cfg"].get("license")),
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "datasets": [dataset["hub_id"]] if dataset.get("hub_id") else None,
        "base_model": metrics.get("base_model"),
        "metrics": ["accuracy"] if results else None,
        "eval_results": results or None,
    }
    return ModelCardData(**{**found, **more})


def _method(training: Mapping[str, Any]) -> str:
    """The key of `TAUGHT_BY` for the settings of a run; another word where they do not tell, as for one from Python."""
    method = "unlabelled" if training.get("unlabelled") else training.get("method")
    return str(training.get("teacher") if method == "self-distill" else method)


def measured_rows(metrics: Mapping[str, Any] | None) -> list[ExitRow]:
    """The rows in a record of metrics, whoever wrote it: exit, module, and of the rest what are numbers."""
    rows = _dict(metrics).get("exits")
    return [
        cast(ExitRow, {key: value for key, value in row.items() if key in ("exit", "module") or _is_finite(value)})
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and "exit" in row
    ]


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _dataset(metrics: Mapping[str, Any]) -> ImageSource:
    """What a record of metrics was measured on; empty where it does not tell all that the Hub asks for."""
    dataset = _dict(metrics.get("dataset"))
    return cast(ImageSource, dataset if {"name", "type", "split", "images"} <= dataset.keys() else {})


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def may_replace(path: Path) -> bool:
    """Whether a README.md may be written over: there is none, or it is one of ours that nobody took for their own."""
    return not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace")


def _eval_results(rows: list[ExitRow], dataset: ImageSource) -> list[EvalResult]:
    """The Hub's entries, accuracies as fractions: first the deepest exit, which is what plain timm loads."""
    measured = [row for row in rows if "top1" in row]
    deepest = next((row for row in reversed(measured) if row["exit"] != "ensemble"), None)
    measured.sort(key=lambda row: row is not deepest)
    results = []
    for row in measured:
        which = "" if row is deepest else f", {_exit_name(row['exit'])}"
        kinds = (("accuracy", "Top-1", row.get("top1")), ("top_5_accuracy", "Top-5", row.get("top5")))
        for kind, name, accuracy in kinds:
            if accuracy is None:
                continue
            results.append(
                EvalResult(
                    task_type="image-classification",
                    task_name="Image Classification",
                    dataset_type=dataset["type"],
                    dataset_name=dataset["name"],
                    dataset_config=dataset.get("config"),
                    dataset_split=dataset["split"],
                    metric_type=kind,
                    metric_name=f"{name} accuracy{which}",
                    metric_value=round(accuracy / 100, 6),
                )
            )
    return results


def _license(name: str | None) -> dict[str, str]:
    """That of the weights that the training began with, else timm's own, under the Hub's name or as another one."""
    name = name or "apache-2.0"
    return {"license": name} if name in HUB_LICENSES else {"license": "other", "license_name": name}


def early_exit_words(record: Any) -> str | None:
    """What calibration found, by "early_exit" of a config.json; None without one."""
    report = _dict(record)
    figures = [
        report[key] for key in ("accuracy", "plain_accuracy", "macs", "plain_macs") if _is_finite(report.get(key))
    ]
    if len(figures) < 4 or figures[3] <= 0:
        return None
    accuracy, plain_accuracy, macs, plain_macs = figures
    return (
        f"top-1 {accuracy:.2f} % at {macs / plain_macs:.0%} of the multiply-adds, where the deepest exit alone has"
        f" {plain_accuracy:.2f} %"
    )


def _exit_name(exit: int | str) -> str:
    return "ensemble" if exit == "ensemble" else f"exit {exit}"


def _cell(text: str) -> str:
    """A text from outside for a line or table of Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("`", "'")


def _table_row(row: ExitRow) -> list[str]:
    forms = {"top1": "{:.2f}", "top5": "{:.2f}", "macs": "{:,.1f} M", "share": "{:.1%}", "speedup": "{:.2f}x"}
    numbers: Mapping[str, Any] = row | {"macs": row["macs"] / 1e6} if "macs" in row else row
    return [
        str(row["exit"]),
        row.get("module", ""),
        *(form.format(numbers[key]) if key in numbers else "" for key, form in forms.items()),
    ]
