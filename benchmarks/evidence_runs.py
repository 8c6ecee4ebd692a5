"""A run of `evidence.py`: the task of a method, its training, and what is measured of it."""

import argparse
import copy
import io
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from evidence_data import Images, digest, load_measured, load_training
from evidence_grid import METHODS, TEACHERS, create_network
from evidence_points import Row, recipe_of
from hardware import describe
from memory import peak_memory
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch.utils.data import DataLoader, Subset

from timm_selfdistill import TrainConfig, Trainer
from timm_selfdistill.training.loop.memory import nothing_remembered
from timm_selfdistill.training.outputs.metrics import measure_exits

BATCH_SIZE = 64


def measure(run: Row, args: argparse.Namespace) -> Row:
    """The line of a run."""
    began = time.monotonic()
    torch.set_num_threads(args.threads)
    train = load_training(run["data"], run["per_class"], run["seed"], recipe_of(run["network"]).image_size)
    task, facts = create_task(run, len(train), args)
    facts |= train_and_measure(task, train, run, args)
    if run["phase"] == "teacher":
        save_teacher(task, facts, teacher_path(run, args))
    return (
        run
        | facts
        | {
            "criterion": repr(getattr(task, "criterion", None)),
            "amp_dtype": args.amp_dtype,
            "hardware": describe(args.device),
            "data_sha256": digest(run["data"]),
            "wall_seconds": round(time.monotonic() - began, 1),
        }
    )


def create_task(run: Row, images: int, args: argparse.Namespace) -> tuple[TrainingTask, Row]:
    """The method's task around a new network, and what is known of its teacher."""
    torch.manual_seed(run["seed"])
    method, facts = METHODS[run["method"]], {}
    arguments = [create_network(run["network"], run["data"]), run["weight"], run["passes"] * images // BATCH_SIZE]
    if method.other == "peer":
        arguments.append(create_network(run["network"], run["data"]))
    elif method.other == "teacher":
        saved = torch.load(teacher_path(run, args), weights_only=True)
        teacher = create_network(TEACHERS[run["network"]], run["data"])
        teacher.load_state_dict(saved["state"])
        arguments.append(teacher.to(memory_format=torch.channels_last))
        facts = {"teacher_seconds": saved["seconds"], "teacher_top1": saved["top1"]}
    return method.make(*arguments), facts


def teacher_path(run: Row, args: argparse.Namespace) -> Path:
    """Weights of the teacher of a setting and seed."""
    return args.output.with_suffix("") / f"{run['setting']}-{run['seed']}.pt"


def save_teacher(task: TrainingTask, facts: Row, path: Path) -> None:
    if "diverged" in facts:
        raise FloatingPointError(f"the teacher {path.stem} diverged at its best point: {facts['diverged']}")
    path.parent.mkdir(exist_ok=True)
    state = {name: value.cpu() for name, value in unwrap_model(task.trainable_module).state_dict().items()}
    torch.save({"state": state, "seconds": facts["seconds"], "top1": facts["top1"][-1]}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def train_and_measure(task: TrainingTask, train: Images, run: Row, args: argparse.Namespace) -> Row:
    """Top-1 of every exit and of the ensemble after the last epoch, in per cent; time and memory of the training."""
    split = "test" if run["phase"] in ("test", "teacher") else "validation"
    measured = load_measured(run["data"], split, recipe_of(run["network"]).image_size)
    memory = step_memory(task, train[0][0].shape, args.device)
    clock = time.perf_counter if args.device == "cuda" else time.process_time  # others may use the processor, too
    with tempfile.TemporaryDirectory() as output, redirect_stdout(io.StringIO()):
        trainer = create_trainer(task, train, measured, run, args, output=output)
        began = clock()
        try:
            if trainer.fit().interrupted_by:
                sys.exit("stopped; the same command goes on")
        except FloatingPointError as error:  # a point of the grid that nobody should choose
            return {"top1": [0.0], "ensemble": None, "diverged": str(error).partition(";")[0]}
        seconds = clock() - began
    metrics, _ = measure_exits(
        trainer.eval_model,
        (trainer.update.to_device(*batch) for batch in DataLoader(measured, 500)),
        trainer.accelerator,
    )
    return {
        "top1": [metric.top1 for metric in metrics if metric.exit != "ensemble"],
        "ensemble": next((metric.top1 for metric in metrics if metric.exit == "ensemble"), None),
        "images": len(train),
        "memory_mb": round(memory / 1e6, 1),
        "seconds": None if args.device == "cuda" and args.jobs > 1 else round(seconds, 1),
    }


def create_trainer(
    task: TrainingTask,
    train: Images,
    measured: Images,
    run: Row,
    args: argparse.Namespace,
    **settings: Any,
) -> Trainer:
    """Epochs of several passes, after which a few images are evaluated, so that this takes little of the time. They are
    a `Subset`, so that an image has one memory in all passes."""
    os.environ["ACCELERATE_USE_CPU"] = str(args.device == "cpu").lower()
    torch.manual_seed(run["seed"])
    recipe = recipe_of(run["network"])
    repeated = Subset(train, list(range(len(train))) * recipe.passes)
    trainer = Trainer(
        task,
        repeated,
        Subset(measured, range(BATCH_SIZE)),
        TrainConfig(
            seed=run["seed"],
            epochs=run["passes"] // recipe.passes,
            batch_size=BATCH_SIZE,
            workers=0,
            opt=recipe.opt,
            **{name: run[name] for name in recipe.grid[0]},
            channels_last=True,
            amp=args.amp_dtype is not None,
            amp_dtype=args.amp_dtype or "float16",
            **settings,
        ),
    )
    if trainer.accelerator.device.type != args.device:
        raise ValueError(f"--device {args.device}: it would train on {trainer.accelerator.device}")
    return trainer


def step_memory(task: TrainingTask, image: torch.Size, device: str) -> int:
    """Bytes at the worst moment of a forward and backward pass; a memory of answers is not counted."""
    task = copy.deepcopy(task).to(device).train()
    x, y = torch.zeros(BATCH_SIZE, *image, device=device), torch.zeros(BATCH_SIZE, dtype=torch.long, device=device)
    classes = unwrap_model(task.get_eval_model()).num_classes
    remembered = nothing_remembered(task, BATCH_SIZE, classes, device)
    return peak_memory(task, lambda: task(x, y, *remembered)["loss"].backward(), device)
