"""Students that learn from the feature maps of a teacher network."""

from collections.abc import Callable, Sequence

import torch
from timm.task import FeatureDistillationTask
from timm.task.distillation import DistillationTeacher, FeatureDistillationTrainableModule
from torch import Tensor, nn

from ..cost import default_input_size
from ..heads import check_logits
from ..loss import LabelLoss, full_precision
from ..stages import Stage, check_timm_classifier, choose_exits
from ..timm_model import TimmModel, as_timm

Pair = tuple[Stage, Stage]
"""A stage of the student, and the stage of the teacher that it is compared with."""


class StudentMaps(FeatureDistillationTrainableModule):
    """What learns: the student, and a projection of its maps that is not part of the saved model.

    Args:
        student: a timm model.
        stages: whose feature maps to give.
        projection: of each map; None leaves them as they are.
    """

    student: TimmModel

    def __init__(self, student: nn.Module, stages: Sequence[Stage], projection: nn.Module | None = None):
        super().__init__(student, projection)
        self.indices = [stage.index for stage in stages]

    def forward(  # type: ignore[override]  # timm's gives one pooled feature
        self, input: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, K), and a map (B, D_i, H_i, W_i) of each stage, for images (B, in_chans, H, W)."""
        final, maps = self.student.forward_intermediates(input, indices=self.indices)
        logits = self.student.forward_head(final)
        check_logits(self.student, logits, input, self.student.num_classes)
        return logits, maps if self.projection is None else [self.projection(feature) for feature in maps]


class FeatureMapTask(FeatureDistillationTask):
    """Labels, and feature maps of a frozen teacher, compared by a function.

    timm's `FeatureDistillationTask` compares pooled features; its teacher, normalisation for it, weights, distribution,
    checkpoint state and evaluated model, the student alone, are those of this task.

    Args:
        student: a timm model.
        teacher: a trained timm model for the same images and classes; it is frozen.
        pairs: the stages that are compared, e.g. of `pair_stages`, which looks whether student and teacher fit.
        projection: of the student's maps, learns with it.
        compare: the maps' loss, a scalar, of the student's maps and the teacher's, each (B, D_i, H_i, W_i).
        criterion: `(logits, target) -> scalar`; None is cross entropy.
        distill_loss_weight: of the maps' loss, >= 0.
        task_loss_weight: of the label loss, >= 0.

    Raises:
        ValueError: student and teacher are one model, their normalisations are of another number of channels than the
            images, or a weight is out of its range.
    """

    teacher: DistillationTeacher
    distill_loss_weight: float
    task_loss_weight: float
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[Pair],
        projection: nn.Module | None,
        compare: Callable[[list[Tensor], list[Tensor]], Tensor],
        criterion: LabelLoss | None,
        distill_loss_weight: float,
        task_loss_weight: float,
    ):
        check_weight("distill_loss_weight", distill_loss_weight)
        check_weight("task_loss_weight", task_loss_weight)
        if teacher is student:
            raise ValueError(
                "student and teacher are one model, and a teacher is frozen; give a trained model of its own as teacher"
            )
        scale, shift = renormalisation(student, teacher)
        super().__init__(
            student,
            teacher.requires_grad_(False),
            nn.CrossEntropyLoss() if criterion is None else criterion,  # type: ignore[arg-type]  # it takes any callable
            distill_loss_weight=distill_loss_weight,
            task_loss_weight=task_loss_weight,
            student_feature_dim=0,
            teacher_feature_dim=0,  # equal, so that timm makes no projection of its own
            device=next(student.parameters()).device,
            verbose=False,
        )
        self.compare_maps = compare
        own, others = zip(*pairs)
        self.trainable_module = StudentMaps(student, own, projection)
        self.teacher_indices = [stage.index for stage in others]
        # timm's `normalize_input` compares the normalisations in every step, for which a GPU is waited for.
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Run student, teacher and loss, in float32.

        Args:
            input: images (B, in_chans, H, W), normalised as the student's.
            target: class indices (B,) or soft labels (B, K).

        Returns:
            "loss", "task_loss", "kd_loss" (scalars) and "output", the student's logits (B, K).
        """
        logits, maps = self.trainable_module(input)
        task_loss = self.criterion(full_precision(logits), target)
        kd_loss = self.compare_maps(list(map(full_precision, maps)), list(map(full_precision, self.teach(input))))
        loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": loss, "output": logits, "task_loss": task_loss, "kd_loss": kd_loss}

    @torch.no_grad()
    def teach(self, input: Tensor) -> list[Tensor]:
        """The teacher's maps (B, D_i, H_i, W_i)."""
        if self.scale is not None and self.shift is not None:
            input = input * self.scale + self.shift
        return as_timm(self.teacher.model).forward_intermediates(
            input, indices=self.teacher_indices, stop_early=True, intermediates_only=True
        )


def check_teacher(student: nn.Module, teacher: nn.Module, role: str = "teacher") -> None:
    """Raise unless one timm model can teach another.

    Args:
        role: of the second, for the message.

    Raises:
        TypeError: one of them is no timm model.
        ValueError: one has no classifier, or classes or image channels differ.

    Examples:
        >>> import timm
        >>> from timm_selfdistill.baselines import check_teacher
        >>> student = timm.create_model("test_resnet", num_classes=10)
        >>> check_teacher(student, timm.create_model("resnet10t", num_classes=10))
        >>> check_teacher(student, timm.create_model("resnet10t", num_classes=7))
        Traceback (most recent call last):
        ...
        ValueError: the teacher (ResNet) has 7 classes, the student (ResNet) 10; ...
    """
    models = [check_timm_classifier(model) for model in (student, teacher)]
    expected, given = ((model.num_classes, default_input_size(model)[0]) for model in models)
    for what, found, wanted in zip(("classes", "image channels"), given, expected):
        if found != wanted:
            raise ValueError(
                f"the {role} ({type(teacher).__name__}) has {found} {what}, the student ({type(student).__name__})"
                f" {wanted}; take a {role} that was trained on the same images and classes"
            )


def renormalisation(student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and shift, each (in_chans, 1, 1), that take images in the student's normalisation to the teacher's; None
    where it is the same.

    Raises:
        ValueError: a mean or standard deviation is of another number of channels than the student's images.
    """
    own, others = (
        [tuple(as_timm(model).pretrained_cfg[key]) for key in ("mean", "std")] for model in (student, teacher)
    )
    if own == others:
        return None, None
    channels = default_input_size(student)[0]
    for role, values in [("student", own), ("teacher", others)]:
        if any(len(value) not in (1, channels) for value in values):
            raise ValueError(
                f"the {role}'s mean and std, {values[0]} and {values[1]}, are not of images of {channels} channel(s);"
                f" call model_data_config(model, size, {channels}) on student and teacher, which settles them"
            )
    like = next(student.parameters())
    mean, std, other_mean, other_std = (torch.tensor(values).view(-1, 1, 1) for values in (*own, *others))
    return (std / other_std).to(like), ((mean - other_mean) / other_std).to(like)


def check_weight(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be a number >= 0, got {value}")


def pair_stages(student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """The stages at which self distillation puts classifiers, of student and teacher, one by one.

    Raises:
        TypeError, ValueError: the two do not fit, or they have not the same number of stages.
    """
    check_teacher(student, teacher)
    own, others = choose_exits(student), choose_exits(teacher)
    if len(own) != len(others):
        raise ValueError(
            f"{type(student).__name__} has {len(own)} stages to compare ({', '.join(map(str, own))}), its teacher"
            f" {type(teacher).__name__} {len(others)} ({', '.join(map(str, others))}); take a teacher of as many"
        )
    return list(zip(own, others))
