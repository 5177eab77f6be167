import io
import pathlib

import datasets
import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.data.image_source import ImageDatasetSource, convert_image

from .conftest import read_all, refused


def noise(size=(64, 64), mode="RGB", seed=0) -> PIL.Image.Image:
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def planes(image: PIL.Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


@pytest.fixture
def class_folders(tmp_path) -> pathlib.Path:
    """Many kinds of image, of two classes with the names of splits, in a folder whose name is a glob pattern."""
    folder = tmp_path / "images [v2]*"
    for name, image in {
        "cat/0.gif": noise((30, 20)).convert("P"),
        "cat/1.png": noise((20, 30), "RGBA"),
        "test/large.jpg": noise((200, 100)),
        "test/tiny.bmp": noise((3, 3)),
        "test/grey.webp": noise((64, 64), "L"),
        ".hidden/a.png": noise(),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / name)
    return folder


def test_box_means_and_the_middle_square():
    image = noise((40, 16))
    values = np.asarray(image)[:, 12:28].reshape(8, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    # Pillow rounds after the rows and again after the columns
    np.testing.assert_allclose(convert_image(image, 8), values, atol=1)
    assert convert_image(image, 8, "lanczos").tolist() != convert_image(image, 8).tolist()
    upright = image.transpose(PIL.Image.Transpose.TRANSPOSE)
    turned = convert_image(image, 8).transpose(0, 2, 1).astype(int)
    np.testing.assert_allclose(convert_image(upright, 8).astype(int), turned, atol=1)
    # of the right size, or of none
    np.testing.assert_array_equal(convert_image(image, None), planes(image))
    np.testing.assert_array_equal(convert_image(noise(), 64), planes(noise()))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    noise().save(file := io.BytesIO(), "png", exif=exif)
    np.testing.assert_array_equal(convert_image(PIL.Image.open(file), 64), planes(np.rot90(noise(), -1)))


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
    for mode, value in (("I", 100_000), ("I", -1), ("F", 0.5)):
        with pytest.raises(ValueError, match="floating-point or 32-bit"):
            convert_image(PIL.Image.new(mode, (16, 16), value), 16)


def test_class_folders(class_folders, tmp_path):
    source = ImageDatasetSource("imagefolder", [str(class_folders)], resolution=32)
    pixels, labels, stream = read_all(source, tmp_path / "work")
    assert (stream.class_names, stream.image_size) == (["cat", "test"], (3, 32, 32))
    assert labels.tolist() == [0, 0, 1, 1, 1]
    for row, path in zip(pixels, sorted(class_folders.glob("[ct]*/*")), strict=True):
        with PIL.Image.open(path) as image:
            np.testing.assert_array_equal(row, convert_image(image, 32))
    assert (source.description["files"], source.description["input"]) == (6, "images [v2]*")
    # and in folders named like the splits
    split = tmp_path / "both"
    (split / "val").mkdir(parents=True)
    class_folders.rename(split / "train")
    (split / "train" / "cat").rename(split / "val" / "cat")
    for name, found in (("train", ["test"]), ("validation", ["cat"])):
        assert read_all(ImageDatasetSource("imagefolder", [str(split)], name), tmp_path / "w")[2].class_names == found
    refused("no folder test that holds class folders", ImageDatasetSource, "imagefolder", [str(split)], "test")


def test_wrong_folders(class_folders, tmp_path):
    (tmp_path / "empty").mkdir()
    folder, loose, broken = str(class_folders), class_folders / "loose.png", class_folders / "cat" / "1.png"
    for message, inputs, options in [
        ("no such folder", [str(tmp_path / "nowhere")], {}),
        ("--input has 2 values", ["a", "b"], {}),
        ("not for class folders", [folder], {"label_column": "label"}),
        ("empty: there are no folders of images", [str(tmp_path / "empty")], {}),
    ]:
        refused(message, ImageDatasetSource, "imagefolder", inputs, **options)
    noise().save(loose)
    refused(r"loose\.png lies outside", ImageDatasetSource, "imagefolder", [folder])
    loose.unlink()
    for content in (broken.read_bytes()[:200], b"", b"<html>"):
        broken.write_bytes(content)
        refused(r"cat/1\.png is not a readable image", ImageDatasetSource, "imagefolder", [folder])


def image_dataset(label_feature, labels, split=None, **columns) -> datasets.Dataset:
    features = {"picture": datasets.Image(), "animal": label_feature}
    features |= {name: datasets.Value("int64") for name in columns}
    content = {"picture": [noise(seed=i) for i in range(len(labels))], "animal": labels, **columns}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features), split=split)


def test_saved_datasets_dicts_and_parquet_files(tmp_path):
    saved = image_dataset(datasets.ClassLabel(names=["cat", "dog"]), [1, 0, 1], split="train", number=[5, 6, 7])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "validation": saved.select([2])}).save_to_disk(tmp_path / "two")
    for folder, split, wanted in [
        ("one", "train", [1, 0, 1]),
        ("two", "train", [1, 0, 1]),
        ("two", "validation", [1]),
    ]:
        pixels, labels, stream = read_all(
            ImageDatasetSource("dataset", [str(tmp_path / folder)], split), tmp_path / "w"
        )
        assert (stream.class_names, labels.tolist()) == (["cat", "dog"], wanted)
        assert stream.details == {"image_column": "picture", "label_column": "animal"}
        np.testing.assert_array_equal(pixels[-1], planes(noise(seed=2)))
    for folder, splits in [("one", "train"), ("two", "train, validation")]:
        message = f"--split test: .*has the splits {splits}$"
        refused(message, ImageDatasetSource, "dataset", [str(tmp_path / folder)], "test")

    (tmp_path / "set").mkdir()
    image_dataset(datasets.Value("int32"), [3, 0, 1]).to_parquet(tmp_path / "set" / "train.parquet")
    source = ImageDatasetSource("dataset", [str(tmp_path / "set")], color_mode="grayscale", label_column="animal")
    pixels, labels, stream = read_all(source, tmp_path / "w")
    assert (stream.class_names, labels.tolist(), pixels.shape) == (list("0123"), [3, 0, 1], (3, 1, 64, 64))


INTEGER, NAMED = datasets.Value("int64"), {"label_column": "animal"}


@pytest.mark.parametrize(
    ("feature", "labels", "options", "message"),
    [
        (INTEGER, [1], {}, "--label_column must name a column of type ClassLabel or int or uint: .*animal .int64"),
        (INTEGER, [-1], NAMED, '"animal" has the label -1 for image 0, but'),
        (INTEGER, [1, None], NAMED, '"animal" is .* instead of 2 integers'),
        (INTEGER, [2**31 - 2], NAMED, "from 0 to 65535"),
        (datasets.ClassLabel(names=["a"]), [-1], {}, "-1 marks no labels"),
        (datasets.Value("string"), ["a"], NAMED, "--label_column animal: not a column of type ClassLabel or int"),
        (INTEGER, [1], {"label_column": "anmal"}, "--label_column anmal: not .* has picture .*; perhaps animal$"),
        (INTEGER, [1], {"image_column": "animal"}, "--image_column animal: not a column of type Image"),
        (None, [1], {}, "--image_column must name a column of type Image"),
    ],
)
def test_datasets_without_the_needed_columns(tmp_path, feature, labels, options, message):
    dataset = image_dataset(feature, labels) if feature else datasets.Dataset.from_dict({"label": labels})
    dataset.save_to_disk(tmp_path / "set")
    refused(message, ImageDatasetSource, "dataset", [str(tmp_path / "set")], **options)


def test_a_broken_image_in_a_dataset_is_numbered(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    for name, image in (("not a readable", {"bytes": b"nonsense", "path": None}), ("missing", None)):
        folder = str(tmp_path / name)
        datasets.Dataset.from_dict({"image": [image], "label": [0]}, features=features).save_to_disk(folder)
        refused(f"image 0 is {name}", ImageDatasetSource, "dataset", [folder])
