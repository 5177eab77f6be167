"""The order of training images, as a pure function of seed and position.

Nothing about the order has to be stored: a run that stopped after step k starts its sampler with start_step=k and sees
exactly the images that the uninterrupted run would have seen, at no cost for the ones it skips.
"""

import itertools
from collections.abc import Iterator

import numpy as np


class GlobalBatchSampler:
    """One rank's share of an endless sequence of batches.

    The images of epoch 0, 1, 2, ... follow each other, each epoch in a random order of its own. Global batch k is
    positions k * global_batch_size to (k + 1) * global_batch_size of that, from first_image on, and each rank gets
    its slice of it: the same images are in batch k whatever the world size. A batch may begin in one epoch and end in
    the next, so no image is dropped.

    Give it to a DataLoader as ``sampler`` with ``batch_size=None``: PreparedImages answers a list of indices with a
    whole batch.

    Args:
        num_images: how many images there are.
        global_batch_size: images a step over all ranks; a multiple of world_size.
        seed: a non-negative integer; each gives other orders.
        rank: this process, from 0.
        world_size: how many processes there are.
        start_step: the first batch to give; as quick for any value.
        first_image: where batch 0 begins in the sequence, for a run that resumes with batches of another size.

    Raises:
        ValueError: one of them is out of range.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        first_image: int = 0,
    ) -> None:
        least = (("num_images", num_images, 1), ("seed", seed, 0), ("start_step", start_step, 0))
        for name, value, lowest in (*least, ("first_image", first_image, 0)):
            if value < lowest:
                raise ValueError(f"{name} is {value}, but must be at least {lowest}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, but must be from 0 to world_size - 1")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(f"global_batch_size is {global_batch_size}, but must be a multiple of {world_size} ranks")
        self.num_images = num_images
        self.batch_size, self.global_batch_size = global_batch_size // world_size, global_batch_size
        self.start_step = start_step
        self._seed = seed
        self._first_position = first_image + rank * self.batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> list[int]:
        """Returns this rank's image indices in global batch ``step``."""
        position = self._first_position + step * self.global_batch_size
        indices: list[int] = []
        while len(indices) < self.batch_size:
            epoch, offset = divmod(position + len(indices), self.num_images)
            if epoch != self._epoch:
                # Sorted raw bits: numpy promises that the bits of PCG64 stay the same for ever, but not what
                # Generator.permutation makes of them, and a run may resume with a newer numpy.
                keys = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.num_images)
                self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
            indices += self._order[offset : offset + self.batch_size - len(indices)].tolist()
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        """Gives the batches from start_step on, without end."""
        return map(self.batch, itertools.count(self.start_step))
