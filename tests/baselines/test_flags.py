"""--method and the flags that go with it."""
import re

import pytest
import timm
import torch
from timm.task import ClassificationTask, LogitDistillationTask

from timm_selfdistill import SelfDistillTask, hub, load_images
from timm_selfdistill.baselines import (
    AttentionTransferTask,
    FitNetTask,
    KnowledgeSynergyLoss,
    MutualLearningTask,
)
from timm_selfdistill.cli import check_method_flags, create_task, parse_args, train_config, train_parser
from timm_selfdistill.training.preprocessing import model_data_config

from ..conftest import EMBEDDED, TWO_PROCESSES, run_python, small_backbone


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


@pytest.mark.parametrize(("argv", "method"), [
    ([], "self-distill"), (["--baseline"], "plain"), (["--method", "kd", "--kd-model-name", "a", "--no-base"], "kd"),
    (["--baseline", "--no-baseline"], "self-distill"), (["--baseline", "--method", "dks"], "dks"),
    (["--method", "dks", "--baseline"], "plain"),
])
def test_baseline_is_another_name_for_the_plain_method(argv, method):
    args = parse(*argv)
    assert args.method == method
    assert train_config(args).settings["method"] == method
    assert "baseline" not in train_config(args).settings


@pytest.mark.parametrize(("text", "method"), [("method: dsn", "dsn"), ("baseline: true", "plain"),
                                              ("baseline: false", "self-distill")])
def test_in_a_config_file(text, method, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    assert parse("--config", str(tmp_path / "c.yaml")).method == method


@pytest.mark.parametrize(("argv", "message"), [
    (["--method", "kd"], "--method kd needs a teacher; give --kd-model-name, a timm model with pretrained weights"),
    (["--method", "at"], "--method at needs a teacher"),
    (["--method", "dml", "--kd-model-name", "resnet18"],
     "--kd-model-name belongs to --method kd, fitnet, at, and the method is dml; leave one out"),
    (["--kd-temperature", "2"], "--kd-temperature belongs to --method kd, and the method is self-distill"),
    (["--method", "dsn", "--distill-loss-weight", "2"], "--distill-loss-weight belongs to --method kd, fitnet, at"),
    (["--method", "dks", "--task-loss-weight", "0"], "--task-loss-weight belongs to --method kd, fitnet, at, and"),
    (["--method", "dks", "--distill-loss-weight", "-1"], "--distill-loss-weight must be a number >= 0, got -1.0"),
    (["--method", "dks", "--distill-loss-weight", "nan"], "--distill-loss-weight must be a number >= 0, got nan"),
    (["--method", "kd", "--kd-model-name", "a", "--kd-temperature", "0"], "--kd-temperature must be a number > 0, got"),
    (["--method", "foo"], "argument --method: invalid choice: 'foo'"),
])
def test_flags_that_contradict(argv, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(*argv)


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
    assert not any(p.requires_grad for p in kd.teacher.parameters())
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
    with pytest.raises(ValueError, match="--kd-model-name cifar_resnet18 has no pretrained weights, and a random"):
        build("--method", "kd", "--kd-model-name", "cifar_resnet18")
    with pytest.raises(RuntimeError, match=r"Unknown model \(resnet1\)"):
        build("--method", "kd", "--kd-model-name", "resnet1")
    hub.save_timm_model(small_backbone(num_classes=7, in_chans=1), tmp_path / "classes")
    with pytest.raises(ValueError, match=r"the teacher \(ResNet\) has 7 classes, the student \(ResNet\) 10"):
        build("--method", "kd", "--kd-model-name", f"local-dir:{tmp_path / 'classes'}")
    hub.save_timm_model(small_backbone(), tmp_path / "channels")
    with pytest.raises(ValueError, match=r"the teacher \(ResNet\) has 3 image channels, the student \(ResNet\) 1"):
        build("--method", "at", "--kd-model-name", f"local-dir:{tmp_path / 'channels'}")


def test_a_teacher_of_other_class_names_is_warned_of(tmp_path):
    model, student = small_backbone(in_chans=1), small_backbone(in_chans=1)
    for network, names in ((model, "abcdefghij"), (student, "abdcefghij")):
        model_data_config(network, 32, 1, class_names=list(names))
    hub.save_timm_model(model, tmp_path)
    args = parse("--method", "kd", "--kd-model-name", f"local-dir:{tmp_path}")
    with pytest.warns(UserWarning, match=r"class 2 is 'c' for the teacher local-dir:.* and 'd' in the data"):
        create_task(args, student, lambda: None)


def test_a_command_on_two_processes_and_a_word_where_the_teacher_is_missing(teacher, tmp_path):
    images = load_images(EMBEDDED)
    images.train.select(range(133)).to_parquet(tmp_path / "train.parquet")
    images.val.select(range(51)).to_parquet(tmp_path / "test.parquet")
    flags = ["examples/train.py", "--data-dir", tmp_path, "--output", tmp_path / "run", "--model", "test_resnet",
             "--epochs", 1, "-b", 32, "-j", 0, "--method", "fitnet"]
    done = run_python(*flags, "--kd-model-name", teacher, "--amp", "--amp-dtype", "bfloat16", launcher=TWO_PROCESSES)
    assert "SelfDistillModel" not in done.stdout
    assert "--baseline" not in done.stdout
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True).num_classes == 10
    settings = hub.read_metrics(tmp_path / "run" / "best")["settings"]
    assert settings["method"] == "fitnet"
    assert "kd_model_name" not in settings  # a path of this machine

    done = run_python(*flags, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.py: error: --method fitnet needs a teacher; give --kd-model-name")
