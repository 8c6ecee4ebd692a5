"""The page: widgets of gradio around `Views`."""

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from .views import Views

LARGEST_FILE = "64mb"
KEPT_SECONDS = 3600
"""After which an uploaded file is deleted."""
FONTS = ("system-ui", "sans-serif")
MONOSPACED = ("ui-monospace", "monospace")


def build_page(views: Views) -> gr.Blocks:
    """The page of a model; `launch_page` opens it."""
    classifier = views.classifier
    with gr.Blocks(
        title=f"{views.title} - timm-selfdistill",
        analytics_enabled=False,
        delete_cache=(KEPT_SECONDS, KEPT_SECONDS),
    ) as page:
        _html(views.header())
        with gr.Tab("Try a picture"):
            answers = gr.State(None)
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    file = gr.File(label="Picture", height=150, elem_id="picture")
                    calibrated = gr.Checkbox(
                        classifier.calibrated is not None,
                        label="Use the calibrated thresholds",
                        visible=classifier.calibrated is not None,
                        elem_id="calibrated",
                    )
                    threshold = gr.Slider(
                        0,
                        round(classifier.highest, 2),
                        value=round(classifier.first_threshold, 2),
                        step=0.01,
                        label="Threshold for all exits",
                        info=views.meaning,
                        buttons=[],
                        elem_id="threshold",
                    )
                with gr.Column(scale=3, min_width=320):
                    shown = _html(views.open(None, 0.0, False)[1], elem_id="answers")
        with gr.Tab("The model"):
            _html(views.model())
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        file.change(views.open, [file, threshold, calibrated], [answers, shown], **quiet)
        threshold.input(lambda: False, None, calibrated, **quiet)  # whoever moves the slider wants its threshold
        for changed in (threshold, calibrated):
            changed.change(views.show, [answers, threshold, calibrated], shown, trigger_mode="always_last", **quiet)
    return page


def launch_page(page: gr.Blocks, **launch_args: Any) -> str:
    """Serve a page with the product's looks; its address.

    Args:
        launch_args: of `gradio.Blocks.launch`.
    """
    _, address, _ = page.launch(
        theme=_theme(),
        css_paths=Path(__file__).parent / "templates/page.css",
        footer_links=[],
        max_file_size=LARGEST_FILE,
        ssr_mode=False,
        **launch_args,
    )
    return address


def _theme() -> gr.themes.Base:
    """Fonts of the system, and notes dark enough to read."""
    return gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=MONOSPACED).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*body_text_color_subdued",
        block_info_text_color_dark="*body_text_color_subdued",
    )


def _html(content: str, **html_args: Any) -> gr.HTML:
    return gr.HTML(content, apply_default_css=False, js_on_load=None, **html_args)
