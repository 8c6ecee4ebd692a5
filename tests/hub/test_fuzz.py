"""Any config.json at all: a whole model, or one clear error."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timm_selfdistill import SelfDistillModel

from .test_trust import within_limits

KEYS = st.one_of(st.text(max_size=12), st.sampled_from(["img_size", "num_classes", "in_chans", "layers", "width"]))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths to everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, inner in items for place in places(inner, (*path, key))]


def change(config: dict, place: tuple, action: str, value: Any) -> None:
    *way, last = place
    for key in way:
        config = config[key]
    if action == "remove":
        del config[last]
    elif action == "add" and isinstance(config, dict):
        config[str(value)[:12]] = value
    else:
        config[last] = value


@cache
def count_parameters(folder: Path) -> int:
    return sum(parameter.numel() for parameter in SelfDistillModel.from_pretrained(folder).parameters())


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    return shutil.copytree(saved, tmp_path_factory.mktemp("fuzz") / "model")


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_changed_config(data, saved: Path, folder: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(places(config)))
        change(config, place, data.draw(st.sampled_from(["replace", "remove", "add"])), data.draw(VALUES))
    (folder / "config.json").write_text(json.dumps(config))
    load_or_refuse(folder, saved)


@examples(25)
@given(data=st.data())
def test_a_changed_config(data, saved, folder):
    check_changed_config(data, saved, folder)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@examples(400)
@given(data=st.data())
def test_many_changed_configs(data, saved, folder):
    check_changed_config(data, saved, folder)


FLIPPED = {"position": st.integers(0, 10_000), "wrong": st.binary(min_size=1, max_size=3)}


@examples(25)
@given(**FLIPPED)
def test_flipped_bytes(position, wrong, saved, folder):
    check_flipped_bytes(position, wrong, saved, folder)


@pytest.mark.slow
@examples(200)
@given(**FLIPPED)
def test_many_flipped_bytes(position, wrong, saved, folder):
    check_flipped_bytes(position, wrong, saved, folder)


def check_flipped_bytes(position: int, wrong: bytes, saved: Path, folder: Path) -> None:
    content = (saved / "config.json").read_bytes()
    position %= len(content)
    (folder / "config.json").write_bytes(content[:position] + wrong + content[position + len(wrong) :])
    load_or_refuse(folder, saved)


def load_or_refuse(folder: Path, saved: Path) -> None:
    parameters = count_parameters(saved)

    def load() -> str:
        try:
            model = SelfDistillModel.from_pretrained(folder)
        except (ValueError, TypeError, FileNotFoundError) as error:
            return f"refused: {error}"
        model.summary()
        return f"loaded {sum(parameter.numel() for parameter in model.parameters())}"

    # The weights in the folder are those of one network, so that nothing else can be loaded.
    answer = within_limits(load)
    assert answer == f"loaded {parameters}" or (answer.startswith("refused: ") and len(answer) > 20), answer
