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
    """Maps stored pixels, uint8 on any device, to what the model sees: x / 127.5 - 1, float32 from -1 to 1."""
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
        class_names, id2label: the name of each class, by its label.
        num_classes: how many classes there are.
        fingerprint: equal for two folders with the same images in the same order.

    Raises:
        DataError: the folder is not a whole prepared one, or an image's size or label is not what the record says.
            Every row is looked at, and no pixel is read.
    """

    def __init__(self, folder: str | pathlib.Path, in_memory: bool = False) -> None:
        self.folder, self._in_memory = pathlib.Path(folder), in_memory
        self.preparation = Preparation.read(self.folder)
        self.channels = self.preparation.channels
        self.image_size = (self.preparation.height, self.preparation.width)
        self.class_names = self.preparation.class_names
        self.id2label = dict(enumerate(self.class_names))
        self.num_classes = len(self.class_names)
        self.fingerprint = self.preparation.fingerprint
        # Every image has the same number of bytes, so a record batch of the file is a piece of memory cut into rows.
        self._row_width = self.channels * self.image_size[0] * self.image_size[1]
        pixels, self._labels = self._checked_columns()
        self._pieces = [_bytes_of(chunk, self._row_width) for chunk in pixels.chunks if len(chunk)]
        if in_memory:
            self._pieces = [memoryview(b"".join(self._pieces))]
        self._starts = np.cumsum([0, *(len(piece) // self._row_width for piece in self._pieces)])

    def _checked_columns(self) -> tuple["pyarrow.ChunkedArray", np.ndarray]:
        """Opens the files and looks at every row, but at no pixel."""
        import datasets
        import pyarrow
        import pyarrow.compute

        try:
            table = datasets.load_from_disk(str(self.folder), keep_in_memory=False).data
            pixels, labels = columns = [table.column(name) for name in (PIXELS_COLUMN, LABEL_COLUMN)]
            for column, kind in zip(columns, (pyarrow.binary(), pyarrow.int64()), strict=True):
                # only whether the buffers are there and as long as they must be, in no time
                column.validate()
                if column.type != kind:
                    raise ValueError(f"a column of type {column.type} instead of {kind}")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, pyarrow.ArrowException) as error:
            raise self._damaged(f"files that cannot be read ({' '.join(str(error).split())})") from error
        if len(pixels) != len(self):
            raise self._damaged(f"{len(pixels):,} images instead of {len(self):,}")
        # filled only where something is missing: the labels of all images need not be copied
        values = (labels.fill_null(-1) if labels.null_count else labels).to_numpy()
        widths = pyarrow.compute.binary_length(pixels).fill_null(-1).to_numpy()
        for what, found, least, most in (
            ("bytes", widths, self._row_width, self._row_width),
            ("as label", values, 0, self.num_classes - 1),
        ):
            wrong = np.flatnonzero((found < least) | (found > most))
            if len(wrong):
                raise self._damaged(f"{found[wrong[0]]} {what} for image {wrong[0]} instead of {least} to {most}")
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
            index: from -len to len - 1; or several of them, in any order.

        Returns:
            "pixel_values": uint8 (channels, height, width) and "class_labels": int64 (); with a leading batch
            dimension for several indices.

        Raises:
            IndexError: an index is out of range.
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


def _bytes_of(chunk: "pyarrow.BinaryArray", row_width: int) -> memoryview:
    """Views the pixels of one record batch, all of one width, without copying them, as a cast would."""
    _, ends, data = chunk.buffers()
    first = int(np.frombuffer(ends, np.int32)[chunk.offset])
    return memoryview(data)[first : first + len(chunk) * row_width]
