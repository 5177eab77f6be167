"""The prepared dataset: how it is laid out on the disk, and how it is written.

``datasets.load_from_disk`` opens it. The column "pixels" has the uint8 values of an image (channels, height, width) as
raw bytes, of which a random batch is read many times faster than one of PNG images (benchmarks/data.py); "label" is a
ClassLabel. Beside it preparation.json says where the images come from and what training and evaluation need to know.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np

from ..utils.atomic_write import atomic_folder, only_writer
from ..utils.progress import progress_bar
from .sources import DataError, ImageSource


RECORD_NAME = "preparation.json"
PIXELS_COLUMN = "pixels"
LABEL_COLUMN = "label"

_FORMAT = {"format": "imagenet64_diffusion.prepared_images", "format_version": 1}
# as datasets names the only file of a saved dataset
_ARROW_NAME = "data-00000-of-00001.arrow"
_OWN_NAMES = re.compile(r"preparation\.json|state\.json|dataset_info\.json|data-.*\.arrow")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What preparation.json says about a prepared folder; the index of a class name is its label.

    The fingerprint is over all pixels and labels and the size of the images: two folders with one fingerprint hold the
    same images in the same order.
    """

    source: dict[str, Any]
    source_details: dict[str, Any]  # what the source found out when opened
    max_images: int | None  # the limit that was asked for
    channels: int
    height: int
    width: int
    num_images: int
    class_names: list[str]
    images_per_class: list[int]
    fingerprint: str  # "sha256:" and a hex digest
    files: dict[str, int]  # name -> bytes of each arrow file, in order

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Preparation":
        """Reads preparation.json; DataError if it is none of this version, or a file that it names is not whole."""
        path = folder / RECORD_NAME
        if not path.is_file():
            hint = "make one with imagenet64-prepare, or wait until it has written it"
            raise DataError(f"{folder} is not a prepared dataset: there is no {RECORD_NAME} in it; {hint}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = {name: record.pop(name) for name in _FORMAT}
            if found != _FORMAT:
                raise ValueError(f"it has {found} instead of {_FORMAT}")
            preparation = cls(**record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not the record of a prepared dataset ({error!r}): use --overwrite") from error
        for file, size in ((folder / name, size) for name, size in preparation.files.items()):
            if (found_size := file.stat().st_size if file.is_file() else 0) != size:
                raise DataError(f"{file} has {found_size:,} bytes instead of {size:,}: it was not copied whole")
        return preparation

    def summary(self) -> str:
        """Numbers of images and classes and the size, for people."""
        used, known = sum(count > 0 for count in self.images_per_class), len(self.class_names)
        classes = f"{used} of {known} classes" if used < known else f"{used} class{'es' * (used != 1)}"
        colour = {1: "grayscale", 3: "RGB"}.get(self.channels, f"{self.channels}-channel")
        total = sum(self.files.values())
        stored = f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"
        return f"{self.num_images:,} images, {classes}, {self.width}x{self.height} {colour}, {stored}"


def find_finished(
    output_dir: pathlib.Path, source: ImageSource, max_images: int | None, overwrite: bool = False
) -> Preparation | None:
    """The record of what output_dir already holds, None where it is to be written; DataError for other contents."""
    names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    foreign = sorted(name for name in names if overwrite and not _OWN_NAMES.fullmatch(name))
    if names and (foreign or RECORD_NAME not in names):
        what = ", ".join(foreign[:3]) or f"no {RECORD_NAME}"
        hint = "name another folder (--overwrite replaces prepared datasets only)"
        raise DataError(f"--output_dir {output_dir} holds files of no prepared dataset ({what}): {hint}")
    if overwrite or not names:
        return None
    preparation = Preparation.read(output_dir)
    # as it comes back from a JSON file
    wanted = json.loads(json.dumps(source.description))
    if (preparation.source, preparation.max_images) != (wanted, max_images):
        found = f"{preparation.summary()}, from {preparation.source!s:.300}, with max_images {preparation.max_images}"
        hint = "name another folder, or replace them with --overwrite"
        raise DataError(f"--output_dir {output_dir} holds other images, {found}: {hint}")
    return preparation


def write_prepared(
    output_dir: pathlib.Path, source: ImageSource, max_images: int | None = None, overwrite: bool = False
) -> Preparation:
    """Reads all images of a source and writes the prepared folder, in memory that does not grow with their number.

    Everything is written to a hidden folder beside it, which is removed when anything goes wrong, or by the next call
    when this process is killed. A folder that holds the same already is left as it is.

    Raises:
        DataError: The source is not what it should be, or output_dir holds something that is not to be replaced.
        OSError: Another process is writing to output_dir, or it cannot be written.
    """
    output_dir = output_dir.absolute()
    with only_writer(output_dir):
        if finished := find_finished(output_dir, source, max_images, overwrite):
            return finished
        try:
            with atomic_folder(output_dir) as folder:
                scratch = folder / "scratch"
                scratch.mkdir()
                _write_images(folder, source, scratch, max_images)
                shutil.rmtree(scratch)
        except OSError as error:
            # what a full disk says does not say where
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise OSError(f"{output_dir.parent} cannot hold the images ({error.strerror})") from error
    return Preparation.read(output_dir)


def _write_images(folder: pathlib.Path, source: ImageSource, scratch: pathlib.Path, max_images: int | None) -> None:
    import datasets
    import pyarrow

    stream = source.open(scratch)
    class_names = stream.class_names
    labels_feature = datasets.ClassLabel(names=class_names)
    features = datasets.Features({PIXELS_COLUMN: datasets.Value("binary"), LABEL_COLUMN: labels_feature})
    schema = features.arrow_schema
    channels, height, width = stream.image_size
    images_per_class = np.zeros(len(class_names), np.int64)
    pixels_digest, labels_digest = hashlib.sha256(), hashlib.sha256()
    with (
        contextlib.closing(stream.blocks) as blocks,
        (folder / _ARROW_NAME).open("wb") as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
        progress_bar(
            desc="preparing",
            total=min(max_images or stream.num_images, stream.num_images),
            unit=" images",
            dynamic_ncols=True,
        ) as progress,
    ):
        for pixels, labels in blocks:
            left = None if max_images is None else max_images - progress.n
            pixels, labels = np.ascontiguousarray(pixels[:left]), labels[:left].astype("<i8")
            pixels_digest.update(pixels.data)
            labels_digest.update(labels.data)
            images_per_class += np.bincount(labels, minlength=len(images_per_class))
            row_type, buffer = pyarrow.binary(channels * height * width), pyarrow.py_buffer(pixels)
            rows = pyarrow.Array.from_buffers(row_type, len(labels), [None, buffer]).cast(pyarrow.binary())
            writer.write_batch(pyarrow.record_batch([rows, labels], schema=schema))
            progress.update(len(labels))
            if progress.n == max_images:
                break
        num_images = progress.total = progress.n
    if num_images == 0:
        raise DataError(f"{source.summary}: there are no images")
    # Two digests joined: whatever the blocks were, the same images give the same fingerprint.
    size = f"{channels}x{height}x{width}".encode()
    digest = hashlib.sha256(size + pixels_digest.digest() + labels_digest.digest()).hexdigest()
    # the two JSON files that datasets.load_from_disk reads beside the arrow file
    datasets.DatasetInfo(features=features).write_to_directory(str(folder))
    state: dict[str, Any] = dict.fromkeys(["_format_columns", "_format_type", "_split"])
    state |= {"_fingerprint": digest[:16], "_format_kwargs": {}, "_output_all_columns": False}
    state |= {"_data_files": [{"filename": _ARROW_NAME}]}
    counts, files = images_per_class.tolist(), {_ARROW_NAME: (folder / _ARROW_NAME).stat().st_size}
    images: Any = (*stream.image_size, num_images, class_names, counts, f"sha256:{digest}", files)
    record = _FORMAT | dataclasses.asdict(Preparation(source.description, stream.details, max_images, *images))
    for name, content in (("state.json", state), (RECORD_NAME, record)):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
