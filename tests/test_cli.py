import re

import pytest
import timm
import yaml

from timm_selfdistill import load_images
from timm_selfdistill.cli import check_frozen_flags, parse_args, train_config, train_parser
from timm_selfdistill.cli import train as train_command

from .conftest import ROOT, run_python


def parse(tmp_path, text: str, *argv: str):
    (tmp_path / "config.yaml").write_text(text)
    return parse_args(train_parser("", "images"), ["--config", str(tmp_path / "config.yaml"), *argv])


def test_a_config_file_holds_flags_with_dashes_or_underscores(tmp_path):
    args = parse(
        tmp_path,
        """
        model: resnet50
        batch-size: 32
        weight_decay: 1e-4
        scale: [0.2, 1.0]
        exits: [layer1, 3]
        decay-milestones: [83, 166]
        amp: true
        no-aug: true
        resume: null
        mean: -0.5
    """,
    )
    assert (args.model, args.batch_size, args.weight_decay, args.scale) == ("resnet50", 32, 1e-4, [0.2, 1.0])
    assert (args.exits, args.decay_milestones, args.amp, args.no_aug) == (["layer1", "3"], [83, 166], True, True)
    assert (args.resume, args.mean) == (None, [-0.5])


def test_flags_of_the_command_line_win_wherever_they_stand(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 0.5\namp: true\nmodel: resnet50\nexits: [1, 2]\n")
    parser = train_parser("", "images")
    for argv in (
        ["-c", str(tmp_path / "c.yaml"), "--lr", "0.1", "--no-amp", "--exits", "3"],
        ["--lr", "0.1", "--no-amp", "--exits", "3", "--conf", str(tmp_path / "c.yaml")],
    ):
        args = parse_args(parser, argv)
        assert (args.lr, args.amp, args.model, args.exits) == (0.1, False, "resnet50", ["3"])


@pytest.mark.parametrize(("flag", "expected"), [("--data-dir", ("mine", None)), ("--dataset", ("images", "mine"))])
def test_images_of_the_command_line_take_the_place_of_the_files(flag, expected, tmp_path):
    text = "dataset: uoft-cs/cifar100\ndataset-config: a\ninput-key: img\ntarget-key: fine_label\nval-split: b\nlr: 3\n"
    args = parse(tmp_path, text)
    assert (args.dataset, args.input_key, args.target_key) == ("uoft-cs/cifar100", "img", "fine_label")
    args = parse(tmp_path, text, flag, "mine", "--target-key", "own")
    assert (args.data_dir, args.dataset) == expected
    assert (args.input_key, args.target_key, args.dataset_config, args.val_split) == (None, "own", None, None)
    assert args.lr == 3


def test_every_switch_of_a_file_can_be_turned_off(tmp_path):
    text = "no-aug: true\npretrained: true\nmodel-ema: true"
    args = parse(tmp_path, text, "--aug", "--no-pretrained", "--no-model-ema")
    assert (args.no_aug, args.pretrained, args.model_ema) == (False, False, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning-rate: 0.1", "unknown flag 'learning-rate'"),
        ("weight-dcay: 0.1", r"unknown flag 'weight-dcay'; .*\bweight-decay"),
        ("config: other.yaml", "unknown flag 'config'"),
        ("help: true", "unknown flag 'help'"),
        ("b: 3", "unknown flag 'b'"),
        ("no-amp: true", r"unknown flag 'no-amp'; .*\bno-aug"),
        ("3: 4", "unknown flag 3"),
        ("amp: 1", "amp .*true or false, got 1"),
        ("lr: true", "lr .*one value, got True"),
        ("lr: [0.1, 0.2]", r"lr .*one value, got \[0.1, 0.2\]"),
        ("scale: {a: 1}", "scale .*values, got .'a': 1"),
        ("- lr", r"config\.yaml .*'lr: 0.1', got list"),
        ("", r"config\.yaml .*'lr: 0.1', got NoneType"),
        ("lr: [", r"config\.yaml .*YAML: .*line 1"),
        ("hint: null", "hint .*got None; .*default none"),
        ("decay-milestones: []", r"decay-milestones .*got \[\]; .*default \(90, 180, 270\)"),
        ("batch-size: 3\nbatch_size: 4", "batch_size .*twice"),
        ("lr: fast", r"config\.yaml: .*--lr\b.*'fast'"),
    ],
)
def test_a_bad_config_file_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, text)


def test_a_config_file_that_does_not_exist_is_refused():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml .*--config .*YAML"):
        parse_args(train_parser("", "images"), ["--config", "nowhere.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: fast", r"--lr\b.*'fast'"),
        ("hint: foo", r"--hint\b.*'foo'"),
        ("scale: 0.1", r"--scale must be a minimum and a maximum, got 0.1"),
        ("lrr: 0.1", r"unknown flag 'lrr'; .*\blr\b"),
        ("aa: cifar11", "timm .*transforms: .*cifar11"),
        ("cutout: -1", "cutout .*pixels >= 0, got -1"),
    ],
)
def test_a_bad_value_ends_in_one_line_and_exit_code_2(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    done = run_python("examples/train.py", "--config", tmp_path / "c.yaml", "--output", tmp_path / "run", check=False)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert re.search(message, line), line


def test_a_run_can_be_repeated_from_its_config_yaml(tmp_path):
    parser = train_parser("", str(ROOT / "examples/data"))
    argv = ["--model", "test_resnet", "--scale", "0.3", "1.0", "--exits", "layer1", "--report-to", "csv", "--amp"]
    config = train_config(parse_args(parser, argv))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    again = train_config(parse_args(parser, ["-c", str(tmp_path / "config.yaml"), "--output", "other"]))
    assert again.output == "other"
    again.output = config.output
    assert again == config


def test_a_batch_size_is_a_number_or_auto(tmp_path):
    assert parse(tmp_path, "batch-size: auto").batch_size == "auto"
    assert train_config(parse(tmp_path, "batch-size: auto")).batch_size == "auto"
    assert parse(tmp_path, "batch-size: auto", "-b", "32").batch_size == 32
    with pytest.raises(ValueError, match="--batch-size: .*'much'"):
        parse(tmp_path, "lr: 1", "-b", "much")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache-features"], r"\(--train-crop-mode rrc, --hflip 0.5, --color-jitter 0.4\); add --no-aug"),
        (
            ["--cache-features", "--train-crop-mode", "rkrc", "--hflip", "0", "--color-jitter", "0", "--aa", "rand-m5"],
            r"\(--train-crop-mode rkrc, --aa rand-m5\); add --no-aug",
        ),
        (["--no-freeze-backbone", "--cache-features"], "^--cache-features .*add --freeze-backbone"),
        (["--no-freeze-backbone", "--unlabelled"], "^--unlabelled .*add --freeze-backbone"),
        (["--baseline"], "--method plain .*--freeze-backbone .*leave one out"),
        (["--method", "dml"], "--method dml .*--freeze-backbone .*leave one out"),
        (["--method", "dsn", "--unlabelled"], "--method dsn .*--unlabelled .*leave one out"),
        (["--pretrained-path", "a"], "--pretrained-path .*--freeze-backbone .*use --initial-checkpoint"),
        (["--num-classes", "0"], "--num-classes .*1, got 0"),
    ],
)
def test_flags_that_contradict(flags, message):
    with pytest.raises(ValueError, match=message):
        check_frozen_flags(parse_args(train_parser("", "images"), ["--freeze-backbone", *flags]))


def test_a_frozen_backbone_without_weights_is_warned_of():
    with pytest.warns(UserWarning, match="--freeze-backbone .*random.*add --pretrained or --initial-checkpoint"):
        check_frozen_flags(parse_args(train_parser("", "images"), ["--freeze-backbone"]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("source", [["--pretrained"], ["--initial-checkpoint", "a"]])
def test_a_frozen_backbone_with_weights_is_not_warned_of(source):
    argv = ["--freeze-backbone", "--cache-features", "--no-aug", "--unlabelled", *source]
    check_frozen_flags(parse_args(train_parser("", "images"), argv))


@pytest.mark.parametrize(
    ("source", "size"), [([], 32), (["--pretrained"], 160), (["--initial-checkpoint", "a.safetensors"], 160)]
)
def test_only_a_new_network_is_trained_at_the_size_of_small_images(source, size, few_images):
    args = parse_args(train_parser("", "images"), ["--model", "test_resnet", *source])
    _, data_config, _ = train_command._fit(
        load_images(few_images), timm.create_model("test_resnet", num_classes=10), args
    )
    assert data_config["input_size"] == (3, size, size)
