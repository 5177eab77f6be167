"""Images of any number of channels from .npz files; what is read is compared with numpy's own reading."""

import io
import pathlib
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.npz_source import NpzSource
from imagenet64_diffusion.data.preparation import write_prepared

from .conftest import read_all, refused


def make(num_images=50, height=6, width=6, channels=5, num_classes=7, seed=0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, height, width, channels), dtype=np.uint8)
    labels = generator.permutation(np.arange(num_images) % num_classes)
    return images, labels


def assert_reads(source: NpzSource, work_folder: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> list[str]:
    pixels, found, stream = read_all(source, work_folder)
    np.testing.assert_array_equal(pixels, np.moveaxis(images, -1, 1))
    np.testing.assert_array_equal(found, labels)
    return stream.class_names


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 64])
def test_every_number_of_channels(tmp_path, save, channels, monkeypatch):
    # some images to a block, so that blocks have to be joined
    monkeypatch.setattr("imagenet64_diffusion.data.stored_arrays._BLOCK_BYTES", 64 * 80 * channels)
    # flat images of many channels would look like planes one after the other
    for height, width in ((80, 64),) if channels == 64 else ((8, 8), (8, 24)):
        images, labels = make(20, height, width, channels)
        save(tmp_path / "images.npz", images, labels)
        class_names = assert_reads(NpzSource([tmp_path / "images.npz"]), tmp_path, images, labels)
        assert class_names == [str(label) for label in range(7)]


def test_named_arrays_and_names_of_classes(tmp_path):
    images, labels = make(channels=4, num_classes=3)
    path = tmp_path / "images.npz"
    names = ["Katze, die", "犬", "🐭"]
    for dtype in ("u1", "<i2", ">u4", ">i8", "u8"):
        for text in (np.array(names), np.array(names).astype(">U20")):
            np.savez(path, notes=np.zeros(3), labels=labels.astype(dtype), images=images, class_names=text)
            source = NpzSource([path])
            assert assert_reads(source, tmp_path, images, labels) == names
            assert list(source.warnings) == []
    # without labels there is one class
    for arrays, name in (({}, "image"), ({"class_names": np.array(["cell"])}, "cell")):
        np.savez(path, images, **arrays)
        source = NpzSource([path])
        assert assert_reads(source, tmp_path, images, np.zeros(50)) == [name]
        (warning,) = source.warnings
        assert 'images.npz has no array "labels" or "arr_1": all images are of one class' in warning
    assert "50 images, 1 class, 6x6 4-channel" in write_prepared(tmp_path / "out", source).summary()


def test_files_in_the_order_given_and_folders_in_natural_order(tmp_path):
    parts = {number: make(num_images=number + 3, seed=number) for number in (1, 2, 10)}
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, (images, labels) in parts.items():
        np.savez(folder / f"part{number}.npz", images, labels)
    (folder / "notes.txt").write_text("not images")
    (folder / "._part1.npz").write_bytes(b"what macOS leaves")
    for inputs, order in [([folder], (1, 2, 10)), ([folder / "part10.npz", folder / "part1.npz"], (10, 1))]:
        images, labels = (np.concatenate([parts[number][item] for number in order]) for item in (0, 1))
        source = NpzSource(inputs)
        assert_reads(source, tmp_path, images, labels)
        assert [file["file"] for file in source.description["files"]] == [f"part{number}.npz" for number in order]


def test_equal_descriptions_mean_equal_images_however_they_came(tmp_path):
    images, labels = make(num_images=90)
    one, first, second = (tmp_path / f"{name}.npz" for name in ("one", "first", "second"))
    np.savez(one, images, labels)
    before = NpzSource([one]).description
    np.savez_compressed(first, images=images[:31], labels=labels[:31].astype(np.uint8))
    np.savez(second, images=images[31:], labels=labels[31:])
    whole, joined = (
        write_prepared(tmp_path / f"{len(paths)}", NpzSource(paths)) for paths in ([one], [first, second])
    )
    assert joined.fingerprint == whole.fingerprint
    np.savez(one, images, labels)
    assert NpzSource([one]).description == before
    # the same bytes of file, one pixel of another value
    images[20, 1, 1, 1] ^= 1
    np.savez(one, images, labels)
    assert NpzSource([one]).description != before


IMAGES, LABELS = make()
PLANES = np.moveaxis(make(height=16, width=16, channels=3)[0], -1, 1)
NAMES = [f"c{number}" for number in range(40)]


@pytest.mark.parametrize(
    ("message", "arrays"),
    [
        ('no array "images" or "arr_0": .*read with --source imagenet64', {"data": LABELS, "labels": LABELS}),
        ('no array "images" or "arr_0": it holds "pictures"$', {"pictures": IMAGES}),
        ('has both "images" and "arr_0"', {"images": IMAGES, "arr_0": LABELS}),
        ('array "images" is float64 of shape .* instead of uint8', {"images": IMAGES / 255.0}),
        ('array "images" is object of shape', {"images": IMAGES.astype(object)}),
        ('array "images" is uint16 of shape', {"images": IMAGES.astype(np.uint16)}),
        (r"shape \(50, 6, 6\) instead of", {"images": IMAGES[..., 0]}),
        (r"shape \(0, 6, 6, 5\) instead of uint8", {"images": IMAGES[:0], "labels": LABELS[:0]}),
        (r"\(50, 3, 16, 16\), which looks like \(images, channels, height, width\).*moveaxis", {"images": PLANES}),
        (r"\(50, 3, 16, 12\), which looks like", {"images": PLANES[:, :, :, :12]}),
        ("1 to 64 channels", {"images": make(2, 80, 80, 65)[0]}),
        ("in Fortran order", {"images": np.asfortranarray(IMAGES)}),
        (r'"labels" is int64 of shape \(49,\) instead of 50 integers', {"images": IMAGES, "labels": LABELS[:-1]}),
        ('"labels" is float64 .* instead of 50 integers', {"images": IMAGES, "labels": LABELS * 1.0}),
        ('"labels" is bool', {"images": IMAGES, "labels": LABELS > 0}),
        (r"of shape \(50, 1\) instead of 50 integers", {"images": IMAGES, "labels": LABELS[:, None]}),
        ('"arr_1" is <U3 of shape .* instead of 50 integers', {"arr_0": IMAGES, "arr_1": np.array(["cat"] * 50)}),
        ("the label -1 for image 9, but", {"images": IMAGES, "labels": np.where(np.arange(50) == 9, -1, 0)}),
        ("4294967295 for image 0, .* 0 to 65535", {"images": IMAGES, "labels": np.full(50, -1).astype(np.uint32)}),
        ("the label 40 for .* go from 0 to 39", {"images": IMAGES, "labels": np.arange(50), "class_names": NAMES}),
        ('has 2 class_names, but no array "labels"', {"images": IMAGES, "class_names": NAMES[:2]}),
        ('array "class_names" is object of shape', {"images": IMAGES, "class_names": np.array(["a"], object)}),
        (r'"class_names" is \|S3 of shape \(1,\) instead', {"images": IMAGES, "class_names": np.array([b"cat"])}),
        (r'"class_names" is <U3 of shape \(\) instead of', {"images": IMAGES, "class_names": np.array("cat")}),
        ("every class needs a name", {"images": IMAGES, "class_names": np.array([], "U1")}),
        ("every class needs a name", {"images": IMAGES, "class_names": np.array(["a", "", "c"])}),
        ("a name of its own", {"images": IMAGES, "labels": LABELS % 2, "class_names": np.array(["a", "a"])}),
        ("cannot be read", {"images": IMAGES, "class_names": np.array(["\ud800"])}),
        ("cannot be read", {"images": IMAGES, "class_names": np.array([0x7FFFFFFF], "<u4").view("<U1")}),
    ],
)
def test_wrong_arrays(tmp_path, message, arrays):
    np.savez(tmp_path / "wrong.npz", **arrays)
    refused(rf"wrong\.npz.*{message}", NpzSource, [tmp_path / "wrong.npz"])


def test_wrong_inputs(tmp_path):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "images.npz"
    np.savez(path, *make())
    np.save(tmp_path / "images.npy", make()[0])
    for inputs, split, message in [
        ([], "train", "--input is missing"),
        ([tmp_path / "nowhere.npz"], "train", r"--input .*nowhere\.npz: no such file or folder"),
        ([tmp_path / "empty"], "train", "the folder holds no .npz file"),
        ([path], "test", r"--split test: \.npz files have only the split train"),
        ([path, tmp_path], "train", r"--input names .*images\.npz twice"),
        ([tmp_path / "images.npy"], "train", r"images\.npy: a \.npy file is one array; .*numpy\.savez"),
    ]:
        refused(message, NpzSource, inputs, split)


def test_files_that_do_not_belong_together(tmp_path):
    whole = {"images": IMAGES, "labels": LABELS, "class_names": np.array(list("abcdefg"))}
    np.savez(tmp_path / "one.npz", **whole)
    for arrays, message in [
        (whole | {"images": make(width=8)[0]}, r"images of .* \(6, 8, 5\), but .*one\.npz has \(6, 6, 5\)"),
        ({"images": IMAGES, "class_names": np.array(["a"])}, r"class_names \['a'\], but .*one\.npz has"),
        ({"images": IMAGES, "labels": LABELS}, r"class_names None, but .*one\.npz"),
    ]:
        np.savez(tmp_path / "two.npz", **arrays)
        refused(rf"two\.npz has {message}", NpzSource, [tmp_path])


def test_damaged_members(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pixels, header = members["images.npy"], members["images.npy"][:128]

    def write(changed: dict[str, bytes]) -> NpzSource:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | changed).items():
                archive.writestr(name, content)
        return NpzSource([path])

    for name, content in [
        ("images", pixels + b"1"),
        ("labels", members["labels.npy"][:-1]),
        ("images", b""),
        ("images", pixels[:60]),
        ("images", pixels.replace(b"(50, 6", b"(-50,6")),
        ("images", pixels.replace(b"(50, 6", b"(10**9,")),
        ("images", header.replace(b"}", b"(")),
        ("images", header.replace(b"'descr'", b"__import")),
    ]:
        with pytest.raises(DataError, match=rf'images\.npz array "{name}" cannot be read'):
            write({f"{name}.npy": content})
    version_2 = io.BytesIO()
    np.lib.format.write_array(version_2, IMAGES, version=(2, 0))
    assert_reads(write({"images.npy": version_2.getvalue()}), tmp_path, IMAGES, LABELS)
