"""Every image gets the answer of its exit, whoever else is in the batch."""

import copy
import io
import pickle
import re
import threading
import warnings

import pytest
import timm
import torch

from timm_selfdistill import EarlyExit, SelfDistillModel, wrap_self_distill
from timm_selfdistill.heads import LinearHead
from timm_selfdistill.inference import early_exit as early_exit_module
from timm_selfdistill.inference.policy import POLICIES

from ..conftest import small_backbone, small_model

CLASSES = [  # a small network of each of 30 model classes
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_mambaout",
    "test_nfnet",
    "test_byobnet",
    "test_coatnet",
    "test_vit_relpos",
    "lcnet_035",
    "starnet_s050",
    "repghostnet_050",
    "edgenext_xx_small",
    "ghostnet_050",
    "efficientvit_b0",
    "efficientvit_m0",
    "regnetx_002",
    "cspnext_tiny",
    "fasternet_t0",
    "pit_ti_224",
    "cpubone_nano",
    "deit_tiny_distilled_patch16_224",
    "shvit_s1",
    "levit_128s",
    "vit_tiny_patch16_dinov3_qkvb",
    "visformer_tiny",
    "crossvit_tiny_240",
    "lowformer_b0",
    "inception_next_atto",
    "rexnet_100",
]
QUICK = {
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "test_byobnet",
    "test_nfnet",
    "test_coatnet",
    "levit_128s",
    "edgenext_xx_small",
    "deit_tiny_distilled_patch16_224",
    "efficientvim_m1",
    "hrnet_w18_small",
}
STUBBORN = {  # images cannot leave the batch at some or all stages: the exit at which those finished at each exit leave
    "efficientvim_m1": [0, 2],
    "hrnet_w18_small": [3, 3, 3],
    "coat_tiny": [1],
    "mvitv2_tiny": [3, 3, 3],
}


def images(model: SelfDistillModel, count: int) -> torch.Tensor:
    """That differ enough for a fresh network to be more or less sure of them."""
    x = torch.randn(count, *model.backbone.pretrained_cfg["input_size"])
    return x * torch.linspace(0.1, 3, count)[torch.randperm(count), None, None, None]


def quantiles(logits: tuple[torch.Tensor, ...], share: float, policy: str = "confidence") -> list[float]:
    """Thresholds at which a share of all images is confident enough."""
    confidence, sign, highest = POLICIES[policy]
    if share in (0, 1):
        return [0.0 if (sign < 0) != bool(share) else highest(logits[0].shape[1])] * (len(logits) - 1)
    return [sign * float(confidence(part.float().softmax(1)).quantile(1 - share)) for part in logits[:-1]]


def row_by_row(model: SelfDistillModel, x: torch.Tensor, exits: torch.Tensor) -> torch.Tensor:
    """What `forward_exits` says to each image at its exit."""
    with torch.no_grad():
        full = model.forward_exits(x).logits
    return torch.stack([full[exit][row] for row, exit in enumerate(exits.tolist())])


def mixed(model: SelfDistillModel, x: torch.Tensor, **more) -> EarlyExit:
    """Early exit with thresholds at which about half of the images leave at each exit."""
    with torch.no_grad():
        early_exit = EarlyExit(model, quantiles(model.forward_exits(x).logits, 0.5), **more)
    assert len(early_exit.predict(x).exit.unique()) > 1
    return early_exit


def check_every_share(early_exit: EarlyExit, policy: str = "confidence") -> set[int]:
    """Compare with `forward_exits`; the exits that were taken."""
    model, taken = early_exit.model, set()
    x = images(model, 8)
    with torch.no_grad():
        full = model.forward_exits(x).logits
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        early_exit.thresholds = quantiles(full, share, policy)
        found = early_exit.predict(x)
        expected = torch.stack([full[exit][row] for row, exit in enumerate(found.exit.tolist())])
        torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.confidence, expected.softmax(1).amax(1), rtol=1e-4, atol=1e-4)
        for row, exit in enumerate(found.exit.tolist()):
            leaves = [
                POLICIES[policy].leaves(part[row : row + 1].softmax(1), threshold).item()
                for part, threshold in zip(full, early_exit.thresholds)
            ]
            assert exit == (leaves.index(True) if True in leaves else len(leaves))
        taken |= set(found.exit.tolist())
    return taken


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSES]
)
def test_answers_are_those_of_forward_exits(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        early_exit = EarlyExit(small_model(name).eval(), 0.5)
    assert len(check_every_share(early_exit)) >= 2


@pytest.mark.parametrize(
    ("name", "stops"),
    [pytest.param(name, stops, marks=() if name in QUICK else pytest.mark.slow) for name, stops in STUBBORN.items()],
)
def test_where_rows_cannot_leave_the_batch_runs_on_with_one_warning(name, stops):
    model = small_model(name).eval()
    kept = ", ".join(model.exits[exit] for exit, stop in enumerate(stops) if stop > exit)
    with pytest.warns(UserWarning, match=f"images cannot leave .* at {re.escape(kept)};"):
        early_exit = EarlyExit(model, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_every_share(early_exit)
    assert early_exit.find_costs("macs", images(model, 1)).stops == stops


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return small_model().eval()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy, model):
    assert len(check_every_share(EarlyExit(model, 0.0, policy), policy)) >= 2


def test_layers_run_once_and_on_fewer_and_fewer_images(model, monkeypatch):
    monkeypatch.setattr(early_exit_module, "PIECE_BYTES", 2**40)
    x = images(model, 32)
    with torch.no_grad():
        full = model.forward_exits(x).logits
    rows = []
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: rows.append((name, len(args[0]))))
        for name, module in model.backbone.named_modules()
        if name in {"layer1", "layer2", "layer3", "layer4"}
    ]
    found = EarlyExit(model, quantiles(full, 0.5)).predict(x)
    counts = torch.bincount(found.exit, minlength=4)
    rows = rows[-4:]
    for handle in handles:
        handle.remove()
    assert rows == [
        ("layer1", 32),
        ("layer2", 32 - int(counts[0])),
        ("layer3", 32 - int(counts[:2].sum())),
        ("layer4", int(counts[3])),
    ]


def test_when_all_are_gone_no_layer_runs_any_more(model):
    called = []
    handle = model.backbone.layer2.register_forward_pre_hook(lambda *_: called.append(1))
    early_exit = EarlyExit(model, 0.0)
    called.clear()
    assert early_exit.predict(images(model, 4)).exit.tolist() == [0] * 4
    handle.remove()
    assert not called


def test_few_who_are_done_wait_with_their_answers(model, monkeypatch):
    monkeypatch.setattr(early_exit_module, "PIECE_BYTES", 2**40)
    x = images(model, 40)
    rows = []
    handle = model.backbone.layer2.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        full = model.forward_exits(x).logits
    one = float(full[0].softmax(1).amax(1).max())
    found = EarlyExit(model, [one, None, None]).predict(x)
    handle.remove()
    assert rows[-1] == 40
    assert sorted(found.exit.tolist()) == [0, *[3] * 39]
    row = int(found.exit.argmin())
    torch.testing.assert_close(found.logits[row], full[0][row])


def test_a_large_batch_goes_in_pieces(model, monkeypatch):
    x = images(model, 37)
    early_exit = mixed(model, x)
    monkeypatch.setattr(early_exit_module, "PIECE_BYTES", 2**40)
    whole = early_exit.predict(x)
    (bytes_each,) = early_exit._bytes.values()
    monkeypatch.setattr(early_exit_module, "PIECE_BYTES", 16 * bytes_each // torch.get_num_threads())
    rows = []
    handle = model.backbone.conv1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    found = early_exit.predict(x)
    handle.remove()
    assert rows == [13, 13, 11]
    for part, expected in zip(found, whole):
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4)


def test_only_a_cpu_takes_pieces(monkeypatch):
    """The model may have been moved since the memory was measured."""
    monkeypatch.setattr(early_exit_module, "PIECE_BYTES", 10 * 2**20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.empty(64, 3, 8, 8)
    assert early_exit_module._piece(x, 2**20) == 16
    assert early_exit_module._piece(x[:20], 2**20) == 20
    assert early_exit_module._piece(x, 2**40) == 2
    assert early_exit_module._piece(x, 0) == 64
    assert early_exit_module._piece(x.to("meta"), 2**20) == 64


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_small_batches(batch, model):
    whole = images(model, 8)
    x, early_exit = whole[:batch], mixed(model, whole)
    found = early_exit.predict(x)
    assert [tuple(part.shape) for part in found] == [(batch, 10), (batch,), (batch,)]
    whole = early_exit.predict(whole)
    for part, expected in zip(found, whole):
        torch.testing.assert_close(part, expected[:batch])


def test_a_threshold_that_nobody_reaches_and_none_at_all(model):
    x = images(model, 3)
    for thresholds in (1.0, [None, None, None]):
        found = EarlyExit(model, thresholds).predict(x)
        assert found.exit.tolist() == [3, 3, 3]
        torch.testing.assert_close(found.logits, model(x))


def test_an_exit_that_nobody_takes_costs_nothing(model):
    called = []
    handle = model.heads[1].register_forward_hook(lambda *_: called.append(1))
    early_exit = EarlyExit(model, [1.0, None, 1.0])
    called.clear()
    early_exit.predict(images(model, 3))
    handle.remove()
    assert not called


def test_temperatures_scale_the_confidence_and_not_the_logits(model):
    x = images(model, 4)
    plain = EarlyExit(model, 1.0).predict(x)
    scaled = EarlyExit(model, 1.0, temperatures=[1.0, 1.0, 1.0, 2.0]).predict(x)
    assert torch.equal(plain.logits, scaled.logits)
    torch.testing.assert_close(scaled.confidence, (plain.logits / 2).softmax(1).amax(1))


def test_other_image_sizes_are_tried_first(model):
    x = torch.randn(8, 3, 96, 64) * torch.linspace(0.1, 3, 8)[:, None, None, None]
    with torch.no_grad():
        thresholds = quantiles(model.forward_exits(x).logits, 0.5)
    shapes = []
    handle = model.backbone.conv1.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    early_exit = EarlyExit(model, thresholds)
    assert {shape[1:] for shape in shapes} == {(3, 160, 160)}
    shapes.clear()
    found = early_exit.predict(x)
    assert {shape[1:] for shape in shapes} == {(3, 96, 64)}
    assert shapes.index(x.shape) == len(shapes) - 1 > 0  # random images first
    shapes.clear()
    again = early_exit.predict(x)
    handle.remove()
    assert shapes == [x.shape]
    for got in (found, again):
        torch.testing.assert_close(got.logits, row_by_row(model, x, got.exit))
    assert len(found.exit.unique()) > 1


@pytest.mark.slow
def test_threads_do_not_disturb_each_other(model):
    batches = [images(model, 6) for _ in range(8)]
    first, second = mixed(model, batches[0]), mixed(model, torch.cat(batches))
    second.thresholds[1] = None
    expected = [(first.predict(x), second.predict(x)) for x in batches]
    failures = []

    def work(early_exit: EarlyExit, which: int) -> None:
        for _ in range(5):
            for x, answers in zip(batches, expected):
                if not all(map(torch.equal, early_exit.predict(x), answers[which])):
                    failures.append(which)

    threads = [threading.Thread(target=work, args=arguments) for arguments in [(first, 0), (second, 1)] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_model_stays_what_it_was():
    model = small_model().eval()
    x = images(model, 8)
    early_exit = mixed(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.truncate(-1)):
        assert torch.equal(other(x), model(x))
    assert torch.equal(torch.compile(model.truncate(1), fullgraph=True, backend="eager")(x), model.predict(x, 1))
    del early_exit
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model = small_model().eval().to(dtype)
    x = images(model, 6).to(dtype)
    found = mixed(model, x).predict(x)
    assert found.logits.dtype == dtype
    torch.testing.assert_close(
        found.logits, row_by_row(model, x, found.exit), rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-6
    )


def test_autocast_and_channels_last(model):
    x = images(model, 6)
    early_exit = mixed(model, x)
    expected = early_exit.predict(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = early_exit.predict(x)
    torch.testing.assert_close(found.logits.float(), row_by_row(model, x, found.exit), rtol=0.1, atol=0.1)
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    formats = []
    nhwc.backbone.layer2.register_forward_pre_hook(
        lambda _, args: formats.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    found = EarlyExit(nhwc, early_exit.thresholds).predict(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert formats[-1]


def test_compiled_stages():
    model = small_model().eval()
    x = images(model, 8)
    early_exit = mixed(model, x)
    expected = early_exit.predict(x)
    for stage in (model.backbone.layer1, model.backbone.layer2):
        stage.compile(backend="eager")
    found = early_exit.predict(x)
    assert torch.equal(found.exit, expected.exit)
    torch.testing.assert_close(found.logits, expected.logits)


def test_a_head_of_ones_own():
    check_every_share(EarlyExit(wrap_self_distill(small_backbone("test_vit"), head=LinearHead).eval(), 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 0.5],), r"3 thresholds, .*got \[0.5, 0.5\]"),
        (("0.5",), "3 thresholds, .*got '0.5'"),
        (([0.5, 0.5, 1.5],), "'confidence' .*0 to 1, .*None .*got 1.5"),
        (([0.5, 0.5, -0.1],), "'confidence' .*0 to 1, .*None .*got -0.1"),
        (([0.5, 0.5, float("nan")],), "got nan"),
        (([0.5, True, 0.5],), "got True"),
        ((2.5, "entropy"), "'entropy' .*0 to 2.303, .*got 2.5"),
        ((0.5, "surprise"), "policy .*confidence, entropy, margin, got 'surprise'"),
        ((0.5, None, [1.0]), r"4 temperatures, .*got \[1.0\]"),
        ((0.5, None, [1.0, 1.0, 1.0, 0.0]), "temperature .*above 0, got 0.0"),
    ],
)
def test_wrong_settings(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        EarlyExit(model, *arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 160, 160), r"ResNet .*\(B, 3, H, W\), got \(3, 160, 160\)"),
        (torch.zeros(1, 1, 160, 160), r"ResNet .*\(B, 3, H, W\), got \(1, 1, 160, 160\)"),
        (
            torch.zeros(1, 3, 160, 160, dtype=torch.float64),
            r"torch\.float64 on cpu, .*torch\.float32 on cpu; .*x\.to\(",
        ),
        (torch.zeros(1, 3, 160, 160, dtype=torch.uint8), r"torch\.uint8 on cpu, .*torch\.float32 on cpu; .*x\.to\("),
        ([[0.0]], r"images .*tensor \(B, C, H, W\), got list"),
    ],
)
def test_wrong_images(x, message, model):
    with pytest.raises(ValueError, match=message):
        EarlyExit(model, 0.5).predict(x)


def test_a_size_that_a_network_does_not_take():
    early_exit = EarlyExit(small_model("pit_ti_224").eval(), 0.5)
    with pytest.raises(ValueError, match="224x224 .*got 96x96"):
        early_exit.predict(torch.zeros(1, 3, 96, 96))


def test_no_thresholds_training_mode_and_other_models(model):
    with pytest.raises(ValueError, match=r"EarlyExit\(model, thresholds=\[\.\.\.\]\), .*calibrate\(loader\)"):
        EarlyExit(model).predict(images(model, 1))
    with pytest.raises(ValueError, match=r"training mode; .*model\.eval\(\)"):
        EarlyExit(small_model(), 0.5)
    learning = small_model().eval()
    early_exit = EarlyExit(learning, 0.5)
    learning.train()
    with pytest.raises(ValueError, match=r"training mode; .*model\.eval\(\)"):
        early_exit.predict(images(model, 1))
    with pytest.raises(TypeError, match="SelfDistillModel, .*got ResNet; .*wrap_self_distill"):
        EarlyExit(timm.create_model("test_resnet"), 0.5)


class InPlaceHead(LinearHead):
    """A head that writes into the feature map it gets."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(torch.nn.functional.relu_(x))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet"])
def test_a_head_that_works_in_place_does_not_disturb_the_layers_behind(name):
    model = wrap_self_distill(small_backbone(name), head=InPlaceHead).eval()
    x = images(model, 4)
    torch.testing.assert_close(EarlyExit(model, 1.0).predict(x).logits, model(x), rtol=1e-4, atol=1e-5)


def test_who_is_done_leaves_also_at_an_exit_that_nobody_takes():
    model = small_model().eval()
    model.backbone.layer2.register_forward_pre_hook(lambda _, args: args[0] + args[0].mean(0))  # of the whole batch
    x = images(model, 8)
    with pytest.warns(UserWarning, match="images cannot leave .* at layer1;"):
        early_exit = mixed(model, x)
    early_exit.thresholds[1:] = [None, None]
    rows = []
    handles = [
        getattr(model.backbone, name).register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        for name in ("layer2", "layer3")
    ]
    found = early_exit.predict(x)
    for handle in handles:
        handle.remove()
    assert rows == [8, int((found.exit == 3).sum())]


def test_a_part_in_training_mode_is_found():
    model = small_model().eval()
    early_exit = EarlyExit(model, 0.5)
    model.backbone.layer2.train()
    with pytest.raises(ValueError, match=r"training mode; .*model\.eval\(\)"):
        early_exit.predict(images(model, 1))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_within_inference_mode_at_sizes_first_seen_there(mode):
    model = small_model().eval()
    sizes = [images(model, 8), torch.randn(6, 3, 64, 96), torch.randn(1, 3, 71, 50)]
    expected = [EarlyExit(model, 0.12).predict(x) for x in sizes]
    with mode():
        early_exit = EarlyExit(model, 0.12)
        found = [early_exit.predict(x) for x in sizes]
        assert all(all(map(torch.equal, *pair)) for pair in zip(found, expected))
        early_exit.find_costs("macs", sizes[1])
    x = sizes[0].clone()
    assert all(map(torch.equal, early_exit.predict(x), expected[0]))


def test_a_network_made_in_inference_mode_and_images_made_there():
    with torch.inference_mode():
        model = small_model().eval()
        x = images(model, 8)
        early_exit = mixed(model, x)
    torch.testing.assert_close(
        early_exit.predict(x).logits, row_by_row(model, x, early_exit.predict(x).exit), rtol=1e-4, atol=1e-4
    )


def test_a_head_that_works_in_place_is_found_in_inference_mode():
    model = wrap_self_distill(small_backbone("test_convnext"), head=InPlaceHead).eval()
    x = images(model, 4)
    with torch.inference_mode():
        torch.testing.assert_close(EarlyExit(model, 1.0).predict(x).logits, model(x), rtol=1e-4, atol=1e-5)


def over_a_file(early_exit: EarlyExit) -> EarlyExit:
    file = io.BytesIO()
    torch.save(early_exit, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda found: pickle.loads(pickle.dumps(found)),
    "torch.save": over_a_file,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_copy_works_by_itself(name, make):
    model = small_model(name).eval()
    x = images(model, 8)
    early_exit = mixed(model, x, temperatures=[1.0, 1.0, 1.0, 2.0])
    expected, hooks = early_exit.predict(x), count_hooks(model)
    other = make(make(early_exit))
    assert (other.model is model) == (make is copy.copy)
    assert all(map(torch.equal, other.predict(x), expected))
    assert count_hooks(other.model) == hooks * (2 if make is copy.copy else 1)  # those of the first copy are gone

    other.thresholds[:], other.temperatures[:] = [1.0] * 3, [1.0] * 4
    assert other.predict(x).exit.tolist() == [3] * 8
    assert all(map(torch.equal, early_exit.predict(x), expected))
    del early_exit
    assert other.predict(x).exit.tolist() == [3] * 8
    other.model.train()
    with pytest.raises(ValueError, match="training mode"):
        other.predict(x)
    left = other.model
    del other
    assert count_hooks(left) == 0


def count_hooks(model: SelfDistillModel) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.slow
def test_another_process_gets_one(model):
    x = images(model, 4)
    early_exit = mixed(model, x)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        found = pool.apply(early_exit.predict, (x,))
    assert all(map(torch.equal, found, early_exit.predict(x)))
