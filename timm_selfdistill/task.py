"""Self distillation as a timm training task, and the networks of any such task."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from copy import copy
from typing import Any, cast

import torch
from timm.data import resolve_model_data_config
from timm.task import ClassificationTask, TrainingTask
from timm.task.distillation import DistillationTeacher
from timm.utils import unwrap_model
from torch import Tensor, nn

from .heads import run_exits
from .hub.files import VERSIONS
from .loss import SelfDistillLoss, check_class_indices
from .memory import Remembered
from .model import SelfDistillModel
from .output import BackboneOutput, SelfDistillOutput


class SelfDistillTask(ClassificationTask):
    """A `timm.task.TrainingTask` that pairs a `SelfDistillModel` with its loss.

    Distribution, compilation, EMA and `get_checkpoint_state` are those of timm's `ClassificationTask`. A model with a
    frozen backbone makes it a `FrozenBackboneTask`.

    Args:
        model: of `wrap_self_distill`.
        criterion: None is `SelfDistillLoss()`, and for a frozen backbone `SelfDistillLoss.paper()`.

    Raises:
        TypeError: the model or the criterion is not one of these.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillLoss, SelfDistillTask, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10))
        >>> task = SelfDistillTask(model, SelfDistillLoss()).train()
        >>> result = task(torch.randn(8, 3, 64, 64), torch.randint(10, (8,)))
        >>> result["loss"].backward()
        >>> result["output"].shape
        torch.Size([8, 10])
    """

    criterion: SelfDistillLoss

    # A frozen model has always been given to this class; what trains it is a class of its own.
    def __new__(cls, model: SelfDistillModel | None = None, *args: Any, **kwargs: Any) -> "SelfDistillTask":
        frozen = cls is SelfDistillTask and isinstance(model, SelfDistillModel) and model.freeze_backbone
        return super().__new__(FrozenBackboneTask if frozen else cls)

    def __init__(self, model: SelfDistillModel, criterion: SelfDistillLoss | None = None):
        if not isinstance(model, SelfDistillModel):
            raise TypeError(f"expected a SelfDistillModel, got {type(model).__name__}; use wrap_self_distill(model)")
        if criterion is not None and not isinstance(criterion, SelfDistillLoss):
            raise TypeError(
                f"expected a SelfDistillLoss, got {type(criterion).__name__}; other criteria are its label_loss:"
                " SelfDistillLoss(label_loss=criterion)"
            )
        if model.freeze_backbone and not isinstance(self, FrozenBackboneTask):
            raise TypeError(
                f"the backbone of this model is frozen, and {type(self).__name__} trains the whole network; make it a"
                " subclass of timm_selfdistill.task.FrozenBackboneTask"
            )
        super().__init__(model, criterion or SelfDistillLoss(), device=next(model.parameters()).device, verbose=False)
        self._captured: CapturedExits | None = None

    @property
    def model(self) -> SelfDistillModel:
        """The network with all its exits, without what wraps it."""
        return unwrap_model(self.trainable_module)

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Those to clip; `exclude_head` leaves out the last two, the classifier, of the backbone and of each head."""
        if not exclude_head:
            return super().get_clip_parameters()
        return [p for part in (self.model.backbone, *self.model.heads) for p in list(part.parameters())[:-2]]

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable[..., Any] = unwrap_model) -> dict[str, Any]:
        """timm's checkpoint entries, and "self_distill": what makes the network and its exits again, as config.json of
        a saved model holds it."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        if ema:
            return state
        known = self.model.backbone.pretrained_cfg
        settings = {key: value for key, value in self.model.settings().items() if key != "early_exit"}
        network = {
            "architecture": known.get("architecture"),
            "num_classes": self.model.num_classes,
            "label_names": known.get("label_names"),
            "model_args": self.model.model_args,
            "pretrained_cfg": resolve_model_data_config(self.model.backbone) | {"input_size": self.model.input_size},
            "self_distill": VERSIONS | settings,
        }
        return state | {"self_distill": json.loads(json.dumps(network, default=str))}

    def forward(
        self, input: Tensor, target: Tensor | None = None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        """Run all exits and the loss, in training and in eval mode.

        Args:
            input: images (B, in_chans, H, W).
            target: class indices (B,), soft labels (B, K), or None for images without labels.
            remembered: of a criterion with the teacher "memory", what an `AnswerMemory` holds of the images. In eval
                mode it may be left out.

        Returns:
            "loss", "label_loss", "distill_loss", "hint_loss" (scalars) and "output", the deepest logits (B, K); with
            the teacher "memory" also "answer" (B, K), what the memory takes.

        Raises:
            ValueError: the teacher is "memory", and in training mode nothing is given of it.
        """
        if not self.training:
            return self.run_loss(self.model.forward_exits(input, self.criterion.needs_features), target, remembered)
        if captured := self._find_captured(input):
            return captured(self.model.forward_backbone(input), target, remembered)
        return self.run_loss(self.trainable_module(input, self.criterion.needs_features), target, remembered)

    def capture_exits(self, batch_size: int, backend: str = "inductor", mode: str | None = "reduce-overhead") -> None:
        """Compile heads and loss as one graph, apart from the backbone; on a GPU it becomes a CUDA graph. There the
        heads are many short kernels, and launching them takes longer than running them.

        Only training batches of `batch_size` images of one size use it, others run as before. Losses and gradients are
        those of separate operations within rounding. If compiling fails, a warning says so and training goes on
        without it. On a GPU the next batch overwrites the gradients of the heads: clone them if you accumulate. Let
        DistributedDataParallel wrap the whole task; one around `trainable_module` would not see the heads.

        Args:
            batch_size: images in a training batch.
            backend, mode: of `torch.compile`.

        Raises:
            TypeError: `trainable_module` is wrapped or compiled.
        """
        if not isinstance(self.trainable_module, (SelfDistillModel, ExitHeads)):
            raise TypeError(
                "capture_exits needs the network itself, and trainable_module is a"
                f" {type(self.trainable_module).__name__}; leave out prepare_distributed and compile, and wrap the"
                " whole task in DistributedDataParallel"
            )
        exits = self._exit_heads()

        def run(features: BackboneOutput, target: Tensor | None, remembered: Remembered | None) -> dict[str, Tensor]:
            terms = self.run_loss(exits(features, self.criterion.needs_features), target, remembered)
            return {name: value for name, value in terms.items() if name != "output"}

        self._captured = CapturedExits(run, batch_size, backend, mode)

    def _exit_heads(self) -> "ExitHeads":
        return ExitHeads(self.model)

    def _find_captured(self, x: Tensor | BackboneOutput) -> "CapturedExits | None":
        """The graph, where it is for this batch, and nothing wraps the network that has to see it."""
        is_bare = isinstance(self.trainable_module, (SelfDistillModel, ExitHeads))
        return self._captured if is_bare and self._captured and self._captured.fits(x) else None

    def run_loss(
        self, output: SelfDistillOutput, target: Tensor | None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        """What `forward` returns, for what the exits say."""
        more = () if remembered is None else (remembered,)  # which a criterion of one's own may not know
        terms = self.criterion.terms(output, target, *more)
        result = {
            "loss": terms["loss"],
            "output": output.logits[-1],
            "label_loss": terms["label"],
            "distill_loss": terms["distill"],
            "hint_loss": terms["hint"],
        }
        return result | {"answer": self.criterion.answer(output)} if self.criterion.teacher == "memory" else result


class ExitHeads(nn.Module):
    """The heads of a `SelfDistillModel`, apart from its backbone: the backbone's features to what every exit says."""

    def __init__(self, model: SelfDistillModel):
        super().__init__()
        self.heads = model.heads
        self.stages, self.model_name = model.stages, type(model.backbone).__name__

    def forward(self, backbone: BackboneOutput, with_features: bool = True) -> SelfDistillOutput:
        classes, channels = backbone.logits.shape[1], backbone.maps[-1].shape[1]
        return run_exits(self.heads, backbone, self.stages, classes, channels, self.model_name, with_features)


class CapturedExits:
    """Heads and loss as one graph, see `SelfDistillTask.capture_exits`.

    Args:
        run: the features of the backbone, the target and what is remembered to the loss and its parts.
        batch_size, backend, mode: as there.
    """

    def __init__(
        self,
        run: Callable[[BackboneOutput, Tensor | None, Remembered | None], dict[str, Tensor]],
        batch_size: int,
        backend: str,
        mode: str | None,
    ):
        self.run, self.batch_size = run, batch_size
        self.shape: torch.Size | None = None
        self.compiled = torch.compile(run, fullgraph=True, dynamic=False, backend=backend, mode=mode)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of the task have None in its place: their heads are not in this graph."""
        return type(None), ()

    def fits(self, x: Tensor | BackboneOutput) -> bool:
        """Whether these images, or features of images, are a batch of the captured size. The first batch of so many
        images, or of several views of each, sets it."""
        shape = x.maps[0].shape if isinstance(x, BackboneOutput) else x.shape
        if self.shape is None and shape[0] % self.batch_size == 0:
            self.shape = shape
        return shape == self.shape

    def __call__(
        self, features: BackboneOutput, target: Tensor | None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()  # the results of the last batch are no longer needed
        try:
            terms = self.compiled(features, target, remembered)
        except IndexError:  # the graph has no check of its own
            if target is not None:
                check_class_indices(target, features.logits.shape[1])
            raise
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            terms = self.run(features, target, remembered)  # a target that does not fit is refused here
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"heads and loss are not captured as one graph: {reason}", stacklevel=2)
            self.compiled = self.run
        if "answer" in terms:  # which is needed until the end of the update
            terms["answer"] = terms["answer"].clone()
        return terms | {"output": features.logits}


class FrozenBackbone(nn.Module):
    """The backbone of a `SelfDistillModel` without its heads, so that a task which holds it owns the backbone's tensors
    once: images (B, in_chans, H, W) to the features that the heads take."""

    def __init__(self, model: SelfDistillModel):
        super().__init__()
        self.backbone = model.backbone
        self._model = (model,)  # in a tuple, so that its heads are not among the modules of this one

    @property
    def model(self) -> SelfDistillModel:
        return self._model[0]

    def forward(self, x: Tensor) -> BackboneOutput:
        return self.model.forward_backbone(x)


class FrozenBackboneTask(SelfDistillTask):
    """Exits on a backbone that stays as it is: what is trained, averaged and distributed are the heads. The backbone
    stands beside them, as the teachers of timm's distillation tasks do.

    Args:
        model: of `wrap_self_distill(..., freeze_backbone=True)`.
        criterion: None is `SelfDistillLoss.paper()`.

    Attributes:
        trainable_module: the heads.
        frozen: the backbone.

    Raises:
        TypeError: the model or the criterion is not one of these.
        ValueError: the backbone is not frozen.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillTask, wrap_self_distill
        >>> backbone = timm.create_model("test_resnet", num_classes=10)
        >>> task = SelfDistillTask(wrap_self_distill(backbone, freeze_backbone=True)).train()
        >>> type(task).__name__
        'FrozenBackboneTask'
        >>> task(torch.randn(8, 3, 64, 64))["loss"].backward()
        >>> any(parameter.grad is not None for parameter in backbone.parameters())
        False
    """

    def __init__(self, model: SelfDistillModel, criterion: SelfDistillLoss | None = None):
        super().__init__(model, criterion or SelfDistillLoss.paper())
        if not model.freeze_backbone:
            raise ValueError(
                "expected a model of wrap_self_distill(..., freeze_backbone=True), whose backbone is frozen"
            )
        self.trainable_module = ExitHeads(model)
        self.frozen = FrozenBackbone(model)

    @property
    def model(self) -> SelfDistillModel:
        return self.frozen.model

    def _exit_heads(self) -> ExitHeads:
        return cast(ExitHeads, self.trainable_module)

    def train(self, mode: bool = True) -> "FrozenBackboneTask":
        super().train(mode)
        self.model.train(mode)  # whose backbone stays in eval mode
        return self

    def compile(  # type: ignore[override]  # as timm's tasks
        self, backend: str = "inductor", mode: str | None = None, **settings: Any
    ) -> nn.Module:
        """Compile heads, backbone, and the network that is evaluated; further arguments are those of
        `torch.compile`."""
        for part in (self.trainable_module, self.frozen):
            part.compile(backend=backend, mode=mode, **settings)
        self.eval_model = cast(nn.Module, torch.compile(self.model, backend=backend, mode=mode, **settings))
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The network with all its exits: the backbone and the heads, or their moving average."""
        if module is not None or hasattr(self, "eval_model_ema" if ema else "eval_model"):
            return super().get_eval_model(module, ema)
        trained = self.get_trainable_module(ema)
        if trained is None:
            return None
        heads = unwrap_model(trained).heads
        if heads is self.model.heads:
            return self.model
        averaged = copy(self.model)
        averaged._modules = {**self.model._modules, "heads": heads}
        return averaged

    def forward(
        self, input: Tensor | BackboneOutput, target: Tensor | None = None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        """See `SelfDistillTask.forward`.

        Args:
            input: images (B, in_chans, H, W), or their features, which `frozen` gave.
            target, remembered: as there.
        """
        features = input if isinstance(input, BackboneOutput) else self.frozen(input)
        if self.training and (captured := self._find_captured(features)):
            return captured(features, target, remembered)
        return self.run_loss(self.trainable_module(features, self.criterion.needs_features), target, remembered)


def check_task(task: Any) -> None:
    """Raise unless this can be trained.

    Raises:
        TypeError: it is no TrainingTask.
        ValueError: its weights hold NaN or infinity.
    """
    if not isinstance(task, TrainingTask):
        raise TypeError(f"expected a timm.task.TrainingTask such as SelfDistillTask, got {type(task).__name__}")
    spoilt = [
        name
        for module in dict.fromkeys([eval_model(task), trainable_model(task)])
        for name, value in module.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if spoilt:
        raise ValueError(
            f"the model's weights are not finite before the first update: {spoilt[0]} first; they come"
            " from a run that diverged or a damaged file, take others"
        )


def trainable_model(task: TrainingTask) -> nn.Module:
    """What learns; two networks where a task trains both.

    Raises:
        TypeError: the task has none.
    """
    return _known(task, task.get_trainable_module())


def eval_model(task: TrainingTask, average: bool = False) -> nn.Module:
    """What is evaluated and saved: one network, or its moving average.

    Raises:
        TypeError: the task has none.
    """
    return _known(task, task.get_eval_model(ema=average))


def _known(task: TrainingTask, model: nn.Module | None) -> nn.Module:
    if model is None:
        raise TypeError(f"{type(task).__name__} has no network")
    return model


def frozen_network(task: TrainingTask) -> nn.Module | None:
    """The backbone of a `FrozenBackboneTask`, or the teacher of one of timm's distillation tasks, ours included. What
    else a task may call its teacher perhaps learns."""
    return task.frozen.backbone if isinstance(task, FrozenBackboneTask) else _teacher(task)


def freeze_teacher(task: TrainingTask) -> None:
    """Freeze the teacher of timm's distillation tasks, which timm does only where it distributes them itself: else
    DistributedDataParallel would wait for its gradients.

    Raises:
        ValueError: its weights hold NaN or infinity.
    """
    teacher = _teacher(task)
    if teacher is None:
        return
    teacher.requires_grad_(False)
    spoilt = [name for name, value in teacher.model.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        raise ValueError(
            f"the teacher's weights are not finite, {spoilt[0]} first; they come from a run that diverged"
            " or a damaged file, take another teacher"
        )


def learned_state(task: TrainingTask) -> dict[str, Tensor]:
    """The state of a task, without that of its frozen network."""
    state, network = task.state_dict(), frozen_network(task)
    if network is None:
        return state
    frozen = tuple(f"{name}." for name, part in task.named_modules() if part is network)
    return {key: value for key, value in state.items() if not key.startswith(frozen)}


def frozen_digest(task: TrainingTask) -> str:
    """SHA-256 of the frozen network, which a checkpoint holds in its place; "" where nothing is frozen."""
    network = frozen_network(task)
    if network is None:
        return ""
    digest = hashlib.sha256()
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _teacher(task: TrainingTask) -> DistillationTeacher | None:
    teacher = getattr(task, "teacher", None)
    return teacher if isinstance(teacher, DistillationTeacher) else None
