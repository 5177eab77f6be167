"""The prepared dataset: how it is laid out on the disk, and how it is written.

A prepared folder is a dataset of the datasets library (``datasets.load_from_disk`` opens it) with the columns
"pixels", the uint8 values of an image (channels, height, width) as raw bytes, and "label", a ClassLabel with the names
of the classes. Raw bytes because a random batch of them is read many times faster than one of PNG images (measured
in benchmarks/data.py). Beside it preparation.json says where the images come from and what training and evaluation
need to know about them.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import tqdm

from ..utils.atomic_write import atomic_folder, lock_path, only_writer
from .errors import DataError
from .sources import ImageSource, ImageStream


RECORD_NAME = "preparation.json"
PIXELS_COLUMN = "pixels"
LABEL_COLUMN = "label"

_FORMAT = "imagenet64_diffusion.prepared_images"
_FORMAT_VERSION = 1
# as datasets names the only file of a saved dataset
_ARROW_NAME = "data-00000-of-00001.arrow"


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What preparation.json says about a prepared folder.

    Attributes:
        source: the description of the source, as JSON values.
        source_details: what the source found out when it was opened, as JSON values.
        max_images: the limit that was asked for, or None.
        channels: at least 1; 1 is grayscale and 3 is RGB.
        height: pixels.
        width: pixels.
        num_images: how many images there are.
        class_names: the name of each class; the index is the label.
        images_per_class: how many images each class has.
        fingerprint: "sha256:" and a hex digest over all pixels and labels and the size of the images. Two folders with
            one fingerprint hold the same images in the same order.
        files: name -> bytes of each arrow file, in order.
    """

    source: dict[str, Any]
    source_details: dict[str, Any]
    max_images: int | None
    channels: int
    height: int
    width: int
    num_images: int
    class_names: list[str]
    images_per_class: list[int]
    fingerprint: str
    files: dict[str, int]

    def write(self, folder: pathlib.Path) -> None:
        """Writes preparation.json into the folder."""
        record = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **dataclasses.asdict(self)}
        _write_json(folder / RECORD_NAME, record)

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Preparation":
        """Reads preparation.json and looks whether the files it names are there.

        Raises:
            DataError: the folder is not a prepared one, was written by another version, or misses something.
        """
        path = folder / RECORD_NAME
        if not path.is_file():
            if not folder.exists() and lock_path(folder.absolute()).exists():
                raise DataError(
                    f"{folder} is not there yet: imagenet64-prepare is still writing it, or was killed. "
                    "Wait for it, or run it again"
                )
            what = "no such folder" if not folder.exists() else f"it has no {RECORD_NAME}"
            raise DataError(f"{folder} is not a prepared dataset ({what}): make one with imagenet64-prepare")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = record.pop("format"), record.pop("format_version")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not the record of a prepared dataset ({error!r})") from error
        if found != (_FORMAT, _FORMAT_VERSION):
            raise DataError(
                f"{path} is not the record of a prepared dataset that this program reads: it has format {found[0]!r} "
                f"and format_version {found[1]} instead of {_FORMAT_VERSION}. Prepare them again with --overwrite"
            )
        try:
            preparation = cls(**record)
        except TypeError as error:
            raise DataError(f"{path} is damaged ({error})") from error
        for name, size in preparation.files.items():
            file = folder / name
            if not file.is_file():
                raise DataError(f"{file} is missing: the folder was not copied whole")
            if (bytes_found := file.stat().st_size) != size:
                raise DataError(f"{file} has {bytes_found:,} bytes instead of {size:,}: it was not copied whole")
        return preparation

    def summary(self) -> str:
        """Returns numbers of images and classes and the size, for people."""
        used = sum(count > 0 for count in self.images_per_class)
        classes = f"{used} of {len(self.class_names)}" if used < len(self.class_names) else f"{used}"
        classes += " class" if len(self.class_names) == 1 else " classes"
        colour = {1: "grayscale", 3: "RGB"}.get(self.channels, f"{self.channels}-channel")
        total = sum(self.files.values())
        return f"{self.num_images:,} images, {classes}, {self.width}x{self.height} {colour}, " + (
            f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"
        )


def find_finished(output_dir: pathlib.Path, source: ImageSource, max_images: int | None) -> Preparation | None:
    """Looks whether output_dir already holds what would be prepared.

    Args:
        output_dir: the folder.
        source: where the images would come from.
        max_images: how many of them at most; None for all.

    Returns:
        Its record, or None when the folder holds nothing.

    Raises:
        DataError: it holds something else.
    """
    if not _holds_anything(output_dir):
        return None
    if not (output_dir / RECORD_NAME).is_file():
        raise DataError(
            f"--output_dir {output_dir} holds files that are no prepared dataset: name another folder "
            "(--overwrite replaces prepared datasets only)"
        )
    preparation = Preparation.read(output_dir)
    if (preparation.source, preparation.max_images) != (_as_json(source.description), max_images):
        raise DataError(
            f"--output_dir {output_dir} holds other images, {preparation.summary()}, prepared from "
            f"{json.dumps(preparation.source)[:300]} with max_images {preparation.max_images}: "
            "name another folder, or replace them with --overwrite"
        )
    return preparation


def write_prepared(
    output_dir: pathlib.Path, source: ImageSource, max_images: int | None = None, overwrite: bool = False
) -> Preparation:
    """Reads all images of a source and writes the prepared folder, in memory that does not grow with their number.

    The write is atomic: everything is written to a hidden folder beside it, which is removed when anything goes wrong,
    or by the next call when this process is killed.

    Args:
        output_dir: the folder to make; its parents are made too.
        source: where the images come from.
        max_images: how many of them at most; None for all.
        overwrite: whether to replace a prepared folder at output_dir.

    Returns:
        The record of the folder.

    Raises:
        DataError: the source is not what it should be, or output_dir holds something that is not to be replaced.
        OSError: another process is writing to output_dir, or it cannot be written.
    """
    output_dir = output_dir.absolute()
    if overwrite:
        _check_replaceable(output_dir)
    elif _holds_anything(output_dir):
        raise DataError(f"--output_dir {output_dir} is not empty: name another folder, or replace it with --overwrite")
    with only_writer(output_dir), atomic_folder(output_dir) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        preparation = _write_images(folder, source, source.open(scratch), max_images)
        shutil.rmtree(scratch)
        preparation.write(folder)
    return preparation


def _write_images(
    folder: pathlib.Path, source: ImageSource, stream: ImageStream, max_images: int | None
) -> Preparation:
    import datasets
    import pyarrow

    if len(set(stream.class_names)) < len(stream.class_names):
        repeated = next(name for name in stream.class_names if stream.class_names.count(name) > 1)
        raise DataError(f"two classes are called {repeated!r}: each needs a name of its own")
    features = datasets.Features(
        {PIXELS_COLUMN: datasets.Value("binary"), LABEL_COLUMN: datasets.ClassLabel(names=stream.class_names)}
    )
    schema = features.arrow_schema
    channels, height, width = stream.image_size
    row_type = pyarrow.binary(channels * height * width)
    images_per_class = np.zeros(len(stream.class_names), np.int64)
    pixels_digest, labels_digest = hashlib.sha256(), hashlib.sha256()
    left = max_images
    with (
        contextlib.closing(stream.blocks) as blocks,
        _naming_full_disk(folder / _ARROW_NAME) as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
        tqdm.tqdm(
            desc="preparing",
            total=stream.num_images if max_images is None else min(max_images, stream.num_images or max_images),
            unit=" images",
            # a log file gets a line now and then, a terminal a moving bar
            mininterval=0.5 if sys.stderr.isatty() else 10,
            dynamic_ncols=True,
        ) as progress,
    ):
        for pixels, labels in blocks:
            pixels, labels = np.ascontiguousarray(pixels[:left]), labels[:left].astype("<i8")
            pixels_digest.update(pixels.data)
            labels_digest.update(labels.data)
            images_per_class += np.bincount(labels, minlength=len(images_per_class))
            rows = pyarrow.Array.from_buffers(row_type, len(labels), [None, pyarrow.py_buffer(pixels)])
            writer.write_batch(pyarrow.record_batch([rows.cast(pyarrow.binary()), labels], schema=schema))
            progress.update(len(labels))
            if left is not None:
                left -= len(labels)
                if left == 0:
                    break
        num_images = progress.total = int(images_per_class.sum())
        if num_images == 0:
            raise DataError(f"{source.summary}: there are no images")
    # Two digests joined: whatever the blocks were, the same images give the same fingerprint.
    size = f"{channels}x{height}x{width}".encode()
    digest = hashlib.sha256(size + pixels_digest.digest() + labels_digest.digest()).hexdigest()
    # the two JSON files that datasets.load_from_disk reads beside the arrow file
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state = dict.fromkeys(["_format_columns", "_format_type", "_split"])
    state |= {"_fingerprint": digest[:16], "_format_kwargs": {}, "_output_all_columns": False}
    _write_json(folder / "state.json", {"_data_files": [{"filename": _ARROW_NAME}], **state})
    return Preparation(
        source=_as_json(source.description),
        source_details=_as_json(stream.details),
        max_images=max_images,
        channels=channels,
        height=height,
        width=width,
        num_images=num_images,
        class_names=stream.class_names,
        images_per_class=images_per_class.tolist(),
        fingerprint=f"sha256:{digest}",
        files={_ARROW_NAME: (folder / _ARROW_NAME).stat().st_size},
    )


@contextlib.contextmanager
def _naming_full_disk(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing; what a full disk says does not say where."""
    try:
        with path.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(f"{path.parent.parent} cannot hold the images ({error.strerror})") from error


def _holds_anything(output_dir: pathlib.Path) -> bool:
    if output_dir.exists() and not output_dir.is_dir():
        raise DataError(f"--output_dir {output_dir} is a file: name a folder")
    return output_dir.is_dir() and any(output_dir.iterdir())


def _check_replaceable(output_dir: pathlib.Path) -> None:
    """Refuses to delete what no preparation wrote."""
    if not _holds_anything(output_dir):
        return
    names = {path.name for path in output_dir.iterdir()}
    own = {name for name in names if name.startswith("data-") and name.endswith(".arrow")}
    foreign = sorted(names - own - {RECORD_NAME, "state.json", "dataset_info.json"})
    if RECORD_NAME not in names or foreign:
        what = ", ".join(foreign[:3]) or "no preparation.json"
        raise DataError(
            f"--output_dir {output_dir} holds files that no preparation wrote ({what}): --overwrite leaves it alone; "
            "remove it yourself or name another folder"
        )


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """Returns the value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
