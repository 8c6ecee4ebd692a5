"""What `sweep.py` asks of one architecture: on the meta device, and on real tensors."""

import copy
import tempfile
from typing import Any

import timm
import torch
from torch import Tensor, nn

from timm_selfdistill import SelfDistillLoss, SelfDistillModel, wrap_self_distill
from timm_selfdistill.cost import count_cost, default_input_size

CLASSES = 10


def check_meta(name: str, row: dict[str, Any]) -> None:
    """Wrap, training forward, loss, backward and eval, without memory or arithmetic: shapes only.

    What is learned on the way goes into `row`, up to the first thing that is wrong.
    """
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=CLASSES)
        row |= describe(backbone)
        size = row["input_size"]
        model = wrap_self_distill(backbone)
        row["exits"] = model.exits
        x, y = torch.empty(2, *size), torch.zeros(2, dtype=torch.long)
        _train_step(model, x, y)
        logits = model.eval()(x)
        expect(logits.shape == backbone.eval()(x).shape == (2, CLASSES), f"eval gives {tuple(logits.shape)}")
    plain = count_cost(backbone, size)
    everything = count_cost(model, size, lambda m, x: m.forward_exits(x, with_features=False))
    row |= {
        "macs": plain.macs,
        "head_macs": everything.macs - plain.macs,
        "shares": [
            count_cost(model, size, lambda m, x, exit=exit: m.predict(x, exit)).macs / plain.macs
            for exit in range(len(model.exits) - 1)
        ],
    }


def check_real(name: str, row: dict[str, Any]) -> None:
    """A training step that moves heads and backbone; eval, every exit, and save and load, to the last bit."""
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=CLASSES)
    row |= describe(backbone)
    model = wrap_self_distill(backbone)
    row["exits"] = model.exits
    row["input_size"] = small_input_size(backbone)
    x, y = torch.randn(2, *row["input_size"]), torch.tensor([0, 1])

    before = copy.deepcopy(model.state_dict())
    _train_step(model, x, y)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = [key for key, value in model.named_parameters() if not torch.equal(before[key], value)]
    for index in range(len(model.heads)):
        expect(any(key.startswith(f"heads.{index}.") for key in moved), f"the step left head {index} as it was")
    expect(any(key.startswith("backbone.") for key in moved), "the step left the backbone as it was")

    model.load_state_dict(before)  # a step of 0.1 can blow an untrained network up
    model.eval()
    with torch.no_grad():
        plain = backbone(x)
        expect(same(model(x), plain), "eval differs from the plain network")
        logits = model.forward_exits(x).logits
        for exit, expected in enumerate(logits):
            expect(same(model.predict(x, exit), expected), f"predict(x, {exit}) differs from forward_exits")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = SelfDistillModel.from_pretrained(folder)
            again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        expect(same(again(x), plain), "plain timm loads another network")
        for exit, expected in enumerate(logits):
            expect(same(loaded.predict(x, exit), expected), f"exit {exit} differs after saving and loading")


def describe(backbone: nn.Module) -> dict[str, Any]:
    return {
        "class": type(backbone).__name__,
        "params": sum(p.numel() for p in backbone.parameters()),
        "levels": len(backbone.feature_info),
        "input_size": default_input_size(backbone),
    }


def small_input_size(backbone: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width): the smallest that the model names, else 224 pixels at most, where it is free."""
    channels, *size = default_input_size(backbone)
    cfg = backbone.pretrained_cfg
    if cfg.get("fixed_input_size"):
        return channels, *size
    return channels, *(min(pair) for pair in zip(size, (cfg.get("min_input_size") or (3, 224, 224))[1:]))


def same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first, second) and bool(first.isfinite().all())


def expect(true: bool, message: str) -> None:
    if not true:
        raise ValueError(message)


def _train_step(model: SelfDistillModel, x: Tensor, y: Tensor) -> None:
    """Forward in training mode, loss and backward; raise if a shape is not what it must be."""
    output = model.train()(x)
    classifiers = len(model.exits)
    expect(
        [tuple(z.shape) for z in output.logits] == [(len(x), CLASSES)] * classifiers,
        f"logits have the shapes {[tuple(z.shape) for z in output.logits]}",
    )
    expect(
        len(output.features) == classifiers and len({f.shape for f in output.features}) == 1,
        f"features have the shapes {[tuple(f.shape) for f in output.features]}",
    )
    loss = SelfDistillLoss.paper()(output, y)
    expect(loss.shape == (), f"the loss has the shape {tuple(loss.shape)}")
    loss.backward()
    for key, p in _learning(model.heads):
        expect(p.grad is not None and p.grad.shape == p.shape, f"head parameter {key} got no gradient")
    expect(any(p.grad is not None for _, p in _learning(model.backbone)), "the backbone got no gradient")


def _learning(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
