import math

import pytest

from timm_selfdistill import TrainConfig


@pytest.mark.parametrize(("setting", "message"), [
    ({"epochs": 0}, r"^epochs .*1, got 0"),
    ({"batch_size": 0}, r"^batch_size .*1, got 0"),
    ({"batch_size": "big"}, r"^batch_size .*\"auto\", got 'big'"),
    ({"validation_batch_size": "auto"}, r"^validation_batch_size .*number, got 'auto'"),
    ({"grad_accum_steps": 0}, r"^grad_accum_steps .*1, got 0"),
    ({"lr": math.nan}, r"^lr .*>= 0, got nan"),
    ({"seed": -1}, r"^seed .*>= 0, got -1"),
    ({"smoothing": 1.0}, r"^smoothing .*\[0, 1\), got 1\.0"),
    ({"clip_grad": 0.0}, r"^clip_grad .*> 0, got 0\.0"),
    ({"mixup": 0.2, "batch_size": 15}, r"mixup .*batch_size .*even, got 15"),
    ({"opt": "sgdd"}, r"optimizer 'sgdd'; timm .*\bsgd\b"),
    ({"sched": "plateau"}, r"schedule 'plateau'; .*cosine, tanh"),
    ({"mixup_mode": "foo"}, r"^mixup_mode .*batch, pair, elem, got 'foo'"),
    ({"mixup_prob": 7}, r"^mixup_prob .*\[0, 1\], got 7"),
    ({"model_ema_decay": 5}, r"^model_ema_decay .*\[0, 1\], got 5"),
    ({"validation_batch_size": 0}, r"^validation_batch_size .*1, got 0"),
    ({"momentum": -1}, r"^momentum .*>= 0, got -1"),
    ({"amp_dtype": "fp8"}, r"^amp_dtype .*float16, bfloat16, got 'fp8'"),
])
def test_values_that_cannot_work_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_a_batch_size_to_be_found_goes_with_mixup():
    assert TrainConfig(batch_size="auto", mixup=0.2).batch_size == "auto"


def test_precision_by_accelerates_name():
    assert TrainConfig().mixed_precision is None
    assert TrainConfig(amp=True).mixed_precision == "fp16"
    assert TrainConfig(amp=True, amp_dtype="bfloat16").mixed_precision == "bf16"
