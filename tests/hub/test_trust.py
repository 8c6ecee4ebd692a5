"""Repositories that a stranger has damaged or made to harm: one clear error, and nothing built from them."""

import gc
import json
import os
import pickle
import re
import resource
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from timm_selfdistill import SelfDistillModel, wrap_self_distill
from timm_selfdistill.cli.opening import load_any_model
from timm_selfdistill.hub import save_timm_model

from ..conftest import small_model
from ..programs import HANGS

BACKBONE, HEADS = "model.safetensors", "self_distill.safetensors"


def config(**changes) -> Callable[[Path], None]:
    """Change config.json; names with dots reach into it."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / "config.json").read_text())
        for name, change in changes.items():
            place, *rest = name.split("__")
            target = value
            for step in rest:
                target, place = target.setdefault(place, {}), step
            target[place] = change
        (folder / "config.json").write_text(json.dumps(value))

    return damage


def network(architecture: str, **model_args) -> Callable[[Path], None]:
    return config(architecture=architecture, **{f"model_args__{key}": value for key, value in model_args.items()})


def text(content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(content)


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def tensors(name: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    return lambda folder: save_file(change(load_file(folder / name)), folder / name)


def header_text(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the text of a safetensors file's header."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        fresh = change(data[8 : 8 + length])
        (folder / name).write_bytes(struct.pack("<Q", len(fresh)) + fresh + data[8 + length :])

    return damage


def header(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the values of a safetensors file's header."""

    def changed(text: bytes) -> bytes:
        values = json.loads(text)
        change(values)
        return json.dumps(values).encode()

    return header_text(name, changed)


def many_tensors(folder: Path) -> None:
    save_file({f"{i}": torch.zeros(0) for i in range(200_000)}, folder / HEADS)


def many_keys(folder: Path) -> None:
    keys = ", ".join(f'"{i}": 0' for i in range(10**6))
    raw("config.json", lambda data: data.rstrip()[:-1] + f', {keys}, "architecture": "x"}}'.encode())(folder)


def extra(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"\x80\x04evil")


def renamed(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / other)


def instead(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Something else in a file's place."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def link(name: str, target: str) -> Callable[[Path], None]:
    return instead(name, lambda path: path.symlink_to(target))


def pipe(name: str) -> Callable[[Path], None]:
    return instead(name, os.mkfifo)


def folder_instead(name: str) -> Callable[[Path], None]:
    return instead(name, Path.mkdir)


def twice(name: str) -> Callable[[Path], None]:
    """The first tensor of a safetensors file under the name of the second."""

    def renamed(text: bytes) -> bytes:
        first, second = re.findall(rb'"([^"]+)":\{"dtype"', text)[:2]
        return text.replace(b'"' + first + b'":', b'"' + second + b'":')

    return header_text(name, renamed)


HOSTILE = {
    "a path as architecture": (config(architecture="/etc/passwd"), "architecture .*timm model, got '/etc/passwd'"),
    "a folder as architecture": (config(architecture="local-dir:/tmp"), "architecture .*got 'local-dir:/tmp'"),
    "the Hub as architecture": (config(architecture="hf-hub:evil/model"), "architecture .*got 'hf-hub:evil/model'"),
    "an address as architecture": (config(architecture="https://evil.example"), "architecture .*got 'https://evil"),
    "a module as architecture": (config(architecture="os.system"), "architecture .*timm model, got 'os.system'"),
    "no word as architecture": (config(architecture=["resnet18"]), r"architecture .*timm model, got \['resnet18'\]"),
    "another architecture": (config(architecture="resnet10t"), "tensors: [0-9]+ missing .*, [0-9]+ foreign"),
    "a giant architecture": (config(architecture="vit_giant_patch14_224"), "tensors: [0-9]+ missing "),
    "no classes": (config(num_classes=0), "num_classes .*above 0, got 0"),
    "a billion classes": (config(num_classes=10**9), "tensor of 96000000000 elements"),
    "half a class": (config(num_classes=2.5), "num_classes .*above 0, got 2.5"),
    "true classes": (config(num_classes=True), "num_classes .*above 0, got True"),
    "other classes": (config(num_classes=11), "fc.bias has shape .10,., expected .11,."),
    "a checkpoint to load": (config(model_args__checkpoint_path="evil.pth"), "model_args .*not set checkpoint_path"),
    "pretrained weights to load": (config(model_args__pretrained=True), "model_args .*not set pretrained"),
    "features only": (config(model_args__features_only=True), "model_args .*not set features_only"),
    "a device": (config(model_args__device="cuda"), "model_args .*not set device"),
    "objects as arguments": (config(model_args__act_layer={"_target_": "os.system"}), "model_args .*plain values"),
    "a path as argument": (config(model_args__act_layer="../../evil"), "act_layer.* plain word, got '../../evil'"),
    "a huge width": (config(model_args__stem_width=10**12), "at most 49152, .* for 'stem_width'"),
    "NaN as argument": (config(model_args__drop_rate=float("nan")), "NaN .*JSON"),
    "infinity as argument": (config(model_args__drop_rate=float("inf")), "Infinity .*JSON"),
    "a thousand layers": (config(model_args__layers=[1000, 1000, 1000, 1000]), "too many layers"),
    "a million values": (config(model_args__layers=[0] * 10**6), "at most 49152, .* for 'layers'"),
    "deep lists": (config(model_args__layers=[[[[[[1]]]]]]), r"plain values only, got \[\[\[1\]\]\]"),
    "no object as arguments": (config(model_args=[1]), r"model_args .*object, got \[1\]"),
    "a huge head": (config(self_distill__head_args={"width": 10**9}), "head_args: .*at most 49152, .* for 'width'"),
    "a head that is code": (config(self_distill__head="os.system"), "unknown head 'os.system'"),
    "unknown head arguments": (config(self_distill__head_args={"a": 1}), "head_args=.'a': 1"),
    "a thousand exits": (config(self_distill__exits=list(range(1000))), "no level 5 "),
    "exits that are no levels": (config(self_distill__exits=[{"a": 1}]), "exits .*feature_info indices, got .*'a': 1"),
    "deep JSON": (text("[" * 200_000), "config.json .*nested too deeply"),
    "a key twice": (
        raw("config.json", lambda data: data.replace(b"{", b'{"architecture": "resnet18",', 1)),
        "key 'architecture' .*twice",
    ),
    "a pickle instead": (renamed(BACKBONE, "model.pth"), "no model.safetensors, only 'model.pth', .*run code"),
    "a pickle in capitals": (renamed(BACKBONE, "Model.PKL"), "no model.safetensors, only 'Model.PKL', .*run code"),
    "a pickle of transformers": (renamed(BACKBONE, "pytorch_model.bin"), "only 'pytorch_model.bin', .*run code"),
    "a pickle instead of the heads": (renamed(HEADS, "self_distill.bin"), f"{HEADS} .*exist"),
    "a link as config": (link("config.json", "/etc/hostname"), "config.json .*link .*out of its folder, .*/etc/host"),
    "a link as weights": (link(BACKBONE, "../../../etc/passwd"), "model.safetensors .*link .*out of its folder, "),
    "a link to nothing": (link(HEADS, "nowhere"), "self_distill.safetensors .*exist"),
    "a link to itself": (link(HEADS, HEADS), "self_distill.safetensors .*exist"),
    "a pipe as weights": (pipe(BACKBONE), "model.safetensors .*exist"),
    "a folder as config": (folder_instead("config.json"), "config.json .*exist"),
    "no preprocessing": (config(pretrained_cfg=None), "pretrained_cfg .*input_size, got None"),
    "a size that is null": (config(pretrained_cfg__input_size=None), "pretrained_cfg .*input_size, got .*None"),
    "a number as network": (config(model_args__layers=5), "config.json: timm .*network .*model_args: "),
    "a std of 0": (config(pretrained_cfg__std=[0.2, 0, 0.2]), r"std=\(0.2, 0, 0.2\), .*above 0.*each channel"),
    "a mean of two channels": (config(pretrained_cfg__mean=[0.5, 0.5]), "mean has 2 values for 3 channels"),
    "a size of booleans": (
        config(pretrained_cfg__input_size=[3, True, True]),
        r"input_size=\(3, True, .*height and width",
    ),
    "a crop of almost nothing": (config(pretrained_cfg__crop_pct=1e-9), "crop_pct=1e-09, .*0.1 to 2"),
    "an unknown interpolation": (config(pretrained_cfg__interpolation="best"), "interpolation='best', .*bicubic"),
    "an unknown crop": (config(pretrained_cfg__crop_mode={"a": 1}), "crop_mode=.'a': 1., .*one of center"),
    "a million exits": (config(self_distill__exits=[1] * 10**6), r"exits .*ascending .*got \[1, .{60,80}$"),
    "a word as mean": (config(pretrained_cfg__mean="grey"), "mean='grey', .*each channel"),
    "a huge image": (config(pretrained_cfg__input_size=[3, 10**9, 10**9]), r"input_size=\(3, 10+, .*image of"),
    "too few names": (config(label_names=["shoe"]), r"label_names .*10 printable names, got \['shoe'\]"),
    "names that are none": (config(label_names=[["shoe"]] * 10), r"label_names .*10 printable names, got \[\["),
    "a tensor twice": (twice(HEADS), f"{HEADS} .*damaged"),
    "a list as config": (text("[1, 2]"), 'config.json .*"architecture".*timm model'),
    "a plain network's config": (config(self_distill=None), 'no "self_distill" entry.*timm.create_model'),
    "an empty config": (text(""), "not valid JSON"),
    "binary config": (raw("config.json", lambda data: b"\xff\xfe\x00" * 100), "not valid JSON"),
    "a huge config": (text(json.dumps({"a": "x" * 2**24})), "config.json .*bytes, more than .*16777216"),
    "a pickle as weights": (raw(BACKBONE, lambda data: b"\x80\x04\x95" + data[3:]), f"{BACKBONE} .*damaged"),
    "a giant header": (raw(HEADS, lambda data: struct.pack("<Q", 2**62) + data[8:]), f"{HEADS} .*damaged"),
    "flipped bytes in the header": (
        raw(HEADS, lambda data: data[:20] + bytes(b ^ 255 for b in data[20:60]) + data[60:]),
        f"{HEADS} .*damaged",
    ),
    "a cut file": (raw(BACKBONE, lambda data: data[:-100]), f"{BACKBONE} .*damaged"),
    "a longer file": (raw(BACKBONE, lambda data: data + b"0" * 100), f"{BACKBONE} .*damaged"),
    "a header of 20 MB": (header_text(HEADS, lambda text: text + b" " * 20 * 2**20), "header of 209[0-9]+ bytes"),
    "a header of 200,000 tensors": (many_tensors, "200000 foreign"),
    "a key twice after a million others": (many_keys, "key 'architecture' .*twice"),
    "a number of classes with 400 digits": (config(num_classes=10**400), "timm .*network .*Overflow"),
    "an argument with 400 digits": (config(model_args__drop_rate=10**400), "a number of many digits for 'drop_rate'"),
    "a million digits": (text('{"a": ' + "9" * 10**6 + "}"), "not valid JSON: .*limit"),
    "huge tensors that no file holds": (network("swin_tiny_patch4_window7_224", img_size=4096), "[0-9]+ missing "),
    "a huge table": (network("beit_large_patch16_512", img_size=4096), "tensor of 4295098369 elements"),
    "a huge layer": (network("resnet152", base_width=48000), "tensor of [0-9]{11} elements"),
    "two thousand blocks under another name": (network("hiera_tiny_224", stages=[512] * 4), "too many layers: .*49152"),
    "a loop of Python over all pairs of pixels": (
        network("tiny_vit_21m_224", window_sizes=[100] * 4),
        "tables of indices",
    ),
    "a tree of blocks": (network("dla34", levels=[20] * 6), "too many layers: .*49152"),
    "a tree without end": (network("dla34", levels=[1, 1, 512, 2, 2, 1]), "model_args: .*recursion"),
    "the widest head": (config(self_distill__head_args={"width": 49152}), r"expected \(49152, "),
    "overlapping tensors": (
        header(HEADS, lambda h: [v.update(data_offsets=[0, 4]) for k, v in h.items() if k != "__metadata__"]),
        f"{HEADS} .*damaged",
    ),
    "a shape that its data do not fill": (
        header(HEADS, lambda h: h["0.fc.bias"].update(shape=[10**9])),
        f"{HEADS} .*damaged",
    ),
    "a tensor less": (tensors(HEADS, lambda t: {k: v for k, v in t.items() if k != "0.fc.bias"}), "1 missing"),
    "a tensor more": (tensors(HEADS, lambda t: {**t, "../../evil": torch.zeros(2)}), "1 foreign"),
    "integers as weights": (
        tensors(BACKBONE, lambda t: {k: v.to(torch.int8) if v.ndim == 4 else v for k, v in t.items()}),
        " int8, expected torch.float32",
    ),
    "transposed weights": (
        tensors(HEADS, lambda t: {**t, "0.fc.weight": t["0.fc.weight"].T.contiguous()}),
        "0.fc.weight has shape",
    ),
}


def within_limits(work: Callable[[], str]) -> str:
    """What `work` returns, run in a process of its own with 5 seconds and 500 MB; the system ends it beyond them."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        gc.freeze()  # what earlier tests left in memory is not gone through again and again at this work's cost
        used = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (used + 500 * 2**20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (5,) * 2)  # of its own work, however busy the machine is
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends a child that waits in C, too
        signal.alarm(HANGS)
        try:
            os.write(writer, work().encode())
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return answer


@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_it_is_refused_within_5_seconds_and_500_mb_and_before_anything_is_read(damage, message, copied, monkeypatch):
    damage(copied)
    check_refused(SelfDistillModel.from_pretrained, copied, message, monkeypatch)


def check_refused(load: Callable[[Path], object], folder: Path, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> str:
        monkeypatch.setattr(torch, "load", lambda *_, **__: os._exit(1))
        monkeypatch.setattr("timm_selfdistill.hub.mixin.load_weights", lambda *_: os._exit(2))
        try:
            load(folder)
        except (ValueError, TypeError, FileNotFoundError) as error:
            return f"refused: {error}"
        return "loaded"

    answer = within_limits(work)
    assert answer.startswith("refused: ")
    assert "\n" not in answer
    assert re.search(message, answer), answer


def test_there_are_forty():
    assert len(HOSTILE) >= 40


SWIN = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


def test_buffers_that_outgrow_files_that_fit_are_refused(tmp_path, monkeypatch):
    backbone = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **SWIN)
    wrap_self_distill(backbone, model_args=SWIN).eval().save_pretrained(tmp_path)
    config(model_args__img_size=8192)(tmp_path)
    check_refused(SelfDistillModel.from_pretrained, tmp_path, "model.safetensors: .*takes 8[0-9]{8} bytes", monkeypatch)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(num_classes=10**9), "tensor of 96000000000 elements"),
        (network("vit_giant_patch14_dinov2"), "model.safetensors: .*takes 4539140136 bytes, more than"),
        (network("test_vit", depth=20_000), "too many layers"),
        (network("test_vit", checkpoint_path="evil.pth"), "not set checkpoint_path"),
        (lambda folder: (folder / BACKBONE).unlink(), "model.safetensors does not exist"),
    ],
)
def test_a_plain_network_is_refused_before_it_takes_memory(damage, message, tmp_path, monkeypatch):
    save_timm_model(timm.create_model("test_resnet", num_classes=10), tmp_path)
    damage(tmp_path)
    check_refused(lambda folder: load_any_model(str(folder), None), tmp_path, message, monkeypatch)


STRAY = [
    "pytorch_model.bin",
    "model.pth",
    "self_distill.pt",
    "Model.PKL",
    "optimizer.ckpt",
    "model.pth.tar",
    "timm_selfdistill.py",
    "modeling_resnet.py",
    "__init__.py",
    "sitecustomize.py",
]
EVIL = b"raise SystemExit('run')\n"


def test_what_lies_beside_a_model_is_neither_read_nor_touched(copied, monkeypatch):
    for name in STRAY:
        (copied / name).write_bytes(EVIL)
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("something was unpickled"))
    opened = []

    def watch(event: str, args: tuple) -> None:
        if event == "open" and Path(str(args[0])).parent == copied:
            opened.append(Path(str(args[0])).name)

    sys.addaudithook(watch)
    model = SelfDistillModel.from_pretrained(copied)
    plain = load_any_model(str(copied), None)
    assert timm.create_model(f"local-dir:{copied}", pretrained=True).eval().state_dict().keys() == (
        model.backbone.state_dict().keys()
    )
    assert type(plain) is SelfDistillModel
    model.save_pretrained(copied)
    assert not set(opened) & set(STRAY)
    assert all((copied / name).read_bytes() == EVIL for name in STRAY)


def test_a_plain_network_that_is_only_a_pickle_is_not_loaded(tmp_path):
    save_timm_model(timm.create_model("test_resnet", num_classes=10), tmp_path)
    assert load_any_model(str(tmp_path), None).num_classes == 10
    torch.save(load_file(tmp_path / BACKBONE), tmp_path / "pytorch_model.bin")
    assert load_any_model(str(tmp_path), None).num_classes == 10
    (tmp_path / BACKBONE).unlink()
    with pytest.raises(ValueError, match="no model.safetensors, only 'pytorch_model.bin', .*run code"):
        load_any_model(str(tmp_path), None)


def test_half_precision_weights_load(copied):
    tensors(BACKBONE, lambda t: {k: v.half() if v.is_floating_point() else v for k, v in t.items()})(copied)
    model = SelfDistillModel.from_pretrained(copied)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("arguments", [{"head_args": {"width": 10**6}}, {"model_args": {"act_layer": "a/b"}}])
def test_what_could_not_be_loaded_again_is_not_saved(arguments, copied):
    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    model = small_model(**{key: value for key, value in arguments.items() if key == "model_args"})
    model.head_args = arguments.get("head_args", {})
    with pytest.raises(ValueError, match="at most 49152, .* for 'width'|'act_layer' .*plain word, got 'a/b'"):
        model.save_pretrained(copied)
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
