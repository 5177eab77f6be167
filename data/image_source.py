"""Ordinary images: a folder with one subfolder a class, or any image dataset that the datasets library opens."""

import concurrent.futures
import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..utils.nearest_names import perhaps
from .sources import MOST_UNNAMED_CLASSES, DataError, ImageSource, ImageStream, check_labels, label_blocks


if TYPE_CHECKING:
    import datasets


def convert_image(
    image: PIL.Image.Image, resolution: int | None, resize_filter: str = "box", color_mode: str = "rgb"
) -> np.ndarray:
    """Makes pixels of one colour mode, and perhaps of one size, out of any image.

    The image is turned the way its EXIF orientation says, laid on white where it is transparent, cut to the largest
    square in its middle and resampled. An image that already has the right size keeps its values.

    Args:
        image: any image.
        resolution: height and width of the result in pixels; None keeps the size.
        resize_filter: "box", as for the published ImageNet-64, "bilinear", "bicubic" or "lanczos".
        color_mode: "rgb" or "grayscale".

    Returns:
        uint8 (channels, height, width), with 3 channels or 1.

    Raises:
        ValueError: the image holds floating-point or 32-bit values, whose range nobody knows.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith(("F", "I")):
        # 16-bit greys; converting them directly would clip everything above 255 to white
        greys = np.asarray(image)
        if image.mode == "F" or greys.min() < 0 or greys.max() > 65535:
            raise ValueError(
                "floating-point or 32-bit pixels have no defined range; store the image with 8 or 16 bits"
            )
        image = PIL.Image.fromarray((greys // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if color_mode == "grayscale" else "RGB")
    if resolution and image.size != (resolution, resolution):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        resample = PIL.Image.Resampling[resize_filter.upper()]
        image = image.resize((resolution, resolution), resample, box=(left, top, left + side, top + side))
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode_image(
    stored: dict[str, Any] | None, name: str, convert: Callable[[PIL.Image.Image], np.ndarray]
) -> np.ndarray:
    """Decodes an image and converts it.

    Args:
        stored: what datasets stores of an image: "bytes", its file's content, or else "path", its file, or nothing.
        name: what errors call it where there is no path.
        convert: makes pixels of it.

    Raises:
        DataError: it is missing, broken, or of a kind that ``convert`` refuses with a ValueError.
    """
    if stored is None:
        raise DataError(f"{name} is missing")
    try:
        encoded = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with PIL.Image.open(encoded) as image:
            return convert(image)
    # Pillow's decoders raise all of these for broken files
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{stored['path'] or name} is not a readable image ({error})") from error


class LoadedImages(NamedTuple):
    """An opened dataset: a column of images that are not decoded, and labels, int64 (images,), with their classes."""

    images: "datasets.Dataset"
    labels: np.ndarray | None
    class_names: list[str] | None
    label_column: str | None


@dataclasses.dataclass
class ImageDatasetSource(ImageSource):
    """Images of a class-folder tree or of a dataset.

    Args:
        kind: "imagefolder" for a folder whose subfolders are the classes (or hold them, in a subfolder named like the
            split); "dataset" for a dataset of the Hub, a folder of datasets.save_to_disk, or local files that
            datasets.load_dataset reads.
        inputs: the folder or the Hub id; for a dataset with several configurations, its name as a second value.
        split: the split to read.
        resolution, resize_filter, color_mode: what to make of the images, as for `convert_image`.
        image_column, label_column: of a dataset; None to find them by their types.

    """

    kind: str
    inputs: Sequence[str] = ()
    split: str = "train"
    resolution: int = 64
    resize_filter: str = "box"
    color_mode: str = "rgb"
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.inputs) <= 1 + (self.kind == "dataset"):
            wanted = {"dataset": "a dataset id or folder (and a configuration)", "imagefolder": "a folder of classes"}
            raise DataError(f"--input has {len(self.inputs)} values, but {self.kind} takes {wanted[self.kind]}")
        if self.kind == "imagefolder" and (self.image_column or self.label_column):
            raise DataError("--image_column and --label_column are for --source dataset, not for class folders")
        options = dataclasses.asdict(self)
        self._input, self._configuration = [*options.pop("inputs"), None][:2]
        self._folder = pathlib.Path(self._input).expanduser()
        if self.kind == "imagefolder":
            self._folder = _folder_of_classes(self._folder, self.split)
        self._is_local = self._folder.exists()
        options |= {"input": self._input, "configuration": self._configuration}
        if self._is_local:
            sizes = [file.stat().st_size for file in _files_under(self._folder)]
            options |= {"input": self._folder.absolute().name, "files": len(sizes), "bytes": sum(sizes)}
        what = "class folders" if self.kind == "imagefolder" else "dataset"
        super().__init__(options, f"{what} {self._folder if self._is_local else self._input} ({self.split})")

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Loads the dataset, as `load` does."""
        loaded = self.load(work_folder)
        # load has found them
        labels, class_names = cast(np.ndarray, loaded.labels), cast(list[str], loaded.class_names)
        image_size = (1 if self.color_mode == "grayscale" else 3, self.resolution, self.resolution)
        details = {"image_column": loaded.images.column_names[0], "label_column": loaded.label_column}
        blocks = label_blocks(self._decoded(loaded.images), labels)
        return ImageStream(class_names, image_size, len(labels), blocks, details)

    def load(self, work_folder: pathlib.Path, needs_labels: bool = True) -> LoadedImages:
        """Loads the dataset and finds its columns, for reading in any order.

        Args:
            work_folder: an existing folder; what datasets stores of local files goes there.
            needs_labels: whether images without labels are an error. If not, the labels are None where nobody has
                named their column and there is none, more than one, or one that is not whole.

        Raises:
            DataError: the dataset cannot be loaded or has no images with labels.
        """
        import datasets

        dataset = _load_class_folders(self._folder) if self.kind == "imagefolder" else self._load(work_folder)
        image_column = self._column(dataset, "image", self.image_column, datasets.Image, ("binary", "string"))
        labels = class_names = label_column = None
        try:
            label_column = self._column(dataset, "label", self.label_column, datasets.ClassLabel, ("int", "uint"))
            class_names = getattr(dataset.features[label_column], "names", None)
            stored = np.asarray(dataset.select_columns([label_column]).with_format("numpy")[:][label_column])
            # the column of no images at all has no type
            stored = stored if len(stored) else stored.astype(np.int64)
            last = len(class_names or range(MOST_UNNAMED_CLASSES)) - 1
            labels = check_labels(stored, f'{self.summary}: the column "{label_column}"', len(dataset), 0, last)
            class_names = class_names or [str(label) for label in range(int(labels.max(initial=0)) + 1)]
        except DataError:
            if needs_labels or self.label_column is not None:
                raise
            labels = class_names = label_column = None
        # not decoded by datasets: a broken image must be named, and decoding is shared among threads
        images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        return LoadedImages(images, labels, class_names, label_column)

    def _load(self, work_folder: pathlib.Path) -> "datasets.Dataset":
        import datasets

        generation_error = datasets.exceptions.DatasetGenerationError
        try:
            if any((self._folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(str(self._folder), keep_in_memory=False)
                if not isinstance(loaded, datasets.DatasetDict):
                    loaded = {str(loaded.split or self.split): loaded}
                if self.split not in loaded:
                    splits = ", ".join(loaded) + perhaps(self.split, loaded)
                    raise DataError(f"--split {self.split}: {self._input} has the splits {splits}")
                return loaded[self.split]
            # Copies of local files are for this run only; downloads go where the user keeps those of the Hub.
            name, cache = (self._folder, work_folder / "datasets") if self._is_local else (self._input, None)
            return datasets.load_dataset(str(name), self._configuration, split=self.split, cache_dir=cache)
        except DataError:
            raise
        except (OSError, ValueError, generation_error) as error:
            # datasets says only that generating failed; why is in the error before it
            reason = (error.__cause__ if isinstance(error, generation_error) else None) or error
            message = " ".join(str(reason).split()) or type(reason).__name__
            raise DataError(f"--input {self._input} --split {self.split}: cannot be loaded ({message})") from error

    def _column(
        self, dataset: "datasets.Dataset", role: str, column: str | None, kind: type, other_types: tuple[str, ...]
    ) -> str:
        """Finds the column that was named, or the only one of its kind."""
        features = dataset.features
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        # integers called "label" are labels, whether or not the classes have names
        found = [column] if column else found or [name for name in features if name == role == "label"]
        feature = features.get(found[0]) if len(found) == 1 else None
        if not isinstance(feature, kind) and not str(getattr(feature, "dtype", "")).startswith(other_types):
            state = f"{column}: not" if column else "must name"
            wanted = f"a column of type {kind.__name__} or {' or '.join(other_types)}"
            types = [f"{name} ({getattr(feature, 'dtype', feature)})" for name, feature in features.items()]
            near = perhaps(column, features) if column else ""
            raise DataError(f"--{role}_column {state} {wanted}: {self._input} has {', '.join(types)}{near}")
        return found[0]

    def _decoded(self, images: "datasets.Dataset") -> Iterator[np.ndarray]:
        def decode(stored: dict[str, Any] | None, number: int) -> np.ndarray:
            options = (self.resolution, self.resize_filter, self.color_mode)
            return decode_image(stored, f"{self._input} image {number}", lambda image: convert_image(image, *options))

        images_at_once = min(256, max(1, (16 << 20) // self.resolution**2))
        # Threads: the decoders of Pillow run without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), images_at_once):
                stored = images[start : start + images_at_once][images.column_names[0]]
                yield np.stack(list(pool.map(decode, stored, itertools.count(start))))


def _folder_of_classes(folder: pathlib.Path, split: str) -> pathlib.Path:
    if not folder.is_dir():
        raise DataError(f"--input {folder}: no such folder")
    for name in dict.fromkeys([split, {"validation": "val"}.get(split, split)]):
        # a split holds class folders; a class that happens to be called "train" holds images
        if (folder / name).is_dir() and any(child.is_dir() for child in (folder / name).iterdir()):
            return folder / name
    if split != "train":
        raise DataError(f"--split {split}: {folder} has no folder {split} that holds class folders")
    return folder


def _load_class_folders(folder: pathlib.Path) -> "datasets.Dataset":
    """Lists the images whose folders are their classes; hidden files and those of other kinds are left out."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    parts = {path: path.relative_to(folder).parts for path in _files_under(folder)}
    paths = [
        path
        for path in parts
        if path.suffix.lower() in ImageFolder.EXTENSIONS
        and not any(part.startswith((".", "__")) for part in parts[path])
    ]
    if not paths:
        raise DataError(f"--input {folder}: there are no folders of images in it, one for each class")
    if loose := [path.name for path in paths if len(parts[path]) == 1]:
        raise DataError(f"--input {folder}: {loose[0]} lies outside of the class folders, so it has no class")
    labels = [path.parent.name for path in paths]
    names = datasets.ClassLabel(names=sorted(set(labels)))
    features = datasets.Features(image=datasets.Image(decode=False), label=names)
    return datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": labels}, features=features)


def _files_under(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists all files at or under a path, in the order of their names."""
    folders: Any = os.walk(path, followlinks=True) if path.is_dir() else [(path.parent, [], [path.name])]
    files = (pathlib.Path(folder, name) for folder, _, names in folders for name in names)
    return sorted((file for file in files if file.is_file()), key=str)
