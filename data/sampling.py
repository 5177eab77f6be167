"""The order of training images, as a pure function of seed and position.

Nothing about the order has to be stored: a run that stopped after step k starts its sampler with start_step=k and sees
exactly the images that the uninterrupted run would have seen, at no cost for the ones it skips.
"""

from collections.abc import Iterator

import numpy as np


class EpochOrder:
    """A random order of all images for every epoch.

    Args:
        num_images: how many images there are.
        seed: a non-negative integer; each gives other orders.

    Raises:
        ValueError: num_images is not positive or seed is negative.
    """

    def __init__(self, num_images: int, seed: int) -> None:
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}, but must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but must not be negative")
        self.num_images = num_images
        self.seed = seed
        self._epoch: int | None = None
        self._order = np.empty(0, np.int64)

    def permutation(self, epoch: int) -> np.ndarray:
        """Returns the order of one epoch.

        Args:
            epoch: from 0.

        Returns:
            int64 (num_images,), every index once. The last one asked for is kept; do not write to it.
        """
        if epoch != self._epoch:
            # Sorted raw bits: numpy promises that the bits of PCG64 stay the same for ever, but not what
            # Generator.permutation makes of them, and a run may go on with a newer numpy.
            keys = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(self.num_images)
            self._order = np.argsort(keys, kind="stable")
            self._epoch = epoch
        return self._order

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Returns a stretch of the endless order: epoch 0, then epoch 1, and so on.

        Args:
            start: first position, from 0.
            stop: one past the last position.

        Returns:
            int64 (stop - start,) image indices.
        """
        parts = [np.empty(0, np.int64)]
        while start < stop:
            epoch, offset = divmod(start, self.num_images)
            part = self.permutation(epoch)[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)


class GlobalBatchSampler:
    """One process's share of an endless sequence of batches.

    Global batch k is positions k * global_batch_size to (k + 1) * global_batch_size of the endless order of
    :class:`EpochOrder`, counted from first_image; process ``rank`` gets the rank-th of world_size equal slices of it.
    So the same images are in batch k however many processes share the work. A batch may begin in one epoch and end in
    the next: no image is dropped, and every one is used once before any is used again (within that batch it may meet
    its next use).

    Give it to a DataLoader as ``sampler`` with ``batch_size=None``: a PreparedImages answers a list of indices with a
    whole batch.

    Args:
        num_images: how many images there are.
        global_batch_size: images a step over all processes; a multiple of world_size.
        seed: a non-negative integer.
        rank: this process, from 0.
        world_size: how many processes there are.
        start_step: the first batch to give; as quick for any value.
        first_image: where batch 0 begins in the endless order, for a run that goes on with batches of another size.

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
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank} of world_size {world_size}, but must be from 0 to world_size - 1")
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size is {global_batch_size}, but must be a multiple of the {world_size} processes"
            )
        for name, value in (("start_step", start_step), ("first_image", first_image)):
            if value < 0:
                raise ValueError(f"{name} is {value}, but must not be negative")
        self.order = EpochOrder(num_images, seed)
        self.global_batch_size = global_batch_size
        self.batch_size = global_batch_size // world_size
        self.rank = rank
        self.start_step = start_step
        self.first_image = first_image

    def batch(self, step: int) -> list[int]:
        """Returns this process's image indices in global batch ``step``."""
        start = self.first_image + step * self.global_batch_size + self.rank * self.batch_size
        return self.order.indices(start, start + self.batch_size).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        """Gives the batches from start_step on, without end."""
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1
