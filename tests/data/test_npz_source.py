"""Images of any number of channels from .npz files; what is read is compared with numpy's own reading."""

import io
import pathlib
import tracemalloc
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data import npz_source
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.npz_source import NpzSource
from imagenet64_diffusion.data.preparation import write_prepared


class Planted:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def make(num_images=50, height=6, width=6, channels=5, num_classes=7, seed=0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (num_images, height, width, channels), dtype=np.uint8)
    labels = generator.permutation(np.arange(num_images) % num_classes)
    return images, labels


def read_all(source: NpzSource, work_folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    stream = source.open(work_folder)
    blocks = list(stream.blocks)
    pixels = np.concatenate([block.pixels for block in blocks])
    labels = np.concatenate([block.labels for block in blocks])
    assert (pixels.dtype, labels.dtype) == (np.uint8, np.int64)
    assert pixels.shape == (stream.num_images, *stream.image_size)
    return pixels, labels, stream.class_names


def assert_reads(source: NpzSource, work_folder: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> list[str]:
    pixels, found, class_names = read_all(source, work_folder)
    np.testing.assert_array_equal(pixels, np.moveaxis(images, -1, 1))
    np.testing.assert_array_equal(found, labels)
    return class_names


def refused(paths: pathlib.Path | list[pathlib.Path], message: str) -> None:
    paths = paths if isinstance(paths, list) else [paths]
    with pytest.raises(DataError, match=message):
        read_all(NpzSource(paths), paths[0].parent)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 64])
def test_every_number_of_channels(tmp_path, save, channels, monkeypatch):
    # some images to a block, so that blocks have to be joined
    monkeypatch.setattr(npz_source, "_BLOCK_BYTES", 64 * 80 * channels)
    path = tmp_path / "images.npz"
    for height, width in ((80, 80), (8, 8), (80, 64), (8, 24)):
        images, labels = make(height=height, width=width, channels=channels)
        if height == 8 and channels == 64:
            # flat images of many channels look like planes one after the other
            continue
        save(path, images, labels)
        class_names = assert_reads(NpzSource([path]), tmp_path, images, labels)
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
            assert source.warnings == []
    np.savez(path, images, labels=labels)
    assert assert_reads(NpzSource([path]), tmp_path, images, labels) == ["0", "1", "2"]


def test_without_labels_there_is_one_class(tmp_path):
    images, _ = make()
    path = tmp_path / "images.npz"
    np.savez(path, images)
    source = NpzSource([path])
    assert assert_reads(source, tmp_path, images, np.zeros(50)) == ["image"]
    (warning,) = source.warnings
    assert 'images.npz has no array "labels" or "arr_1": all images are of one class' in warning
    record = write_prepared(tmp_path / "out", source)
    assert "50 images, 1 class, 6x6 5-channel" in record.summary()
    np.savez(path, images, class_names=np.array(["cell"]))
    assert assert_reads(NpzSource([path]), tmp_path, images, np.zeros(50)) == ["cell"]
    np.savez(path, images, class_names=np.array(["cell", "nucleus"]))
    refused(path, r'images\.npz has 2 class_names, but no array "labels"')


def test_files_in_the_order_given_and_folders_in_natural_order(tmp_path):
    parts = {number: make(num_images=number + 3, seed=number) for number in (1, 2, 10)}
    folder = tmp_path / "parts"
    folder.mkdir()
    for number, (images, labels) in parts.items():
        np.savez(folder / f"part{number}.npz", images, labels)
    (folder / "notes.txt").write_text("not images")
    (folder / "._part1.npz").write_bytes(b"what macOS leaves")
    for inputs, order in [
        ([folder], (1, 2, 10)),
        ([folder / "part10.npz", folder / "part1.npz"], (10, 1)),
    ]:
        images, labels = (np.concatenate([parts[number][item] for number in order]) for item in (0, 1))
        source = NpzSource(inputs)
        assert_reads(source, tmp_path, images, labels)
        assert [file["file"] for file in source.description["files"]] == [f"part{number}.npz" for number in order]
    assert NpzSource([folder]).description != NpzSource([folder / "part1.npz"]).description


def test_equal_descriptions_mean_equal_images(tmp_path):
    images, labels = make()
    path = tmp_path / "images.npz"
    np.savez(path, images, labels)
    before = NpzSource([path]).description
    np.savez(path, images, labels)
    assert NpzSource([path]).description == before
    # the same bytes of file, one pixel of another value
    images[20, 1, 1, 1] ^= 1
    np.savez(path, images, labels)
    assert NpzSource([path]).description != before


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_is_that_of_a_block(tmp_path, save):
    path = tmp_path / "images.npz"
    save(path, np.zeros((6000, 64, 64, 6), np.uint8), np.zeros(6000, np.int64))
    tracemalloc.start()
    num_images = sum(len(block.labels) for block in NpzSource([path]).open(tmp_path).blocks)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_images == 6000
    # the array has 147 MB; a block has 17, which reading a compressed one joins from pieces
    assert peak < 60e6


def test_prepared_files_do_not_depend_on_how_they_came(tmp_path):
    images, labels = make(num_images=90)
    np.savez(tmp_path / "one.npz", images, labels)
    np.savez_compressed(tmp_path / "first.npz", images=images[:31], labels=labels[:31].astype(np.uint8))
    np.savez(tmp_path / "second.npz", images=images[31:], labels=labels[31:])
    one = write_prepared(tmp_path / "one", NpzSource([tmp_path / "one.npz"]))
    two = write_prepared(tmp_path / "two", NpzSource([tmp_path / "first.npz", tmp_path / "second.npz"]))
    assert one.fingerprint == two.fingerprint
    assert (one.channels, one.height, one.width, one.num_images) == (5, 6, 6, 90)
    assert one.images_per_class == np.bincount(labels).tolist()


def test_wrong_inputs(tmp_path):
    for inputs, message in [
        ([], "--input is missing"),
        ([tmp_path / "nowhere.npz"], r"--input .*nowhere\.npz: no such file or folder"),
        ([tmp_path], "the folder holds no .npz file"),
    ]:
        with pytest.raises(DataError, match=message):
            NpzSource(inputs)
    path = tmp_path / "images.npz"
    np.savez(path, *make())
    with pytest.raises(DataError, match=r"--split test: \.npz files have only the split train"):
        NpzSource([path], "test")
    with pytest.raises(DataError, match=r"--input names .*images\.npz twice"):
        NpzSource([path, tmp_path])
    np.save(tmp_path / "images.npy", make()[0])
    refused(tmp_path / "images.npy", r"images\.npy: a \.npy file is one array; .*numpy\.savez")


def wrong_arrays():
    images, labels = make()
    planes = np.moveaxis(make(height=16, width=16, channels=3)[0], -1, 1)
    rows = np.zeros((10, 12288), np.uint8)
    return [
        ({"data": rows, "labels": np.arange(10)}, 'no array "images" or "arr_0": .*read with --source imagenet64'),
        ({"pictures": images}, 'no array "images" or "arr_0": it holds "pictures"$'),
        ({"images": images, "arr_0": labels}, 'has both "images" and "arr_0"'),
        ({"arr_0": images, "arr_1": labels, "labels": labels}, 'has both "labels" and "arr_1"'),
        ({"images": images / 255.0}, 'array "images" is float64 of shape .* instead of uint8'),
        ({"images": images.astype(np.uint16)}, 'array "images" is uint16 of shape'),
        ({"images": rows}, r"shape \(10, 12288\) instead of uint8"),
        ({"images": images[..., 0]}, r"shape \(50, 6, 6\) instead of"),
        ({"images": images[:0], "labels": labels[:0]}, r"shape \(0, 6, 6, 5\) instead of uint8"),
        ({"images": images[..., :0]}, "instead of uint8"),
        ({"images": planes}, r"\(50, 3, 16, 16\), which looks like \(images, channels, height, width\).*moveaxis"),
        ({"images": planes[:, :, :, :12]}, r"\(50, 3, 16, 12\), which looks like"),
        ({"images": make(height=80, width=80, channels=65)[0]}, "1 to 64 channels"),
        ({"images": np.asfortranarray(images)}, "in Fortran order"),
        ({"images": images, "labels": labels[:-1]}, r'"labels" is int64 of shape \(49,\) instead of 50 integers'),
        ({"images": images, "labels": labels * 1.0}, '"labels" is float64 .* instead of 50 integers'),
        ({"images": images, "labels": labels > 0}, '"labels" is bool'),
        ({"images": images, "labels": labels[:, None]}, r"of shape \(50, 1\) instead of 50 integers"),
        ({"arr_0": images, "arr_1": np.array(["cat"] * 50)}, '"arr_1" is <U3 of shape .* instead of 50 integers'),
        (
            {"images": images, "labels": np.where(np.arange(50) == 9, -1, 0)},
            "has the label -1 for image 9, but labels go from 0",
        ),
        (
            {"images": images, "labels": np.full(50, -1).astype(np.uint32)},
            "has the label 4294967295 for image 0, but labels go from 0 to 65535",
        ),
        (
            {"images": images, "labels": np.arange(50), "class_names": np.array([f"c{i}" for i in range(40)])},
            "has the label 40 for image 40, but labels go from 0 to 39",
        ),
        ({"images": images, "class_names": np.array([b"cat"])}, r'"class_names" is \|S3 of shape \(1,\) instead of'),
        ({"images": images, "class_names": np.array("cat")}, r'"class_names" is <U3 of shape \(\) instead of text'),
        ({"images": images, "class_names": np.array([], "U1")}, "every class needs a name"),
        ({"images": images, "class_names": np.array(["a", "", "c"])}, "every class needs a name"),
        ({"images": images, "class_names": np.array([""])}, "every class needs a name"),
        ({"images": images, "class_names": np.array(["\ud800"])}, "cannot be read"),
        (
            {"images": images, "class_names": np.array([0x7FFFFFFF], "<u4").view("<U1")},
            "cannot be read",
        ),
    ]


@pytest.mark.parametrize(("arrays", "message"), wrong_arrays())
def test_wrong_arrays(tmp_path, arrays, message):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    refused(path, rf"wrong\.npz.*{message}")


def test_two_classes_of_one_name(tmp_path):
    images, labels = make(num_classes=2)
    np.savez(tmp_path / "images.npz", images=images, labels=labels, class_names=np.array(["cat", "cat"]))
    with pytest.raises(DataError, match="two classes are called 'cat'"):
        write_prepared(tmp_path / "out", NpzSource([tmp_path / "images.npz"]))


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_objects_are_refused_and_not_unpickled(tmp_path, key):
    marker = tmp_path / "marker"
    images, labels = make()
    arrays = {"images": images, "labels": labels, "class_names": np.array(list("abcdefg"))}
    objects = np.empty(len(arrays[key]), object)
    objects[:] = Planted(marker)
    path = tmp_path / "images.npz"
    np.savez(path, **arrays | {key: objects})
    refused(path, rf'images\.npz array "{key}" holds Python objects, which are stored as a pickle and never read')
    assert not marker.exists()
    np.load(path, allow_pickle=True)[key]
    # or else the test above would show nothing
    assert marker.exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"images": make(channels=4)[0]},
            r"two\.npz has images of height x width 6x6 with 4 channels, but .*one\.npz",
        ),
        ({"images": make(width=8)[0]}, "height x width 6x8 with 5 channels, but .* 6x6 with 5"),
        ({"labels": None}, r"of .*one\.npz and .*two\.npz only one has labels"),
        ({"class_names": None}, r"two\.npz has other class_names than .*one\.npz"),
        ({"class_names": np.array(list("bacdefg"))}, r"two\.npz has other class_names than .*one\.npz"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, arrays, message):
    images, labels = make()
    whole = {"images": images, "labels": labels, "class_names": np.array(list("abcdefg"))}
    np.savez(tmp_path / "one.npz", **whole)
    np.savez(tmp_path / "two.npz", **{key: value for key, value in (whole | arrays).items() if value is not None})
    refused([tmp_path / "one.npz", tmp_path / "two.npz"], message)


def test_damaged_files(tmp_path):
    images, labels = make(height=32, width=32)
    path = tmp_path / "images.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, images=images, labels=labels)
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            refused(path, r"images\.npz.* cannot be read")
        # a flipped byte among the pixels is found by the checksum
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 0xFF
        path.write_bytes(changed)
        refused(path, r"images\.npz.* cannot be read")
    path.write_bytes(b"<!DOCTYPE html>")
    refused(path, r"images\.npz.* cannot be read")


def test_any_damaged_byte_is_a_data_error_or_does_no_harm(tmp_path):
    images, labels = make(num_images=4, num_classes=4)
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=labels, class_names=np.array(["a", "b", "c", "d"]))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        # the directory after the members is left alone: it has the names, and labels of another name are no labels
        members_end = archive.start_dir
    generator = np.random.default_rng(0)
    refusals = []
    for position in generator.permutation(members_end)[:500]:
        changed = bytearray(whole)
        changed[position] ^= generator.integers(1, 256)
        path.write_bytes(changed)
        try:
            pixels, found, class_names = read_all(NpzSource([path]), tmp_path)
        except DataError as error:
            refusals.append(str(error))
        else:
            np.testing.assert_array_equal(pixels, np.moveaxis(images, -1, 1))
            np.testing.assert_array_equal(found, labels)
            assert class_names == ["a", "b", "c", "d"]
    assert len(refusals) > 300
    assert all("images.npz" in refusal for refusal in refusals)


def test_damaged_members(tmp_path):
    images, labels = make()
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=labels)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    version_3 = io.BytesIO()
    np.lib.format.write_array(version_3, images, version=(3, 0))
    pixels, header = members["images.npy"], members["images.npy"][:128]
    for changed, message in [
        ({"images.npy": pixels[:-1]}, r'array "images" ends early: \(50, 6, 6, 5\) of uint8 makes 9,000 bytes'),
        ({"images.npy": pixels + b"1"}, 'array "images" is longer than its shape asks for'),
        ({"labels.npy": members["labels.npy"][:-1]}, 'array "labels" ends early'),
        ({"images.npy": b""}, 'array "images" cannot be read'),
        ({"images.npy": pixels[:60]}, 'array "images" cannot be read'),
        ({"images.npy": b"<html>"}, 'array "images" cannot be read'),
        ({"images.npy": version_3.getvalue()}, r"version \(3, 0\) of the format"),
        ({"images.npy": pixels.replace(b"(50, 6", b"(-50,6")}, "cannot be read"),
        ({"images.npy": header.replace(b"}", b"(")}, "cannot be read"),
        ({"images.npy": header.replace(b"'descr'", b"__import")}, "cannot be read"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | changed).items():
                archive.writestr(name, content)
        refused(path, rf"images\.npz .*{message}")


def test_arrays_that_are_read_whole(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "rows": generator.standard_normal((40, 3)),
        "columns": np.asfortranarray(generator.integers(0, 9, (5, 4, 3))),
        "one": np.array(3, ">i4"),
        "none": np.zeros((0, 3), np.uint8),
        "text": np.array(["", ""], "U0"),
    }
    path = tmp_path / "arrays.npz"
    np.savez(path, **arrays)
    assert npz_source.array_keys(path, "arrays") == list(arrays)
    with np.load(path) as expected:
        for key in arrays:
            array = npz_source.open_array(path, "arrays", key)
            np.testing.assert_array_equal(array.read(), expected[key], strict=True)
            assert (array.shape, array.dtype) == (expected[key].shape, expected[key].dtype)
