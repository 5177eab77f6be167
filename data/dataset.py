"""Reading a prepared folder in batches, whose order is a pure function of seed and position."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .errors import DataError
from .preparation import LABEL_COLUMN, PIXELS_COLUMN, Preparation


def to_model_range(pixel_values: torch.Tensor) -> torch.Tensor:
    """Maps stored pixels, uint8 on any device, to what the model sees: x / 127.5 - 1, float32 from -1 to 1."""
    return pixel_values.to(torch.float32).div_(127.5).sub_(1.0)


class PreparedImages(torch.utils.data.Dataset):
    """The images of a folder written by imagenet64-prepare.

    A list of indices gives a whole batch at once, copied straight from the memory-mapped files; so a DataLoader with a
    batch_size wants ``collate_fn=lambda batch: batch``, and one with a GlobalBatchSampler ``batch_size=None``.

    Args:
        folder: The prepared folder.
        in_memory: Whether to read all images into memory first, for slow disks.

    Attributes:
        preparation: The record of the folder.
        channels: 1 is grayscale and 3 is RGB.
        image_size: (height, width) in pixels.
        id2label, num_classes: The name of each class by its label, and how many there are.
        fingerprint: Equal for two folders with the same images in the same order.

    Raises:
        DataError: The folder is not a whole prepared one; every row's size and label is looked at, and no pixel.
    """

    def __init__(self, folder: str | pathlib.Path, in_memory: bool = False) -> None:
        self.folder, self._in_memory = pathlib.Path(folder), in_memory
        self.preparation = Preparation.read(self.folder)
        self.channels = self.preparation.channels
        self.image_size = (self.preparation.height, self.preparation.width)
        self.id2label = dict(enumerate(self.preparation.class_names))
        self.num_classes = len(self.id2label)
        self.fingerprint = self.preparation.fingerprint
        # Every image has the same number of bytes, so a record batch of the file is a piece of memory cut into rows.
        self._row_width = self.channels * self.image_size[0] * self.image_size[1]
        try:
            pixels, self._labels = self._checked_columns()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            found = " ".join(str(error).split())
            raise DataError(
                f"{self.folder} is damaged ({found}): prepare the images again with --overwrite"
            ) from error
        self._pieces: list[memoryview] = []
        for chunk in pixels.chunks:
            # the pixels of one record batch, without copying them, as a cast would
            _, ends, data = chunk.buffers()
            first = int(np.frombuffer(ends, np.int32)[chunk.offset])
            self._pieces.append(memoryview(data)[first : first + len(chunk) * self._row_width])
        if in_memory:
            self._pieces = [memoryview(b"".join(self._pieces))]
        self._starts = np.cumsum([0, *(len(piece) // self._row_width for piece in self._pieces)])

    def _checked_columns(self) -> tuple[Any, np.ndarray]:
        """Opens the files and looks at every row, but at no pixel."""
        import datasets
        import pyarrow
        import pyarrow.compute

        table = datasets.load_from_disk(str(self.folder), keep_in_memory=False).data
        pixels, labels = columns = [table.column(name) for name in (PIXELS_COLUMN, LABEL_COLUMN)]
        for column, kind in zip(columns, (pyarrow.binary(), pyarrow.int64()), strict=True):
            # only whether the buffers are there and as long as they must be, in no time
            column.validate()
            if (column.type, column.null_count, len(column)) != (kind, 0, len(self)):
                found = f"{len(column):,} rows of type {column.type}, {column.null_count} of them missing"
                raise ValueError(f"{found}, instead of {len(self):,} of type {kind}")
        values, widths = labels.to_numpy(), pyarrow.compute.binary_length(pixels).to_numpy()
        for what, found, least, most in (
            ("bytes", widths, self._row_width, self._row_width),
            ("as label", values, 0, self.num_classes - 1),
        ):
            wrong = np.flatnonzero((found < least) | (found > most))
            if len(wrong):
                raise ValueError(f"{found[wrong[0]]} {what} for image {wrong[0]} instead of {least} to {most}")
        return pixels, values

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process that does not share memory opens the files again instead of getting them piped.
        return PreparedImages, (self.folder, self._in_memory)

    def __len__(self) -> int:
        return self.preparation.num_images

    def labels(self) -> np.ndarray:
        """The label of every image: int64 (images,), a copy."""
        return self._labels.copy()

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Reads one image, or a batch for several indices: from -len to len - 1, in any order; others are IndexErrors.

        Returns:
            "pixel_values": uint8 (channels, height, width) and "class_labels": int64 (); with a leading batch
            dimension for several indices.
        """
        if isinstance(index, int | np.integer):
            return {name: values[0] for name, values in self[[index]].items()}
        rows = np.asarray(index, np.int64)
        labels = self._labels[rows]
        rows = np.where(rows < 0, rows + len(self), rows)
        pieces = np.searchsorted(self._starts, rows, side="right") - 1
        offsets = (rows - self._starts[pieces]) * self._row_width
        # One join of views is the quickest way to gather rows from many pieces: each is copied once.
        pixels = bytearray().join(
            self._pieces[piece][offset : offset + self._row_width]
            for piece, offset in zip(pieces.tolist(), offsets.tolist(), strict=True)
        )
        shape = (len(rows), self.channels, *self.image_size)
        pixel_values = torch.from_numpy(np.frombuffer(pixels, np.uint8)).view(shape)
        return {"pixel_values": pixel_values, "class_labels": torch.from_numpy(labels)}

    # what a DataLoader with a batch_size of its own calls
    __getitems__ = __getitem__


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
