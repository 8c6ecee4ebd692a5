"""Self distillation as a timm training task."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.task import ClassificationTask
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor, nn

from .hub.files import VERSIONS
from .loss import SelfDistillLoss
from .model import SelfDistillModel
from .output import BackboneOutput


class SelfDistillTask(ClassificationTask):
    """A `timm.task.TrainingTask` that pairs a `SelfDistillModel` with its loss.

    Distribution, compilation, EMA and `get_checkpoint_state` are those of timm's `ClassificationTask`; the EMA of a
    model with a frozen backbone is of its heads alone.

    Args:
        model: of `wrap_self_distill`.
        criterion: None is `SelfDistillLoss()`, and for a frozen backbone `SelfDistillLoss.paper()`.

    Raises:
        TypeError: the model or the criterion is not one of these.
    """

    criterion: SelfDistillLoss

    def __init__(self, model: SelfDistillModel, criterion: SelfDistillLoss | None = None):
        if not isinstance(model, SelfDistillModel):
            raise TypeError(f"expected a SelfDistillModel, got {type(model).__name__}; use wrap_self_distill(model)")
        if criterion is not None and not isinstance(criterion, SelfDistillLoss):
            raise TypeError(
                f"expected a SelfDistillLoss, got {type(criterion).__name__}; other criteria are its label_loss:"
                " SelfDistillLoss(label_loss=criterion)"
            )
        if criterion is None:
            criterion = SelfDistillLoss.paper() if model.freeze_backbone else SelfDistillLoss()
        super().__init__(model, criterion, device=next(model.parameters()).device, verbose=False)

    @property
    def _model(self) -> SelfDistillModel:
        return unwrap_model(self.trainable_module)

    def setup_ema(
        self,
        decay: float = 0.9999,
        use_warmup: bool = False,
        device: torch.device | None = None,
        **settings: Any,
    ) -> nn.Module:
        """Keep a moving average; `settings` are the others of timm's `ModelEmaV3`."""
        settings = {"decay": decay, "use_warmup": use_warmup, "device": device, **settings}
        if not self._model.freeze_backbone:
            return super().setup_ema(**settings)
        self.trainable_module_ema = ModelEmaV3(self._model.heads, **settings)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        if not self._model.freeze_backbone:
            super().update_ema(step)
        elif self.has_ema():
            self.trainable_module_ema.update(self._model.heads, step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        model = super().get_eval_model(module, ema)
        own = model is self.get_trainable_module(ema=True)
        if ema and own and self._model.freeze_backbone and isinstance(model, ModelEmaV3):
            return self._model.with_heads(model.module)
        return model

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Those to clip; `exclude_head` leaves out the last two, the classifier, of the backbone and of each head."""
        if not exclude_head:
            return super().get_clip_parameters()
        model = self._model
        return [p for part in (model.backbone, *model.heads) for p in list(part.parameters())[:-2]]

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Callable[..., Any] = unwrap_model) -> dict[str, Any]:
        """timm's checkpoint entries, and "self_distill": what makes the network and its exits again, as config.json of
        a saved model holds it."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        if ema:
            return state
        model = self._model
        known = model.backbone.pretrained_cfg
        network = {
            "architecture": known.get("architecture"),
            "num_classes": model.num_classes,
            "label_names": known.get("label_names"),
            "model_args": model.model_args,
            "pretrained_cfg": resolve_model_data_config(model.backbone) | {"input_size": model.input_size},
            "self_distill": VERSIONS | {key: value for key, value in model.settings().items() if key != "early_exit"},
        }
        return state | {"self_distill": json.loads(json.dumps(network, default=str))}

    def forward(self, input: Tensor | BackboneOutput, target: Tensor | None = None) -> dict[str, Tensor]:
        """Run all exits and the loss, in training and in eval mode.

        Args:
            input: images (B, in_chans, H, W), or what `SelfDistillModel.forward_backbone` gave for them.
            target: class indices (B,), soft labels (B, K), or None for images without labels.

        Returns:
            "loss", "label_loss", "distill_loss", "hint_loss" (scalars) and "output", the deepest logits (B, K).
        """
        forward = self.trainable_module if self.training else self._model.forward_exits
        output = forward(input)
        terms = self.criterion.terms(output, target)
        return {
            "loss": terms["loss"],
            "output": output.logits[-1],
            "label_loss": terms["label"],
            "distill_loss": terms["distill"],
            "hint_loss": terms["hint"],
        }
