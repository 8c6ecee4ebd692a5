"""--method and the flags that go with it."""

import re

import pytest
import timm
import torch
import yaml
from timm.task import ClassificationTask, LogitDistillationTask

from timm_selfdistill import SelfDistillLoss, SelfDistillTask, hub, load_images
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
)
from timm_selfdistill.cli import check_method_flags, create_task, parse_args, train_config, train_parser
from timm_selfdistill.training.data.transforms import model_data_config

from ..conftest import EMBEDDED, run_python, small_backbone


def parse(*argv: str):
    args = parse_args(train_parser("", "images"), list(argv))
    check_method_flags(args)
    return args


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A saved network for grey images of 32 px, with a mean of one value."""
    model = small_backbone(in_chans=1)
    model_data_config(model, 32, 1, mean=(0.2,), std=(0.3,))
    folder = tmp_path_factory.mktemp("teacher")
    hub.save_timm_model(model, folder)
    return f"local-dir:{folder}"


def build(*argv: str):
    """The task of a command line, around a network for grey images of 32 px."""
    backbone = small_backbone(in_chans=1)
    model_data_config(backbone, 32, 1, mean=(0.5,), std=(0.5,))
    return create_task(parse(*argv), backbone, lambda: small_backbone(in_chans=1))


@pytest.mark.parametrize(
    ("argv", "method"),
    [
        ([], "self-distill"),
        (["--baseline"], "plain"),
        (["--method", "kd", "--kd-model-name", "a", "--no-base"], "kd"),
        (["--baseline", "--no-baseline"], "self-distill"),
        (["--baseline", "--method", "dks"], "dks"),
        (["--method", "dks", "--baseline"], "plain"),
    ],
)
def test_baseline_is_another_name_for_the_plain_method(argv, method):
    args = parse(*argv)
    assert args.method == method
    assert train_config(args).settings["method"] == method
    assert "baseline" not in train_config(args).settings


@pytest.mark.parametrize(
    ("text", "method"), [("method: dsn", "dsn"), ("baseline: true", "plain"), ("baseline: false", "self-distill")]
)
def test_in_a_config_file(text, method, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "c.yaml")).method == method


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "kd"], "--method kd .*teacher; add --kd-model-name .*local-dir:FOLDER .*hf-hub:ID"),
        (["--method", "at"], "--method at .*teacher; .*--kd-model-name"),
        (
            ["--method", "dml", "--kd-model-name", "resnet18"],
            "^--kd-model-name .*--method kd, fitnet, at, .* dml; leave one out",
        ),
        (["--kd-temperature", "2"], "^--kd-temperature .*--method kd, .* self-distill; leave one out"),
        (["--method", "dsn", "--distill-loss-weight", "2"], "--distill-loss-weight .*--method kd, fitnet, at, .* dsn"),
        (["--method", "dks", "--task-loss-weight", "0"], "^--task-loss-weight .*--method kd, fitnet, at, .* dks"),
        (["--method", "dks", "--distill-loss-weight", "-1"], "--distill-loss-weight .*>= 0, got -1.0"),
        (["--method", "dks", "--distill-loss-weight", "nan"], "--distill-loss-weight .*>= 0, got nan"),
        (["--method", "kd", "--kd-model-name", "a", "--kd-temperature", "0"], "--kd-temperature .*> 0, got 0"),
        (
            ["--method", "kd", "--kd-model-name", "a", "--task-loss-weight", "2"],
            r"--task-loss-weight.*\[0, 1\], .*got 2.0; .*--distill-loss-weight",
        ),
        (
            ["--method", "kd", "--kd-model-name", "a", "--task-loss-weight", "0", "--distill-loss-weight", "0"],
            "--task-loss-weight and --distill-loss-weight .*both 0",
        ),
        (
            ["--method", "at", "--kd-model-name", "a", "--task-loss-weight", "0", "--distill-loss-weight", "0"],
            "--task-loss-weight and --distill-loss-weight .*both 0",
        ),
        (
            ["--method", "kd", "--kd-model-name", "a", "--temperature", "8"],
            "^--temperature .*--method self-distill, .* kd; leave one out",
        ),
        (["--method", "dsn", "--alpha", "0.3"], "^--alpha .*--method self-distill, .* dsn; leave one out"),
        (["--method", "dks", "--hint", "map"], "^--hint .*--method self-distill, .* dks; leave one out"),
        (["--method", "dml", "--no-t-squared"], "^--t-squared .*--method self-distill, .* dml; leave one out"),
        (["--method", "dks", "--teacher", "ensemble"], "^--teacher .*--method self-distill, .* dks; leave one out"),
        (["--method", "dks", "--paper"], "^--paper .*--method self-distill, .* dks; leave one out"),
        (["--method", "dsn", "--beta", "0"], "^--beta .*--method self-distill, .* dsn; leave one out"),
        (
            ["--method", "fitnet", "--kd-model-name", "a", "--exits", "1"],
            "^--exits .*--method dsn, self-distill, dks, .* fitnet; leave one out",
        ),
        (
            ["--method", "at", "--kd-model-name", "a", "--head", "linear"],
            "^--head .*--method dsn, self-distill, dks, .* at; leave one out",
        ),
        (["--memory-share", "0.5"], "^--memory-share belongs to --teacher memory, .* is ensemble; leave one out"),
        (["--paper", "--memory-topk", "5"], "^--memory-topk belongs to --teacher memory, .* is deepest; leave one out"),
        (
            ["--method", "dsn", "--memory-momentum", "0"],
            "^--memory-momentum .*--method self-distill, .* dsn; leave one",
        ),
        (["--beta", "0.1"], "--beta 0.1 .*--hint .*none; .*--hint map or --hint pooled"),
        (["--freeze-backbone", "--hint", "none", "--beta", "0.1"], "--beta 0.1 .*--hint .*none; .*--hint map"),
        (
            ["--method", "dml", "--initial-checkpoint", "a.pth"],
            "--initial-checkpoint .*--method dml .*same weights.*leave it out",
        ),
        (["--method", "foo"], "--method: .*'foo'"),
    ],
)
def test_flags_that_contradict(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--method", "dks", "--exits", "1", "--head", "linear"],
        ["--method", "dsn", "--exits", "1", "--head", "linear"],
        ["--alpha", "0.5", "--head", "linear", "--baseline"],  # added to a command, to compare
        ["--paper", "--beta", "0.1"],
        ["--teacher", "memory", "--memory-share", "0.5", "--memory-topk", "0"],
        ["--teacher", "memory", "--memory-momentum", "0.3", "--baseline"],
        ["--paper", "--baseline"],
        ["--freeze-backbone", "--beta", "0.1"],
        ["--beta", "0.1", "--hint", "map"],
        ["--alpha", "0", "--beta", "0"],
        ["--method", "kd", "--kd-model-name", "a", "--task-loss-weight", "2", "--distill-loss-weight", "1"],
        ["--method", "kd", "--kd-model-name", "a", "--task-loss-weight", "1"],
    ],
)
def test_flags_that_go_together(argv):
    parse(*argv)


@pytest.mark.parametrize("method", ["plain", "dsn", "dks", "dml"])
def test_of_a_file_each_method_takes_what_it_has_a_use_for(method, tmp_path):
    (tmp_path / "c.yaml").write_text("alpha: 0.5\ntemperature: 2\nhint: none\nhead: linear\nexits: [layer2]")
    args = parse("--config", str(tmp_path / "c.yaml"), "--method", method)
    assert (args.method, args.head) == (method, "linear")
    with pytest.raises(ValueError, match="^--alpha .*--method self-distill, .* dsn; leave one out"):
        parse("--config", str(tmp_path / "c.yaml"), "--method", "dsn", "--alpha", "0.1")


def test_all_flags_of_the_loss_reach_it():
    loss = build(
        "--temperature",
        "2",
        "--alpha",
        "0.6",
        "--beta",
        "0.1",
        "--hint",
        "pooled",
        "--teacher",
        "deepest",
        "--no-t-squared",
    ).criterion
    assert repr(loss) == (
        "SelfDistillLoss(temperature=2.0, alpha=0.6, beta=0.1, hint='pooled', teacher='deepest', t_squared=False)"
    )


def test_the_flags_of_the_memory_reach_the_loss_and_go_with_its_teacher(tmp_path):
    flags = ("--memory-momentum", "0.3", "--memory-share", "0.5", "--memory-warmup-epochs", "2", "--memory-topk", "9")
    args = parse("--teacher", "memory", *flags)
    assert repr(build("--teacher", "memory", *flags).criterion).endswith(
        "memory_momentum=0.3, memory_share=0.5, memory_warmup_epochs=2, memory_topk=9)"
    )
    recorded = train_config(args).to_dict()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    file = ("--config", str(tmp_path / "config.yaml"))
    assert repr(build(*file).criterion) == repr(build("--teacher", "memory", *flags).criterion)
    assert repr(build(*file, "--teacher", "ensemble").criterion) == repr(SelfDistillLoss())
    assert repr(build(*file, "--paper").criterion) == repr(SelfDistillLoss.paper())
    with pytest.raises(ValueError, match=r"memory_momentum must lie in \[0, 1\), got 1.0"):
        build("--teacher", "memory", "--memory-momentum", "1")


def test_the_loss_is_what_measured_best_or_on_a_frozen_backbone_the_papers():
    assert (
        repr(build().criterion)
        == repr(SelfDistillLoss())
        == ("SelfDistillLoss(temperature=3.0, alpha=0.3, beta=0.03, hint=None, teacher='ensemble', t_squared=True)")
    )
    frozen = build("--freeze-backbone", "--hint", "pooled").criterion
    assert repr(frozen) == (
        "SelfDistillLoss(temperature=3.0, alpha=0.3, beta=0.03, hint='pooled', teacher='deepest', t_squared=False)"
    )
    assert repr(build("--freeze-backbone").criterion) == repr(SelfDistillLoss.paper())
    assert repr(build("--freeze-backbone", "--no-freeze-backbone").criterion) == repr(build().criterion)


def test_the_papers_loss_by_one_flag(tmp_path):
    assert repr(build("--paper").criterion) == repr(SelfDistillLoss.paper())
    for argv in (["--paper", "--hint", "pooled"], ["--hint", "pooled", "--paper"]):
        assert repr(build(*argv, "--alpha", "0.5").criterion) == repr(SelfDistillLoss.paper(hint="pooled", alpha=0.5))
    (tmp_path / "paper.yaml").write_text("paper: true\nalpha: 0.5")
    file = ("--config", str(tmp_path / "paper.yaml"))
    assert repr(build(*file).criterion) == repr(SelfDistillLoss.paper(alpha=0.5))
    assert repr(build(*file, "--teacher", "ensemble").criterion) == repr(
        SelfDistillLoss.paper(alpha=0.5, teacher="ensemble")
    )
    assert repr(build(*file, "--no-paper").criterion) == repr(SelfDistillLoss(alpha=0.5))
    assert parse(*file, "--method", "dsn").method == "dsn"


def test_a_run_records_the_loss_itself(tmp_path):
    recorded = train_config(parse("--paper", "--alpha", "0.5")).to_dict()
    assert "paper" not in recorded
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    file = ("--config", str(tmp_path / "config.yaml"))
    assert repr(build(*file).criterion) == repr(SelfDistillLoss.paper(alpha=0.5))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(train_config(parse("--alpha", "0.5")).to_dict()))
    assert repr(build(*file).criterion) == repr(SelfDistillLoss(alpha=0.5))
    assert repr(build(*file, "--paper").criterion) == repr(SelfDistillLoss.paper(alpha=0.5))


def test_of_a_file_too(tmp_path):
    (tmp_path / "c.yaml").write_text("freeze-backbone: true\nalpha: 0.5")
    assert repr(build("--config", str(tmp_path / "c.yaml")).criterion) == repr(SelfDistillLoss.paper(alpha=0.5))
    (tmp_path / "c.yaml").write_text("beta: 0.1")
    with pytest.raises(ValueError, match="--beta 0.1 .*--hint .*none; .*--hint map"):
        parse("--config", str(tmp_path / "c.yaml"))
    assert parse("--config", str(tmp_path / "c.yaml"), "--hint", "map").beta == 0.1
    parse("--config", str(tmp_path / "c.yaml"), "--method", "dks")


def test_each_method_has_its_task(teacher):
    with_teacher = ("--kd-model-name", teacher, "--method")
    assert type(build("--method", "plain")) is ClassificationTask
    assert build().criterion.alpha == 0.3
    dsn = build("--method", "dsn", "--head", "linear", "--exits", "layer2")
    assert isinstance(dsn, SelfDistillTask)
    assert (dsn.criterion.alpha, dsn.criterion.beta, dsn.get_eval_model().exits) == (0, 0, ("layer2", "layer4"))
    dks = build("--method", "dks", "--distill-loss-weight", "0.5").criterion
    assert isinstance(dks, KnowledgeSynergyLoss)
    assert dks.distill_loss_weight == 0.5
    assert isinstance(build("--method", "dml"), MutualLearningTask)

    kd = build(*with_teacher, "kd", "--task-loss-weight", "0.1")
    assert isinstance(kd, LogitDistillationTask)
    assert (kd.temperature, kd.task_loss_weight, kd.distill_loss_weight) == (4.0, 0.1, 0.9)
    assert (kd.student_mean.item(), kd.teacher.mean_kd.item()) == (0.5, pytest.approx(0.2))
    fitnet = build(*with_teacher, "fitnet", "--distill-loss-weight", "3")
    assert isinstance(fitnet, FitNetTask)
    assert (fitnet.task_loss_weight, fitnet.distill_loss_weight) == (1, 3)
    at = build(*with_teacher, "at", "--task-loss-weight", "2")
    assert isinstance(at, AttentionTransferTask)
    assert (at.task_loss_weight, at.distill_loss_weight) == (2, 1000)


def test_the_teacher_is_the_saved_network(teacher):
    x = torch.randn(2, 1, 32, 32)
    task = build("--method", "kd", "--kd-model-name", teacher)
    saved = timm.create_model(teacher, pretrained=True).eval()
    assert torch.equal(task.teacher.model(x), saved(x))


def test_teachers_that_do_not_fit(teacher, tmp_path):
    with pytest.raises(ValueError, match="--kd-model-name cifar_resnet18 .*untrained teacher.*local-dir:FOLDER"):
        build("--method", "kd", "--kd-model-name", "cifar_resnet18")
    hub.save_timm_model(small_backbone(), tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    for name, said in (
        ("resnet1", r"Unknown model \(resnet1\)"),
        ("resnet18.no", r"tag \(no\) for resnet18"),
        ("local-dir:/nowhere", "not found: /nowhere/config.json"),
        (f"local-dir:{tmp_path / 'empty'}", "checkpoints found in .*/empty"),
        ("hf-hub:nobody/nothing", "local cache.*"),
    ):
        with pytest.raises(ValueError, match=rf"^--kd-model-name {name}: .*{said}; .*local-dir:FOLDER .*hf-hub:ID"):
            build("--method", "kd", "--kd-model-name", name)
    hub.save_timm_model(small_backbone(num_classes=7, in_chans=1), tmp_path / "classes")
    with pytest.raises(ValueError, match=r"teacher \(ResNet\) .*7 classes, .*student \(ResNet\) 10"):
        build("--method", "kd", "--kd-model-name", f"local-dir:{tmp_path / 'classes'}")
    hub.save_timm_model(small_backbone(), tmp_path / "channels")
    with pytest.raises(ValueError, match=r"teacher \(ResNet\) .*3 image channels, .*student \(ResNet\) 1"):
        build("--method", "at", "--kd-model-name", f"local-dir:{tmp_path / 'channels'}")


def test_a_teacher_of_other_class_names_is_warned_of(tmp_path):
    model, student = small_backbone(in_chans=1), small_backbone(in_chans=1)
    for network, names in ((model, "abcdefghij"), (student, "abxdefghij")):
        model_data_config(network, 32, 1, class_names=list(names))
    hub.save_timm_model(model, tmp_path)
    args = parse("--method", "kd", "--kd-model-name", f"local-dir:{tmp_path}")
    with pytest.warns(UserWarning, match="class 2 .*'c' .*teacher local-dir:.* 'x' .*data"):
        create_task(args, student, lambda: None)
    model_data_config(student, 32, 1, class_names=list("abdcefghij"))
    with pytest.raises(ValueError, match=r"\('a', 'b', 'c', 'd', .*\('a', 'b', 'd', 'c', .* in a different order"):
        create_task(args, student, lambda: None)


def test_a_teacher_for_images_of_another_size_is_warned_of(teacher):
    student = small_backbone(in_chans=1)
    model_data_config(student, 64, 1)
    with pytest.warns(UserWarning, match=r"local-dir:.* 32 pixels, .* have 64, .*--img-size 32"):
        task = create_task(parse("--method", "at", "--kd-model-name", teacher), student, lambda: None)
    assert task.teacher.model.pretrained_cfg["input_size"] == (1, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "fitnet"])
def test_a_command_on_two_processes_and_a_word_where_the_teacher_is_missing(method, teacher, tmp_path):
    images = load_images(EMBEDDED)
    images.train.select(range(133)).to_parquet(tmp_path / "train.parquet")
    images.val.select(range(51)).to_parquet(tmp_path / "test.parquet")
    flags = [
        "examples/train.py",
        "--data-dir",
        tmp_path,
        "--output",
        tmp_path / "run",
        "--model",
        "test_resnet",
        "--in-chans",
        1,
        "--epochs",
        1,
        "-b",
        32,
        "-j",
        0,
        "--method",
        method,
    ]
    done = run_python(*flags, "--kd-model-name", teacher, "--amp", "--amp-dtype", "bfloat16", processes=2)
    assert "SelfDistillModel" not in done.stdout
    assert "--baseline" not in done.stdout
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True).num_classes == 10
    settings = hub.read_metrics(tmp_path / "run" / "best")["settings"]
    assert settings["method"] == method
    assert "kd_model_name" not in settings  # a path of this machine

    done = run_python(*flags, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.match(f"train.py: error: --method {method} .*teacher; .*--kd-model-name", line)
