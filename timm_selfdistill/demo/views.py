"""What the page shows, as HTML; the templates escape class names, file names and all else that comes from outside."""

import base64
from io import BytesIO
from pathlib import Path

import jinja2
import torch
from PIL import Image

from .answers import Answers, Classifier
from .chart import HEIGHT, WIDTH, draw_chart
from .picture import read_picture
from .recorded import Recorded

TOP = 5
"""Classes that are shown for each exit."""
THUMBNAIL = 320
"""Pixels of the longer side."""
MEANINGS = {
    "confidence": "An image leaves at the first exit that gives its most likely class at least this probability.",
    "entropy": "An image leaves at the first exit whose probabilities have at most this entropy, in nats.",
    "margin": "An image leaves at the first exit whose two most likely classes are at least this far apart.",
}
"""Of the threshold, by policy."""


class Views:
    """The parts of the page of one model.

    Args:
        title: name of the model.
    """

    def __init__(self, title: str, classifier: Classifier, recorded: Recorded):
        self.title, self.classifier, self.recorded = title, classifier, recorded
        loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
        self.templates = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self.templates.filters["share"] = _share

    @property
    def meaning(self) -> str:
        """Of the threshold."""
        return MEANINGS[self.classifier.early_exit.policy]

    def header(self) -> str:
        model = self.classifier.model
        return self._render(
            "header.html",
            title=self.title,
            exits=len(model.exits),
            classes=model.num_classes,
            size=self.classifier.input_size,
        )

    def open(self, path: str | None, threshold: float, calibrated: bool) -> tuple[Answers | None, str]:
        """The answers for a file that was dropped, and what is shown; a message where it is no picture to classify.

        Args:
            path: None where the file was taken away.
            calibrated: use the saved thresholds, not `threshold`.
        """
        if path is None:
            return None, self._render("hint.html")
        classifier = self.classifier
        try:
            image = read_picture(path, classifier.input_size[0], classifier.value_range)
        except ValueError as error:
            return None, self._render("error.html", message=str(error))
        answers = classifier.answer(image)
        return answers, self.show(answers, threshold, calibrated)

    def show(self, answers: Answers | None, threshold: float, calibrated: bool) -> str:
        """Every exit's classes, where the picture leaves, and at what share of the compute."""
        if answers is None:
            return self._render("hint.html")
        classifier = self.classifier
        saved = classifier.calibrated if calibrated else None
        leaving = classifier.leave(answers, saved if saved is not None else float(threshold))
        thresholds = saved if saved is not None else [float(threshold)] * len(classifier.model.stages)
        exits = [
            {"module": module, "classes": classes, "share": share, "confidence": confidence, "threshold": limit}
            for module, classes, share, confidence, limit in zip(
                classifier.model.exits,
                self._top_classes(answers),
                leaving.shares,
                classifier.confidences(answers),
                [*thresholds, None],
            )
        ]
        return self._render(
            "answers.html", picture=_as_uri(answers.image), exits=exits, taken=leaving.exit, share=leaving.share
        )

    def model(self) -> str:
        """The second tab: accuracy over compute, the table of the exits, and the gallery."""
        recorded = self.recorded
        gallery = recorded.gallery.read_bytes() if recorded.gallery else None
        return self._render(
            "model.html",
            recorded=recorded,
            chart=draw_chart(recorded),
            has_speedup=any("speedup" in row for row in recorded.rows),
            width=WIDTH,
            height=HEIGHT,
            gallery=None if gallery is None else _data_uri(gallery),
        )

    def _top_classes(self, answers: Answers) -> list[list[tuple[str, float]]]:
        """For each exit the likeliest classes with their probabilities."""
        names = self.classifier.class_names
        found = torch.topk(answers.probabilities, min(TOP, len(names)))
        return [
            [(names[index], value) for index, value in zip(indices, values)]
            for indices, values in zip(found.indices.tolist(), found.values.tolist())
        ]

    def _render(self, template: str, **values: object) -> str:
        return self.templates.get_template(template).render(**values)


def _share(part: float) -> str:
    """A part as per cent: with one digit below ten."""
    return f"{part:.1%}" if part < 0.0995 else f"{part:.0%}"


def _as_uri(image: Image.Image) -> str:
    """A small copy of an image, to stand in the page itself."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    file = BytesIO()
    small.save(file, "PNG")
    return _data_uri(file.getvalue())


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
