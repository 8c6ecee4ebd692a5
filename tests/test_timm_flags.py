"""The flags of timm's train.py mean here what they mean there."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import FeatureDistillationTask, LogitDistillationTask, TokenDistillationTask
from timm.utils import dispatch_clip_grad
from torch import nn
from torch.distributions import Bernoulli, kl_divergence

from timm_selfdistill import (
    SelfDistillModel,
    SelfDistillOutput,
    SelfDistillTask,
    TrainConfig,
    Trainer,
    load_images,
)
from timm_selfdistill.cli import parse_args, train_config, train_parser
from timm_selfdistill.cli.methods import _wrap, check_method_flags, create_task, exit_loss
from timm_selfdistill.cli.timm_flags import PASSED_OVER, REFUSED
from timm_selfdistill.cli.train import _augmentation, _create_backbone
from timm_selfdistill.hub import read_metrics
from timm_selfdistill.training.data.splits import in_mapped_order
from timm_selfdistill.training.data.transforms import TargetMixer, create_train_transform
from timm_selfdistill.training.loop.optimizer import base_lr, create_optimizer

from .conftest import run_python, small_backbone, small_model

IMAGES = SimpleNamespace(num_classes=7)


def parse(*flags: object):
    return parse_args(train_parser("", "images"), list(map(str, flags)))


def described(optimizer: torch.optim.Optimizer) -> list[dict]:
    return [
        {
            key: [p.shape for p in value] if key == "params" else tuple(value) if isinstance(value, list) else value
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--opt", "lamb", "--lr", 5e-3, "--weight-decay", 0.02, "--opt-eps", 1e-6],
        ["--opt", "adamw", "--opt-betas", 0.9, 0.95, "--opt-eps", 1e-7],
        ["--opt", "adamw", "--layer-decay", 0.6, "--layer-decay-min-scale", 0.2],
        ["--opt", "rmsproptf", "--momentum", 0.9, "--opt-kwargs", "alpha=0.95"],
        ["--opt", "sgd", "--opt-kwargs", "nesterov=False"],
    ],
)
def test_the_optimizer(flags):
    args, model = parse(*flags), small_backbone("test_vit")
    expected = create_optimizer_v2(copy.deepcopy(model), **optimizer_kwargs(args), **args.opt_kwargs)
    optimizer = create_optimizer(model, train_config(args))
    assert type(optimizer) is type(expected)
    assert described(optimizer) == described(expected)


def test_layers_that_are_not_trained():
    model = small_backbone("test_vit")
    optimizer = create_optimizer(model, TrainConfig(opt="adamw", layer_decay=0.5, layer_decay_no_opt_scale=0.2))
    assert any(not p.requires_grad for p in model.parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_a_setting_that_the_optimizer_does_not_take():
    for config, message in (
        (TrainConfig(opt_betas=(0.9, 0.99)), "sgd has no betas; leave opt_betas out"),
        (TrainConfig(opt_eps=1e-3), "sgd has no eps; leave opt_eps out"),
        (TrainConfig(opt_kwargs={"size": 3}), "sgd does not accept one of its settings: .*'size'"),
    ):
        with pytest.raises(ValueError, match=f"the optimizer {message}"):
            create_optimizer(small_backbone(), config)


@pytest.mark.parametrize(
    "flags",
    [
        ["--sched", "cosine", "--lr-cycle-limit", 3, "--lr-cycle-mul", 1.5, "--lr-cycle-decay", 0.3],
        ["--sched", "poly", "--lr-k-decay", 0.7],
        ["--sched", "cosine", "--lr-k-decay", 1.5],
        ["--sched", "cosine", "--lr-noise", 0.4, 0.9, "--lr-noise-pct", 0.5, "--lr-noise-std", 0.8],
        ["--sched", "step", "--decay-epochs", 2, "--dr", 0.3],
        ["--sched", "cosine", "--lr-noise", 0.5],
    ],
)
def test_the_schedule(flags, tmp_path):
    """Of every update of a run, against timm's own with the same flags, stepped by update."""
    args = parse("--lr", 0.4, "--epochs", 6, "-b", 8, "-j", 0, "--output", tmp_path, *flags)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.lr)
    args.sched_on_updates = True
    expected, _ = create_scheduler_v2(reference, **scheduler_kwargs(args), updates_per_epoch=4)
    data = [(torch.zeros(3, 32, 32), index % 10) for index in range(32)]
    trainer = Trainer(SelfDistillTask(small_model()), data, data, train_config(args))
    for position in range(24):
        expected.step_update(position)
        trainer.update.set_schedule(position)
        assert trainer.update.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"], position


@pytest.mark.parametrize(
    "flags",
    [
        ["--reprob", 0.3, "--remode", "rand", "--recount", 3],
        ["--reprob", 0.2],
        ["--color-jitter", 0.3, "--color-jitter-prob", 0.8, "--grayscale-prob", 0.2, "--gaussian-blur-prob", 0.1],
        ["--aa", "rand-m9-mstd0.5", "--scale", 0.08, 1.0],
        ["--aa", "3a"],
        ["--no-aug"],
    ],
)
def test_the_transform(flags):
    args = parse(*flags)
    config = {**resolve_model_data_config(small_backbone()), "interpolation": "random"}
    own = create_train_transform(config, **_augmentation(args))
    rest = (
        {"no_aug": True}
        if args.no_aug
        else {
            "train_crop_mode": args.train_crop_mode,
            "scale": args.scale,
            "ratio": args.ratio,
            "hflip": args.hflip,
            "vflip": args.vflip,
            "color_jitter": args.color_jitter,
            "color_jitter_prob": args.color_jitter_prob,
            "grayscale_prob": args.grayscale_prob,
            "gaussian_blur_prob": args.gaussian_blur_prob,
            "auto_augment": args.aa,
            "re_prob": args.reprob,
            "re_mode": args.remode,
            "re_count": args.recount,
        }
    )
    expected = create_transform(**config, is_training=True, **rest)
    assert str(own) == str(expected)
    if args.reprob:
        assert vars(own.transforms[-1]) == vars(expected.transforms[-1])


@pytest.mark.parametrize("mode", ["norm", "value", "agc"])
def test_clipping(mode, tmp_path):
    torch.manual_seed(0)
    task = SelfDistillTask(small_model())
    data = [(torch.randn(3, 32, 32), index % 10) for index in range(8)]
    trainer = Trainer(
        task,
        data,
        data,
        TrainConfig(output=str(tmp_path / "run"), batch_size=4, workers=0, clip_grad=1e-3, clip_mode=mode),
    )
    model = trainer.update.task.get_trainable_module()
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    twin = SelfDistillTask(copy.deepcopy(model))
    for p, own in zip(twin.trainable_module.parameters(), model.parameters()):
        p.grad = own.grad.clone()
    dispatch_clip_grad(list(twin.get_clip_parameters(exclude_head=mode == "agc")), 1e-3, mode=mode)
    trainer.update._clip()
    for p, own in zip(twin.trainable_module.parameters(), model.parameters()):
        torch.testing.assert_close(own.grad, p.grad)


@pytest.mark.parametrize(
    ("flags", "images", "expected"),
    [
        (["--lr-base", 0.1], 512, 0.2),
        (["--lr-base", 0.1, "--opt", "adamw"], 1024, 0.2),
        (["--lr-base", 0.1, "--opt", "lamb", "--lr-base-scale", "linear"], 1024, 0.4),
        (["--lr-base", 0.1, "--lr-base-size", 64], 128, 0.2),
        (["--lr-base", 0.1, "--lr-base-scale", "sqrt"], 1024, 0.2),
    ],
)
def test_the_learning_rate_by_the_size_of_the_batch(flags, images, expected):
    assert math.isclose(base_lr(train_config(parse(*flags)), images), expected)


def test_a_learning_rate_of_its_own_comes_first(tmp_path):
    assert train_config(parse("--lr-base", 0.1, "--lr", 0.3)).lr_base is None
    assert train_config(parse()).lr == 0.05
    data = [(torch.zeros(3, 32, 32), 0)] * 32
    config = train_config(parse("--lr-base", 0.1, "-b", 16, "--grad-accum-steps", 2, "-j", 0, "--output", tmp_path))
    assert Trainer(SelfDistillTask(small_model()), data, data, config).config.lr == pytest.approx(0.1 * 32 / 256)


def test_the_network(tmp_path):
    args = parse(
        "--model",
        "test_efficientnet",
        "--bn-eps",
        0.01,
        "--bn-momentum",
        0.3,
        "--gp",
        "max",
        "--model-kwargs",
        "act_layer=gelu",
        "--input-size",
        1,
        64,
        64,
        "--head-init-scale",
        0.0,
        "--head-init-bias",
        -2,
    )
    model = _create_backbone(args, IMAGES)
    norms = [part for part in model.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(0.01, 0.3)}
    assert (args.in_chans, args.img_size, model.num_classes) == (1, 64, 7)
    assert any("GELU" in type(part).__name__ for part in model.modules())
    assert (model.classifier.weight == 0).all()
    assert (model.classifier.bias == -2).all()
    assert "max" in str(model.global_pool).lower()
    args.exits = args.head = None
    whole = _wrap(args, model, None).eval()
    whole.save_pretrained(tmp_path)
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        assert torch.equal(SelfDistillModel.from_pretrained(tmp_path)(x), whole(x))
        assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(x), whole(x))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input-size", 3, 64, 32], "--input-size 3 64 32: images are read as squares"),
        (["--input-size", 3, 64, 64, "--img-size", 32], "--input-size 3 64 64 and --img-size 32 contradict"),
        (["--input-size", 3, 64, 64, "--in-chans", 1], "--input-size 3 64 64 and --in-chans 1 contradict"),
        (["--weight-decey", 0.1], "unrecognized arguments: --weight-decey; did you mean --weight-decay"),
        (["--opt-beta", "x"], "--opt-betas"),
        (["--model-kwargs", "foo"], "--model-kwargs: expected NAME=VALUE, got 'foo'"),
        (["-b", "many"], "invalid batch_size value: 'many'"),
        (["--opt", "adma"], "'adma'; did you mean .*adam"),
        (["--kd-loss-type", "mse"], "--kd-loss-type: invalid choice: 'mse'"),
        (["--hflip", 7], "--hflip must be a probability in .0, 1., got 7"),
        (["--drop-path", 3], "--drop-path must be a rate"),
        (["--scale", 2, 1], "--scale must be a minimum and a maximum, got 2.0 1.0"),
        (["--scale", 0.08], "--scale must be a minimum"),
        (["--recount", 0], "--recount must be at least 1"),
        (["--bce-pos-weight", -1], "--bce-pos-weight must be > 0"),
        (["--lr-noise", 0.9, 0.2], "lr_noise must be one fraction of the run, or two in ascending order"),
        (["--decay-milestones", 3, 2], "decay_milestones must increase"),
        (["--decay-epochs", 0], "decay_epochs must be a number > 0"),
        (["--lr-base-size", 8], "lr_base_size and lr_base_scale have no effect without lr_base"),
        (["--sched", "plateau", "--start-epoch", 2], "start_epoch must be 0 with plateau"),
        (["--clip-mode", "all"], "--clip-mode: invalid choice: 'all'"),
        (["--lr-base-scale", "cubic"], "--lr-base-scale: invalid choice: 'cubic'"),
    ],
)
def test_flags_that_are_wrong(flags, message):
    with pytest.raises(ValueError, match=message):
        train_config(parse(*flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model-kwargs", "depth=99"], "test_resnet does not accept all of --model-kwargs: .*'depth'; leave out"),
        (["--model-kwargs", "block=1"], "test_resnet does not accept all of --model-kwargs: "),
        (["--model-kwargs", "num_classes=4"], "--model-kwargs num_classes has its own flag; use --num-classes"),
        (["--model", "test_vit", "--drop-block", 0.1], "test_vit does not accept all of --drop-block: "),
        (
            ["--model", "test_vit", "--aug-splits", 2, "--split-bn"],
            "--split-bn needs batch norm, which test_vit does not",
        ),
        (["--model", "resnet180"], "timm has no model resnet180; did you mean .*resnet18"),
    ],
)
def test_a_model_that_does_not_take_its_arguments(flags, message):
    with pytest.raises(ValueError, match=message):
        _create_backbone(parse("--model", "test_resnet", *flags), IMAGES)


def test_betas_that_are_not_enough():
    with pytest.raises(ValueError, match="the optimizer adamw does not accept one of its settings"):
        create_optimizer(small_backbone(), TrainConfig(opt="adamw", opt_betas=(0.9,)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_with_the_reason(name):
    flag = f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag}, a flag of timm's train.py, is not supported: ") as refused:
        parse(flag)
    assert str(refused.value).endswith(REFUSED[name])


@pytest.mark.parametrize("name", PASSED_OVER)
def test_what_changes_nothing_is_passed_over(name):
    """With its value, if it has one, and the folder behind it."""
    values = [] if yaml.safe_load(FLAGS.read_text())[name]["nargs"] == 0 else ["kl" if "kd" in name else 1]
    with pytest.warns(UserWarning, match=f"--{name.replace('_', '-')} has no effect here"):
        args = parse_args(train_parser(""), [f"--{name.replace('_', '-')}", *map(str, values), "photos"])
    assert args.data_dir == "photos"


def test_the_folder_of_images_alone(tmp_path):
    assert parse("photos", "--epochs", 3).data_dir == "photos"
    (tmp_path / "flags.yaml").write_text("data-dir: others\ntrain-split: part\nreport-to: [tensorboard]")
    args = parse("--config", tmp_path / "flags.yaml", "photos")
    assert (args.data_dir, args.train_split, args.report_to) == ("photos", "train", ["tensorboard"])
    assert parse("--config", tmp_path / "flags.yaml").data_dir == "others"
    for more in (["--data-dir", "others"], ["--dataset", "user/images"]):
        with pytest.raises(ValueError, match=f"given twice, photos and {more[1]}; give"):
            parse("photos", *more)


def test_a_data_set_under_timms_name():
    args = parse("--dataset", "hfds/user/images")
    assert (args.dataset, args.streaming) == ("user/images", False)
    assert parse("--dataset", "hfids/user/images").streaming
    with pytest.raises(ValueError, match="torch/cifar10: timm's dataset type torch is not supported; give"):
        parse("--dataset", "torch/cifar10")


def test_a_recovery_interval_is_one_of_checkpoints():
    assert parse("--recovery-interval", 50).checkpoint_interval == "50"
    assert "recovery_interval" not in train_config(parse("--recovery-interval", 50)).to_dict()
    with pytest.raises(ValueError, match="--recovery-interval 50 and --checkpoint-interval 10m contradict"):
        parse("--recovery-interval", 50, "--checkpoint-interval", "10m")


@pytest.fixture
def three_classes(tmp_path):
    for name in ("ant", "bee", "cat"):
        for index in range(8):
            path = tmp_path / "images" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (30 * index, 90, 10)).save(path)
    return tmp_path / "images"


def test_the_order_of_classes_by_a_file(three_classes, tmp_path):
    """The file lies in the folder of the images; later commands know the order."""
    (three_classes / "map.txt").write_text("cat\nelk\nant\nbee\n")
    run_python(
        "-m",
        "timm_selfdistill",
        "train",
        three_classes,
        "--class-map",
        "map.txt",
        "--model",
        "test_resnet",
        "-b",
        4,
        "-j",
        0,
        "--epochs",
        1,
        "--output",
        tmp_path / "run",
    )
    model = SelfDistillModel.from_pretrained(tmp_path / "run/best")
    assert (model.pretrained_cfg["label_names"], model.num_classes) == (["cat", "elk", "ant", "bee"], 4)
    images = in_mapped_order(load_images(three_classes), three_classes / "map.txt", None)
    train, _ = images.transformed(resolve_model_data_config(model.backbone))
    assert {Path(row["image"]["path"]).parent.name: train[index][1] for index, row in enumerate(train.rows)} == {
        "cat": 0,
        "ant": 2,
        "bee": 3,
    }
    assert "found: " not in run_python("-m", "timm_selfdistill", "evaluate", tmp_path / "run/best").stderr


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("nowhere.txt", None, FileNotFoundError, "class map nowhere.txt does not exist"),
        ("map.txt", "ant\nbee\n", ValueError, "map.txt has 2 classes .*it lacks 'cat'; add"),
        ("map.txt", "ant\nbee\ncat\nant\n", ValueError, "map.txt lists 'ant' twice"),
        ("map.pkl", "ant", ValueError, "map.pkl must be a text file .*pickled"),
    ],
)
def test_class_maps_that_cannot_be(name, text, error, message, three_classes):
    if text:
        (three_classes / name).write_text(text)
    with pytest.raises(error, match=message):
        in_mapped_order(load_images(three_classes), name, three_classes)


def test_a_class_map_with_more_classes(three_classes):
    (three_classes / "map.txt").write_text("cat\nant\nbee\nelk\n")
    assert in_mapped_order(load_images(three_classes), "map.txt", three_classes, 5).class_names == [
        "cat",
        "ant",
        "bee",
        "elk",
        "4",
    ]
    with pytest.raises(ValueError, match="map.txt has 4 classes, but num_classes is 3"):
        in_mapped_order(load_images(three_classes), "map.txt", three_classes, 3)


def kd_args(*flags: object):
    return parse("--method", "kd", "--kd-model-name", "teacher", *flags)


def test_kinds_of_distillation_of_timm(monkeypatch):
    teacher = small_backbone("test_vit", num_classes=7, img_size=32)
    monkeypatch.setattr("timm_selfdistill.cli.methods.create_teacher", lambda name, student: teacher)
    student = small_backbone("test_resnet", num_classes=7)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(7, (4,))
    args = kd_args("--kd-distill-type", "feature", "--distill-loss-weight", 2)
    check_method_flags(args)
    task = create_task(args, student, lambda: None)
    assert type(task) is FeatureDistillationTask
    assert task.distill_loss_weight == 2
    assert task.train()(x, y)["loss"].isfinite()
    args = kd_args("--kd-distill-type", "token", "--kd-token-distill-type", "hard", "--kd-temperature", 2)
    check_method_flags(args)
    student = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=7)
    task = create_task(args, student, lambda: None)
    assert (type(task), task.distill_type, task.temperature) == (TokenDistillationTask, "hard", 2)
    assert task.train()(x, y)["loss"].isfinite()
    assert type(create_task(kd_args(), student, lambda: None)) is LogitDistillationTask


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--kd-distill-type", "feature", "--kd-temperature", 2],
            "--kd-temperature belongs to --kd-distill-type logit",
        ),
        (
            ["--kd-token-distill-type", "hard"],
            "--kd-token-distill-type belongs to --kd-distill-type token, but it is logit",
        ),
        (["--kd-student-feature-dim", 64], "--kd-student-feature-dim belongs to --kd-distill-type feature"),
    ],
)
def test_flags_of_other_kinds_of_distillation(flags, message):
    with pytest.raises(ValueError, match=message):
        check_method_flags(kd_args(*flags))


def test_a_student_without_a_distillation_token(monkeypatch):
    monkeypatch.setattr("timm_selfdistill.cli.methods.create_teacher", lambda name, student: small_backbone())
    with pytest.raises(ValueError, match="--kd-distill-type token .*which test_resnet does"):
        create_task(kd_args("--kd-distill-type", "token", "--model", "test_resnet"), small_backbone(), lambda: None)


def test_an_experiment_is_a_folder_below_the_output():
    assert parse("--output", "runs", "--experiment", "first").output == "runs/first"
    assert parse("--experiment", "first").output == "output/train/first"
    assert "experiment" not in train_config(parse("--experiment", "first")).to_dict()


def test_compiling():
    assert parse("--torchcompile").torchcompile == "inductor"
    assert parse("--torchcompile", "aot_eager").torchcompile == "aot_eager"
    assert parse("--torchcompile", "--no-torchcompile").torchcompile is False
    assert parse("--capture-exits").capture_exits == "inductor"
    assert parse("--capture-exits", "--no-capture-exits").capture_exits is False
    config = train_config(parse("--torchcompile", "--torchcompile-mode", "max-autotune"))
    assert config.torchcompile_mode == "max-autotune"


@pytest.mark.parametrize(("value", "expected"), [("true", "inductor"), ("false", False), ("aot_eager", "aot_eager")])
def test_compiling_by_a_file(value, expected, tmp_path):
    (tmp_path / "flags.yaml").write_text(f"torchcompile: {value}")
    assert parse("--config", tmp_path / "flags.yaml").torchcompile == expected


def test_a_backend_compiles_the_model(tmp_path):
    data = [(torch.randn(3, 32, 32), index % 10) for index in range(8)]
    config = TrainConfig(output=str(tmp_path / "run"), epochs=1, batch_size=4, workers=0, torchcompile="eager")
    assert Trainer(SelfDistillTask(small_model()), data, data, config).fit().summary
    with pytest.raises(RuntimeError, match="no_such_backend"):
        Trainer(
            SelfDistillTask(small_model()),
            data,
            data,
            TrainConfig(output=str(tmp_path / "other"), batch_size=4, workers=0, torchcompile="no_such_backend"),
        )


def test_cutmix_between_two_sizes():
    config = train_config(parse("--cutmix-minmax", 0.2, 0.8))
    mixer = TargetMixer(config, 10)
    assert mixer.mixup.cutmix_minmax == (0.2, 0.8)
    assert mixer.mixes
    for given in ([0.8, 0.2], [0.5], [0.2, 1.5]):
        with pytest.raises(ValueError, match="cutmix_minmax must be two fractions"):
            train_config(parse("--cutmix-minmax", *given))


def test_weights_and_biases():
    args = parse("--log-wandb", "--wandb-project", "shoes", "--wandb-tags", "a", "b", "--report-to", "tensorboard")
    config = train_config(args)
    assert (config.report_to, config.wandb_project, config.wandb_tags) == (
        ("tensorboard", "wandb"),
        "shoes",
        ("a", "b"),
    )
    assert "log_wandb" not in config.to_dict()
    for flags in (["--wandb-project", "shoes"], ["--wandb-tags", "a"]):
        with pytest.raises(ValueError, match="need the tracker wandb; add it to report_to"):
            train_config(parse(*flags))


@pytest.mark.parametrize("flags", [[], ["--bce-sum"], ["--bce-target-thresh", 0.2], ["--bce-pos-weight", 2.0]])
@pytest.mark.parametrize("teacher", ["ensemble", "deepest"])
def test_binary_cross_entropy_and_what_distills_with_it(flags, teacher):
    """Against timm's loss for the labels, and torch's KL divergence between Bernoulli distributions."""
    args = parse("--bce-loss", "--teacher", teacher, "--temperature", 2, "--alpha", 0.4, *flags)
    loss = exit_loss(vars(args))
    logits = torch.randn(3, 5, 7, dtype=torch.double)
    target = torch.rand(5, 7, dtype=torch.double)
    label_loss = BinaryCrossEntropy(
        smoothing=0.0, target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum, pos_weight=args.bce_pos_weight
    )
    terms = loss.terms(SelfDistillOutput(tuple(logits), tuple(logits)), target)
    labels = torch.stack([label_loss(z, target) for z in logits])
    weights = torch.tensor([0.6, 0.6, 0.6 if teacher == "ensemble" else 1.0])
    torch.testing.assert_close(terms["label"], (weights * labels).sum())
    known = logits.mean(0) if teacher == "ensemble" else logits[-1]
    divergences = kl_divergence(Bernoulli(logits=(known / 2).expand(3, 5, 7)), Bernoulli(logits=logits / 2))
    divergences = divergences.sum(-1) if args.bce_sum else divergences.mean(-1)
    torch.testing.assert_close(terms["distill"], 4 * divergences.mean(1).sum())
    torch.testing.assert_close(terms["loss"], terms["label"] + 0.4 * terms["distill"])


def test_the_binary_loss_is_finite_for_any_logits():
    loss = exit_loss(vars(parse("--bce-loss")))
    for scale in (1e4, 1e30, -1e30):
        logits = tuple((scale * torch.randn(4, 7)).requires_grad_() for _ in range(3))
        value = loss.terms(SelfDistillOutput(logits, logits), torch.eye(7)[:4])["distill"]
        value.backward()
        assert value.isfinite()
        assert all(z.grad.isfinite().all() for z in logits)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--bce-loss", "--method", "kd", "--kd-model-name", "resnet18"],
            "--bce-loss .*--method kd compares softmaxes",
        ),
        (["--bce-loss", "--method", "dml"], "--method dml compares softmaxes"),
        (["--bce-sum"], "--bce-sum belongs to --bce-loss, which is off"),
        (["--bce-pos-weight", 2], "--bce-pos-weight belongs to --bce-loss"),
    ],
)
def test_binary_flags_that_do_not_fit(flags, message):
    with pytest.raises(ValueError, match=message):
        check_method_flags(parse(*flags))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--mixup", 0.2],
        ["--smoothing", 0.1, "--bce-sum"],
        ["--method", "plain", "--model-kwargs", "act_layer=gelu"],
        ["--method", "dsn"],
    ],
)
def test_a_run_with_binary_cross_entropy(more, few_images, tmp_path):
    run_python(
        "examples/train.py",
        few_images,
        "--model",
        "test_resnet",
        "--img-size",
        32,
        "-b",
        32,
        "-j",
        0,
        "--epochs",
        1,
        "--bce-loss",
        "--output",
        tmp_path / "run",
        *more,
    )
    settings = read_metrics(tmp_path / "run/best")["settings"]
    assert settings["bce_loss"]
    if settings["method"] == "self-distill":
        assert exit_loss(settings).distill == "sigmoid"


ARGS = Path(__file__).parent / "data/timm_args.yaml"
"""As timm's train.py writes it without any flag."""


def timm_file(folder, **changes: object) -> Path:
    (folder / "args.yaml").write_text(yaml.safe_dump({**yaml.safe_load(ARGS.read_text()), **changes}))
    return folder / "args.yaml"


FLAGS = Path(__file__).parent / "data/timm_flags.yaml"
"""Options, number of values and type of the flags of timm's train.py, 1.0.29.dev0, but for --config."""


def test_every_flag_of_timms_script_is_known_with_its_names_values_and_type():
    """Where ours differs, it takes more."""
    own, timms = {}, yaml.safe_load(FLAGS.read_text())
    for action in train_parser("")._actions:
        known = own.setdefault(action.dest, SimpleNamespace(options=[], nargs=action.nargs, type=action.type))
        known.options += action.option_strings
    assert timms.keys() == yaml.safe_load(ARGS.read_text()).keys() <= own.keys()
    assert len(timms) == 172
    for name, flag in timms.items():
        assert set(flag["options"]) <= set(own[name].options), name
        if name in REFUSED:
            continue
        assert {None: 1}.get(own[name].nargs, own[name].nargs) == flag["nargs"] or name == "resume", name
        found = getattr(own[name].type, "__name__", None)
        wanted = {"warmup_epochs": "float", "batch_size": "batch_size", "worker_seeding": None, "fuser": None}
        assert found in (wanted.get(name, flag["type"]), flag["type"] and (None if flag["type"] == "str" else ...)) or (
            name in PASSED_OVER
        ), name


@pytest.mark.parametrize(
    "changes",
    [
        {
            "bce_loss": True,
            "opt": "lamb",
            "lr_base": 5e-3,
            "mixup": 0.1,
            "cutmix": 1.0,
            "aa": "rand-m6-mstd0.5",
            "aug_repeats": 3,
            "bce_target_thresh": 0.2,
            "cooldown_epochs": 1,
        },
        {
            "model": "test_vit",
            "img_size": 160,
            "opt": "adamw",
            "layer_decay": 0.7,
            "opt_betas": [0.9, 0.98],
            "lr": 1e-3,
            "model_kwargs": {"qkv_bias": False},
            "drop_path": 0.1,
        },
        {
            "opt": "rmsproptf",
            "lr": 0.02,
            "lr_noise": [0.42, 0.9],
            "model_ema": True,
            "sched": "step",
            "decay_rate": 0.97,
            "decay_epochs": 2.4,
            "opt_eps": 0.001,
            "warmup_lr": 1e-6,
        },
    ],
)
def test_an_args_file_trains_as_it_is(changes, few_images, tmp_path):
    """An epoch; optimizer, schedule, loss and transforms are those that timm's own factories build of the same
    arguments."""
    file = timm_file(
        tmp_path,
        **{
            "model": "test_resnet",
            "epochs": 1,
            "batch_size": 16,
            "workers": 0,
            "num_classes": 10,
            "img_size": 32,
            "data_dir": str(few_images),
            "warmup_epochs": 0,
            "output": str(tmp_path),
            "experiment": "run",
            "pin_mem": True,
            **changes,
        },
    )
    done = run_python("-m", "timm_selfdistill", "train", "--config", file, cwd=tmp_path)
    assert f"{file}: ignored, since they have no effect here: pin_mem\n" in done.stdout
    assert (tmp_path / "run/best/config.json").is_file()
    args, wanted = parse("--config", file), SimpleNamespace(**yaml.safe_load(file.read_text()))
    config = train_config(args)
    assert config.sched_on_updates is False
    model = _create_backbone(args, IMAGES)
    if wanted.lr is None:
        wanted.lr = config.lr = base_lr(config, 16)
    optimizer, expected = (
        create_optimizer(model, config),
        create_optimizer_v2(copy.deepcopy(model), **optimizer_kwargs(wanted), **wanted.opt_kwargs),
    )
    assert described(optimizer) == described(expected)
    schedules = [
        create_scheduler_v2(which, **scheduler_kwargs(settings))[0]
        for which, settings in ((optimizer, config), (expected, wanted))
    ]
    assert len((tmp_path / "run/history.csv").read_text().splitlines()) == 2 + wanted.cooldown_epochs
    assert str(create_train_transform(data_config := resolve_model_data_config(model), **_augmentation(args))) == str(
        create_transform(
            **data_config,
            is_training=True,
            scale=wanted.scale,
            ratio=wanted.ratio,
            color_jitter=wanted.color_jitter,
            auto_augment=wanted.aa,
        )
    )
    label_loss = exit_loss(vars(args)).label_loss
    assert (label_loss is None) == (not wanted.bce_loss)
    if label_loss:
        timms = BinaryCrossEntropy(target_threshold=wanted.bce_target_thresh)
        logits, target = torch.randn(4, 10), torch.rand(4, 10)
        assert torch.equal(label_loss(logits, target), timms(logits, target))
    for epoch in range(3):
        for schedule in schedules:
            schedule.step(epoch)
        assert described(optimizer) == described(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tta": 3}, "args.yaml: tta 3 is not supported: validation runs each image once"),
        ({"naflex_loader": True}, "args.yaml: naflex_loader True is not supported: NaFlex models"),
        ({"torchscript": True}, "args.yaml: torchscript True is not supported: torch.jit"),
        ({"muon_lr": 0.1, "zeta": 1}, "args.yaml: unknown keys, .* another version of timm: muon_lr, zeta;"),
        ({"clip_mode": "all"}, "args.yaml: .*--clip-mode: invalid choice: 'all'"),
        ({"val_split": ""}, "args.yaml: an empty val_split is not supported: a run always validates"),
        ({"dist_bn": ""}, "args.yaml: an empty dist_bn is not supported"),
        ({"sched": ""}, "unknown schedule ''"),
        ({"input_img_mode": "L"}, "input_img_mode L is not supported"),
        ({"kd_model_name": "resnet18", "kd_loss_type": "mse"}, "kd_loss_type mse is not supported: timm only has kl"),
    ],
)
def test_an_args_file_that_cannot_be_done(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_config(parse("--config", timm_file(tmp_path, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"bce_target_thresh": 0.2},
        {"bce_loss": True, "smoothing": 0.0},
        {"wandb_project": "shoes"},
        {"apex_amp": False},
        {"torchcompile_mode": "max-autotune"},
        {"opt_eps": 1e-3, "opt_betas": [0.9, 0.99]},
        {"epoch_repeats": 2.0},
        {"train_num_samples": 100},
        {"drop_connect": 0.2},
        {"sched": "step", "cooldown_epochs": 10},
    ],
)
def test_what_timm_ignores_is_passed_over(changes, tmp_path, capsys):
    args = parse("--config", timm_file(tmp_path, **changes))
    train_config(args)
    assert not args.bce_loss
    said = capsys.readouterr().out
    for name, value in changes.items():
        assert (name in said) == (name == "apex_amp" or (bool(value) and name != "sched"))


def test_empty_and_missing_values_of_an_args_file(tmp_path):
    args = parse("--config", timm_file(tmp_path, train_interpolation="", input_img_mode="RGB", lr=0.0))
    assert (args.train_interpolation, args.lr, args.lr_base, args.fit_img_size) == ("", 0.05, 0.1, False)
    short = {key: value for key, value in yaml.safe_load(ARGS.read_text()).items() if key != "pin_mem"}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(short))
    assert parse("--config", tmp_path / "args.yaml").model == "resnet50"


def test_flags_by_hand_take_the_place_of_those_that_go_with_them(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("lr: 0.3\nopt: adamw\nopt-betas: [0.9, 0.95]\nbce-loss: true\nbce-sum: true")
    assert (parse("--config", file).lr, parse("--config", file).lr_base) == (0.3, None)
    args = parse("--config", file, "--lr-base", 0.6, "--opt", "sgd", "--no-bce-loss")
    check_method_flags(args)
    assert (args.lr_base, args.opt_betas, args.bce_sum) == (0.6, None, False)
    file.write_text("lr: 0.01\nlr_base: 0.1\nfound: {}")  # a run's own
    assert parse("--config", file).lr_base == 0.1
    assert parse("--config", file, "--lr", 0.2).lr_base is None


def test_a_teacher_alone_makes_the_method():
    assert parse("--kd-model-name", "resnet34").method == "kd"
    assert parse("--kd-model-name", "resnet34", "--method", "at").method == "at"
    assert parse("--baseline").method == "plain"
    assert parse("--baseline", "--no-baseline").method == "self-distill"


def test_flags_by_hand_win_over_the_file(tmp_path):
    args = parse("--config", timm_file(tmp_path, lr=0.3, data_dir="photos"), "--lr", 0.1, "--epochs", 2)
    assert (args.lr, args.epochs, args.data_dir, args.smoothing, args.model) == (0.1, 2, "photos", 0.1, "resnet50")
    assert parse("--config", timm_file(tmp_path, data="old"), "--img-size", 64).data_dir == "old"


def test_timms_defaults(tmp_path):
    ours, timms = parse("--timm-defaults"), SimpleNamespace(**yaml.safe_load(ARGS.read_text()))
    for name in (
        "model",
        "smoothing",
        "weight_decay",
        "epochs",
        "batch_size",
        "warmup_epochs",
        "lr_base",
        "decay_epochs",
        "workers",
        "checkpoint_hist",
        "sched_on_updates",
        "opt",
        "momentum",
        "sched",
        "warmup_lr",
        "min_lr",
        "decay_rate",
        "hflip",
        "vflip",
        "color_jitter",
        "reprob",
        "remode",
        "recount",
        "mixup",
        "cutmix",
        "clip_mode",
        "lr_noise_pct",
        "lr_cycle_decay",
        "model_ema_decay",
        "seed",
        "train_interpolation",
    ):
        assert getattr(ours, name) == getattr(timms, name), name
    assert list(ours.scale) == timms.scale
    assert parse("--timm-defaults", "--epochs", 5).epochs == 5
    assert "timm_defaults" not in train_config(ours).to_dict()


def test_a_schedule_by_epoch(tmp_path):
    args = parse(
        "--no-sched-on-updates",
        "--lr",
        0.4,
        "--epochs",
        4,
        "--warmup-epochs",
        2,
        "-b",
        8,
        "-j",
        0,
        "--output",
        tmp_path,
    )
    data = [(torch.zeros(3, 32, 32), index % 10) for index in range(32)]
    trainer = Trainer(SelfDistillTask(small_model()), data, data, train_config(args))
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=args.lr)
    expected, _ = create_scheduler_v2(reference, **scheduler_kwargs(args))
    for position in range(16):
        if position % 4 == 0 and position:
            expected.step(position // 4)
        trainer.update.set_schedule(position)
        assert trainer.update.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"], position
