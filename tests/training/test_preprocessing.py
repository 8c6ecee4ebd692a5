import pytest

from timm_selfdistill import model_data_config

from ..conftest import small_backbone


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_channels_are_the_models_own(name, channels):
    model = small_backbone(name, in_chans=channels)
    config = model_data_config(model, 160)
    assert config["input_size"] == model.pretrained_cfg["input_size"] == (channels, 160, 160)
    assert len(config["mean"]) == len(config["std"]) == channels
    assert model_data_config(model, 160, 3)["input_size"] == (3, 160, 160)
