"""One exit as a network of its own."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard

from timm_selfdistill import SelfDistillModel, TruncatedModel, load_pretrained, wrap_self_distill
from timm_selfdistill.heads import LinearHead

from .conftest import small_backbone, small_model

EXITS = [0, 1, 2, 3, -1, "ensemble"]


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        "test_convnext",
        "test_efficientnet",
        "test_mambaout",
        "test_nfnet",
        "test_byobnet",
        "crossvit_tiny_240",
        "hrnet_w18_small",
    ],
)
def test_it_says_what_predict_says_and_the_model_stays_as_it_was(name):
    model = small_model(name).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(2, *model.backbone.pretrained_cfg["input_size"])
    with torch.no_grad():
        for exit in [*range(len(model.exits)), -1, "ensemble"]:
            assert torch.equal(model.truncate(exit)(x), model.predict(x, exit))
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_it_holds_no_more_than_its_exit_needs():
    model = small_model().eval()
    rows = model.summary()
    for exit, row in zip([0, 1, 2, 3, "ensemble"], rows):
        assert count(model.truncate(exit)) == row.params
    assert [key.split(".")[2] for key in model.truncate(0).state_dict() if "layer" in key][-1] == "layer1"


@pytest.mark.parametrize("exit", [4, -5, 1.0, True, "first", None])
def test_an_exit_that_does_not_exist(exit):
    with pytest.raises(ValueError, match=f"exit .*0 to 3, -1 to -4 or 'ensemble', got {exit!r}"):
        small_model().truncate(exit)


@pytest.mark.parametrize("exit", EXITS)
def test_saved_and_loaded_it_is_the_same(exit, tmp_path):
    model = small_model().eval()
    truncated = model.truncate(exit)
    truncated.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    for loaded in (load_pretrained(tmp_path), TruncatedModel.from_pretrained(tmp_path)):
        assert isinstance(loaded, TruncatedModel)
        assert loaded.exit == truncated.exit
        assert torch.equal(loaded(x), model.predict(x, exit))
    model.save_pretrained(tmp_path / "whole")
    for number, again in enumerate([loaded, SelfDistillModel.from_pretrained(tmp_path / "whole").truncate(exit)]):
        again.save_pretrained(tmp_path / str(number))
        assert torch.equal(TruncatedModel.from_pretrained(tmp_path / str(number))(x), model.predict(x, exit))


def test_each_class_loads_its_own_and_names_the_other(tmp_path):
    model = small_model().eval()
    model.save_pretrained(tmp_path / "whole")
    model.truncate(0).save_pretrained(tmp_path / "short")
    assert type(load_pretrained(tmp_path / "whole")) is SelfDistillModel
    assert type(load_pretrained(tmp_path / "short")) is TruncatedModel
    with pytest.raises(ValueError, match=r"short is a truncated model.*TruncatedModel\.from_pretrained"):
        SelfDistillModel.from_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match=r"whole is a model with all its exits.*SelfDistillModel\.from_pretrained"):
        TruncatedModel.from_pretrained(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="nowhere .*no folder here"):
        load_pretrained(tmp_path / "nowhere")


def test_with_a_head_of_ones_own(tmp_path):
    model = wrap_self_distill(small_backbone("test_vit"), head=LinearHead).eval()
    model.truncate(1).save_pretrained(tmp_path)
    x = torch.randn(1, 3, 160, 160)
    assert torch.equal(load_pretrained(tmp_path, head=LinearHead)(x), model.predict(x, 1))
    with pytest.raises(ValueError, match=r"head of its own.*from_pretrained\(\.\.\., head=\.\.\.\)"):
        TruncatedModel.from_pretrained(tmp_path)


def test_a_backbone_that_is_not_rebuilt_is_not_saved(tmp_path):
    model = small_model().eval()
    model.backbone.act1 = torch.nn.Tanh()
    with pytest.raises(ValueError, match=r"rebuild .*wrap_self_distill\(model, model_args="):
        model.truncate(0).save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_its_card_says_what_it_is(tmp_path):
    rows = [{"exit": exit, "top1": 70.0, "top5": 90.0} for exit in [0, 1, 2, 3, "ensemble"]]
    dataset = {"name": "shoes", "type": "shoes", "split": "test", "images": 10}
    small_model().truncate(1).save_pretrained(tmp_path, metrics={"exits": rows, "dataset": dataset})
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.model_name == "test_resnet-self-distilled-exit-1"
    assert [result.metric_name for result in card.data.eval_results] == ["Top-1 accuracy", "Top-5 accuracy"]
    assert "Exit 1 of [timm]" in card.text
    assert "timm.create_model" not in card.text
    assert "| 1 | layer2 | 70.00 | 90.00 |" in card.text
    assert 'TruncatedModel.from_pretrained("user/name")(images)' in card.text


@pytest.mark.parametrize("exit", [9, "first", True, [0]])
def test_a_damaged_config_is_refused(exit, tmp_path):
    small_model().truncate(0).save_pretrained(tmp_path, check=False)
    config = tmp_path / "config.json"
    values = json.loads(config.read_text())
    values["self_distill"]["truncated_to"] = exit
    config.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"exit .*0 to 3, .*got {re.escape(repr(exit))}"):
        TruncatedModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("exit", [0, "ensemble"])
def test_it_compiles_and_learns(exit):
    truncated = small_model().truncate(exit)
    compiled = torch.compile(truncated.eval(), fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), truncated(x))
    truncated.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in truncated.parameters())
