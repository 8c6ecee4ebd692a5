"""examples/quickstart.ipynb: what is committed can be read and followed, and it runs."""

import ast
import base64
import importlib
import importlib.util
import inspect
import json
import re
from typing import Any

import pytest
from PIL import Image

from timm_selfdistill import EarlyExit, SelfDistillModel, Trainer, TrainResult, load_images
from timm_selfdistill.inference import CalibrationReport

from .conftest import small_model
from .programs import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
TREES = [ast.parse("".join(cell["source"])) for cell in CODE]
NODES = [node for tree in TREES for node in ast.walk(tree)]
PLACES = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|Users|content)/|\b[A-Z]:\\|file://|site-packages")


def texts(cell: dict[str, Any]) -> str:
    """What a code cell printed or displayed, without pictures."""
    found = []
    for output in cell["outputs"]:
        found.append("".join(output.get("text", "")))
        found += ["".join(data) for kind, data in output.get("data", {}).items() if kind == "text/plain"]
    return "".join(found)


def test_the_notebook_is_one_that_readers_take():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    needed = {"code": {"execution_count", "outputs"}, "markdown": set()}
    for cell in NOTEBOOK["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | needed[cell["cell_type"]]
        assert cell["metadata"] == {}
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 400_000


def test_every_cell_was_run_in_order_and_without_errors():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds
        assert kinds <= {"stream", "display_data", "execute_result"}
        assert {output.get("name", "stdout") for output in cell["outputs"]} == {"stdout"}  # no warnings


def test_outputs_name_no_folder_of_a_machine():
    for cell in NOTEBOOK["cells"]:
        written = json.dumps([cell["source"], [{**output, "data": {}} for output in cell.get("outputs", [])]])
        assert not PLACES.search(written + (texts(cell) if cell in CODE else ""))
    assert not re.search(r"\d images/s|left \d", "".join(map(texts, CODE)))


def test_the_plots_are_pictures():
    pictures = [
        base64.b64decode(output["data"]["image/png"])
        for cell in CODE
        for output in cell["outputs"]
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert all(picture.startswith(b"\x89PNG\r\n") and len(picture) > 10_000 for picture in pictures)


def test_the_text_links_to_files_and_installs_extras_that_there_are():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) >= 4
    for link in links:
        assert (EXAMPLES / link.split("#")[0]).is_file(), link
    extras = {name for names in re.findall(r"\[([a-z,]+)\]\"", TEXT) for name in names.split(",")}
    assert extras == {"notebook", "onnx"}
    for extra in extras:
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def test_the_code_has_only_names_and_arguments_that_there_are():
    """Of this package and of timm."""
    imported = {}
    for node in NODES:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("timm"):
            module = importlib.import_module(node.module)
            imported |= {name.name: getattr(module, name.name) for name in node.names}
    assert len(imported) >= 12
    images, model = load_images(EXAMPLES / "data"), small_model().eval()
    variables: dict[str, Any] = {
        "model": model,
        "early_exit": EarlyExit(model),
        "report": CalibrationReport,
        "result": TrainResult,
        "images": images,
        "source": images,
    }
    checked = []
    for node in NODES:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables:
            owner = variables[node.value.id]
            assert hasattr(owner, node.attr) or node.attr in inspect.get_annotations(owner), ast.unparse(node)
        if isinstance(node, ast.Call):
            function = named(node.func, imported, variables)
            if function is not None:
                keywords = dict.fromkeys(keyword.arg for keyword in node.keywords)
                inspect.signature(function).bind_partial(**keywords)
                checked.append(ast.unparse(node.func))
    assert {"TrainConfig", "Trainer", "EarlyExit", "early_exit.calibrate", "images.transformed"} <= set(checked)
    assert callable(SelfDistillModel.push_to_hub)
    assert callable(Trainer.fit)


def named(node: ast.expr, imported: dict[str, Any], variables: dict[str, Any]) -> Any:
    """What a call calls, where it is a name of the package or a method of a variable that holds one of its objects."""
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in variables:
        return getattr(variables[node.value.id], node.attr)
    return None


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_notebook_runs(tmp_path):
    """From the top, as a user does who has nothing but the clone."""
    missing = [name for name in ("nbclient", "ipykernel", "ipywidgets") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install -e '.[notebook]'")
    from .notebook import execute

    cells = [cell for cell in execute(tmp_path).cells if cell.cell_type == "code"]
    assert {output.get("name", "stdout") for cell in cells for output in cell.outputs} == {"stdout"}
    printed = "".join(map(texts, cells))
    assert str(tmp_path) not in printed

    folder = tmp_path / "quickstart"
    assert len(list(folder.glob("photos/train/*/*.png"))) == 2000
    assert len(list(folder.glob("photos/val/*/*.png"))) == 1000
    assert "2000 training and 1000 validation images of 10 classes" in printed

    (run,) = folder.glob("runs/*")
    rows = json.loads((run / "summary.json").read_text())["exits"]
    assert [row["exit"] for row in rows] == [0, 1, 2, 3, "ensemble"]
    for row in rows:
        assert row["top1"] > 60  # by chance 10
        assert f"│ {row['exit']!s:<8} │ {row['module']} │   {row['top1']:.2f} │" in printed
    for name in ("curves.png", "exits.png"):
        Image.open(run / name).verify()
    assert len(re.findall(r"epoch \d/4  loss", printed)) == 4

    assert "largest difference of logits below 0.001: True\nsame classes: True\n" in printed
    assert "timm gives the same logits: True\n" in printed
    assert {path.name for path in (folder / "resnet18").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "self_distill.safetensors",
    }
    assert (folder / "exit0.onnx").is_file()
    config = json.loads((folder / "resnet18/config.json").read_text())
    met = "NOT MET" not in printed
    assert ("early_exit" in config["self_distill"]) == met
    assert f"it has the calibrated thresholds: {met}\n" in printed
