import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from timm_selfdistill.training.data.sampling import EpochSampler, mixed_seed


def global_batches(world: int, epoch: int = 0, start: int = 0) -> list[set[int]]:
    samplers = [EpochSampler(25, 8, rank, world, seed=1) for rank in range(world)]
    for sampler in samplers:
        sampler.begin(epoch, start)
    shares = [[draw.index for draw in sampler] for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    size = 8 // world
    return [{i for share in shares for i in share[k : k + size]} for k in range(0, len(shares[0]), size)]


def test_an_epoch_sees_every_usable_image_once():
    batches = global_batches(1)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len(set.union(*batches)) == 24


@pytest.mark.parametrize("world", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_processes(world):
    assert global_batches(world) == global_batches(1)


def test_epochs_differ_and_repeat():
    assert global_batches(1, epoch=0) != global_batches(1, epoch=1)
    assert global_batches(1, epoch=1) == global_batches(1, epoch=1)


def test_it_goes_on_in_the_middle():
    assert global_batches(2, start=16) == global_batches(1)[2:]


@pytest.mark.parametrize("repeats", [3, 2.5, 1.0])
@pytest.mark.parametrize(("size", "world", "batch"), [(700, 1, 16), (700, 4, 8), (256, 2, 8), (1000, 3, 10)])
def test_repeated_augmentation_is_timms(repeats, size, world, batch, monkeypatch):
    """The images of each process, of the batches that its DataLoader does not drop; each time augmented by another
    seed."""
    order = torch.randperm(size)
    monkeypatch.setattr(torch, "randperm", lambda *args, **kwargs: order)
    data, seeds = range(size), set()
    for rank in range(world):
        sampler = EpochSampler(size, batch * world, rank, world, seed=1, repeats=repeats)
        draws = list(sampler)
        expected = list(RepeatAugSampler(data, world, rank, num_repeats=repeats))
        assert [draw.index for draw in draws] == expected[: len(expected) // batch * batch]
        seeds |= {draw.seed for draw in draws}
    assert len(seeds) == sampler.usable


def test_repeated_augmentation_of_few_images():
    sampler = EpochSampler(25, 8, 0, 1, seed=1, repeats=3)
    assert [[draw.index for draw in sampler].count(index) for index in {draw.index for draw in sampler}] == [3] * 8


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match=r"\b7 training images .*batch of 8; .*batch_size"):
        EpochSampler(7, 8, 0, 1, 0)


def test_another_seed_is_no_other_epoch():
    def draws(seed: int, epoch: int) -> list:
        sampler = EpochSampler(25, 8, 0, 1, seed)
        sampler.begin(epoch)
        return list(sampler)

    found = {(seed, epoch): draws(seed, epoch) for seed in (42, 43) for epoch in (0, 1)}
    assert len({tuple(order) for order in found.values()}) == 4
    assert draws(42, 1) == found[42, 1]
    assert mixed_seed(42, 1) != mixed_seed(43, 0)
