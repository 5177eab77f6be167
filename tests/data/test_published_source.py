import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data.class_names import imagenet64_names
from imagenet64_diffusion.data.published_source import PublishedSource

from .conftest import make_batches, read_all, refused, write_zips


def assert_reads(source: PublishedSource, work_folder: pathlib.Path, batches) -> None:
    pixels, labels, stream = read_all(source, work_folder)
    rows = np.concatenate([rows for rows, _ in batches])
    size = int((rows.shape[1] // 3) ** 0.5)
    np.testing.assert_array_equal(pixels, rows.reshape(-1, 3, size, size))
    np.testing.assert_array_equal(labels, np.concatenate([labels for _, labels in batches]) - 1)
    assert stream.class_names == imagenet64_names()
    assert list(work_folder.iterdir()) == []


def write_batch(path: pathlib.Path, pixels, labels, protocol: int = 3) -> pathlib.Path:
    path.write_bytes(pickle.dumps({"data": pixels, "labels": labels}, protocol))
    return path


@pytest.mark.parametrize(("protocol", "num_images", "size"), [(2, 103, 8), (3, 7, 64), (5, 103, 8)])
def test_every_image_and_label_of_the_two_zips(tmp_path, protocol, num_images, size, monkeypatch):
    # some blocks a batch
    monkeypatch.setattr("imagenet64_diffusion.data.stored_arrays._BLOCK_BYTES", 192 * 10)
    batches = make_batches(num_images=num_images, size=size)
    source = PublishedSource(write_zips(tmp_path, batches, protocol))
    assert_reads(source, tmp_path / "work", batches)
    assert source.warnings == ()
    assert [file["entry"] for file in source.description["files"]] == [f"train_data_batch_{n}" for n in range(1, 11)]


@pytest.mark.parametrize("form", ["pickles", "compressed npz", "zipped npz"])
def test_a_folder_with_other_forms_is_read_in_numeric_order(tmp_path, form):
    batches = make_batches()
    folder = tmp_path / "Imagenet64_train"
    folder.mkdir()
    for number, (pixels, labels) in enumerate(batches, start=1):
        path = folder / f"train_data_batch_{number}"
        if form == "pickles":
            write_batch(path, pixels, labels)
        else:
            save = np.savez_compressed if form == "compressed npz" else np.savez
            save(path, data=pixels, labels=labels, mean=pixels.mean(0))
    (tmp_path / "notes.txt").write_text("not a batch")
    if form == "zipped npz":
        shutil.make_archive(str(tmp_path / "Imagenet64_train_npz"), "zip", tmp_path, folder.name)
        shutil.rmtree(folder)
    assert_reads(PublishedSource([tmp_path]), tmp_path / "work", batches)


def test_splits_and_missing_batches(tmp_path):
    batches, validation = make_batches(), make_batches(1, 1000)
    _, part2 = write_zips(tmp_path, batches)
    with zipfile.ZipFile(tmp_path / "Imagenet64_val.zip", "w") as archive:
        archive.writestr("val_data", pickle.dumps(dict(zip(("data", "labels"), validation[0], strict=True))))
    assert_reads(PublishedSource([tmp_path], "validation"), tmp_path / "work", validation)
    part2.unlink()
    source = PublishedSource([tmp_path])
    assert source.description["missing_batches"] == [6, 7, 8, 9, 10]
    (warning,) = source.warnings
    assert "5 of the 10 batches are missing: train_data_batch_6, train_data_batch_7" in warning
    assert_reads(source, tmp_path / "work", batches[:5])
    write_batch(tmp_path / "train_data_batch_3", *batches[2])
    refused(r"train_data_batch_3 and .*train_data_batch_3 are the same batch", PublishedSource, [tmp_path])


def test_labels_of_numpy_kinds_and_python_2_keys(tmp_path):
    pixels, labels = make_batches(1, 30)[0]
    path = tmp_path / "train_data_batch_1"
    for stored in (np.array(labels, np.int32), np.array(labels, ">u2"), [np.int64(label) for label in labels]):
        write_batch(path, pixels, stored)
        assert_reads(PublishedSource([path]), tmp_path / "work", [(pixels, labels)])
    path.write_bytes(pickle.dumps({b"data": np.asfortranarray(pixels), b"labels": labels}, 2))
    assert_reads(PublishedSource([path]), tmp_path / "work", [(pixels, labels)])


def test_a_file_that_is_shortened_while_it_is_read_does_no_harm(tmp_path):
    ((pixels, labels),) = make_batches(1)
    path = write_batch(tmp_path / "train_data_batch_1", pixels, labels)
    blocks = PublishedSource([path]).open(tmp_path).blocks
    path.write_bytes(b"")
    np.testing.assert_array_equal(np.concatenate([block.pixels for block in blocks]), pixels.reshape(-1, 3, 8, 8))


def test_inputs_without_batches(tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8), [0, 1])
    val = write_batch(tmp_path / "val_data", *make_batches(1)[0])
    for inputs, split, message in [
        ([tmp_path / "images.npz"], "train", r"images\.npz: holds no train_data_batch_1 to 10.*--source npz"),
        ([val], "train", "--split validation reads val_data"),
        ([tmp_path], "test", "--split test: ImageNet-64 has only the splits train and validation"),
    ]:
        refused(message, PublishedSource, inputs, split)


def test_damaged_zips_are_named(tmp_path):
    part1, _ = write_zips(tmp_path, make_batches())
    whole = part1.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content, message in [
        (whole[: len(whole) // 2], "cannot be read"),
        (b"<!DOCTYPE html><html>Not found</html>", "cannot be read"),
        # found by the checksum of the entry
        (flipped, "entry train_data_batch_3 cannot be read"),
    ]:
        part1.write_bytes(content)
        refused(rf"part1\.zip {message}", PublishedSource, [part1])
    entry = pickle.dumps(dict(zip(("data", "labels"), make_batches(1)[0], strict=True)))
    for content, message in [
        (entry[:-50], "cannot be read"),
        (b"cposix\nsystem\n.", r".*wants posix\.system"),
        (b"<html>", "cannot be read"),
    ]:
        with zipfile.ZipFile(part1, "w") as archive:
            archive.writestr("train_data_batch_1", content)
        refused(rf"part1\.zip entry train_data_batch_1 {message}", PublishedSource, [part1])


PIXELS, LABELS = np.zeros((10, 192), np.uint8), list(range(1, 11))
WRONG_LABELS = '"labels", which must be a list of integers'


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (PIXELS, None, 'has no "labels"'),
        (None, LABELS, 'has no "data"'),
        ([PIXELS], LABELS, 'has "data" that is list of shape None'),
        (PIXELS.astype(np.float32), LABELS, r'"data" that is float32 of shape \(10, 192\) instead'),
        (PIXELS.reshape(10, 3, 8, 8), LABELS, r"of shape \(10, 3, 8, 8\) instead of uint8"),
        (PIXELS[:, :191], LABELS, r"of shape \(10, 191\) instead of"),
        (PIXELS[:, :189], LABELS, r"of shape \(10, 189\) instead of"),
        (PIXELS[:0], [], r"of shape \(0, 192\) instead of"),
        (PIXELS, LABELS[:-1], "of shape \\(9,\\) instead of 10 integers"),
        (PIXELS, [0, *LABELS[1:]], "the label 0 for image 0, but they go from 1 to 1000"),
        (PIXELS, [*LABELS[1:], 1001], "the label 1001 for image 9, but they go from 1 to 1000"),
        (PIXELS, [*LABELS[1:], 2**70], '"labels" is object of shape'),
        *((PIXELS, [*LABELS[1:], label], WRONG_LABELS) for label in (1.0, True, "7", np.ndarray)),
        (PIXELS, dict.fromkeys(LABELS), WRONG_LABELS),
        (PIXELS, np.array(LABELS, np.float64), '"labels" is float64'),
        (PIXELS, np.array([LABELS]), r"shape \(1, 10\) instead of 10 integers"),
    ],
)
def test_wrong_batches(tmp_path, data, labels, message):
    content = {key: value for key, value in (("data", data), ("labels", labels)) if value is not None}
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps(content))
    refused(f"train_data_batch_1 .*{message}", PublishedSource, [tmp_path])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": PIXELS}, 'has no "labels" .*--source npz'),
        ({"data": PIXELS, "labels": np.array(LABELS) - 1}, "has the label 0"),
        ({"data": PIXELS.astype(object), "labels": LABELS}, 'has "data" that is object'),
        ({"data": np.asfortranarray(PIXELS), "labels": LABELS}, 'array "data" is in Fortran order'),
    ],
)
def test_wrong_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "train_data_batch_1.npz", **arrays)
    refused(rf"train_data_batch_1\.npz .*{message}", PublishedSource, [tmp_path])


def test_batches_of_two_resolutions(tmp_path):
    write_batch(tmp_path / "train_data_batch_1", *make_batches(1, 5, 8)[0])
    write_batch(tmp_path / "train_data_batch_2", *make_batches(1, 5, 16)[0])
    refused("train_data_batch_2 has .* 768 values instead of 192", PublishedSource, [tmp_path])
