"""Every method through the `Trainer`: what is trained, kept, evaluated and saved."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn
from torch.utils.data import Subset

from timm_selfdistill import SelfDistillModel, SelfDistillTask, TrainConfig, Trainer, model_data_config
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
    deep_supervision_loss,
)
from timm_selfdistill.training.loop.optimizer import create_optimizer
from timm_selfdistill.training.state.checkpoint import list_checkpoints

from ..conftest import small_backbone, small_model
from ..training.test_trainer import fit, interrupt_after, same_weights, settings

TASKS: dict[str, Callable[[], TrainingTask]] = {
    "dsn": lambda: SelfDistillTask(small_model(in_chans=1), deep_supervision_loss()),
    "kd": lambda: LogitDistillationTask(small_backbone(in_chans=1), small_backbone(in_chans=1), nn.CrossEntropyLoss()),
    "fitnet": lambda: FitNetTask(small_backbone(in_chans=1), small_backbone(in_chans=1)),
    "at": lambda: AttentionTransferTask(small_backbone(in_chans=1), small_backbone(in_chans=1)),
    "dml": lambda: MutualLearningTask(small_backbone(in_chans=1), small_backbone(in_chans=1)),
    "dks": lambda: SelfDistillTask(small_model(in_chans=1), KnowledgeSynergyLoss()),
}
WITH_TEACHER, WITH_EXITS = ("kd", "fitnet", "at"), ("dsn", "dks")


@pytest.fixture
def few(fashion_tensors):
    return Subset(fashion_tensors[0], range(60)), Subset(fashion_tensors[1], range(30))


def plain_task() -> TrainingTask:
    return ClassificationTask(small_backbone(in_chans=1), verbose=False)


def make(method: str) -> TrainingTask:
    torch.manual_seed(0)
    return TASKS[method]()


@pytest.mark.parametrize("method", TASKS)
def test_a_run_saves_a_plain_timm_model_and_leaves_the_teacher_alone(method, few, tmp_path):
    task = make(method)
    teacher = getattr(task, "teacher", None)
    before = {name: value.clone() for name, value in teacher.state_dict().items()} if teacher else {}
    result, _ = fit(tmp_path, few, task, epochs=1, model_ema=True, model_ema_decay=0.5)

    evaluated = task.get_eval_model(ema=True)
    evaluated = getattr(evaluated, "module", evaluated)
    network = evaluated.backbone if method in WITH_EXITS else evaluated
    same_weights(timm.create_model(f"local-dir:{tmp_path / 'best'}", pretrained=True), network, rtol=0, atol=0)
    assert len(result.summary["exits"]) == (5 if method in WITH_EXITS else 1)
    if method in WITH_EXITS:
        assert SelfDistillModel.from_pretrained(tmp_path / "best").exits == evaluated.exits
    else:
        assert {"train_task_loss", "train_kd_loss"} <= result.history[0].keys()
        assert type(task.get_eval_model()) is type(network) is type(small_backbone())

    (checkpoint,) = list_checkpoints(tmp_path / "checkpoints")
    kept = load_file(checkpoint / "model.safetensors")
    assert not any(name.startswith("teacher.") for name in kept)
    assert (teacher is not None) == (method in WITH_TEACHER)
    assert all(torch.equal(value, before[name]) for name, value in (teacher.state_dict() if teacher else {}).items())
    extra = {"fitnet": "trainable_module.projection.weight", "dml": "trainable_module.peer.fc.weight"}
    assert method not in extra or extra[method] in kept


@pytest.mark.parametrize("method", ["fitnet", "dml"])
def test_a_run_stopped_in_the_middle_goes_on_as_if_nothing_had_happened(method, few, tmp_path, monkeypatch):
    changes = {"batch_size": 20, "opt": "adamw", "lr": 1e-3, "mixup": 0.2, "smoothing": 0.1}
    undisturbed, task = fit(tmp_path / "a", few, make(method), **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        fit(tmp_path / "b", few, make(method), **changes)
    resumed, again = fit(tmp_path / "b", few, make(method), resume="latest", **changes)
    same_weights(task, again, rtol=0, atol=0)  # the regressor and the peer, too
    assert resumed.history == undisturbed.history


def test_a_run_is_not_gone_on_with_under_another_teacher(few, tmp_path):
    fit(tmp_path, few, make("at"), epochs=1)
    task = make("at")
    with torch.no_grad():
        task.teacher.model.conv1[0].weight.mul_(2)
    with pytest.raises(ValueError, match="whose teacher .*different weights.*resume with .*teacher"):
        fit(tmp_path, few, task, epochs=2, resume="latest")


def test_a_run_is_not_gone_on_with_where_there_was_no_teacher(few, tmp_path):
    fit(tmp_path / "plain", few, plain_task(), epochs=1)
    with pytest.raises(ValueError, match="neither .*teacher .*frozen backbone, .*has one; resume"):
        fit(tmp_path / "plain", few, make("kd"), epochs=2, resume="latest")
    fit(tmp_path / "kd", few, make("kd"), epochs=1)
    with pytest.raises(ValueError, match="with a teacher .*frozen backbone, .*has none; resume"):
        fit(tmp_path / "kd", few, plain_task(), epochs=2, resume="latest")


def test_what_a_task_of_ones_own_calls_its_teacher_is_trained_and_kept(few, tmp_path):
    task = plain_task()
    task.teacher = "ensemble"
    fit(tmp_path / "word", few, task, epochs=1)
    task = plain_task()
    task.teacher = nn.Linear(2, 2)  # as a mean teacher
    fit(tmp_path / "module", few, task, epochs=1)
    (checkpoint,) = list_checkpoints(tmp_path / "module" / "checkpoints")
    assert {"teacher.weight", "teacher.bias"} < load_file(checkpoint / "model.safetensors").keys()
    assert all(p.requires_grad for p in task.teacher.parameters())


@pytest.mark.parametrize("method", WITH_TEACHER)
def test_a_teacher_whose_weights_are_not_finite_is_refused(method, few, tmp_path):
    task = make(method)
    with torch.no_grad():
        task.teacher.model.fc.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"teacher's weights .*not finite, fc\.bias .*another teacher"):
        fit(tmp_path, few, task)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["kd", "fitnet", "at", "dml"])
def test_the_optimizer_and_the_modes_of_training(method, few, tmp_path):
    task = make(method).train()
    Trainer(task, *few, settings(tmp_path, channels_last=True))
    names = {name.split(".")[0] for name, p in task.named_parameters() if p.requires_grad}
    assert names == {"trainable_module"}
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in task.parameters() if p.ndim == 4)
    if method in WITH_TEACHER:
        assert not any(part.training for part in task.teacher.modules())
        assert {id(p) for p in task.teacher.parameters()}.isdisjoint(map(id, task.trainable_module.parameters()))


@pytest.mark.parametrize("method", ["fitnet", "at", "dml"])
def test_learning_rates_by_layer_know_all_that_learns(method):
    module = make(method).get_trainable_module()
    matcher = module.group_matcher()
    groups = {name: matcher(name) for name, _ in module.named_parameters()}
    first, last = groups["student.conv1.0.weight"], groups["student.fc.weight"]
    assert first < last == groups.get("projection.weight", last) == groups.get("peer.fc.weight", last)
    optimizer = create_optimizer(module, TrainConfig(layer_decay=0.7))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)


def test_the_classifiers_of_peers_of_other_depths_learn_at_the_same_rate():
    module = MutualLearningTask(small_backbone(), small_backbone("resnet18")).get_trainable_module()
    matcher = module.group_matcher()
    assert [
        matcher(name) for name in ("student.conv1.0.weight", "student.fc.weight", "peer.conv1.weight", "peer.fc.weight")
    ] == [4, 9, 0, 9]
    optimizer = create_optimizer(module, TrainConfig(layer_decay=0.5))
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales[id(module.student.fc.weight)] == scales[id(module.peer.fc.weight)] == 1


@pytest.mark.parametrize("method", ["fitnet", "dml"])
def test_networks_without_exits_have_no_learning_rate_for_heads(method):
    with pytest.raises(ValueError, match="head_lr_scale needs a network with exits"):
        create_optimizer(make(method).get_trainable_module(), TrainConfig(head_lr_scale=2.0))


@pytest.mark.parametrize("method", ["fitnet", "at", "dml"])
def test_distributed_and_compiled_as_timm_does_it(method, tmp_path):
    task, x, y = make(method).train(), torch.randn(4, 1, 32, 32), torch.arange(4)
    student = task.get_eval_model()
    expected = student.eval()(x)
    task.compile(backend="eager")
    torch.testing.assert_close(task.get_eval_model()(x), expected)
    task.train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        task.prepare_distributed()
        for _ in range(2):  # the second pass fails where parameters of the first had no gradient
            task(x, y)["loss"].backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in student.parameters())
    state = task.get_checkpoint_state()
    assert set(state["state_dict"]) == set(small_backbone().state_dict())
    assert set(state.get("task_state", {})) == {"fitnet": {"projection"}, "dml": {"peer"}}.get(method, set())
    make(method).load_checkpoint_state(state["state_dict"], state.get("task_state"))


def test_networks_that_do_not_fit_are_refused():
    network = small_backbone()
    with pytest.raises(ValueError, match=r"teacher \(ResNet\) .*7 classes, .*student \(ResNet\) 10; take a teacher"):
        FitNetTask(network, small_backbone(num_classes=7))
    with pytest.raises(ValueError, match=r"teacher \(ResNet\) .*1 image channels, .*student \(ResNet\) 3;"):
        AttentionTransferTask(network, small_backbone(in_chans=1))
    with pytest.raises(ValueError, match=r"peer \(ResNet\) .*7 classes, .*student \(ResNet\) 10; take a peer"):
        MutualLearningTask(network, small_backbone(num_classes=7))
    with pytest.raises(ValueError, match="student and peer .*same weights"):
        MutualLearningTask(network, network)
    with pytest.raises(TypeError, match=r"timm model, got torch\.nn\.modules\.linear\.Linear"):
        FitNetTask(network, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"level 2 \(layer2\) of ResNet .*1/8 .* VisionTransformer 1/16; .*teacher"):
        FitNetTask(network, small_backbone("test_vit"))
    with pytest.raises(ValueError, match="distill_loss_weight .*>= 0, got -1"):
        FitNetTask(network, small_backbone(), distill_loss_weight=-1)
    for task in (FitNetTask, AttentionTransferTask):
        with pytest.raises(ValueError, match="student and teacher .*one model, .*teacher$"):
            task(network, network)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="distill_loss_weight .*>= 0, got nan"):
        KnowledgeSynergyLoss(float("nan"))


@pytest.mark.parametrize("make", [FitNetTask, AttentionTransferTask])
def test_grey_networks_of_other_normalisations(make):
    """timm gives networks for grey images the means of three channels."""
    student, teacher = small_backbone(in_chans=1), small_backbone("resnet10t", in_chans=1)
    with pytest.raises(ValueError, match=r"\(0.5, 0.5, 0.5\), .*1 channel\(s\); .*model_data_config\(model, size, 1\)"):
        make(student, teacher)
    model_data_config(student, 32, in_chans=1)
    with pytest.raises(ValueError, match=r"teacher's mean and std, \(0.485, 0.456, 0.406\) and"):
        make(student, teacher)
    model_data_config(teacher, 32, in_chans=1)
    task = make(student, teacher)
    assert task(torch.randn(4, 1, 32, 32), torch.arange(4))["loss"].isfinite()
    assert task.scale.item() == pytest.approx(0.5 / 0.226, rel=1e-3)
    assert task.shift.item() == pytest.approx((0.5 - 0.449) / 0.226, rel=1e-3)


def test_attention_goes_from_a_transformer_to_a_convolutional_network():
    task = AttentionTransferTask(small_backbone(), small_backbone("test_vit", img_size=64)).train()
    result = task(torch.randn(2, 3, 64, 64), torch.arange(2))
    assert 0 < result["kd_loss"] < 1


def test_networks_of_other_numbers_of_stages_are_refused():
    student, teacher = small_backbone(), small_backbone()
    teacher.feature_info = teacher.feature_info[2:]
    with pytest.raises(ValueError, match=r"ResNet .*4 stages .*level 1 \(layer1\), .*teacher ResNet 3 \(level "):
        AttentionTransferTask(student, teacher)
