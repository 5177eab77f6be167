"""The order of training images, as a pure function of seed and position."""

import itertools
from collections.abc import Iterator

import numpy as np


class GlobalBatchSampler:
    """One rank's share of an endless sequence of batches, for a DataLoader with ``batch_size=None``.

    The images of epoch 0, 1, 2, ... follow each other, each epoch in a random order of its own. Global batch k is
    positions k * global_batch_size to (k + 1) * global_batch_size of that, from first_image on, and each rank gets
    its slice of it: the same images are in batch k whatever the world size. A batch may begin in one epoch and end in
    the next, so no image is dropped. A run resumes with the images that it has seen as first_image, at no cost.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        first_image: int = 0,
    ) -> None:
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ValueError(f"global_batch_size is {global_batch_size}, but must be a multiple of {world_size} ranks")
        self._num_images, self._seed = num_images, seed
        self._batch_size, self._global_batch_size = global_batch_size // world_size, global_batch_size
        self._first_position = first_image + rank * self._batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int) -> list[int]:
        """This rank's image indices in global batch ``step``."""
        position = self._first_position + step * self._global_batch_size
        indices: list[int] = []
        while len(indices) < self._batch_size:
            epoch, offset = divmod(position + len(indices), self._num_images)
            if epoch != self._epoch:
                # Sorted raw bits: numpy promises that the bits of PCG64 stay the same for ever, but not what
                # Generator.permutation makes of them, and a run may resume with a newer numpy.
                keys = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self._num_images)
                self._epoch, self._order = epoch, np.argsort(keys, kind="stable")
            indices += self._order[offset : offset + self._batch_size - len(indices)].tolist()
        return indices

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, itertools.count())
