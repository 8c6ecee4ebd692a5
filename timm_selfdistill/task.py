"""Self distillation as a timm training task."""

import json
from collections.abc import Iterable
from typing import Any

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

    def setup_ema(self, **settings: Any) -> nn.Module:
        """Keep a moving average; `settings` are those of timm's `ModelEmaV3`."""
        if not self._frozen:
            return super().setup_ema(**settings)
        self.trainable_module_ema = ModelEmaV3(unwrap_model(self.trainable_module).heads, **settings)
        return self.trainable_module_ema

    def update_ema(self, step: int | None = None) -> None:
        if not self._frozen:
            super().update_ema(step)
        elif self.has_ema():
            self.trainable_module_ema.update(unwrap_model(self.trainable_module).heads, step)

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        model = super().get_eval_model(module, ema)
        if not ema or not self._frozen or model is not self.get_trainable_module(ema=True) or model is None:
            return model
        return unwrap_model(self.trainable_module).with_heads(model.module)

    def get_clip_parameters(self, exclude_head: bool = False) -> Iterable[nn.Parameter]:
        """Those to clip; `exclude_head` leaves out the last two, the classifier, of the backbone and of each head."""
        if not exclude_head:
            return super().get_clip_parameters()
        model = unwrap_model(self.trainable_module)
        return [p for part in (model.backbone, *model.heads) for p in list(part.parameters())[:-2]]

    def get_checkpoint_state(self, ema: bool = False, **unwrap: Any) -> dict[str, Any]:
        """timm's checkpoint entries, and "self_distill": what makes the network and its exits again, as config.json of
        a saved model holds it."""
        state = super().get_checkpoint_state(ema, **unwrap)
        if ema:
            return state
        model = unwrap_model(self.trainable_module)
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

    @property
    def _frozen(self) -> bool:
        return unwrap_model(self.trainable_module).freeze_backbone

    def forward(self, input: Tensor | BackboneOutput, target: Tensor | None = None) -> dict[str, Tensor]:
        """Run all exits and the loss, in training and in eval mode.

        Args:
            input: images (B, in_chans, H, W), or what `SelfDistillModel.forward_backbone` gave for them.
            target: class indices (B,), soft labels (B, K), or None for images without labels.

        Returns:
            "loss", "label_loss", "distill_loss", "hint_loss" (scalars) and "output", the deepest logits (B, K).
        """
        forward = self.trainable_module if self.training else unwrap_model(self.trainable_module).forward_exits
        output = forward(input)
        terms = self.criterion.terms(output, target)
        return {
            "loss": terms["loss"],
            "output": output.logits[-1],
            "label_loss": terms["label"],
            "distill_loss": terms["distill"],
            "hint_loss": terms["hint"],
        }
