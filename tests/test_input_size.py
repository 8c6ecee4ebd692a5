"""A saved model is for images of the size that it was trained at, also in a training loop of one's own."""

import copy
import json
import pickle

import pytest
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from timm_selfdistill import (
    SelfDistillLoss,
    SelfDistillModel,
    SelfDistillTask,
    TruncatedModel,
    model_data_config,
    wrap_self_distill,
)

from .conftest import small_backbone, small_model


def train_step(model: nn.Module, size: tuple[int, int] = (48, 64)) -> None:
    x, y = torch.randn(4, 3, *size), torch.arange(4)
    output = model.train()(x)
    (
        nn.functional.cross_entropy(output, y) if isinstance(output, torch.Tensor) else SelfDistillLoss()(output, y)
    ).backward()


def saved_size(model: SelfDistillModel, folder) -> list[int]:
    model.save_pretrained(folder)
    kind = TruncatedModel if isinstance(model, TruncatedModel) else SelfDistillModel
    assert kind.from_pretrained(folder).input_size == model.input_size
    return json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"]


def test_the_size_of_the_last_training_batch_is_saved(tmp_path):
    model = small_model()
    assert saved_size(model, tmp_path / "untrained") == [3, 160, 160]
    train_step(model)
    model.eval()(torch.randn(1, 3, 96, 96))  # measuring is not training
    assert saved_size(model, tmp_path / "trained") == [3, 48, 64]
    assert saved_size(model.truncate(0), tmp_path / "truncated") == [3, 48, 64]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(model) and model,
        copy.copy,
        lambda model: SelfDistillTask(model).trainable_module,
    ],
)
def test_whatever_wraps_the_model(wrap, tmp_path):
    model = small_model()
    train_step(wrap(model))
    assert saved_size(model, tmp_path) == [3, 48, 64]


@pytest.mark.parametrize(
    "average",
    [
        lambda model: ModelEmaV3(model).module,
        lambda model: AveragedModel(model).module,
        copy.deepcopy,
        lambda model: SelfDistillTask(model).setup_ema().module,
    ],
)
def test_a_moving_average_has_the_size_of_its_original(average, tmp_path):
    model = small_model()
    averaged = average(model)
    train_step(model)
    assert saved_size(averaged.eval(), tmp_path) == [3, 48, 64]
    train_step(averaged, (32, 32))
    assert (averaged.input_size, model.input_size) == ((3, 32, 32), (3, 48, 64))


def test_pickling_keeps_the_size():
    model = small_model()
    average = copy.deepcopy(model)
    train_step(model)
    assert pickle.loads(pickle.dumps(average)).input_size == (3, 48, 64)


@pytest.mark.parametrize(
    "choose",
    [
        lambda model: model.set_input_size(img_size=96),
        lambda model: model_data_config(model, 96),
        lambda model: model_data_config(model, 96, 3),
    ],
)
def test_another_size_is_chosen_after_training(choose, tmp_path):
    model = small_model()
    train_step(model)
    choose(model)
    assert saved_size(model, tmp_path) == [3, 96, 96]


def test_a_truncated_model_that_is_trained_on(tmp_path):
    network = small_model().truncate(1)
    train_step(network, (32, 32))
    assert saved_size(network, tmp_path) == [3, 32, 32]


def test_a_network_of_one_size_only(tmp_path):
    model = wrap_self_distill(small_backbone("test_vit", img_size=64))
    train_step(model, (64, 64))
    assert saved_size(model, tmp_path) == [3, 64, 64]


def load_trained(model: SelfDistillModel) -> SelfDistillModel:
    """The same model, filled from the state dict of one that was trained at another size."""
    trained = copy.deepcopy(model)
    train_step(trained, (64, 64) if isinstance(model.backbone, VisionTransformer) else (48, 64))
    model.load_state_dict(trained.state_dict())
    return model


@pytest.mark.parametrize(
    "fill",
    [
        lambda model: model,
        lambda model: SelfDistillTask(model).trainable_module,
        lambda model: pickle.loads(pickle.dumps(model)),
        copy.deepcopy,
        lambda model: model.truncate(0),
    ],
)
def test_a_size_that_nobody_told_is_warned_of(fill, tmp_path):
    model = load_trained(small_model())
    with pytest.warns(UserWarning, match=r"images of 160 x 160 pixels, the default .* call set_input_size\(PIXELS\)"):
        fill(model).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "tell",
    [
        lambda model: model.set_input_size(48),
        lambda model: model_data_config(model, 48),
        train_step,
        lambda model: model.load_state_dict(model.state_dict()) and model_data_config(model, 48),
    ],
)
def test_a_size_that_was_told_is_not(tell, tmp_path):
    model = load_trained(small_model())
    tell(model)
    assert saved_size(model, tmp_path)[1] == 48


def test_a_copy_of_trained_weights_keeps_their_size(tmp_path):
    model = small_model()
    train_step(model)
    best, exit = copy.deepcopy(model), model.truncate(0)
    train_step(model, (32, 32))
    assert (saved_size(best, tmp_path / "best"), saved_size(exit, tmp_path / "exit")) == ([3, 48, 64], [3, 48, 64])


def test_timms_question_is_answered_before_saving_as_after():
    model = small_model()
    train_step(model)
    for network in (model, model.truncate(0), model.truncate("ensemble")):
        assert resolve_model_data_config(network)["input_size"] == (3, 48, 64)
    model.set_input_size(96)
    train_step(model)
    assert model.input_size == resolve_model_data_config(model)["input_size"] == (3, 48, 64)


def test_a_vit_of_any_size(tmp_path):
    model = wrap_self_distill(small_backbone("test_vit", dynamic_img_size=True))
    train_step(model, (64, 64))
    assert saved_size(model, tmp_path) == [3, 64, 64]
    loaded = SelfDistillModel.from_pretrained(tmp_path)
    assert loaded.input_size == resolve_model_data_config(loaded)["input_size"] == (3, 64, 64)
    average = copy.deepcopy(loaded)
    train_step(loaded, (96, 96))
    assert average.input_size == (3, 96, 96)


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model.eval().forward_exits(x).logits[0],
        lambda model, x: model.train().predict(x, 0),
        lambda model, x: model.train().predict(x),
        lambda model, x: model.train().predict(x, "ensemble"),
    ],
)
def test_a_loop_that_does_not_call_the_model_itself(run, tmp_path):
    model = small_model()
    run(model, torch.randn(2, 3, 48, 64)).sum().backward()
    assert saved_size(model, tmp_path) == [3, 48, 64]


def test_a_measurement_is_no_training(tmp_path):
    model = small_model()
    train_step(model)
    model.eval().predict(torch.randn(2, 3, 96, 96), 0)
    with torch.no_grad():
        model.train().predict(torch.randn(2, 3, 96, 96), 0)
    assert saved_size(model, tmp_path) == [3, 48, 64]


@pytest.mark.parametrize("change", [train_step, lambda model: model.load_state_dict(small_model().state_dict())])
def test_thresholds_are_not_those_of_other_weights(change):
    model = small_model()
    model.early_exit = {"policy": "confidence", "thresholds": [0.5] * 3}
    change(model)
    assert model.early_exit is None


def test_a_network_of_one_size_only_tells_its_size(tmp_path):
    model = load_trained(wrap_self_distill(small_backbone("test_vit", img_size=64)))
    assert saved_size(model, tmp_path) == [3, 64, 64]
