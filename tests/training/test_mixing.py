import torch

from timm_selfdistill import TrainConfig
from timm_selfdistill.training.data.transforms import TargetMixer

X, Y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


def test_nothing_on_nothing_changed():
    x, y = TargetMixer(TrainConfig(), 3)(X.clone(), Y, 0)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_label_smoothing_makes_soft_labels():
    x, y = TargetMixer(TrainConfig(smoothing=0.3), 3)(X.clone(), Y, 0)
    assert torch.equal(x, X)
    torch.testing.assert_close(y[0], torch.tensor([0.8, 0.1, 0.1]))


def test_mixup_mixes_images_and_labels_until_it_is_off():
    mixer = TargetMixer(TrainConfig(mixup=1.0, cutmix=1.0, mixup_off_epoch=2), 3)
    x, y = mixer(X.clone(), Y, 1)
    assert not torch.equal(x, X)
    assert y.shape == (4, 3)
    torch.testing.assert_close(y.sum(1), torch.ones(4))
    x, y = mixer(X.clone(), Y, 2)
    assert torch.equal(x, X)
    assert y[0].tolist() == [1, 0, 0]
