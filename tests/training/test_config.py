import math

import numpy as np
import pytest
import torch
import yaml

from timm_selfdistill import TrainConfig
from timm_selfdistill.cli import parse_args, train_config, train_parser

from ..conftest import small_backbone


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, r"^epochs .*1, got 0"),
        ({"batch_size": 0}, r"^batch_size .*1, got 0"),
        ({"batch_size": "big"}, r"^batch_size .*\"auto\", got 'big'"),
        ({"validation_batch_size": "auto"}, r"^validation_batch_size .*number, got 'auto'"),
        ({"grad_accum_steps": 0}, r"^grad_accum_steps .*1, got 0"),
        ({"lr": math.nan}, r"^lr .*>= 0, got nan"),
        ({"seed": -1}, r"^seed .*>= 0, got -1"),
        ({"smoothing": 1.0}, r"^smoothing .*\[0, 1\), got 1\.0"),
        ({"clip_grad": 0.0}, r"^clip_grad .*> 0, got 0\.0"),
        ({"mixup": 0.2, "batch_size": 15}, r"batch_size must be even with mixup .*, got 15"),
        ({"opt": "sgdd"}, r"optimizer 'sgdd'; did you mean sgd, "),
        ({"sched": "cubic"}, r"schedule 'cubic'; .*cosine, tanh"),
        ({"mixup_mode": "foo"}, r"^mixup_mode .*batch, pair, elem, got 'foo'"),
        ({"mixup_prob": 7}, r"^mixup_prob .*\[0, 1\], got 7"),
        ({"model_ema_decay": 5}, r"^model_ema_decay .*\[0, 1\], got 5"),
        ({"validation_batch_size": 0}, r"^validation_batch_size .*1, got 0"),
        ({"momentum": -1}, r"^momentum .*>= 0, got -1"),
        ({"amp_dtype": "fp8"}, r"^amp_dtype .*float16, bfloat16, got 'fp8'"),
    ],
)
def test_values_that_cannot_work_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_a_batch_size_to_be_found_goes_with_mixup():
    assert TrainConfig(batch_size="auto", mixup=0.2).batch_size == "auto"


def test_precision_by_accelerates_name():
    assert TrainConfig().mixed_precision is None
    assert TrainConfig(amp=True).mixed_precision == "fp16"
    assert TrainConfig(amp=True, amp_dtype="bfloat16").mixed_precision == "bf16"


def test_scalars_of_other_libraries_and_paths_are_recorded_as_plain_yaml(tmp_path):
    config = TrainConfig(
        output=tmp_path / "run",
        epochs=np.int64(3),
        batch_size=torch.tensor(8),
        lr=np.float32(0.5),
        model_ema=np.True_,
        momentum=torch.tensor(0.75),
        report_to="tensorboard",
        decay_milestones=30,
        settings={
            "model": np.str_("resnet18"),
            "scale": (np.float64(0.5), torch.tensor(1)),
            "found": {"folder": tmp_path, "counts": {np.int64(1): np.arange(2)}},
        },
    )
    assert (config.report_to, config.decay_milestones, config.epochs) == (("tensorboard",), (30,), 3)
    config.settings["hflip"] = np.float64(0.25)  # added later
    text = yaml.safe_dump(config.to_dict())
    read = yaml.safe_load(text)
    assert read == config.to_dict()
    assert "!" not in text
    assert (read["output"], read["lr"], read["model_ema"]) == (str(tmp_path / "run"), 0.5, True)
    assert read["found"] == {"folder": str(tmp_path), "counts": {1: [0, 1]}}
    (tmp_path / "config.yaml").write_text(text)
    again = train_config(parse_args(train_parser("", "images"), ["--config", str(tmp_path / "config.yaml")]))
    assert (again.epochs, again.batch_size, again.report_to, again.decay_milestones) == (3, 8, ("tensorboard",), (30,))
    assert (again.settings["scale"], again.settings["hflip"]) == ([0.5, 1.0], 0.25)


def test_settings_are_no_fields():
    with pytest.raises(ValueError, match=r"settings .*epochs, lr; .*TrainConfig\(epochs=\.\.\.\)"):
        TrainConfig(settings={"lr": 1, "epochs": 2, "model": "a"})
    config = TrainConfig()
    config.settings["seed"] = 1
    with pytest.raises(ValueError, match="settings .*seed"):
        config.to_dict()


def test_settings_that_yaml_cannot_tell():
    with pytest.raises(TypeError, match=r"settings\['model'\] .*path, .*got ResNet"):
        TrainConfig(settings={"model": small_backbone()})


def test_numbers_that_count_are_whole():
    assert TrainConfig(epochs=3.0).epochs == 3
    with pytest.raises(ValueError, match="epochs must be a whole number, got 2.5"):
        TrainConfig(epochs=2.5)
