"""Ordinary images: a folder with one subfolder a class, or any image dataset that the datasets library opens."""

import concurrent.futures
import io
import os
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import PIL.Image
import PIL.ImageOps

from ..utils.nearest_names import perhaps
from .errors import DataError
from .sources import MOST_UNNAMED_CLASSES, ImageBlock, ImageStream, check_labels


if TYPE_CHECKING:
    import datasets


RESIZE_FILTERS = {
    "box": PIL.Image.Resampling.BOX,
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}

# of one channel
_BLOCK_BYTES = 16 << 20


def convert_image(
    image: PIL.Image.Image, resolution: int, resize_filter: str = "box", color_mode: str = "rgb"
) -> np.ndarray:
    """Makes a square image of one size and colour mode out of any image.

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
        kind: str,
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
        self._kind, self._split = kind, split
        self._input, self._configuration = inputs[0], (inputs[1] if len(inputs) == 2 else None)
        self._folder = pathlib.Path(inputs[0]).expanduser()
        self._is_local = self._folder.exists()
        self._convert = (resolution, resize_filter, color_mode)
        self._columns = {"image": image_column, "label": label_column}
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
            sizes = [file.stat().st_size for file in _files_under(self._folder)]
            self.description["files"], self.description["bytes"] = len(sizes), sum(sizes)
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
        image_column = self._column(dataset.features, "image", datasets.Image, ("binary", "string"))
        labels = class_names = label_column = None
        try:
            label_column = self._column(dataset.features, "label", datasets.ClassLabel, ("int", "uint"))
            class_names = getattr(dataset.features[label_column], "names", None)
            stored = np.asarray(dataset.select_columns([label_column]).with_format("numpy")[:][label_column])
            last = (MOST_UNNAMED_CLASSES if class_names is None else len(class_names)) - 1
            # the column of no images at all has no type
            stored = stored if len(stored) else stored.astype(np.int64)
            labels = check_labels(stored, f'{self.summary}: the column "{label_column}"', len(dataset), 0, last)
            class_names = class_names or [str(label) for label in range(int(labels.max(initial=0)) + 1)]
        except DataError:
            if needs_labels or self._columns["label"] is not None:
                raise
            labels = class_names = label_column = None
        # Not decoded by datasets: a broken image must be named, and decoding is shared among threads here.
        images = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        return LoadedImages(images, labels, class_names, label_column)

    def _load(self, cache_folder: pathlib.Path) -> "datasets.Dataset":
        import datasets

        if self._kind == "imagefolder":
            return _load_class_folders(self._folder)
        try:
            if self._is_local and any((self._folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                return self._choose_split(datasets.load_from_disk(str(self._folder), keep_in_memory=False))
            return datasets.load_dataset(
                str(self._folder) if self._is_local else self._input,
                self._configuration,
                split=self._split,
                # Copies of local files are for this run only; downloads go where the user keeps those of the Hub.
                cache_dir=str(cache_folder) if self._is_local else None,
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

    def _column(self, features: "datasets.Features", role: str, kind: type, other_types: tuple[str, ...]) -> str:
        """Finds the column that was named, or the only one of its kind."""
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())
        column = self._columns[role]
        if column is None:
            found = [name for name, feature in features.items() if isinstance(feature, kind)]
            # integers called "label" are labels, whether or not the classes have names
            if not found and role == "label" and "label" in features:
                found = ["label"]
            if len(found) != 1:
                state = "several columns" if found else "no column"
                raise DataError(
                    f"{self._input} has {state} of the type {kind.__name__}; name the {role} column with "
                    f"--{role}_column. It has {columns}"
                )
            column = found[0]
        elif column not in features:
            raise DataError(
                f"--{role}_column {column}: {self._input} has the columns {columns}{perhaps(column, features)}"
            )
        feature = features[column]
        if not isinstance(feature, kind) and not str(getattr(feature, "dtype", "")).startswith(other_types):
            wanted = f"{kind.__name__} or {' or '.join(other_types)}"
            raise DataError(f"--{role}_column {column}: its type is {feature} instead of {wanted}")
        return column

    def _blocks(self, images: "datasets.Dataset", labels: np.ndarray) -> Generator[ImageBlock, None, None]:
        image_column = images.column_names[0]
        images_at_once = min(256, max(1, _BLOCK_BYTES // self._convert[0] ** 2))
        # Threads: the decoders of Pillow run without the interpreter's lock.
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(images), images_at_once):
                stored = images[start : start + images_at_once][image_column]
                positions = range(start, start + len(stored))
                pixels = list(pool.map(self._decode, stored, positions))
                yield ImageBlock(np.stack(pixels), labels[start : start + len(stored)])

    def _decode(self, stored: dict[str, Any] | None, position: int) -> np.ndarray:
        return decode_image(
            stored, f"{self._input} image {position}", lambda image: convert_image(image, *self._convert)
        )


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

    paths: list[str] = []
    labels: list[str] = []
    for path in _files_under(folder):
        parts = path.relative_to(folder).parts
        if path.suffix.lower() in ImageFolder.EXTENSIONS and not any(part.startswith((".", "__")) for part in parts):
            if len(parts) == 1:
                raise DataError(f"--input {folder}: {parts[0]} lies outside of the class folders, so it has no class")
            paths.append(str(path))
            labels.append(parts[-2])
    if not paths:
        raise DataError(f"--input {folder}: there are no folders of images in it, one for each class")
    features = datasets.Features(
        image=datasets.Image(decode=False), label=datasets.ClassLabel(names=sorted(set(labels)))
    )
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _files_under(path: pathlib.Path) -> list[pathlib.Path]:
    """Lists all files at or under a path, in the order of their names."""
    if not path.is_dir():
        return [path]
    folders = os.walk(path, followlinks=True)
    files = (pathlib.Path(folder, name) for folder, _, names in folders for name in names)
    return sorted((file for file in files if file.is_file()), key=str)
