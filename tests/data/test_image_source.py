import pathlib

import datasets
import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.image_source import ImageDatasetSource, convert_image


def read_all(source: ImageDatasetSource, work_folder: pathlib.Path):
    work_folder.mkdir(exist_ok=True)
    stream = source.open(work_folder)
    blocks = list(stream.blocks)
    pixels = np.concatenate([block.pixels for block in blocks])
    assert pixels.shape == (stream.num_images, *stream.image_size)
    assert pixels.dtype == np.uint8
    return stream, pixels, np.concatenate([block.labels for block in blocks])


def noise(size, mode="RGB", seed=0) -> PIL.Image.Image:
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture
def class_folders(tmp_path) -> pathlib.Path:
    """Two classes with the names of splits, in a folder whose name is a glob pattern."""
    folder = tmp_path / "images [v2]*"
    for label in ("cat", "test"):
        (folder / label).mkdir(parents=True)
        for index in range(3):
            noise((64, 64), seed=index + 10 * len(label)).save(folder / label / f"{index}.png")
    return folder


def test_an_image_of_the_right_size_keeps_its_values():
    image = noise((64, 64))
    np.testing.assert_array_equal(convert_image(image, 64), np.asarray(image).transpose(2, 0, 1))


def test_box_means_and_the_middle_square():
    image = noise((40, 16))
    values = np.asarray(image)[:, 12:28].reshape(8, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    # Pillow rounds after the rows and again after the columns
    np.testing.assert_allclose(convert_image(image, 8), values, atol=1)
    assert convert_image(image, 8, "lanczos").tolist() != convert_image(image, 8).tolist()
    upright = image.transpose(PIL.Image.Transpose.TRANSPOSE)
    turned = convert_image(image, 8).transpose(0, 2, 1).astype(int)
    np.testing.assert_allclose(convert_image(upright, 8).astype(int), turned, atol=1)


def test_colour_modes():
    plain = convert_image(noise((16, 16)), 16)
    palette = PIL.Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    np.testing.assert_array_equal(convert_image(palette, 16)[:, 0, 0], [255, 0, 0])
    palette.info["transparency"] = 1
    np.testing.assert_array_equal(convert_image(palette, 16)[:, 0, 0], [255, 255, 255])
    with_alpha = noise((16, 16)).convert("RGBA")
    np.testing.assert_array_equal(convert_image(with_alpha, 16), plain)
    # the colours of transparent pixels, often garbage, do not show
    with_alpha.putalpha(0)
    assert (convert_image(with_alpha, 16) == 255).all()
    grey = noise((16, 16), "L")
    np.testing.assert_array_equal(convert_image(grey, 16), np.repeat(np.asarray(grey)[None], 3, 0))
    np.testing.assert_array_equal(convert_image(grey, 16, color_mode="grayscale"), np.asarray(grey)[None])
    assert convert_image(noise((16, 16)), 16, color_mode="grayscale").shape == (1, 16, 16)
    deep = PIL.Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    np.testing.assert_array_equal(convert_image(deep, 16, color_mode="grayscale"), np.asarray(grey)[None])
    assert convert_image(noise((16, 16), "CMYK"), 16).shape == (3, 16, 16)
    assert convert_image(PIL.Image.new("1", (16, 16), 1), 16).min() == 255
    with pytest.raises(ValueError, match="32-bit"):
        convert_image(PIL.Image.new("I", (16, 16), 100_000), 16)
    with pytest.raises(ValueError, match="floating-point"):
        convert_image(PIL.Image.new("F", (16, 16)), 16)


def test_exif_orientation(tmp_path):
    image = noise((16, 16))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    with PIL.Image.open(tmp_path / "turned.png") as turned:
        np.testing.assert_array_equal(convert_image(turned, 16), np.rot90(np.asarray(image), -1).transpose(2, 0, 1))


def test_class_folders(class_folders, tmp_path):
    source = ImageDatasetSource("imagefolder", [str(class_folders)])
    stream, pixels, labels = read_all(source, tmp_path / "work")
    assert stream.class_names == ["cat", "test"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    for position, (name, index) in enumerate((name, index) for name in ("cat", "test") for index in range(3)):
        with PIL.Image.open(class_folders / name / f"{index}.png") as image:
            np.testing.assert_array_equal(pixels[position], np.asarray(image).transpose(2, 0, 1))
    assert source.description["files"] == 6
    assert source.description["input"] == "images [v2]*"


def test_class_folders_of_many_kinds_of_image(tmp_path):
    for name, image in {
        "a/palette.gif": noise((30, 20)).convert("P"),
        "a/alpha.png": noise((20, 30), "RGBA"),
        "b/large.jpg": noise((200, 100)),
        "b/tiny.bmp": noise((3, 3)),
        "b/grey.webp": noise((64, 64), "L"),
    }.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train" / name)
    source = ImageDatasetSource("imagefolder", [str(tmp_path)], resolution=32)
    stream, pixels, labels = read_all(source, tmp_path / "work")
    assert stream.image_size == (3, 32, 32)
    assert labels.tolist() == [0, 0, 1, 1, 1]
    for path, row in zip(sorted((tmp_path / "train").glob("*/*")), pixels, strict=True):
        with PIL.Image.open(path) as image:
            np.testing.assert_array_equal(row, convert_image(image, 32))


def test_splits_of_class_folders(class_folders, tmp_path):
    split = tmp_path / "both"
    (split / "val").mkdir(parents=True)
    class_folders.rename(split / "train")
    (split / "train" / "cat").rename(split / "val" / "cat")
    assert read_all(ImageDatasetSource("imagefolder", [str(split)]), tmp_path / "w")[0].class_names == ["test"]
    source = ImageDatasetSource("imagefolder", [str(split)], "validation")
    assert read_all(source, tmp_path / "w")[0].class_names == ["cat"]
    with pytest.raises(DataError, match="no folder test that holds class folders"):
        ImageDatasetSource("imagefolder", [str(split)], "test")


def test_wrong_folders(class_folders, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        ImageDatasetSource("imagefolder", [str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="--input has 2 values"):
        ImageDatasetSource("imagefolder", ["a", "b"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: there are no folders of images"):
        read_all(ImageDatasetSource("imagefolder", [str(tmp_path / "empty")]), tmp_path / "work")
    noise((8, 8)).save(class_folders / "loose.png")
    with pytest.raises(DataError, match=r"loose\.png lies outside"):
        read_all(ImageDatasetSource("imagefolder", [str(class_folders)]), tmp_path / "work")
    (class_folders / "loose.png").unlink()
    broken = class_folders / "cat" / "1.png"
    for content in (broken.read_bytes()[:200], b"", b"<html>"):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"cat/1\.png is not a readable image"):
            read_all(ImageDatasetSource("imagefolder", [str(class_folders)]), tmp_path / "work")


def image_dataset(label_feature, labels, split=None, **columns) -> datasets.Dataset:
    features = {"picture": datasets.Image(), "animal": label_feature}
    features |= {name: datasets.Value("int64") for name in columns}
    content = {"picture": [noise((64, 64), seed=i) for i in range(len(labels))], "animal": labels, **columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features), split=split)


def test_saved_dataset_and_dict(tmp_path):
    saved = image_dataset(datasets.ClassLabel(names=["cat", "dog"]), [1, 0, 1], split="train", number=[5, 6, 7])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "validation": saved.select([2])}).save_to_disk(tmp_path / "two")
    for folder, split, wanted in [
        ("one", "train", [1, 0, 1]),
        ("two", "train", [1, 0, 1]),
        ("two", "validation", [1]),
    ]:
        source = ImageDatasetSource("dataset", [str(tmp_path / folder)], split)
        stream, pixels, labels = read_all(source, tmp_path / "work")
        assert stream.class_names == ["cat", "dog"]
        assert labels.tolist() == wanted
        assert stream.details == {"image_column": "picture", "label_column": "animal"}
        np.testing.assert_array_equal(pixels[-1], np.asarray(noise((64, 64), seed=2)).transpose(2, 0, 1))
    for folder, message in [("one", "is the split train"), ("two", "has the splits train, validation")]:
        with pytest.raises(DataError, match=f"--split test: .*{message}"):
            read_all(ImageDatasetSource("dataset", [str(tmp_path / folder)], "test"), tmp_path / "work")


def test_parquet_files_and_integer_labels(tmp_path):
    (tmp_path / "set").mkdir()
    image_dataset(datasets.Value("int32"), [3, 0, 1]).to_parquet(tmp_path / "set" / "train.parquet")
    source = ImageDatasetSource("dataset", [str(tmp_path / "set")], color_mode="grayscale", label_column="animal")
    stream, pixels, labels = read_all(source, tmp_path / "work")
    assert stream.class_names == ["0", "1", "2", "3"]
    assert labels.tolist() == [3, 0, 1]
    assert pixels.shape == (3, 1, 64, 64)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (lambda: image_dataset(datasets.Value("int64"), [1]), {}, "has no column of the type ClassLabel"),
        (
            lambda: image_dataset(datasets.Value("int64"), [-1]),
            {"label_column": "animal"},
            '"animal" has the label -1 for image 0, but',
        ),
        (
            lambda: image_dataset(datasets.Value("int64"), [1, None]),
            {"label_column": "animal"},
            '"animal" is .* instead of 2 integers',
        ),
        (lambda: image_dataset(datasets.Value("int64"), [2**31 - 2]), {"label_column": "animal"}, "from 0 to 65535"),
        (lambda: image_dataset(datasets.ClassLabel(names=["a"]), [-1]), {}, "marks a split without labels"),
        (
            lambda: image_dataset(datasets.Value("string"), ["a"]),
            {"label_column": "animal"},
            "instead of ClassLabel or int",
        ),
        (lambda: image_dataset(datasets.Value("int64"), [1]), {"label_column": "size"}, "has the columns picture"),
        (
            lambda: image_dataset(datasets.Value("int64"), [1]),
            {"image_column": "animal"},
            "no column of|instead of Image",
        ),
        (lambda: datasets.Dataset.from_dict({"label": [1]}), {}, "has no column of the type Image"),
    ],
)
def test_datasets_without_the_needed_columns(tmp_path, dataset, options, message):
    dataset().save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        read_all(ImageDatasetSource("dataset", [str(tmp_path / "set")], **options), tmp_path / "work")


def test_a_broken_image_in_a_dataset_is_numbered(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = {"image": [{"bytes": b"nonsense", "path": None}], "label": [0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="set image 0 is not a readable image"):
        read_all(ImageDatasetSource("dataset", [str(tmp_path / "set")]), tmp_path / "work")
