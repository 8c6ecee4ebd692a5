from pathlib import Path

import pytest
import timm
import torch

from timm_selfdistill import SelfDistillModel, Trainer
from timm_selfdistill.training.loop.sharding import block_classes

from ..conftest import run_python
from .run_fsdp import RUNS, images, make_task, settings


def test_two_processes_agree_with_one_and_sharded_weights_with_whole_ones():
    done = run_python("tests/training/run_sharded.py", processes=2, CUDA_VISIBLE_DEVICES="")
    assert done.stdout.split("\n").count("the same") == 1


@pytest.mark.parametrize(("name", "classes"), [
    ("resnet50", ["Bottleneck"]), ("test_vit", ["Block"]), ("swin_tiny_patch4_window7_224", ["SwinTransformerBlock"]),
    ("efficientnet_b0", ["DepthwiseSeparableConv", "InvertedResidual"]), ("coat_tiny", [])])
def test_the_blocks_that_are_gathered_one_by_one(name, classes):
    with torch.device("meta"):
        assert block_classes(timm.create_model(name)) == classes


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 adds gradients up where there are no GPUs")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_vit"])
def test_a_run_with_fsdp_is_that_with_whole_weights(name, tmp_path):
    """In two processes; it is resumed there, and then in one."""
    done = run_python("tests/training/run_fsdp.py", tmp_path, name, processes=2, CUDA_VISIBLE_DEVICES="")
    assert f"{name}: the same" in done.stdout.split("\n")

    run = tmp_path / name / "fsdp"
    loaded = SelfDistillModel.from_pretrained(run / "last")
    plain = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    x = images(4).tensors[0]
    assert torch.equal(plain(x), SelfDistillModel.from_pretrained(run / "best").eval()(x))

    if name != "test_resnet":  # whose batch norm sees other batches on one process
        check_resumed_alone(name, run, tmp_path / "alone", loaded)


def check_resumed_alone(name: str, run: Path, output: Path, expected: SelfDistillModel) -> None:
    """One process, in whose hands the weights are whole, ends where two did."""
    changes = dict(RUNS[name])
    task = make_task(name, freeze_backbone=changes.pop("freeze_backbone", False))
    alone = Trainer(task, images(48), images(21), settings(
        output, 16, resume=str(run / "checkpoints" / "step-00000001"), **changes))
    with pytest.warns(UserWarning, match="processes 1 instead of 2"):
        alone.fit()
    for (key, value), other in zip(alone.eval_model.state_dict().items(), expected.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4, msg=key)
