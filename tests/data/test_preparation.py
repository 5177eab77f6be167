import hashlib
import json
import pathlib
import pickle
import resource
import signal
import tracemalloc

import datasets
import filelock
import numpy as np
import pyarrow
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.npz_source import NpzSource
from imagenet64_diffusion.data.preparation import Preparation, find_finished, write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource
from imagenet64_diffusion.data.sources import ImageSource, ImageStream, label_blocks


class ArraySource(ImageSource):
    """Images from memory, in blocks of any size, perhaps with an error after some of them."""

    def __init__(self, pixels, labels, block=10, fail_after=None, error=DataError):
        super().__init__({"kind": "array", "images": len(pixels)}, "images from memory")
        self.pixels, self.labels, self.block = pixels, labels, block
        self.fail_after, self.error = fail_after, error

    def open(self, work_folder):
        (work_folder / "scratch").write_text("something that must not stay")
        blocks = label_blocks(self._blocks(), self.labels)
        return ImageStream(["a", "b", "c"], self.pixels.shape[1:], len(self.pixels), blocks)

    def _blocks(self):
        for start in range(0, len(self.pixels), self.block):
            if self.fail_after is not None and start >= self.fail_after:
                raise self.error("the source broke")
            yield self.pixels[start : start + self.block]


@pytest.fixture
def images() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (95, 3, 4, 4), dtype=np.uint8), generator.integers(0, 2, 95)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_datasets_reads_every_image(tmp_path, images):
    pixels, labels = images
    output_dir = tmp_path / "parents" / "out"
    record = write_prepared(output_dir, ArraySource(pixels, labels))
    loaded = datasets.load_from_disk(str(output_dir))
    assert [np.frombuffer(row, np.uint8).tolist() for row in loaded["pixels"]] == pixels.reshape(95, -1).tolist()
    assert list(loaded["label"]) == labels.tolist()
    assert loaded.features["label"].names == ["a", "b", "c"]
    assert names(output_dir) == ["data-00000-of-00001.arrow", "dataset_info.json", "preparation.json", "state.json"]
    assert names(output_dir.parent) == ["out"]
    assert record == Preparation.read(output_dir)
    assert (record.channels, record.height, record.width, record.num_images) == (3, 4, 4, 95)
    assert record.images_per_class == np.bincount(labels, minlength=3).tolist()
    assert "95 images, 2 of 3 classes, 4x4 RGB" in record.summary()
    digests = [hashlib.sha256(values.tobytes()).digest() for values in (pixels, labels)]
    assert record.fingerprint == "sha256:" + hashlib.sha256(b"3x4x4" + b"".join(digests)).hexdigest()
    # whatever the blocks were
    for block in (1, 1000):
        again = write_prepared(tmp_path / f"{block}", ArraySource(pixels, labels, block=block))
        assert again.fingerprint == record.fingerprint


@pytest.mark.parametrize("max_images", [1, 10, 15, 1000])
def test_max_images(tmp_path, images, max_images):
    record = write_prepared(tmp_path / "out", ArraySource(*images), max_images)
    labels = list(datasets.load_from_disk(str(tmp_path / "out"))["label"])
    assert labels == images[1][:max_images].tolist()
    assert record.num_images == len(labels)


def test_finished_is_found_and_other_contents_are_refused(tmp_path, images):
    out, source = tmp_path / "out", ArraySource(*images)
    out.mkdir()
    assert find_finished(out, source, None) is None
    record = write_prepared(out, source)
    before = contents(out)
    assert find_finished(out, source, None) == write_prepared(out, source) == record
    other = ArraySource(images[0][:50], images[1][:50])
    for wanted, max_images in [(other, None), (source, 5)]:
        with pytest.raises(DataError, match=r"holds other images.*--overwrite"):
            write_prepared(out, wanted, max_images)
    assert contents(out) == before
    write_prepared(out, other, overwrite=True)
    assert Preparation.read(out).num_images == 50
    assert names(tmp_path) == ["out"]


def test_foreign_files_are_never_replaced(tmp_path, images):
    out, precious = tmp_path / "out", tmp_path / "out" / "thesis.txt"
    out.mkdir()
    precious.write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"files of no prepared dataset .*: name another folder"):
            write_prepared(out, ArraySource(*images), overwrite=overwrite)
    precious.rename(tmp_path / "thesis.txt")
    write_prepared(out, ArraySource(*images))
    (tmp_path / "thesis.txt").rename(precious)
    with pytest.raises(DataError, match=r"thesis\.txt"):
        write_prepared(out, ArraySource(*images), overwrite=True)
    assert precious.read_text() == "precious"
    with pytest.raises(OSError, match=r"thesis\.txt"):
        write_prepared(precious, ArraySource(*images))


@pytest.mark.parametrize("error", [DataError, OSError, KeyboardInterrupt])
def test_nothing_is_left_when_the_source_breaks(tmp_path, images, error):
    with pytest.raises(error, match="the source broke"):
        write_prepared(tmp_path / "out", ArraySource(*images, fail_after=60, error=error))
    assert names(tmp_path) == []
    write_prepared(tmp_path / "out", ArraySource(*images))
    before = contents(tmp_path / "out")
    with pytest.raises(error, match="the source broke"):
        write_prepared(tmp_path / "out", ArraySource(*images, fail_after=60, error=error), overwrite=True)
    assert contents(tmp_path / "out") == before
    # and when it was killed after the old folder was moved away, and before the new one came
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    (tmp_path / ".out.writing").mkdir()
    with pytest.raises(DataError, match="the source broke"):
        write_prepared(tmp_path / "out", ArraySource(*images, fail_after=0), overwrite=True)
    assert contents(tmp_path / "out") == before
    assert names(tmp_path) == ["out"]


def test_a_full_disk_is_one_sentence(tmp_path, images):
    # the system refuses to let any file grow further, as it does on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(OSError, match=f"^{tmp_path} cannot hold the images .File too large.$"):
            write_prepared(tmp_path / "out", ArraySource(*images))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []


def test_no_images_and_two_writers_are_errors(tmp_path, images):
    with pytest.raises(DataError, match="there are no images"):
        write_prepared(tmp_path / "out", ArraySource(images[0][:0], images[1][:0]))
    assert names(tmp_path) == []
    with filelock.FileLock(tmp_path / ".out.lock"), pytest.raises(OSError, match="another process is writing to it"):
        write_prepared(tmp_path / "out", ArraySource(*images))


def test_damaged_folders_are_named(tmp_path, images):
    out = tmp_path / "out"
    write_prepared(out, ArraySource(*images))
    record = out / "preparation.json"
    text = record.read_text()
    for change in ({"format": "other"}, {"format_version": 99}, {"colour": "red"}, None):
        record.write_text(json.dumps(json.loads(text) | change) if change else "{")
        with pytest.raises(DataError, match=f"not the record of .*{next(iter(change)) if change else ''}"):
            Preparation.read(out)
    record.write_text(text)
    arrow = next(out.glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-1])
    for found in ("[0-9,]+", "0"):
        with pytest.raises(DataError, match=rf"\.arrow has {found} bytes instead of"):
            Preparation.read(out)
        arrow.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", [PublishedSource, NpzSource])
def test_memory_does_not_grow_with_the_images(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("imagenet64_diffusion.data.stored_arrays._BLOCK_BYTES", 1 << 20)
    pixels, labels = np.zeros((5000, 64, 64, 3), np.uint8), [5] * 5000  # 61 MB
    if kind is NpzSource:
        np.savez_compressed(tmp_path / "images.npz", pixels, labels)
    else:
        (tmp_path / "train_data_batch_1").write_bytes(
            pickle.dumps({"data": pixels.reshape(5000, -1), "labels": labels})
        )
    arrow_before = pyarrow.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    record = write_prepared(tmp_path / "out", kind([tmp_path]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert record.num_images == 5000
    assert peak < 10e6
    assert pyarrow.default_memory_pool().bytes_allocated() - arrow_before < 10e6
