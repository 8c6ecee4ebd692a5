import json
import shutil
import stat

import pytest
import timm
import torch
from torch import nn

from timm_selfdistill import SelfDistillModel, wrap_self_distill
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.hub import save_timm_model

from ..conftest import small_backbone, small_model

MODEL_FILES = {"config.json", "model.safetensors", "self_distill.safetensors"}
FILES = MODEL_FILES | {"README.md"}


def edit_config(folder, **settings):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["self_distill"].update(settings)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "create", "wrap"),
    [
        ("test_resnet", {}, {}),
        ("test_resnet", {"in_chans": 1}, {"exits": ["layer2"], "head": "linear"}),
        ("test_resnet", {"in_chans": 4}, {"head_args": {"width": 16}}),
        ("test_vit", {}, {}),
        ("test_vit", {"img_size": 64}, {}),
        ("test_convnext", {}, {"exits": [0, 2]}),
        pytest.param(
            "swin_tiny_patch4_window7_224", {}, {}, marks=pytest.mark.slow
        ),  # makes buffers that are not saved
    ],
)
def test_two_readers_get_the_same_logits(name, create, wrap, tmp_path):
    backbone = small_backbone(name, **create)
    model = wrap_self_distill(backbone, model_args=create, **wrap).eval()
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES

    size = (create["img_size"],) * 2 if "img_size" in create else backbone.pretrained_cfg["input_size"][1:]
    x = torch.randn(2, create.get("in_chans", 3), *size)
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    loaded = SelfDistillModel.from_pretrained(tmp_path / "model")
    assert loaded.exits == model.exits
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(plain(x), model(x))
        for got, expected in zip(loaded.forward_exits(x).logits, model.forward_exits(x).logits, strict=True):
            assert torch.equal(got, expected)


def test_a_reloaded_model_can_be_saved_again(saved, tmp_path):
    SelfDistillModel.from_pretrained(saved).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((saved / "config.json").read_text())


def test_a_head_of_ones_own_is_given_again_when_loading(tmp_path):
    model = small_model(head=LinearHead).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head of its own.*from_pretrained\(\.\.\., head=\.\.\.\)"):
        SelfDistillModel.from_pretrained(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    loaded = SelfDistillModel.from_pretrained(tmp_path, head=LinearHead)
    assert torch.equal(loaded.predict(x, 0), model.predict(x, 0))


def test_class_names_metrics_and_preprocessing_travel(tmp_path):
    model = small_model()
    model.backbone.pretrained_cfg.update(
        label_names=[f"class {i}" for i in range(10)], mean=(0.1, 0.2, 0.3), input_size=(3, 48, 48)
    )
    model.save_pretrained(tmp_path, metrics={"top1": 81.5})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"][9] == "class 9"
    assert config["self_distill"]["metrics"] == {"top1": 81.5}
    loaded = SelfDistillModel.from_pretrained(tmp_path)
    data_config = timm.data.resolve_model_data_config(loaded.backbone)
    assert tuple(data_config["mean"]) == (0.1, 0.2, 0.3)
    assert tuple(data_config["input_size"]) == (3, 48, 48)


def test_files_are_readable_as_any_other_file(saved, tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert {stat.S_IMODE((saved / name).stat().st_mode) for name in FILES} == {stat.S_IMODE(ordinary.stat().st_mode)}


@pytest.mark.parametrize(("module", "replacement"), [("layer4", nn.Conv2d(256, 512, 3, 2)), ("act1", nn.GELU())])
def test_a_backbone_that_timm_cannot_rebuild_is_refused_and_the_old_model_stays(module, replacement, copied):
    before = {name: (copied / name).read_bytes() for name in FILES}
    backbone = timm.create_model("resnet10t", num_classes=10)
    setattr(backbone, module, replacement)
    with pytest.raises(ValueError, match="rebuild .*model_args="):
        wrap_self_distill(backbone).save_pretrained(copied)
    assert {name: (copied / name).read_bytes() for name in FILES} == before
    assert {path.name for path in copied.iterdir()} == FILES


@pytest.mark.parametrize("file", ["model.safetensors", "self_distill.safetensors"])
@pytest.mark.parametrize("length", [0, 7, 1000, -1])
def test_truncated_files_are_named(copied, file, length):
    path = copied / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{file} .*damaged"):
        SelfDistillModel.from_pretrained(copied)


def test_tensors_of_another_model_are_refused(copied):
    shutil.copy(copied / "self_distill.safetensors", copied / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors .*tensors: \d+ missing .*, \d+ foreign"):
        SelfDistillModel.from_pretrained(copied)


def test_tensors_of_another_shape_are_refused(copied, tmp_path):
    small_model(num_classes=7).save_pretrained(tmp_path / "seven")
    shutil.copy(tmp_path / "seven" / "self_distill.safetensors", copied)
    with pytest.raises(ValueError, match=r"fc.bias has shape \(7,\), expected \(10,\)"):
        SelfDistillModel.from_pretrained(copied)


@pytest.mark.parametrize("file", sorted(MODEL_FILES))
def test_missing_files_are_named(copied, file):
    (copied / file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"/{file} .*exist"):
        SelfDistillModel.from_pretrained(copied)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere .*no folder here.*user/name"):
        SelfDistillModel.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_version": 1}, "version 1, .*timm-selfdistill .* reads 2"),
        ({"format_version": None}, "version None, .*timm-selfdistill .* reads 2"),
        ({"exits": [9]}, "ResNet .*level 9 .*layer1"),
        ({"exits": None}, "damaged.*exits=None"),
        ({"head": "foo"}, "unknown head 'foo'"),
        ({"head_args": 3}, "damaged.*head_args=3"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(copied, settings, message):
    edit_config(copied, **settings)
    with pytest.raises(ValueError, match=message):
        SelfDistillModel.from_pretrained(copied)


def test_a_config_that_is_no_json_or_a_plain_timm_models_is_refused(copied):
    config = json.loads((copied / "config.json").read_text())
    del config["self_distill"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='"self_distill".*timm.create_model'):
        SelfDistillModel.from_pretrained(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        SelfDistillModel.from_pretrained(copied)


def test_saving_to_a_file_is_refused(saved):
    with pytest.raises(FileExistsError, match=r"config\.json .*file; .*folder"):
        small_model().save_pretrained(saved / "config.json")


def test_saving_leaves_random_numbers_and_modes_alone(tmp_path):
    model = small_model().train()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


def test_a_picture_of_the_users_stays(tmp_path):
    (tmp_path / "exits.png").write_text("mine")
    small_model().save_pretrained(tmp_path, check=False)
    assert (tmp_path / "exits.png").read_text() == "mine"


def test_a_plain_network_leaves_no_heads_of_an_earlier_model(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path, check=False)
    assert (tmp_path / "self_distill.safetensors").exists()
    save_timm_model(model.backbone, tmp_path, metrics={"epoch": 1}, check=False)
    assert not (tmp_path / "self_distill.safetensors").exists()


@pytest.mark.parametrize("content", ["not json", "[]", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_a_config_of_the_users_is_no_reason_not_to_save(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "exits.png").write_bytes(b"mine")
    small_model().save_pretrained(tmp_path, picture=False)
    assert (tmp_path / "exits.png").read_bytes() == b"mine"
    SelfDistillModel.from_pretrained(tmp_path)
