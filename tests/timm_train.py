"""What timm's train.py does around its training task, on few images: mixed precision, EMA, AGC, compiled, resumed.

The lines that docs/own_loop.md adds to train.py are executed here. Writes output/distilled/ to the current folder.
"""

import argparse
import re
from functools import partial
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, accuracy, dispatch_clip_grad

from timm_selfdistill import load_images

PAGE = Path(__file__).parents[1] / "docs/own_loop.md"


def added_lines():
    """The import, the line after `create_model`, and the line that makes the task."""
    diff = re.search(r"^```diff\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL).group(1)
    lines = [line[1:].strip() for line in diff.splitlines() if line.startswith("+")]
    assert len(lines) == 3
    return lines


def write_images(folder):
    images = load_images("examples/data")
    for split, rows in (("train", images.train), ("validation", images.val)):
        for position, row in enumerate(rows.select(range(64))):
            path = folder / split / str(row["label"]) / f"{position}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].convert("RGB").save(path)


def train(epochs, resume=None):
    device = torch.device("cpu")
    args = argparse.Namespace(model="test_resnet", num_classes=10, img_size=32)
    backbone = timm.create_model(args.model, num_classes=args.num_classes)
    names = {"model": backbone, "train_loss_fn": SoftTargetCrossEntropy()}
    imported, wrapped, tasked = added_lines()
    exec(f"{imported}\n{wrapped}", names)
    data_config = resolve_data_config(vars(args), model=names["model"])
    assert data_config == resolve_data_config(vars(args), model=backbone)
    autocast = partial(torch.autocast, device_type="cpu", dtype=torch.bfloat16)
    loaders = [
        create_loader(
            create_dataset("", root="images", split=split),
            data_config["input_size"],
            batch_size=32,
            is_training=split == "train",
            device=device,
            num_workers=0,
        )
        for split in ("train", "validation")
    ]
    exec(tasked, names)
    task = names["task"]
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.01, weight_decay=2e-5)
    start = resume_task_checkpoint(task, resume, optimizer=optimizer) if resume else 0
    task.setup_ema(decay=0.9, use_warmup=False, device=None)
    if resume:
        load_task_ema_checkpoint(task, resume)
    task.compile(backend="eager", mode=None)
    model, eval_model = task.get_trainable_module(), task.get_eval_model()
    task.compile_ema(backend="eager", mode=None)
    saver = CheckpointSaver(
        model=model,
        optimizer=optimizer,
        args=args,
        task=task,
        checkpoint_dir="output/distilled",
        recovery_dir="output/distilled",
    )
    for epoch in range(start, epochs):
        task.get_trainable_module().train()
        for step, (x, y) in enumerate(loaders[0]):
            with autocast():
                result = task(x, torch.nn.functional.one_hot(y, args.num_classes).float())
            result["loss"].backward()
            dispatch_clip_grad(task.get_clip_parameters(exclude_head=True), value=0.01, mode="agc")
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema(step=step + 1)
        validate(eval_model, loaders[1], autocast)
        saver.save_checkpoint(epoch, metric=validate(task.get_eval_model(ema=True), loaders[1], autocast))
    return start


def validate(model, loader, autocast):
    model.eval()
    with torch.inference_mode():
        found = []
        for x, y in loader:
            with autocast():
                output = model(x)
            assert output.shape == (len(x), 10)  # of the deepest exit
            found.append(accuracy(output, y)[0])
    return float(torch.stack(found).mean())


if __name__ == "__main__":
    write_images(Path("images"))
    Path("output/distilled").mkdir(parents=True)
    assert train(epochs=1) == 0
    assert train(epochs=2, resume="output/distilled/last.pth.tar") == 1
