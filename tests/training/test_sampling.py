import pytest

from timm_selfdistill.training.sampling import EpochSampler, mixed_seed


def global_batches(world: int, epoch: int = 0, start: int = 0) -> list[set[int]]:
    samplers = [EpochSampler(25, 8, rank, world, seed=1) for rank in range(world)]
    for sampler in samplers:
        sampler.begin(epoch, start)
    shares = [[draw.index for draw in sampler] for sampler in samplers]
    assert {len(share) for share in shares} == {len(samplers[0])}
    size = 8 // world
    return [{i for share in shares for i in share[k:k + size]} for k in range(0, len(shares[0]), size)]


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
