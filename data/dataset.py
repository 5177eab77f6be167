"""Reading a prepared folder, in batches."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import DataError
from .preparation import LABEL_COLUMN, PIXELS_COLUMN, Preparation


if TYPE_CHECKING:
    import pyarrow


def to_model_range(pixel_values: torch.Tensor) -> torch.Tensor:
    """Maps stored pixels to what the model sees, x / 127.5 - 1.

    Args:
        pixel_values: uint8, any shape, on any device, where the work is done.

    Returns:
        float32 of the same shape, -1 to 1.
    """
    return pixel_values.to(torch.float32).div_(127.5).sub_(1.0)


class PreparedImages(torch.utils.data.Dataset):
    """The images of a folder written by imagenet64-prepare.

    A list of indices gives a whole batch at once, copied straight from the memory-mapped files. With a DataLoader::

        sampler = GlobalBatchSampler(len(images), global_batch_size=128, seed=0)
        loader = DataLoader(images, sampler=sampler, batch_size=None, num_workers=2, pin_memory=True)

    Args:
        folder: the prepared folder.
        in_memory: whether to read all images into memory first; worth it where the disk is slow and memory ample.

    Attributes:
        preparation: the record of the folder.
        channels: at least 1; 1 is grayscale and 3 is RGB.
        image_size: (height, width) in pixels.
        class_names: the name of each class; the index is the label.
        id2label: label -> name.
        num_classes: how many classes there are.
        fingerprint: equal for two folders with the same images in the same order.

    Raises:
        DataError: the folder is not a whole prepared one, an image has another size than the record says, a
            label is none of the classes, or there are more or fewer images. Every row is looked at, and no pixel
            is read.
    """

    def __init__(self, folder: str | pathlib.Path, in_memory: bool = False) -> None:
        self.folder = pathlib.Path(folder)
        self.preparation = Preparation.read(self.folder)
        self.channels = self.preparation.channels
        self.image_size = (self.preparation.height, self.preparation.width)
        self.class_names = self.preparation.class_names
        self.id2label = dict(enumerate(self.class_names))
        self.num_classes = len(self.class_names)
        self.fingerprint = self.preparation.fingerprint
        self._in_memory = in_memory
        self._open()

    def _open(self) -> None:
        # Every image has the same number of bytes, so a record batch of the file is a piece of memory cut into rows.
        self._row_width = self.channels * self.image_size[0] * self.image_size[1]
        pixels, self._labels = self._checked_columns()
        chunks = [chunk for chunk in pixels.chunks if len(chunk)]
        self._pieces = [_bytes_of(chunk, self._row_width) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks])
        if self._in_memory:
            self._pieces = [memoryview(b"".join(self._pieces))]
            self._ends = self._ends[-1:]
        self._starts = np.concatenate([[0], self._ends[:-1]])

    def _checked_columns(self) -> tuple["pyarrow.ChunkedArray", np.ndarray]:
        """Opens the files and looks at every row, but at no pixel."""
        import datasets
        import pyarrow
        import pyarrow.compute

        try:
            table = datasets.load_from_disk(str(self.folder), keep_in_memory=False).data
            columns = {name: table.column(name) for name in (PIXELS_COLUMN, LABEL_COLUMN)}
            for column in columns.values():
                # only whether the buffers are there and as long as they must be, in no time
                column.validate()
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
            raise self._damaged(f"files that cannot be read ({' '.join(str(error).split())})") from error
        for (name, column), kind in zip(columns.items(), (pyarrow.binary(), pyarrow.int64()), strict=True):
            if column.type != kind:
                raise self._damaged(f'a column "{name}" of type {column.type} instead of {kind}')
        pixels, labels = columns.values()
        widths = pyarrow.compute.binary_length(pixels).fill_null(-1).to_numpy()
        wrong = np.flatnonzero(widths != self._row_width)
        if len(wrong):
            found = "no pixels" if widths[wrong[0]] < 0 else f"{widths[wrong[0]]:,} bytes"
            raise self._damaged(f"{found} for image {wrong[0]} instead of {self._row_width:,}")
        # filled only where something is missing: the labels of all images need not be copied
        values = (labels.fill_null(-1) if labels.null_count else labels).to_numpy()
        wrong = np.flatnonzero((values < 0) | (values >= self.num_classes))
        if len(wrong):
            found = f"the label {labels[wrong[0]]}"
            raise self._damaged(f"{found} for image {wrong[0]}, where labels go from 0 to {self.num_classes - 1}")
        if len(values) != len(self):
            raise self._damaged(f"{len(values):,} images instead of {len(self):,}")
        return pixels, values

    def _damaged(self, found: str) -> DataError:
        return DataError(f"{self.folder} is damaged: it has {found}. Prepare the images again with --overwrite")

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process that does not share memory opens the files again instead of getting them piped.
        return PreparedImages, (self.folder, self._in_memory)

    def __len__(self) -> int:
        return self.preparation.num_images

    def labels(self) -> np.ndarray:
        """Returns the label of every image: int64 (images,), a copy."""
        return self._labels.copy()

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Reads one image, or a batch when given several indices.

        Args:
            index: from -len to len - 1; or several of them.

        Returns:
            "pixel_values": uint8 (channels, height, width) and "class_labels": int64 (); with a leading batch
            dimension for several indices.

        Raises:
            IndexError: an index is out of range.
        """
        if isinstance(index, int | np.integer):
            batch = self.__getitems__([index])
            return {name: values[0] for name, values in batch.items()}
        return self.__getitems__(index)

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, torch.Tensor]:
        """Reads a batch.

        Args:
            indices: from -len to len - 1, in any order.

        Returns:
            "pixel_values": uint8 (batch, channels, height, width) and "class_labels": int64 (batch,).

        Raises:
            IndexError: an index is out of range.
        """
        rows = np.asarray(indices, np.int64)
        labels = self._labels[rows]
        rows = np.where(rows < 0, rows + len(self), rows)
        pieces = np.searchsorted(self._ends, rows, side="right")
        offsets = (rows - self._starts[pieces]) * self._row_width
        # One join of views is the quickest way to gather rows from many pieces: each is copied once.
        pixels = bytearray().join(
            self._pieces[piece][offset : offset + self._row_width]
            for piece, offset in zip(pieces.tolist(), offsets.tolist(), strict=True)
        )
        return {
            "pixel_values": torch.from_numpy(np.frombuffer(pixels, np.uint8)).view(
                len(rows), self.channels, *self.image_size
            ),
            "class_labels": torch.from_numpy(labels),
        }


def _bytes_of(chunk: "pyarrow.BinaryArray", row_width: int) -> memoryview:
    """Views the pixels of one record batch, all of one width, without copying them, as a cast would."""
    _, ends, data = chunk.buffers()
    first = int(np.frombuffer(ends, np.int32)[chunk.offset])
    return memoryview(data)[first : first + len(chunk) * row_width]
