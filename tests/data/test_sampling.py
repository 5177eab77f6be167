import itertools

import numpy as np
import pytest

from imagenet64_diffusion.data.sampling import EpochOrder, GlobalBatchSampler


def test_orders_are_permutations_that_depend_on_seed_and_epoch():
    order = EpochOrder(1000, seed=0)
    seen = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        permutation = EpochOrder(1000, seed).permutation(epoch)
        assert sorted(permutation) == list(range(1000))
        seen.add(tuple(permutation))
    assert len(seen) == 9
    for epoch in (2, 0, 1, 0):
        np.testing.assert_array_equal(order.permutation(epoch), EpochOrder(1000, 0).permutation(epoch))


def test_the_order_stays_what_it_was():
    # a run that goes on with another numpy must see the same images
    assert EpochOrder(10, seed=5).permutation(3).tolist() == [4, 1, 8, 5, 9, 3, 2, 0, 6, 7]


def test_indices_run_through_the_epochs():
    order = EpochOrder(7, seed=1)
    endless = np.concatenate([order.permutation(epoch) for epoch in range(6)])
    for start, stop in [(0, 0), (0, 7), (3, 12), (6, 40), (13, 15)]:
        np.testing.assert_array_equal(order.indices(start, stop), endless[start:stop])
    assert order.indices(0, 3).dtype == np.int64


@pytest.mark.parametrize(("num_images", "batch"), [(100, 8), (96, 8), (5, 12)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_one_sequence(num_images, batch, world_size):
    samplers = [GlobalBatchSampler(num_images, batch, 7, rank, world_size) for rank in range(world_size)]
    steps = 40
    joined = []
    for parts in itertools.islice(zip(*samplers, strict=True), steps):
        assert all(len(part) == batch // world_size for part in parts)
        joined += [index for part in parts for index in part]
    assert joined == EpochOrder(num_images, 7).indices(0, steps * batch).tolist()
    # nothing is dropped: after every whole epoch each image was used equally often
    epochs = steps * batch // num_images
    assert np.bincount(joined[: epochs * num_images]).tolist() == [epochs] * num_images


def test_resuming_gives_the_rest():
    whole = list(itertools.islice(GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2), 100))
    for start in (0, 1, 31, 32, 99):
        resumed = GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2, start_step=start)
        assert list(itertools.islice(resumed, 100 - start)) == whole[start:]
        # and again: a DataLoader may ask twice
        assert next(iter(resumed)) == whole[start]
    assert all(type(index) is int for index in whole[0])


def test_starting_late_costs_nothing():
    sampler = GlobalBatchSampler(1000, 100, seed=0, start_step=10**12)
    batch = next(iter(sampler))
    assert len(set(batch)) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"global_batch_size": 0}, "global_batch_size is 0"),
        ({"global_batch_size": 9, "world_size": 2}, "multiple of the 2 processes"),
        ({"rank": 1}, "rank is 1 of world_size 1"),
        ({"rank": -1, "world_size": 2}, "rank is -1"),
        ({"start_step": -1}, "start_step is -1"),
    ],
)
def test_wrong_values(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**({"num_images": 100, "global_batch_size": 8, "seed": 0} | options))
