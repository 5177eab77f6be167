import itertools

import numpy as np
import pytest

from imagenet64_diffusion.data.sampling import GlobalBatchSampler


def first_images(count: int, num_images: int, seed: int, first_image: int = 0) -> list[int]:
    return GlobalBatchSampler(num_images, count, seed, first_image=first_image).batch(0)


def test_orders_are_permutations_that_depend_on_seed_and_epoch():
    seen = set()
    for seed in range(3):
        order = np.reshape(first_images(3000, 1000, seed), (3, 1000))
        for epoch in (2, 0, 1):
            assert sorted(order[epoch]) == list(range(1000))
            assert first_images(1000, 1000, seed, 1000 * epoch) == order[epoch].tolist()
            seen.add(tuple(order[epoch]))
    assert len(seen) == 9
    # a run that resumes with another numpy must see the same images
    assert first_images(10, 10, 5, first_image=30) == [4, 1, 8, 5, 9, 3, 2, 0, 6, 7]


@pytest.mark.parametrize(("num_images", "batch"), [(100, 8), (96, 8), (5, 12)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_one_sequence(num_images, batch, world_size):
    samplers = [GlobalBatchSampler(num_images, batch, 7, rank, world_size) for rank in range(world_size)]
    steps = 40
    joined = []
    for parts in itertools.islice(zip(*samplers, strict=True), steps):
        assert all(len(part) == batch // world_size for part in parts)
        joined += [index for part in parts for index in part]
    assert joined == first_images(steps * batch, num_images, 7)
    # nothing is dropped: after every whole epoch each image was used equally often
    epochs = steps * batch // num_images
    assert np.bincount(joined[: epochs * num_images]).tolist() == [epochs] * num_images


def test_resuming_gives_the_rest_and_costs_nothing():
    whole = list(itertools.islice(GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2), 100))
    for start in (1, 31, 99):
        resumed = GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2, first_image=32 * start)
        assert list(itertools.islice(resumed, 100 - start)) == whole[start:]
        # and again: a DataLoader may ask twice
        assert next(iter(resumed)) == whole[start]
    assert len(set(first_images(100, 1000, seed=0, first_image=10**14))) == 100


def test_batch_that_ranks_cannot_share():
    with pytest.raises(ValueError, match="multiple of 2 ranks"):
        GlobalBatchSampler(100, 9, seed=0, world_size=2)
