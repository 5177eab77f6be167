import itertools
import pathlib
import pickle

import datasets
import numpy as np
import pyarrow
import pytest
import torch

from imagenet64_diffusion.data.class_names import imagenet64_id2label
from imagenet64_diffusion.data.dataset import GlobalBatchSampler, PreparedImages, to_model_range
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.npz_source import NpzSource
from imagenet64_diffusion.data.preparation import RECORD_NAME, write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource

from .conftest import make_batches, write_zips


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[pathlib.Path, torch.Tensor, torch.Tensor]:
    """A folder of many small record batches, and what it holds."""
    folder, batches = tmp_path_factory.mktemp("prepared"), make_batches(num_images=67)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imagenet64_diffusion.data.stored_arrays._BLOCK_BYTES", 192 * 50)
        write_prepared(folder / "prepared", PublishedSource(write_zips(folder, batches)))
    pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 8, 8)
    labels = np.concatenate([labels for _, labels in batches]) - 1
    return folder / "prepared", torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_image(prepared, in_memory):
    folder, pixels, labels = prepared
    images = PreparedImages(folder, in_memory=in_memory)
    assert len(images) == 670
    assert (images.channels, images.image_size, images.num_classes) == (3, (8, 8), 1000)
    assert images.id2label == imagenet64_id2label()
    np.testing.assert_array_equal(images.labels(), labels)
    for index in range(670):
        image = images[index]
        assert torch.equal(image["pixel_values"], pixels[index])
        assert (image["class_labels"], image["class_labels"].shape) == (labels[index], ())
    order = np.random.default_rng(0).permutation(670)
    for indices in (order, order.tolist(), [3, 3, -1, 0], [669], torch.tensor([5, 2]), []):
        batch = images.__getitems__(indices)
        where = torch.as_tensor(indices, dtype=torch.int64)
        assert torch.equal(batch["pixel_values"], pixels[where])
        assert torch.equal(batch["class_labels"], labels[where])
        assert (batch["pixel_values"].dtype, batch["class_labels"].dtype) == (torch.uint8, torch.int64)
    for index in (670, -671, [0, 670]):
        with pytest.raises(IndexError):
            images[index]
    # what is given out can be changed, and pickling moves no pixels
    images[[0, 1]]["pixel_values"].zero_()
    images.labels()[:] = 0
    content = pickle.dumps(images)
    assert len(content) < 50_000
    for read in (images, pickle.loads(content)):
        assert torch.equal(read[[600, 0]]["pixel_values"], pixels[[600, 0]])
        np.testing.assert_array_equal(read.labels(), labels)


def test_no_prepared_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=rf"{folder} is not .* no preparation\.json.*imagenet64-prepare"):
            PreparedImages(folder)


ROWS = [bytes(range(row, row + 8)) for row in range(30)]
LABELS = [row % 3 for row in range(30)]


def write_folder(folder: pathlib.Path, columns: dict) -> pathlib.Path:
    """Writes rows of any kind with the record of 30 images of 2x2x2 bytes and three classes, in three files."""
    pixels = np.frombuffer(b"".join(ROWS), np.uint8).reshape(30, 2, 2, 2)
    np.savez(folder.with_suffix(".npz"), images=pixels, labels=LABELS, class_names=["a", "b", "c"])
    record = write_prepared(folder, NpzSource([folder.with_suffix(".npz")]))
    text = (folder / RECORD_NAME).read_text()
    (only,) = record.files
    (folder / only).unlink()
    datasets.Dataset(pyarrow.table(columns)).save_to_disk(folder, num_shards=3)
    files = ",".join(f'"{path.name}": {path.stat().st_size}' for path in sorted(folder.glob("*.arrow")))
    (folder / RECORD_NAME).write_text(text.replace(f'"{only}": {record.files[only]}', files))
    return folder


def with_rows(rows: list, **changed) -> list:
    return [changed.get(f"row_{index}", row) for index, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"pixels": with_rows(ROWS, row_25=b"1234567")}, r"7 bytes for image 25 instead of 8"),
        ({"pixels": with_rows(ROWS, row_29=b"")}, "0 bytes for image 29 instead of 8"),
        ({"pixels": with_rows(ROWS, row_12=None)}, "30 rows of type binary, 1 of them missing, instead of 30"),
        # as many bytes as there should be
        ({"pixels": with_rows(ROWS, row_14=b"1234", row_15=b"123456789012")}, "4 bytes for image 14 instead of 8"),
        ({"pixels": [row.decode() for row in ROWS]}, "30 rows of type string, .* of type binary"),
        ({"pixels": pyarrow.array(ROWS, pyarrow.large_binary())}, "30 rows of type large_binary"),
        ({"image": ROWS}, '.*"pixels" does not exist'),
        ({"label": with_rows(LABELS, row_17=3)}, "3 as label for image 17 instead of 0 to 2"),
        ({"label": with_rows(LABELS, row_28=-1)}, "-1 as label for image 28"),
        ({"label": with_rows(LABELS, row_11=None)}, "30 rows of type int64, 1 of them missing"),
        ({"label": [str(label) for label in LABELS]}, "30 rows of type string, .* of type int64"),
        ({"pixels": ROWS[:-1], "label": LABELS[:-1]}, "29 rows of type binary, .*instead of 30"),
    ],
)
def test_wrong_rows_are_found_on_opening(tmp_path, columns, found):
    pixels = {} if "image" in columns else {"pixels": ROWS}
    folder = write_folder(tmp_path / "out", {**pixels, "label": LABELS, **columns})
    with pytest.raises(DataError, match=rf"^{folder} is damaged \({found}.*with --overwrite$"):
        PreparedImages(folder)


def test_damaged_files_of_the_right_length_are_found_on_opening(tmp_path):
    folder = write_folder(tmp_path / "out", {"pixels": ROWS, "label": LABELS})
    path = sorted(folder.glob("*.arrow"))[1]
    whole = path.read_bytes()
    ends = (np.arange(11, dtype="<i4") * 8).tobytes()
    assert whole.count(ends) == 1
    for changed, found in [
        (whole.replace(ends, ends[:-4] + b"\xff\xff\xff\x7f"), ""),
        (whole.replace(ends, ends[:-4] + b"\xff\xff\xff\xff"), ""),
        (whole.replace(ends, ends[:4] + b"\x09" + ends[5:]), "9 bytes for image 10 instead of 8"),
        (b"\0" * len(whole), ""),
    ]:
        assert len(changed) == len(whole)
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"out is damaged \({found}"):
            PreparedImages(folder)
    path.write_bytes(whole)
    PreparedImages(folder)
    (folder / "state.json").unlink()
    with pytest.raises(DataError, match="out is damaged"):
        PreparedImages(folder)


def test_to_model_range():
    stored = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(stored)
    assert (values.dtype, values[0], values[255]) == (torch.float32, -1, 1)
    torch.testing.assert_close(values, (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float(), atol=1e-7, rtol=0)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), stored)


def first_images(count: int, num_images: int, seed: int, first_image: int = 0) -> list[int]:
    return GlobalBatchSampler(num_images, count, seed, first_image=first_image).batch(0)


def test_orders_are_permutations_that_depend_on_seed_and_epoch():
    seen = set()
    for seed in range(3):
        order = np.reshape(first_images(3000, 1000, seed), (3, 1000))
        for epoch in (2, 0, 1):
            assert sorted(order[epoch]) == list(range(1000))
            assert first_images(1000, 1000, seed, 1000 * epoch) == order[epoch].tolist()
            seen.add(tuple(order[epoch]))
    assert len(seen) == 9
    # a run that resumes with another numpy must see the same images
    assert first_images(10, 10, 5, first_image=30) == [4, 1, 8, 5, 9, 3, 2, 0, 6, 7]


@pytest.mark.parametrize(("num_images", "batch"), [(100, 8), (96, 8), (5, 12)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_one_sequence(num_images, batch, world_size):
    samplers = [GlobalBatchSampler(num_images, batch, 7, rank, world_size) for rank in range(world_size)]
    steps = 40
    joined = []
    for parts in itertools.islice(zip(*samplers, strict=True), steps):
        assert all(len(part) == batch // world_size for part in parts)
        joined += [index for part in parts for index in part]
    assert joined == first_images(steps * batch, num_images, 7)
    # nothing is dropped: after every whole epoch each image was used equally often
    epochs = steps * batch // num_images
    assert np.bincount(joined[: epochs * num_images]).tolist() == [epochs] * num_images


def test_resuming_gives_the_rest_and_costs_nothing():
    whole = list(itertools.islice(GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2), 100))
    for start in (1, 31, 99):
        resumed = GlobalBatchSampler(1000, 32, seed=0, rank=1, world_size=2, first_image=32 * start)
        assert list(itertools.islice(resumed, 100 - start)) == whole[start:]
        # and again: a DataLoader may ask twice
        assert next(iter(resumed)) == whole[start]
    assert len(set(first_images(100, 1000, seed=0, first_image=10**14))) == 100
    with pytest.raises(ValueError, match="multiple of 2 ranks"):
        GlobalBatchSampler(100, 9, seed=0, world_size=2)
