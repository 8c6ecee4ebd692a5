"""The self-distillation loss: what measured best, and that of "Be Your Own Teacher", ICCV 2019, arXiv:1905.08094."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .memory import MOMENTUM, AnswerMemory, Remembered, check_momentum, check_topk
from .output import SelfDistillOutput

LabelLoss = Callable[[Tensor, Tensor], Tensor]
TEACHERS = ("deepest", "ensemble", "memory")
LARGEST = 1e30
NO_INDEX = torch.iinfo(torch.int64).min


class SelfDistillLoss(nn.Module):
    """Every classifier learns from the labels, the shallow ones also from the teacher.

    For the classifiers i = 1..C, C the deepest, with logits z_i and features F_i. The default, in which the average of
    all logits teaches every classifier (arXiv:2104.00299)::

        loss = sum_(i <= C) (1 - alpha) label_loss(z_i, y)  +  alpha T^2 KL(p || p_i)
        p_i  = softmax(z_i / T),  p = softmax(mean_j z_j / T),  T = temperature

    `SelfDistillLoss.paper()`, in which the deepest classifier teaches the others (arXiv:1905.08094, section 3)::

        loss = label_loss(z_C, y)
             + sum_(i < C) (1 - alpha) label_loss(z_i, y)  +  alpha KL(p_C || p_i)  +  beta mse(F_i, F_C)

    With `teacher="memory"` the teacher is what the ensemble answered to the same image in earlier epochs (temporal
    ensembling, arXiv:1610.02242). For an image that was seen n times before, with the ensemble's logits a_1..a_n::

        p    = softmax(((1 - s) mean_j z_j + s m) / T)
        m    = sum_k momentum^(n - k) a_k / sum_k momentum^(n - k)
        s    = memory_share, or 0 for an image that was not seen before and until the warm-up is over

    An `AnswerMemory` keeps m. PS-KD (arXiv:2006.12000) is the case of momentum 0, share 1 and temperature 1 for a
    network with one classifier: its cross entropy with (1 - alpha) y + alpha p, p of the epoch before, has the same
    gradient. There alpha grows from epoch to epoch, here it is constant.

    Label and distillation terms are averaged over the batch. The teacher's p and F_C carry no gradient.

    `beta` is the paper's lambda. The hint is the squared L2 distance divided by the number of elements of one
    feature, so that `beta` means the same for every network and input size: lambda = beta / (D * H * W) for maps,
    beta / D for pooled features. Without a hint, the default, `beta` has no effect.

    Args:
        temperature: softens both distributions of the distillation term; > 0.
        alpha: weight of the distillation term against the labels, in [0, 1].
        beta: weight of the hint term, >= 0.
        label_loss: criterion `(logits (B, K), target) -> scalar`, any of timm's or torch's; None is cross entropy,
            which takes class indices (B,) and soft labels (B, K).
        hint: what the hint compares: "map" the whole feature maps, "pooled" their spatial means, None nothing.
        teacher: "ensemble", the average of all logits, teaches every classifier, the deepest included; so does
            "memory", the ensemble's earlier answers to each image; or the "deepest" classifier teaches the others. The
            hint's teacher is always the deepest feature.
        t_squared: multiply the distillation term by temperature^2, so that its gradients do not shrink with the
            temperature (arXiv:1503.02531, section 2.1).
        distill: "softmax" as above; "sigmoid", for a binary label loss such as `timm.loss.BinaryCrossEntropy`, takes
            each class k on its own, with p_k = sigmoid(z_k / T) in the place of the softmax::

                KL(p || q) = mean_k  p_k log(p_k / q_k) + (1 - p_k) log((1 - p_k) / (1 - q_k))

            or the sum over the classes, where the label loss sums over them (its `sum_classes` is True).
        memory_momentum: of the running mean m, in [0, 1). This and the following have an effect with the teacher
            "memory" only.
        memory_share: weight of the memory against the present ensemble, in [0, 1].
        memory_warmup_epochs: epochs in which the present ensemble teaches while the memory is filled; `Trainer` counts
            them.
        memory_topk: number of classes kept of an answer, see `AnswerMemory`.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: `label_loss` is not callable.

    Examples:
        >>> import timm, torch
        >>> from timm_selfdistill import SelfDistillLoss, wrap_self_distill
        >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).train()
        >>> criterion = SelfDistillLoss(alpha=0.5)
        >>> images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
        >>> loss = criterion(model(images), labels)
        >>> loss.backward()
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 3.0,
        alpha: float = 0.3,
        beta: float = 0.03,
        label_loss: LabelLoss | None = None,
        hint: str | None = None,
        teacher: str = "ensemble",
        t_squared: bool = True,
        distill: str = "softmax",
        memory_momentum: float = MOMENTUM,
        memory_share: float = 1.0,
        memory_warmup_epochs: int = 0,
        memory_topk: int | None = None,
    ):
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta must be a number >= 0, got {beta}")
        if label_loss is not None and not callable(label_loss):
            raise TypeError(f"label_loss must be a criterion (logits, target) -> scalar, got {label_loss!r}")
        if hint not in ("map", "pooled", None):
            raise ValueError(f"hint must be 'map', 'pooled' or None, got {hint!r}")
        if teacher not in TEACHERS:
            raise ValueError(f"teacher must be 'deepest', 'ensemble' or 'memory', got {teacher!r}")
        self.temperature = temperature
        self.alpha = alpha
        self.beta = beta
        self.label_loss = label_loss
        self.hint = hint
        self.teacher = teacher
        if distill not in ("softmax", "sigmoid"):
            raise ValueError(f"distill must be 'softmax' or 'sigmoid', got {distill!r}")
        self.t_squared = t_squared
        self.distill = distill
        check_momentum(memory_momentum, "memory_momentum")
        if not 0 <= memory_share <= 1:
            raise ValueError(f"memory_share must lie in [0, 1], got {memory_share}")
        if not isinstance(memory_warmup_epochs, int) or memory_warmup_epochs < 0:
            raise ValueError(f"memory_warmup_epochs must be a number of epochs, got {memory_warmup_epochs!r}")
        check_topk(memory_topk, "memory_topk")
        self.memory_momentum = memory_momentum
        self.memory_share = memory_share
        self.memory_warmup_epochs = memory_warmup_epochs
        self.memory_topk = memory_topk

    @classmethod
    def paper(cls, **overrides: Any) -> "SelfDistillLoss":
        """The loss of the ICCV paper: the deepest classifier and its feature map teach the others.

        Args:
            overrides: arguments of `SelfDistillLoss`.

        Examples:
            >>> from timm_selfdistill import SelfDistillLoss
            >>> criterion = SelfDistillLoss.paper(alpha=0.5)
            >>> criterion.teacher, criterion.hint, criterion.t_squared
            ('deepest', 'map', False)
        """
        return cls(**{"hint": "map", "teacher": "deepest", "t_squared": False, **overrides})

    @property
    def needs_features(self) -> bool:
        """Whether the loss looks at features; `SelfDistillTask` leaves them out where it does not. A subclass with
        `terms` of its own is given them, unless it overrides this."""
        return bool(self.hint and self.beta) or type(self).terms is not SelfDistillLoss.terms

    def create_memory(self, images: int, num_classes: int, **settings: Any) -> AnswerMemory:
        """An `AnswerMemory` as this loss wants it.

        Args:
            settings: further arguments, such as `device`.
        """
        own = {"momentum": self.memory_momentum, "topk": self.memory_topk, "temperature": self.temperature}
        return AnswerMemory(images, num_classes, **{**own, **settings})

    @torch.no_grad()
    def answer(self, output: SelfDistillOutput) -> Tensor:
        """What an `AnswerMemory` takes: the average of all logits, (B, K) in float32, without gradient. The mean over
        the classes is subtracted, so that float16 rounds them less; softmaxes do not change with it, sigmoids would."""
        with _no_autocast(output.logits[-1].device.type):
            mean = bounded(full_precision(torch.stack(output.logits))).mean(0)
            return mean if self.distill == "sigmoid" else mean - mean.mean(1, keepdim=True)

    def forward(
        self, output: SelfDistillOutput, target: Tensor | None = None, remembered: Remembered | None = None
    ) -> Tensor:
        """The loss, a scalar tensor. See `terms`."""
        more = () if remembered is None else (remembered,)  # which the terms of a subclass may not know
        return self.terms(output, target, *more)["loss"]

    def terms(
        self, output: SelfDistillOutput, target: Tensor | None = None, remembered: Remembered | None = None
    ) -> dict[str, Tensor]:
        """The loss and its parts, `loss = label + alpha * distill + beta * hint`.

        Args:
            output: of a `SelfDistillModel`: C logits (B, K) and C features (B, D, H, W), which only the hint needs.
            target: class indices (B,), or soft labels (B, K); None for images without labels, where `label` is 0 and
                the exits learn from the teacher alone.
            remembered: of the teacher "memory", what `AnswerMemory.lookup` gives for the images. In eval mode it may be
                left out; the present ensemble is the teacher then.

        Returns:
            Scalar tensors: "loss"; "label", the label terms with their factors 1 - a_i; "distill" and "hint", the
            sums over the students, the former times temperature^2 with `t_squared`; each is 0, and not computed, where
            its weight is 0.

        Raises:
            TypeError: `output` is not a `SelfDistillOutput`, or class indices are not integers.
            ValueError: the target's shape does not fit, or (checked on CPU) an index is not in 0..K-1, or what is
                remembered is missing, or of other images or another teacher.


        Examples:
            >>> import timm, torch
            >>> from timm_selfdistill import SelfDistillLoss, wrap_self_distill
            >>> model = wrap_self_distill(timm.create_model("test_resnet", num_classes=10)).train()
            >>> output = model(torch.randn(8, 3, 64, 64))
            >>> terms = SelfDistillLoss.paper().terms(output, torch.randint(10, (8,)))
            >>> sorted(terms)
            ['distill', 'hint', 'label', 'loss']
        """
        if not isinstance(output, SelfDistillOutput):
            raise TypeError(
                f"expected a SelfDistillOutput, got {type(output).__name__}; in eval mode model(x) gives only the"
                " deepest logits: use model.forward_exits(x)"
            )
        with _no_autocast(output.logits[-1].device.type):
            logits = bounded(full_precision(torch.stack(output.logits)))
            zero = logits.new_zeros(())
            label = zero if target is None else self._label(logits, target)
            self._check_remembered(remembered, logits[-1])
            distill = self._distill(logits, remembered)
            loss = torch.add(label, distill, alpha=self.alpha)
            hint = zero
            if self.hint and self.beta:
                hint = self._hint(output.features)
                loss = torch.add(loss, hint, alpha=self.beta)
        return {"loss": loss, "label": label, "distill": distill, "hint": hint}

    def _label(self, logits: Tensor, target: Tensor) -> Tensor:
        target = _check_target(target, logits[-1])
        if self.label_loss is None:  # all exits at once
            every = target.repeat(len(logits), *[1] * (target.ndim - 1))
            label = len(logits) * (1 - self.alpha) * _cross_entropy(logits.flatten(0, 1), every)
        else:
            check_class_indices(target, logits.shape[-1])
            label = (1 - self.alpha) * sum((self.label_loss(z, target) for z in logits), logits.new_zeros(()))
        if self.teacher == "deepest":  # whose own labels count in full
            own = self.label_loss or _cross_entropy
            label = label + self.alpha * own(logits[-1], target)
        return label

    def _distill(self, logits: Tensor, remembered: Remembered | None = None) -> Tensor:
        if not self.alpha:
            return logits.new_zeros(())
        logits = logits / self.temperature
        if self.teacher == "deepest":
            teacher, students = logits[-1], logits[:-1]
        else:
            teacher, students = logits.detach().mean(0), logits
        if remembered is not None:
            share = self.memory_share * remembered.known.to(logits)[:, None]
            teacher = torch.lerp(teacher, remembered.logits.to(logits) / self.temperature, share)
        weight = self.temperature**2 if self.t_squared else 1.0
        if self.distill == "softmax":
            return divergence(teacher, students, weight)
        classes = 1 if getattr(self.label_loss, "sum_classes", False) else logits.shape[-1]
        return binary_divergence(teacher, students, weight / classes)

    def _check_remembered(self, remembered: Remembered | None, logits: Tensor) -> None:
        if remembered is None:
            if self.teacher == "memory" and self.training:
                raise ValueError(
                    "the teacher 'memory' is what was said of each image before, and nothing was given of it: give"
                    " remembered=memory.lookup(indices), memory an AnswerMemory; a loop that does not know the indices"
                    " of its images, such as timm's train.py, needs teacher='ensemble'"
                )
            return
        if self.teacher != "memory":
            raise ValueError(
                f"remembered is for the teacher 'memory', and the teacher is {self.teacher!r}; leave it out"
            )
        if remembered.logits.shape != logits.shape or remembered.known.shape != logits.shape[:1]:
            raise ValueError(
                f"expected remembered logits {tuple(logits.shape)} and known {tuple(logits.shape[:1])}, got"
                f" {tuple(remembered.logits.shape)} and {tuple(remembered.known.shape)}"
            )

    def _hint(self, features: tuple[Tensor, ...]) -> Tensor:
        if not features:
            raise ValueError("the hint compares features, and the output has none; run the model with_features=True")
        compared = [full_precision(f) for f in features]
        if self.hint == "pooled":
            compared = [f.mean((2, 3)) for f in compared]
        teacher = compared[-1].detach()
        return sum((F.mse_loss(f, teacher) for f in compared[:-1]), teacher.new_zeros(()))

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, beta={self.beta}, hint={self.hint!r},"
            f" teacher={self.teacher!r}, t_squared={self.t_squared}"
            + (f", distill={self.distill!r}" if self.distill != "softmax" else "")
            + (f", {self._memory_repr()}" if self.teacher == "memory" else "")
        )

    def _memory_repr(self) -> str:
        names = ("memory_momentum", "memory_share", "memory_warmup_epochs", "memory_topk")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def divergence(teacher: Tensor, students: Tensor, weight: float = 1.0) -> Tensor:
    """KL(p_teacher || p_student), the mean over the batch and the sum over the students, times a weight.

    Args:
        teacher: logits (B, K), which get no gradient.
        students: logits (B, K), or (S, B, K) of several.
    """
    log_p, log_q = F.log_softmax(teacher.detach(), dim=-1), F.log_softmax(students, dim=-1)
    p = weight / len(teacher) * log_p.exp()  # the weight is here, where no gradient has to be multiplied by it
    return (p * (log_p - log_q)).sum()


def binary_divergence(teacher: Tensor, students: Tensor, weight: float = 1.0) -> Tensor:
    """The KL divergence of each class on its own, between sigmoids: the mean over the batch, and the sum over classes
    and students, times a weight.

    Args:
        teacher, students: as of `divergence`.
    """
    p, q = teacher.detach(), students
    yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    no = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    return weight / len(teacher) * (yes + no).sum()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Without autocast, which the meta device does not know."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def bounded(logits: Tensor) -> Tensor:
    """Logits of at most 1e30 in size, whose differences and sums stay finite in float32."""
    return F.hardtanh(logits, -LARGEST, LARGEST)


def _check_target(target: Tensor, logits: Tensor) -> Tensor:
    batch, classes = logits.shape
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    if target.shape == logits.shape and target.is_floating_point():
        return target
    if target.shape != (batch,):
        raise ValueError(
            f"target must be class indices ({batch},) or soft labels ({batch}, {classes}) in floating point,"
            f" got {target.dtype} of shape {tuple(target.shape)}"
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"class indices must be integers, got {target.dtype}; use target.long()")
    return target.long()


def check_class_indices(target: Tensor, classes: int) -> None:
    """Raise ValueError for class indices out of range. On an accelerator this would wait for the device in every step;
    torch asserts there by itself."""
    if target.is_floating_point() or target.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in target.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"class indices must lie in 0..{classes - 1}, got {low if low < 0 else high}")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """torch's, which looks at the indices itself, but passes over one of them where it is not told another."""
    try:
        return F.cross_entropy(logits, target, ignore_index=NO_INDEX)
    except IndexError:
        check_class_indices(target, logits.shape[-1])
        raise
