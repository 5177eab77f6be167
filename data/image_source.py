"""Ordinary images: a folder with one subfolder a class, or any image dataset that the datasets library opens."""

import concurrent.futures
import dataclasses
import io
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

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
    """Makes uint8 pixels (channels, height, width) of one colour mode, and perhaps of one size, out of any image.

    It is turned the way its EXIF orientation says, laid on white where it is transparent, cut to the largest square in
    its middle and resampled, unless it has that size. ValueError for floating-point and 32-bit pixels.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith(("F", "I")):
        # 16-bit greys; converting them directly would clip everything above 255 to white
        greys = np.asarray(image)
        if image.mode == "F" or greys.min() < 0 or greys.max() > 65535:
            raise ValueError("floating-point or 32-bit pixels have no defined range; store 8 or 16 bits")
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


def decode_image(stored: dict[str, Any] | None, name: str, *conversion: Any) -> np.ndarray:
    """Decodes and converts what datasets stores of an image: "bytes", or else "path"; DataError if that cannot be."""
    if stored is None:
        raise DataError(f"{name} is missing")
    try:
        encoded = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with PIL.Image.open(encoded) as image:
            return convert_image(image, *conversion)
    # Pillow's decoders raise all of these for broken files
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{stored['path'] or name} is not a readable image ({error})") from error


@dataclasses.dataclass
class ImageDatasetSource(ImageSource):
    """Images of class folders (kind "imagefolder"), or of a dataset of the Hub or in a folder (kind "dataset").

    Class folders may lie in a subfolder named like the split. A second input is the dataset's configuration.
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
            wanted = "a dataset takes its id or folder (and a configuration), an imagefolder a folder of classes"
            raise DataError(f"--input has {len(self.inputs)} values, but {wanted}")
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
        dataset, images = self.load(work_folder)
        labels, class_names, label_column = self.read_labels(dataset)
        image_size = (1 if self.color_mode == "grayscale" else 3, self.resolution, self.resolution)
        details = {"image_column": images.column_names[0], "label_column": label_column}
        return ImageStream(class_names, image_size, len(labels), label_blocks(self._decoded(images), labels), details)

    def load(self, work_folder: pathlib.Path) -> tuple["datasets.Dataset", "datasets.Dataset"]:
        """Loads the dataset, and its column of images, not decoded; copies of local files go to the work folder."""
        import datasets

        dataset = _load_class_folders(self._folder) if self.kind == "imagefolder" else self._load(work_folder)
        column = self._column(dataset, "image", self.image_column, datasets.Image, ("binary", "string"))
        # not decoded by datasets: a broken image must be named, and decoding is shared among threads
        return dataset, dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def read_labels(self, dataset: "datasets.Dataset") -> tuple[np.ndarray, list[str], str]:
        """The labels of a loaded dataset, int64 (images,), the names of the classes, and the column of the labels."""
        import datasets

        column = self._column(dataset, "label", self.label_column, datasets.ClassLabel, ("int", "uint"))
        class_names = getattr(dataset.features[column], "names", None)
        stored = np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])
        # the column of no images at all has no type
        stored = stored if len(stored) else stored.astype(np.int64)
        last = len(class_names or range(MOST_UNNAMED_CLASSES)) - 1
        labels = check_labels(stored, f'{self.summary}: the column "{column}"', len(dataset), 0, last)
        return labels, class_names or [str(label) for label in range(int(labels.max(initial=0)) + 1)], column

    def _load(self, work_folder: pathlib.Path) -> "datasets.Dataset":
        import datasets

        generation_error = datasets.exceptions.DatasetGenerationError
        try:
            if not any((self._folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                # Copies of local files are for this run only; downloads go where the user keeps those of the Hub.
                name, cache = (self._folder, work_folder / "datasets") if self._is_local else (self._input, None)
                return datasets.load_dataset(str(name), self._configuration, split=self.split, cache_dir=cache)
            loaded = datasets.load_from_disk(str(self._folder), keep_in_memory=False)
        except (OSError, ValueError, generation_error) as error:
            # datasets says only that generating failed; why is in the error before it
            reason = (error.__cause__ if isinstance(error, generation_error) else None) or error
            message = " ".join(str(reason).split()) or type(reason).__name__
            raise DataError(f"--input {self._input} --split {self.split}: cannot be loaded ({message})") from error
        if not isinstance(loaded, datasets.DatasetDict):
            loaded = {str(loaded.split or self.split): loaded}
        if self.split not in loaded:
            splits = ", ".join(loaded) + perhaps(self.split, loaded)
            raise DataError(f"--split {self.split}: {self._input} has the splits {splits}")
        return loaded[self.split]

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
            conversion = (self.resolution, self.resize_filter, self.color_mode)
            return decode_image(stored, f"{self._input} image {number}", *conversion)

        images_at_once = min(256, max(1, (16 << 20) // self.resolution**2))
        # Threads: the decoders of Pillow run without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), images_at_once):
                stored = images[start : start + images_at_once][images.column_names[0]]
                yield np.stack(list(pool.map(decode, stored, itertools.count(start))))


def _folder_of_classes(folder: pathlib.Path, split: str) -> pathlib.Path:
    if not folder.is_dir():
        raise DataError(f"--input {folder}: no such folder")
    for name in (split, {"validation": "val"}.get(split, split)):
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

    paths = [
        path
        for path in _files_under(folder)
        if path.suffix.lower() in ImageFolder.EXTENSIONS
        and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    ]
    if not paths:
        raise DataError(f"--input {folder}: there are no folders of images in it, one for each class")
    if loose := [path.name for path in paths if path.parent == folder]:
        raise DataError(f"--input {folder}: {loose[0]} lies outside of the class folders, so it has no class")
    labels = [path.parent.name for path in paths]
    names = datasets.ClassLabel(names=sorted(set(labels)))
    features = datasets.Features(image=datasets.Image(decode=False), label=names)
    return datasets.Dataset.from_dict({"image": list(map(str, paths)), "label": labels}, features=features)


def _files_under(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists all files under a folder, also behind links, in the order of their names."""
    files = (pathlib.Path(place, name) for place, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted((file for file in files if file.is_file()), key=str)
