import math

import pytest

from timm_selfdistill import TrainConfig


@pytest.mark.parametrize(("setting", "message"), [
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"batch_size": "big"}, "batch_size must be a number or \"auto\", got 'big'"),
    ({"validation_batch_size": "auto"}, "validation_batch_size must be a number, got 'auto'"),
    ({"grad_accum_steps": 0}, "grad_accum_steps must be at least 1"),
    ({"lr": math.nan}, "lr must be a number >= 0, got nan"),
    ({"seed": -1}, "seed must be a number >= 0, got -1"),
    ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\)"),
    ({"clip_grad": 0.0}, "clip_grad must be > 0"),
    ({"mixup": 0.2, "batch_size": 15}, "batch_size must be even, got 15"),
    ({"opt": "sgdd"}, "unknown optimizer 'sgdd'; timm has .*sgd"),
    ({"sched": "plateau"}, "unknown schedule 'plateau'; choose from cosine"),
    ({"mixup_mode": "foo"}, "mixup_mode must be .*, got 'foo'"),
    ({"mixup_prob": 7}, r"mixup_prob must lie in \[0, 1\], got 7"),
    ({"model_ema_decay": 5}, r"model_ema_decay must lie in \[0, 1\], got 5"),
    ({"validation_batch_size": 0}, "validation_batch_size must be at least 1"),
    ({"momentum": -1}, "momentum must be a number >= 0"),
    ({"amp_dtype": "fp8"}, "amp_dtype must be one of float16, bfloat16, got 'fp8'"),
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
