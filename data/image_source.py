"""Ordinary pictures: a folder with one subfolder a class, or any image dataset that the datasets library opens."""

import concurrent.futures
import io
import os
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..utils.nearest_names import perhaps
from .errors import DataError
from .sources import ImageBlock, ImageStream


if TYPE_CHECKING:
    import datasets


RESIZE_FILTERS = {
    "box": PIL.Image.Resampling.BOX,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}

_IMAGES_AT_ONCE = 256


def convert_image(
    image: PIL.Image.Image, resolution: int, resize_filter: str = "box", color_mode: str = "rgb"
) -> np.ndarray:
    """Makes a square picture of one size and colour mode out of any image.

    The image is turned the way its EXIF orientation says, laid on white where it is transparent, cut to the largest
    square in its middle and resampled. An image that already has the right size keeps its values.

    Args:
        image: any image.
        resolution: height and width of the result in pixels.
        resize_filter: one of RESIZE_FILTERS; the published ImageNet-64 was made with "box".
        color_mode: "rgb" or "grayscale".

    Returns:
        uint8 (channels, resolution, resolution), with 3 channels or 1.

    Raises:
        ValueError: the image holds floating-point or 32-bit values, whose range nobody knows.
    """
    image = convert_colors(image, color_mode)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    if image.size != (resolution, resolution):
        square = (left, top, left + side, top + side)
        image = image.resize((resolution, resolution), RESIZE_FILTERS[resize_filter], box=square)
    return to_planes(image)


def convert_colors(image: PIL.Image.Image, color_mode: str = "rgb") -> PIL.Image.Image:
    """Makes an 8-bit image of one colour mode out of any image, turned as its EXIF orientation says.

    Args:
        image: any image; it is laid on white where it is transparent.
        color_mode: "rgb" or "grayscale".

    Raises:
        ValueError: the image holds floating-point or 32-bit values, whose range nobody knows.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, which have no defined range; store the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        # 16-bit greys; converting them directly would clip everything above 255 to white
        greys = np.asarray(image, np.int64)
        if greys.min() < 0 or greys.max() > 65535:
            raise ValueError("32-bit pixels, which have no defined range; store the image with 8 or 16 bits")
        image = PIL.Image.fromarray((greys // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image)
    return image.convert("L" if color_mode == "grayscale" else "RGB")


def to_planes(image: PIL.Image.Image) -> np.ndarray:
    """Gives the pixels of an 8-bit image as uint8 (channels, height, width)."""
    return np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)


def decode_image(
    stored: dict[str, Any] | None, name: str, convert: Callable[[PIL.Image.Image], np.ndarray]
) -> np.ndarray:
    """Decodes an image and converts it.

    Args:
        stored: what datasets stores of an image: "bytes", its file's content, or else "path", its file; None when
            there is none.
        name: what errors call it where there is no path.
        convert: what makes pixels of it.

    Raises:
        DataError: it is missing, broken, or of a kind that ``convert`` refuses with a ValueError.
    """
    if stored is None:
        raise DataError(f"{name} is missing")
    name = str(stored["path"] or name)
    try:
        encoded = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        with PIL.Image.open(encoded) as image:
            return convert(image)
    # Pillow's decoders raise all of these for broken files
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a readable image ({error})") from error


class LoadedImages(NamedTuple):
    """An opened dataset of images.

    Attributes:
        images: its only column holds images that are not decoded, as `decode_image` takes them.
        labels: int64 (images,), or None.
        class_names: the name of each class, where there are labels.
        label_column: where the labels were found.
    """

    images: "datasets.Dataset"
    labels: np.ndarray | None
    class_names: list[str] | None
    label_column: str | None


class ImageDatasetSource:
    """Images of a class-folder tree or of a dataset.

    Args:
        kind: "imagefolder" for a folder whose subfolders are the classes (or hold them, in a subfolder named like the
            split); "dataset" for a dataset of the Hub, a folder of datasets.save_to_disk, or local files that
            datasets.load_dataset reads.
        inputs: the folder or the Hub id; for a dataset with several configurations, its name as a second value.
        split: the split to read.
        resolution: height and width of the prepared images in pixels.
        resize_filter: one of RESIZE_FILTERS.
        color_mode: "rgb" or "grayscale".
        image_column: the column of images; None to find it by its type.
        label_column: the column of labels; None to find it by its type.

    Raises:
        DataError: the inputs do not exist or are too many.
    """

    def __init__(
        self,
        kind: Literal["imagefolder", "dataset"],
        inputs: Sequence[str],
        split: str = "train",
        resolution: int = 64,
        resize_filter: str = "box",
        color_mode: str = "rgb",
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        most = 1 if kind == "imagefolder" else 2
        if not 1 <= len(inputs) <= most:
            wanted = "a folder of class folders" if most == 1 else "a dataset id or folder (and a configuration)"
            raise DataError(f"--input has {len(inputs)} values, but --source {kind} takes {wanted}")
        self._kind = kind
        self._input, self._configuration = inputs[0], (inputs[1] if len(inputs) == 2 else None)
        self._folder = pathlib.Path(inputs[0]).expanduser()
        self._is_local = self._folder.exists()
        self._split = split
        self._convert = (resolution, resize_filter, color_mode)
        self._image_column, self._label_column = image_column, label_column
        if kind == "imagefolder":
            self._folder = _folder_of_classes(self._folder, split)
        self.description: dict[str, Any] = {
            "kind": kind,
            "input": self._folder.absolute().name if self._is_local else self._input,
            "configuration": self._configuration,
            "split": split,
            "resolution": resolution,
            "resize_filter": resize_filter,
            "color_mode": color_mode,
            "image_column": image_column,
            "label_column": label_column,
        }
        if self._is_local:
            self.description["files"], self.description["bytes"] = _count_files(self._folder)
        what = "class folders" if kind == "imagefolder" else "dataset"
        self.summary = f"{what} {self._folder if self._is_local else self._input} ({split})"
        self.warnings: list[str] = []

    def open(self, work_folder: pathlib.Path) -> ImageStream:
        """Loads the dataset and finds its columns.

        Args:
            work_folder: an existing folder; what datasets stores of local files goes there.

        Raises:
            DataError: the dataset cannot be loaded or has no images with labels.
        """
        # with labels, unless load raises
        loaded = self.load(work_folder)
        resolution, _, color_mode = self._convert
        return ImageStream(
            class_names=cast(list[str], loaded.class_names),
            image_size=(1 if color_mode == "grayscale" else 3, resolution, resolution),
            num_images=len(loaded.images),
            blocks=self._blocks(loaded.images, cast(np.ndarray, loaded.labels)),
            details={"image_column": loaded.images.column_names[0], "label_column": loaded.label_column},
        )

    def load(self, work_folder: pathlib.Path, needs_labels: bool = True) -> LoadedImages:
        """Loads the dataset and finds its columns, for reading in any order.

        Args:
            work_folder: as for `open`.
            needs_labels: whether images without labels are an error. If not, the labels are None where nobody has
                named their column and there is none, more than one, or one that is not whole.

        Raises:
            DataError: as for `open`.
        """
        import datasets

        dataset = self._load(work_folder / "datasets")
        image_column = self._find_images(dataset.features)
        labels = class_names = label_column = None
        try:
            label_column, class_names = self._find_labels(dataset.features)
            labels = _checked_labels(dataset, label_column, class_names, self.summary)
            if class_names is None:
                class_names = [str(label) for label in range(int(labels.max(initial=0)) + 1)]
        except DataError:
            if needs_labels or self._label_column is not None:
                raise
            class_names = label_column = None
        # Not decoded by datasets: a broken image must be named, and decoding is shared among threads here.
        images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        return LoadedImages(images, labels, class_names, label_column)

    def _load(self, cache_folder: pathlib.Path) -> "datasets.Dataset":
        import datasets

        # Copies of local files are for this run only; downloads go where the user keeps those of the Hub.
        cache_dir = str(cache_folder) if self._is_local else None
        try:
            if self._kind == "imagefolder":
                return datasets.load_dataset(
                    "imagefolder",
                    # named by hand: left alone, datasets takes class folders called "test" or "train" for splits
                    data_files={self._split: f"{_escape_glob(str(self._folder.absolute()))}/**"},
                    split=self._split,
                    drop_labels=False,
                    drop_metadata=True,
                    cache_dir=cache_dir,
                )
            if self._is_local and any((self._folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                return self._choose_split(datasets.load_from_disk(str(self._folder), keep_in_memory=False))
            return datasets.load_dataset(
                str(self._folder) if self._is_local else self._input,
                self._configuration,
                split=self._split,
                cache_dir=cache_dir,
            )
        except DataError:
            raise
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            # datasets says only that generating failed; why is in the error before it
            reason = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
            reason = reason or error
            message = " ".join(str(reason).split()) or type(reason).__name__
            raise DataError(f"--input {self._input} --split {self._split}: cannot be loaded ({message})") from error

    def _choose_split(self, loaded: "datasets.Dataset | datasets.DatasetDict") -> "datasets.Dataset":
        import datasets

        if isinstance(loaded, datasets.DatasetDict):
            if self._split not in loaded:
                splits = ", ".join(loaded) + perhaps(self._split, loaded)
                raise DataError(f"--split {self._split}: {self._input} has the splits {splits}")
            return loaded[self._split]
        if loaded.split is not None and str(loaded.split) != self._split:
            raise DataError(f"--split {self._split}: {self._input} is the split {loaded.split}")
        return loaded

    def _find_images(self, features: "datasets.Features") -> str:
        import datasets

        image_column = self._column(features, "image", self._image_column, (datasets.Image,))
        feature = features[image_column]
        if not (isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "string")):
            raise DataError(f"--image_column {image_column}: its type is {feature}, which is no image")
        return image_column

    def _find_labels(self, features: "datasets.Features") -> tuple[str, list[str] | None]:
        import datasets

        label_column = self._column(features, "label", self._label_column, (datasets.ClassLabel,))
        feature = features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            return label_column, list(feature.names)
        if "int" not in str(getattr(feature, "dtype", None)):
            raise DataError(
                f"--label_column {label_column}: its type is {feature}, but labels are classes or integers"
            )
        return label_column, None

    def _column(self, features: "datasets.Features", role: str, named: str | None, types: tuple[type, ...]) -> str:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        if named is not None:
            if named not in features:
                near = perhaps(named, features)
                raise DataError(f"--{role}_column {named}: {self._input} has the columns {columns}{near}")
            return named
        found = [name for name, feature in features.items() if isinstance(feature, types)]
        if len(found) != 1:
            # integers called "label" are labels, whether or not the classes have names
            if not found and role == "label" and "label" in features:
                return "label"
            state = "several columns" if found else "no column"
            raise DataError(
                f"{self._input} has {state} of the type {types[0].__name__}; name the {role} column with "
                f"--{role}_column. It has {columns}"
            )
        return found[0]

    def _blocks(self, images: "datasets.Dataset", labels: np.ndarray) -> Generator[ImageBlock, None, None]:
        image_column = images.column_names[0]
        # Threads: the decoders of Pillow run without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), _IMAGES_AT_ONCE):
                stored = images[start : start + _IMAGES_AT_ONCE][image_column]
                positions = range(start, start + len(stored))
                pixels = list(pool.map(self._decode, stored, positions))
                yield ImageBlock(np.stack(pixels), labels[start : start + len(stored)])

    def _decode(self, stored: dict[str, Any] | None, position: int) -> np.ndarray:
        return decode_image(
            stored, f"{self._input} image {position}", lambda image: convert_image(image, *self._convert)
        )


def _folder_of_classes(folder: pathlib.Path, split: str) -> pathlib.Path:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if not folder.is_dir():
        raise DataError(f"--input {folder}: no such folder")
    for name in dict.fromkeys([split, {"validation": "val"}.get(split, split)]):
        # a split holds class folders; a class that happens to be called "train" holds images
        if (folder / name).is_dir() and any(child.is_dir() for child in (folder / name).iterdir()):
            folder = folder / name
            break
    else:
        if split != "train":
            raise DataError(f"--split {split}: {folder} has no folder {split} that holds class folders")
    loose = next((path for path in folder.iterdir() if path.is_file() and _is_image(path, ImageFolder)), None)
    if loose is not None:
        raise DataError(f"--input {folder}: {loose.name} lies outside of the class folders, so it has no class")
    return folder


def _is_image(path: pathlib.Path, builder: Any) -> bool:
    return path.suffix.lower() in builder.EXTENSIONS


def _escape_glob(path: str) -> str:
    return "".join(f"[{character}]" if character in "*?[" else character for character in path)


def _count_files(path: pathlib.Path) -> tuple[int, int]:
    """Returns number and bytes of all files at or under a path."""
    if path.is_file():
        return 1, path.stat().st_size
    count = total = 0
    folders = [path]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(pathlib.Path(entry.path))
                elif entry.is_file():
                    count += 1
                    total += entry.stat().st_size
    return count, total


def _checked_labels(
    dataset: "datasets.Dataset", column: str, class_names: list[str] | None, summary: str
) -> np.ndarray:
    labels = np.asarray(dataset.select_columns([column]).with_format("numpy")[:][column])
    # a missing label turns the integers into NaN or objects
    if len(labels) and labels.dtype.kind not in "iu":
        raise DataError(f'{summary}: some images have no "{column}"')
    wrong = np.flatnonzero((labels < 0) | (labels >= (len(class_names) if class_names else np.iinfo(np.int32).max)))
    if len(wrong):
        raise DataError(
            f'{summary}: image {wrong[0]} has the "{column}" {labels[wrong[0]]}, but labels go from 0 '
            + (f"to {len(class_names) - 1}" if class_names else "up")
            + (" (-1 marks a split without labels)" if labels[wrong[0]] == -1 else "")
        )
    return labels.astype(np.int64)
