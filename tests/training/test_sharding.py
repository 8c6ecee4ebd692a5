import pytest
import timm
import torch

from timm_selfdistill import SelfDistillModel, Trainer
from timm_selfdistill.training.sharding import block_classes

from ..conftest import TWO_PROCESSES, run_python
from .run_fsdp import RUNS, images, make_task, settings

NO_GPU = {"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""}


def test_two_processes_agree_with_one_and_sharded_weights_with_whole_ones():
    done = run_python("tests/training/run_sharded.py", launcher=TWO_PROCESSES, **NO_GPU)
    assert done.stdout.split("\n").count("the same") == 1


@pytest.mark.parametrize(("name", "classes"), [
    ("resnet50", ["Bottleneck"]), ("test_vit", ["Block"]), ("swin_tiny_patch4_window7_224", ["SwinTransformerBlock"]),
    ("efficientnet_b0", ["DepthwiseSeparableConv", "InvertedResidual"]), ("coat_tiny", [])])
def test_the_blocks_that_are_gathered_one_by_one(name, classes):
    with torch.device("meta"):
        assert block_classes(timm.create_model(name)) == classes


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 adds gradients up where there are no GPUs")
def test_a_run_with_fsdp_is_that_with_whole_weights(tmp_path):
    """In two processes; it is resumed there, and then in one, in whose hands the weights are whole."""
    done = run_python("tests/training/run_fsdp.py", tmp_path, launcher=TWO_PROCESSES, **NO_GPU)
    assert [line for line in done.stdout.split("\n") if "the same" in line] == [f"{name}: the same" for name in RUNS]

    run = tmp_path / "test_convnext" / "fsdp"
    loaded = SelfDistillModel.from_pretrained(run / "last")
    plain = timm.create_model(f"local-dir:{run / 'best'}", pretrained=True).eval()
    x = images(4).tensors[0]
    assert torch.equal(plain(x), SelfDistillModel.from_pretrained(run / "best").eval()(x))

    alone = Trainer(make_task("test_convnext"), images(48), images(21), settings(
        tmp_path / "alone", 16, resume=str(run / "checkpoints" / "step-00000001"), **RUNS["test_convnext"]))
    with pytest.warns(UserWarning, match="processes 1 instead of 2"):
        alone.fit()
    for (name, value), expected in zip(alone.eval_model.state_dict().items(), loaded.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4, msg=name)
