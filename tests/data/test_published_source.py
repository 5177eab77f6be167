import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data.class_names import imagenet64_names
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.published_source import PublishedSource


def read_all(source: PublishedSource, work_folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    work_folder.mkdir(exist_ok=True)
    stream = source.open(work_folder)
    assert stream.class_names == imagenet64_names()
    blocks = list(stream.blocks)
    pixels = np.concatenate([block.pixels for block in blocks])
    assert pixels.dtype == np.uint8
    assert pixels.shape[1:] == stream.image_size
    # only an estimate for zips, but the progress bar should not be far off
    assert abs(stream.num_images - len(pixels)) <= 0.05 * len(pixels) + 1
    assert list(work_folder.iterdir()) == []
    return pixels, np.concatenate([block.labels for block in blocks])


def expected(batches) -> tuple[np.ndarray, np.ndarray]:
    rows = np.concatenate([pixels for pixels, _ in batches])
    size = int((rows.shape[1] // 3) ** 0.5)
    return rows.reshape(-1, 3, size, size), np.concatenate([labels for _, labels in batches]) - 1


def assert_reads(source: PublishedSource, work_folder: pathlib.Path, batches) -> None:
    pixels, labels = read_all(source, work_folder)
    expected_pixels, expected_labels = expected(batches)
    np.testing.assert_array_equal(pixels, expected_pixels)
    np.testing.assert_array_equal(labels, expected_labels)


def write_batch(path: pathlib.Path, pixels, labels, protocol: int = 3, **more) -> pathlib.Path:
    path.write_bytes(pickle.dumps({"data": pixels, "labels": labels, **more}, protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_image_and_label_of_the_two_zips(tmp_path, make_batches, write_zips, protocol):
    batches = make_batches()
    source = PublishedSource(write_zips(tmp_path, batches, protocol))
    assert_reads(source, tmp_path / "work", batches)
    assert {label for _, labels in batches for label in labels} == set(range(1, 1001))
    assert source.warnings == []
    assert [file["entry"] for file in source.description["files"]] == [f"train_data_batch_{n}" for n in range(1, 11)]


def test_a_folder_with_raw_batches_is_read_in_numeric_order(tmp_path, make_batches):
    batches = make_batches()
    (tmp_path / "Imagenet64_train").mkdir()
    for index, (pixels, labels) in enumerate(batches):
        write_batch(tmp_path / "Imagenet64_train" / f"train_data_batch_{index + 1}", pixels, labels)
    (tmp_path / "notes.txt").write_text("not a batch")
    assert_reads(PublishedSource([tmp_path]), tmp_path / "work", batches)


def test_64_pixels(tmp_path, make_batches, write_zips):
    batches = make_batches(num_images=7, size=64)
    assert_reads(PublishedSource(write_zips(tmp_path, batches)), tmp_path / "work", batches)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("zipped", [False, True])
def test_npz(tmp_path, make_batches, save, zipped):
    batches = make_batches()
    paths = []
    for index, (pixels, labels) in enumerate(batches):
        paths.append(tmp_path / f"train_data_batch_{index + 1}.npz")
        save(paths[-1], data=pixels, labels=labels, mean=pixels.mean(0))
    if zipped:
        with zipfile.ZipFile(tmp_path / "Imagenet64_train_npz.zip", "w") as archive:
            for path in paths:
                archive.write(path, f"npz/{path.name}")
        paths = [tmp_path / "Imagenet64_train_npz.zip"]
    assert_reads(PublishedSource(paths), tmp_path / "work", batches)


def test_validation_split(tmp_path, make_batches, write_zips):
    (validation,) = make_batches(1, 1000)
    write_zips(tmp_path, make_batches())
    with zipfile.ZipFile(tmp_path / "Imagenet64_val.zip", "w") as archive:
        archive.writestr("val_data", pickle.dumps({"data": validation[0], "labels": validation[1]}))
    source = PublishedSource([tmp_path], "validation")
    assert source.warnings == []
    assert_reads(source, tmp_path / "work", [validation])
    assert len(PublishedSource([tmp_path], "train").description["files"]) == 10


def test_blocks_join_across_record_size(tmp_path, make_batches, monkeypatch):
    monkeypatch.setattr("imagenet64_diffusion.data.npz_source._BLOCK_BYTES", 192 * 10)
    batches = make_batches(1, 1003)
    path = write_batch(tmp_path / "train_data_batch_1", *batches[0])
    assert_reads(PublishedSource([path]), tmp_path / "work", batches)


def test_labels_of_numpy_kinds_and_python_2_keys(tmp_path, make_batches):
    pixels, labels = make_batches(1, 30)[0]
    path = tmp_path / "train_data_batch_1"
    for stored in (np.array(labels, np.int32), np.array(labels, ">u2"), [np.int64(label) for label in labels]):
        write_batch(path, pixels, stored)
        assert_reads(PublishedSource([path]), tmp_path / "work", [(pixels, labels)])
    path.write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, 2))
    assert_reads(PublishedSource([path]), tmp_path / "work", [(pixels, labels)])


def test_missing_batches_are_named(tmp_path, make_batches, write_zips):
    batches = make_batches()
    part1, _ = write_zips(tmp_path, batches)
    source = PublishedSource([part1])
    assert source.description["missing_batches"] == [6, 7, 8, 9, 10]
    (warning,) = source.warnings
    assert "5 of the 10 batches are missing: train_data_batch_6, train_data_batch_7" in warning
    assert_reads(source, tmp_path / "work", batches[:5])


def test_a_batch_twice_is_an_error(tmp_path, make_batches, write_zips):
    batches = make_batches()
    write_zips(tmp_path, batches)
    write_batch(tmp_path / "train_data_batch_3", *batches[2])
    with pytest.raises(
        DataError,
        match=r"part1\.zip.* and .*train_data_batch_3 are the same batch|train_data_batch_3 and .*part1\.zip",
    ):
        PublishedSource([tmp_path])


def test_inputs_without_batches(tmp_path, make_batches):
    with pytest.raises(DataError, match="--input is missing"):
        PublishedSource([])
    with pytest.raises(DataError, match=r"nowhere: no such file"):
        PublishedSource([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="holds no train_data_batch_1 to 10"):
        PublishedSource([tmp_path])
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"notes\.txt: holds no"):
        PublishedSource([tmp_path / "notes.txt"])
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    with pytest.raises(DataError, match=r"images\.npz: holds no .*--source npz"):
        PublishedSource([tmp_path / "images.npz"])
    val = write_batch(tmp_path / "val_data", *make_batches(1)[0])
    with pytest.raises(DataError, match="--split validation val_data"):
        PublishedSource([val])
    with pytest.raises(DataError, match="--split test"):
        PublishedSource([tmp_path], "test")


def test_broken_zips(tmp_path, make_batches, write_zips):
    part1, _ = write_zips(tmp_path, make_batches())
    whole = part1.read_bytes()
    part1.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part1\.zip cannot be read"):
        PublishedSource([part1])
    part1.write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(DataError, match=r"part1\.zip cannot be read"):
        PublishedSource([part1])
    # a flipped byte in the middle of an entry is found by its checksum
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    part1.write_bytes(damaged)
    with pytest.raises(DataError, match=r"part1\.zip entry train_data_batch_3 cannot be read"):
        read_all(PublishedSource([part1]), tmp_path / "work")


def test_truncated_and_malicious_entries_are_named(tmp_path, make_batches):
    pixels, labels = make_batches(1)[0]
    whole = pickle.dumps({"data": pixels, "labels": labels})
    path = tmp_path / "part1.zip"
    for content, error, message in [
        (whole[:-50], DataError, r"part1\.zip entry train_data_batch_1 cannot be read"),
        (b"cposix\nsystem\n.", DataError, r"part1\.zip entry train_data_batch_1 .*wants posix\.system"),
        (b"<html>", DataError, r"part1\.zip entry train_data_batch_1 is a web page"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("train_data_batch_1", content)
        with pytest.raises(error, match=message):
            read_all(PublishedSource([path]), tmp_path / "work")


def wrong_contents():
    pixels = np.zeros((10, 192), np.uint8)
    labels = list(range(1, 11))
    return [
        (([pixels], labels), 'has a list as "data"'),
        ((pixels.astype(np.float32), labels), 'has "data" of type float32 and shape'),
        ((pixels.astype(np.int8), labels), "of type int8 and"),
        ((pixels.reshape(10, 3, 8, 8), labels), r"and shape \(10, 3, 8, 8\) instead of"),
        ((pixels[:, :191], labels), r"and shape \(10, 191\) instead of"),
        ((pixels[:, :189], labels), r"and shape \(10, 189\) instead of"),
        ((pixels[:0], []), r"and shape \(0, 192\) instead of"),
        ((np.asfortranarray(pixels), labels), "in Fortran order"),
        ((pixels, labels[:-1]), "of shape \\(9,\\) instead of 10 integers"),
        ((pixels, [0, *labels[1:]]), "has the label 0 for image 0, but labels go from 1 to 1000"),
        ((pixels, [*labels[1:], 1001]), "has the label 1001 for image 9, but labels go from 1 to 1000"),
        ((pixels, [*labels[1:], -1]), "has the label -1"),
        ((pixels, [*labels[1:], 2**70]), "cannot be read"),
        ((pixels, [*labels[1:], 1.0]), '"labels", which must be a list of integers'),
        ((pixels, [*labels[1:], True]), '"labels", which must be a list of integers'),
        ((pixels, [*labels[1:], "7"]), '"labels", which must be a list of integers'),
        ((pixels, dict.fromkeys(labels)), '"labels", which must be a list of integers'),
        ((pixels, np.array(labels, np.float64)), '"labels" is float64'),
        ((pixels, np.array([labels])), r"shape \(1, 10\) instead of a list"),
    ]


@pytest.mark.parametrize(("content", "message"), wrong_contents())
def test_wrong_batches(tmp_path, content, message):
    path = write_batch(tmp_path / "train_data_batch_1", *content)
    with pytest.raises(DataError, match=f"train_data_batch_1 .*{message}"):
        read_all(PublishedSource([path]), tmp_path / "work")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list instead of a dict"),
        ({"data": np.zeros((1, 192), np.uint8)}, 'has no "labels"'),
        ({"labels": [1]}, 'has no "data"'),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message):
    path = tmp_path / "train_data_batch_1"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        read_all(PublishedSource([path]), tmp_path / "work")


def test_batches_of_two_resolutions(tmp_path, make_batches):
    write_batch(tmp_path / "train_data_batch_1", *make_batches(1, 5, 8)[0])
    write_batch(tmp_path / "train_data_batch_2", *make_batches(1, 5, 16)[0])
    with pytest.raises(DataError, match=r"train_data_batch_2 has .* 768 values, but .*train_data_batch_1 has 192"):
        read_all(PublishedSource([tmp_path]), tmp_path / "work")


def test_wrong_npz(tmp_path):
    path = tmp_path / "train_data_batch_1.npz"
    pixels = np.zeros((10, 192), np.uint8)
    labels = np.arange(1, 11)
    for arrays, message in [
        ({"data": pixels}, 'has no "labels" .*--source npz'),
        ({"data": pixels, "labels": labels[:9]}, "instead of 10 integers"),
        ({"data": pixels, "labels": labels * 1.0}, '"labels" is float64'),
        ({"data": pixels, "labels": labels - 1}, "has the label 0"),
        ({"data": pixels.astype(object), "labels": labels}, 'array "data" holds Python objects'),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=f"train_data_batch_1.npz .*{message}"):
            read_all(PublishedSource([path]), tmp_path / "work")
    np.savez(path, data=pixels, labels=labels)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for changed, message in [
        ({"data.npy": members["data.npy"][:-1]}, "ends early"),
        ({"data.npy": members["data.npy"] + b"1"}, "longer than"),
        ({"labels.npy": members["labels.npy"][:-1]}, '"labels" ends early'),
        ({"data.npy": b"<html>"}, "cannot be read"),
    ]:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | changed).items():
                archive.writestr(name, content)
        with pytest.raises(DataError, match=f"train_data_batch_1.npz .*{message}"):
            read_all(PublishedSource([path]), tmp_path / "work")
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match="cannot be read"):
        read_all(PublishedSource([path]), tmp_path / "work")
