"""What only a GPU shows: half precision, memory formats, compiled stages, the loss scale of fp16, no waiting, and how
large a batch its memory holds."""

import copy

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from timm_selfdistill import (
    AnswerMemory,
    EarlyExit,
    SelfDistillLoss,
    SelfDistillModel,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    TruncatedModel,
)
from timm_selfdistill.training.loop.update import Updater

from .conftest import small_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def _exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield
    AcceleratorState._reset_state(True)


def images(model: SelfDistillModel, count: int) -> torch.Tensor:
    like = next(model.parameters())
    x = torch.randn(count, *model.backbone.pretrained_cfg["input_size"])
    return (x * torch.linspace(0.1, 3, count)[torch.randperm(count), None, None, None]).to(like)


def check_early_exit(model: SelfDistillModel, tolerance: float, compile_stage: bool = False) -> None:
    """Half of the images leave at each exit; the answers are those of `forward_exits`."""
    x = images(model, 16)
    with torch.no_grad():
        full = model.forward_exits(x).logits
        thresholds = [float(part.float().softmax(1).amax(1).quantile(0.5)) for part in full[:-1]]
        if compile_stage:
            model.backbone.get_submodule(model.stages[0].name).compile()
        found = EarlyExit(model, thresholds).predict(x)
    assert len(found.exit.unique()) > 1
    expected = torch.stack([full[exit][row] for row, exit in enumerate(found.exit.tolist())])
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.logits.float(), expected.float(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet10t"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)])
def test_early_exit(name, dtype, tolerance):
    check_early_exit(small_model(name).eval().to("cuda", dtype), tolerance)


def test_early_exit_in_channels_last_and_under_autocast():
    model = small_model("resnet10t").eval().cuda().to(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.float16):
        check_early_exit(model, 1e-2)


def test_early_exit_with_a_compiled_stage():
    check_early_exit(small_model("resnet10t").eval().cuda(), 1e-4, compile_stage=True)


def test_a_truncated_model_and_the_way_over_the_disk(tmp_path):
    model = small_model().eval().cuda()
    x = images(model, 4)
    fast = model.truncate(0)
    torch.testing.assert_close(fast(x), model.predict(x, 0))
    fast.save_pretrained(tmp_path)
    torch.testing.assert_close(TruncatedModel.from_pretrained(tmp_path).cuda()(x), fast(x))


def test_the_loss_is_finite_in_half_precision():
    model = small_model().train().cuda()
    x, y = images(model, 8), torch.arange(8, device="cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        output = model(x)
        huge = output._replace(logits=tuple(logits * 60000 for logits in output.logits))
        assert SelfDistillLoss()(huge, y).isfinite()


def fit(
    folder, data, epochs: int = 2, amp_dtype: str | None = None, teacher: str = "ensemble", **changes
) -> tuple[Trainer, dict]:
    torch.manual_seed(0)
    task = SelfDistillTask(small_model(in_chans=1), SelfDistillLoss(teacher=teacher))
    config = TrainConfig(
        output=str(folder),
        epochs=epochs,
        batch_size=50,
        workers=0,
        lr=0.02,
        log_interval=4,
        amp=amp_dtype is not None,
        amp_dtype=amp_dtype or "float16",
        **changes,
    )
    trainer = Trainer(task, *data, config)
    trainer.fit()
    return trainer, {key: value.cpu() for key, value in trainer.eval_model.state_dict().items()}


@pytest.mark.parametrize("teacher", ["ensemble", "memory"])
@pytest.mark.parametrize("amp_dtype", [None, "float16", "bfloat16"])
def test_a_resumed_run_ends_as_the_undisturbed_one(amp_dtype, teacher, fashion_tensors, tmp_path):
    changes = {"amp_dtype": amp_dtype, "teacher": teacher, "sched": "none", "warmup_epochs": 0}
    undisturbed, expected = fit(tmp_path / "a", fashion_tensors, **changes)
    AcceleratorState._reset_state(True)
    fit(tmp_path / "b", fashion_tensors, epochs=1, **changes)
    AcceleratorState._reset_state(True)
    resumed, found = fit(tmp_path / "b", fashion_tensors, resume="latest", **changes)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    if amp_dtype == "float16":
        assert resumed.accelerator.scaler.get_scale() == undisturbed.accelerator.scaler.get_scale() > 1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"amp_dtype": "bfloat16", "channels_last": True},
        {"mixup": 0.2, "cutmix": 0.5, "model_ema": True, "smoothing": 0.1, "opt": "adamw"},
        {"torchcompile": True},
        {"teacher": "memory", "mixup": 0.2, "mixup_prob": 0.5},
    ],
)
def test_a_step_does_not_wait_for_the_gpu(changes, fashion_tensors, tmp_path, monkeypatch):
    """Between two looks at the losses the processor runs ahead; torch raises where it would have to wait. (With fp16
    it waits: torch's GradScaler looks whether gradients overflowed.)"""
    update, calls = Updater.__call__, []

    def watched(self, *args):
        calls.append(None)
        mode = "error" if len(calls) > 2 else "default"  # the first allocates, compiles and chooses kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return update(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Updater, "__call__", watched)
    fit(tmp_path, fashion_tensors, **changes)
    assert len(calls) > 2


@pytest.mark.parametrize(
    "changes", [{}, {"opt": "adamw", "amp_dtype": "bfloat16", "channels_last": True, "mixup": 0.2}]
)
def test_the_largest_batch_is_found_and_leaves_no_trace(changes, fashion_tensors, tmp_path):
    """400 images: 256 is the largest power of two; in 2 GiB of memory, fewer of 224 pixels fit."""
    amp = {"amp": "amp_dtype" in changes, **changes}
    config = TrainConfig(output=str(tmp_path / "a"), epochs=1, batch_size="auto", workers=0, **amp)
    task = SelfDistillTask(small_model("resnet18", in_chans=1))
    expected = copy.deepcopy(task.state_dict())
    before = torch.cuda.memory_allocated()
    trainer = Trainer(task, *fashion_tensors, config)
    assert trainer.config.batch_size == 256
    for key, value in task.state_dict().items():
        assert torch.equal(value.cpu(), expected[key]), key
    weights = sum(value.numel() * value.element_size() for value in task.state_dict().values())
    most = before + 2 * weights + 2**26  # the weights and cuBLAS's workspace, no copy with gradients and moments
    assert torch.cuda.memory_allocated() < most
    assert torch.cuda.max_memory_allocated() < most  # what the run reports
    trainer.fit()
    assert yaml.safe_load((tmp_path / "a/config.yaml").read_text())["batch_size"] == 256

    AcceleratorState._reset_state(True)
    del trainer, task
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(2**31 / total)
    try:
        config = TrainConfig(output=str(tmp_path / "b"), epochs=1, batch_size="auto", workers=0, **amp)
        large = tuple(Enlarged(part) for part in fashion_tensors)
        trainer = Trainer(SelfDistillTask(small_model("resnet18", in_chans=1)), *large, config)
        assert 2 <= trainer.config.batch_size < 256
        trainer.fit()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Enlarged(torch.utils.data.Dataset):
    """The images of a data set at 224 pixels."""

    num_classes = 10

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x.repeat_interleave(7, 1).repeat_interleave(7, 2), y


@pytest.mark.parametrize("topk", [0, 5])
def test_a_memory_of_answers_is_that_of_a_cpu(topk):
    """Also where an image comes several times in an update."""
    memories = [AnswerMemory(30, 40, topk=topk, device=device) for device in ("cpu", "cuda")]
    for _ in range(4):
        indices, answers = torch.randint(-1, 30, (64,)), torch.randn(64, 40)
        for memory in memories:
            memory.update(indices.to(memory.device), answers.to(memory.device))
    expected, found = (memory.lookup(torch.arange(-1, 30).to(memory.device)) for memory in memories)
    assert torch.equal(found.known.cpu(), expected.known)
    torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("amp_dtype", [None, "float16", "bfloat16"])
def test_exits_on_a_frozen_backbone_with_cached_features(amp_dtype, fashion_tensors, tmp_path):
    """Not a bit of the backbone changes, and the cache gives what the images give."""
    runs = []
    for cache in (False, True):
        torch.manual_seed(0)
        model = small_model("resnet18", in_chans=1, freeze_backbone=True)
        before = copy.deepcopy(model.backbone.state_dict())
        amp = {"amp": amp_dtype is not None, "amp_dtype": amp_dtype or "float16"}
        config = TrainConfig(
            output=str(tmp_path / str(cache)),
            epochs=2,
            batch_size=50,
            workers=0,
            model_ema=True,
            channels_last=True,
            unlabelled=True,
            cache_features=cache,
            **amp,
        )
        Trainer(SelfDistillTask(model), *fashion_tensors, config).fit()
        assert all(torch.equal(value.cpu(), before[key]) for key, value in model.backbone.state_dict().items())
        runs.append(model.heads.state_dict())
    for key, value in runs[0].items():
        torch.testing.assert_close(runs[1][key], value, rtol=1e-2, atol=1e-3)
