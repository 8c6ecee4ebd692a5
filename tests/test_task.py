import copy
import pickle

import pytest
import torch
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from timm_selfdistill import SelfDistillLoss, SelfDistillTask
from timm_selfdistill.baselines import KnowledgeSynergyLoss
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.task import FrozenBackboneTask

from .conftest import small_backbone, small_model


def test_a_timm_training_task_that_gives_the_terms_of_its_loss():
    criterion = SelfDistillLoss.paper(alpha=0.4, beta=0.5)
    task = SelfDistillTask(small_model(), criterion)
    assert isinstance(task, TrainingTask)
    result = task.train()(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))
    assert set(result) == {"loss", "output", "label_loss", "distill_loss", "hint_loss"}
    assert result["output"].shape == (2, 10)
    torch.testing.assert_close(
        result["loss"], result["label_loss"] + 0.4 * result["distill_loss"] + 0.5 * result["hint_loss"]
    )
    result["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


@pytest.mark.parametrize(("frozen", "loss"), [(False, SelfDistillLoss()), (True, SelfDistillLoss.paper())])
def test_the_loss_where_none_is_given(frozen, loss):
    assert repr(SelfDistillTask(small_model(freeze_backbone=frozen)).criterion) == repr(loss)


def test_the_heads_of_a_frozen_backbone_are_what_is_trained():
    model = small_model(freeze_backbone=True)
    task = SelfDistillTask(model)
    assert isinstance(task, FrozenBackboneTask)
    assert list(task.get_trainable_module().parameters()) == list(model.heads.parameters())
    task.train()
    assert model.training
    assert model.heads.training
    assert not model.backbone.training
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    by_images, by_features = task(x, y), task(task.frozen(x), y)
    whole = SelfDistillLoss.paper().terms(model(x), y)
    for name, value in by_images.items():
        assert torch.equal(value, by_features[name])
    assert torch.equal(by_images["loss"], whole["loss"])
    by_images["loss"].backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.heads.parameters())
    assert task.get_eval_model() is model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_of_a_frozen_task_is_one_of_its_own(copied):
    task = SelfDistillTask(small_model(freeze_backbone=True))
    other = copied(task).double()
    assert type(other) is FrozenBackboneTask
    assert other.model.heads is other.get_trainable_module().heads is not task.model.heads
    assert other.model.backbone is other.frozen.backbone is not task.model.backbone
    x = torch.randn(2, 3, 32, 32)
    assert other(x.double())["output"].dtype == torch.double
    assert task(x)["output"].dtype == torch.float


def test_a_frozen_model_in_a_task_that_trains_all_of_it_and_the_reverse():
    class Own(SelfDistillTask):
        pass

    with pytest.raises(TypeError, match=r"frozen, and Own trains the whole network; .*FrozenBackboneTask"):
        Own(small_model(freeze_backbone=True))
    with pytest.raises(ValueError, match=r"freeze_backbone=True\)"):
        FrozenBackboneTask(small_model())


def test_a_compiled_frozen_task_gives_the_same():
    task, x = SelfDistillTask(small_model(freeze_backbone=True)).train(), torch.randn(2, 3, 32, 32)
    expected = copy.deepcopy(task)(x, torch.tensor([0, 1]))
    assert task.compile("eager")._orig_mod is task.model
    for name, value in task(x, torch.tensor([0, 1])).items():
        torch.testing.assert_close(value, expected[name])


def test_in_eval_mode_too():
    task = SelfDistillTask(small_model(), SelfDistillLoss.paper()).eval()
    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    result = task(x, y)
    assert torch.equal(result["output"], task.get_eval_model()(x))
    assert result["hint_loss"] > 0


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_features_are_made_for_losses_that_look_at_them(freeze_backbone):
    class Own(SelfDistillLoss):
        def terms(self, output, target=None):
            return super().terms(output, target)

    x, y = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    for criterion, count in (
        (SelfDistillLoss(), 0),
        (SelfDistillLoss.paper(), 4),
        (SelfDistillLoss.paper(beta=0.0), 0),
        (SelfDistillLoss(hint="pooled"), 4),
        (KnowledgeSynergyLoss(), 0),
        (Own(), 4),
    ):
        seen = []
        task = SelfDistillTask(small_model(freeze_backbone=freeze_backbone), criterion)
        terms = criterion.terms
        criterion.terms = lambda output, target, terms=terms, seen=seen: (
            seen.append(len(output.features)) or terms(output, target)
        )
        for mode in (True, False):
            task.train(mode)(x, y)
        assert seen == [count, count], criterion


def test_a_hint_needs_features():
    output = small_model().forward_exits(torch.randn(2, 3, 64, 64), with_features=False)
    with pytest.raises(ValueError, match="the output has none; .*with_features=True"):
        SelfDistillLoss.paper()(output, torch.tensor([0, 1]))


def test_without_labels():
    assert SelfDistillTask(small_model()).train()(torch.randn(2, 3, 64, 64))["label_loss"] == 0


def test_other_models_and_criteria_are_refused():
    with pytest.raises(TypeError, match=r"got ResNet; use wrap_self_distill\(model\)"):
        SelfDistillTask(small_backbone())
    with pytest.raises(TypeError, match=r"SelfDistillLoss\(label_loss=criterion\)"):
        SelfDistillTask(small_model(), nn.CrossEntropyLoss())


@pytest.mark.parametrize(("criterion", "freeze_backbone"), [(SelfDistillLoss, False), (SelfDistillLoss.paper, True)])
def test_captured_exits_give_the_same_losses_and_gradients(criterion, freeze_backbone):
    eager = SelfDistillTask(small_model(freeze_backbone=freeze_backbone), criterion()).train()
    captured = copy.deepcopy(eager)
    captured.capture_exits(batch_size=4, backend="aot_eager", mode=None)
    seen = []
    compiled = captured._captured.compiled
    captured._captured.compiled = lambda *args: seen.append(len(args[0].logits)) or compiled(*args)
    for images, amp in ((4, False), (4, True), (3, False), (4, False)):
        x, y = torch.randn(images, 3, 64, 64), torch.randint(10, (images,))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            expected, found = eager(x, y), captured(x, y)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)
        expected["loss"].backward()
        found["loss"].backward()
        for one, other in zip(eager.parameters(), captured.parameters()):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                tolerance = 1e-2 if amp else 1e-4
                assert (other.grad - one.grad).norm() <= tolerance * one.grad.norm() + 1e-6
            one.grad = other.grad = None
    assert seen == [4, 4, 4]  # odd batches run as before
    assert copy.deepcopy(captured)._captured is None
    captured.eval()(x, y)
    assert len(seen) == 3
    with pytest.raises(ValueError, match=r"class indices must lie in 0\.\.9"):
        captured.train()(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 10]))
    assert captured._captured.compiled is not captured._captured.run
    assert pickle.loads(pickle.dumps(captured))._captured is None


def test_networks_that_are_wrapped_are_not_captured():
    task = SelfDistillTask(small_model()).train()
    task.capture_exits(batch_size=4, backend="aot_eager", mode=None)
    module, x, y = task.trainable_module, torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    task.trainable_module = nn.Sequential(module)  # as DistributedDataParallel would be
    with pytest.raises(TypeError, match="trainable_module is a Sequential; leave out prepare_distributed"):
        task.capture_exits(batch_size=4)
    calls = []
    task.trainable_module.forward = lambda *args: calls.append(1) or module(*args)
    task(x, y)
    assert calls == [1]


def test_heads_that_do_not_compile_are_trained_as_they_are():
    class Unruly(LinearHead):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    task = SelfDistillTask(small_model(head=Unruly)).train()
    x, y = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    expected = task(x, y)["loss"]
    task.capture_exits(batch_size=4, backend="aot_eager", mode=None)
    with pytest.warns(UserWarning, match="not captured as one graph: .*graph_break"):
        assert task(x, y)["loss"] == expected
    task(x, y)  # without another warning


@pytest.mark.parametrize("freeze_backbone", [False, True])
def test_the_moving_average_compiles(freeze_backbone):
    task = SelfDistillTask(small_model(freeze_backbone=freeze_backbone))
    task.setup_ema(decay=0.5)
    task.update_ema()
    task.compile_ema(backend="eager")
    x = torch.randn(2, 3, 32, 32)
    expected = task.get_eval_model(ema=True)._orig_mod.eval()(x)
    assert torch.equal(task.get_eval_model(ema=True)(x), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_leaves_out_every_classifier_as_timm_leaves_out_the_one_of_a_plain_network(compiled):
    task = SelfDistillTask(small_model())
    model = task.get_trainable_module()
    if compiled:
        task.compile(backend="eager")
    clipped = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    left_out = {name for name, p in model.named_parameters() if id(p) not in clipped}
    plain = [id(p) for p in ClassificationTask(model.backbone, verbose=False).get_clip_parameters(exclude_head=True)]
    assert left_out == {
        f"{module}.fc.{part}" for module in ("backbone", "heads.0", "heads.1", "heads.2") for part in ("weight", "bias")
    }
    assert {id(p) for p in model.backbone.parameters()} & clipped == set(plain)
    assert len(list(task.get_clip_parameters())) == len(list(model.parameters()))
