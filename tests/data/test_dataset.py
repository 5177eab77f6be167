import pathlib
import pickle

import datasets
import filelock
import numpy as np
import pyarrow
import pytest
import torch

from imagenet64_diffusion.data import npz_source
from imagenet64_diffusion.data.class_names import imagenet64_id2label
from imagenet64_diffusion.data.dataset import PreparedImages, to_model_range
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.npz_source import NpzSource
from imagenet64_diffusion.data.preparation import Preparation, write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource
from imagenet64_diffusion.data.sampling import GlobalBatchSampler


@pytest.fixture
def prepared(tmp_path, make_batches, write_zips, monkeypatch) -> tuple[pathlib.Path, torch.Tensor, torch.Tensor]:
    """A folder of many small record batches, and what it holds."""
    monkeypatch.setattr(npz_source, "_BLOCK_BYTES", 192 * 50)
    batches = make_batches(num_images=67)
    write_prepared(tmp_path / "prepared", PublishedSource(write_zips(tmp_path, batches)))
    pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 8, 8)
    labels = np.concatenate([labels for _, labels in batches]) - 1
    return tmp_path / "prepared", torch.from_numpy(pixels), torch.from_numpy(labels)


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_image(prepared, in_memory):
    folder, pixels, labels = prepared
    images = PreparedImages(folder, in_memory=in_memory)
    assert len(images) == 670
    assert (images.channels, images.image_size, images.num_classes) == (3, (8, 8), 1000)
    assert images.id2label == imagenet64_id2label()
    assert images.class_names == list(images.id2label.values())
    assert images.fingerprint.startswith("sha256:")
    np.testing.assert_array_equal(images.labels(), labels)
    for index in range(670):
        image = images[index]
        assert torch.equal(image["pixel_values"], pixels[index])
        assert image["class_labels"] == labels[index]
        assert image["class_labels"].shape == ()
    order = np.random.default_rng(0).permutation(670)
    for indices in (order, order.tolist(), [3, 3, -1, 0], [669], torch.tensor([5, 2]), []):
        batch = images.__getitems__(indices)
        where = torch.as_tensor(indices, dtype=torch.int64)
        assert torch.equal(batch["pixel_values"], pixels[where])
        assert torch.equal(batch["class_labels"], labels[where])
        assert (batch["pixel_values"].dtype, batch["class_labels"].dtype) == (torch.uint8, torch.int64)


def test_what_is_given_out_can_be_changed(prepared):
    folder, pixels, _ = prepared
    images = PreparedImages(folder, in_memory=True)
    images[[0, 1]]["pixel_values"].zero_()
    images.labels()[:] = 0
    assert torch.equal(images[0]["pixel_values"], pixels[0])
    assert images.labels().any()


@pytest.mark.parametrize("index", [670, -671, [0, 670]])
def test_out_of_range(prepared, index):
    with pytest.raises(IndexError):
        PreparedImages(prepared[0])[index]


def test_pickling_moves_no_pixels(prepared):
    folder, pixels, _ = prepared
    for in_memory in (False, True):
        content = pickle.dumps(PreparedImages(folder, in_memory=in_memory))
        assert len(content) < 50_000
        assert torch.equal(pickle.loads(content)[[600, 0]]["pixel_values"], pixels[[600, 0]])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_loader(prepared, num_workers):
    folder, pixels, labels = prepared
    images = PreparedImages(folder)
    sampler = GlobalBatchSampler(len(images), 64, seed=3)
    expected = [sampler.batch(step) for step in range(12)]
    loader = torch.utils.data.DataLoader(images, sampler=sampler, batch_size=None, num_workers=num_workers)
    for indices, batch in zip(expected, loader, strict=False):
        assert torch.equal(batch["pixel_values"], pixels[indices])
        assert torch.equal(batch["class_labels"], labels[indices])


def test_no_prepared_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        PreparedImages(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"it has no preparation\.json.*imagenet64-prepare"):
        PreparedImages(tmp_path)
    with (
        filelock.FileLock(tmp_path / ".soon.lock"),
        pytest.raises(DataError, match="soon is not there yet: imagenet64-prepare is still writing it, or was killed"),
    ):
        PreparedImages(tmp_path / "soon")


def test_images_of_five_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 6, 4, 5), dtype=np.uint8)
    labels = np.arange(30) % 7
    np.savez(tmp_path / "images.npz", pixels, labels)
    write_prepared(tmp_path / "out", NpzSource([tmp_path / "images.npz"]))
    images = PreparedImages(tmp_path / "out")
    assert (images.channels, images.image_size, images.num_classes) == (5, (6, 4), 7)
    batch = images[list(range(30))]
    np.testing.assert_array_equal(batch["pixel_values"], np.moveaxis(pixels, -1, 1))
    np.testing.assert_array_equal(batch["class_labels"], labels)


def write_folder(folder: pathlib.Path, columns: dict, num_images: int = 30) -> pathlib.Path:
    """Writes rows of any kind with the record of 2x2 images of two channels and three classes, in three files."""
    datasets.Dataset(pyarrow.table(columns)).save_to_disk(folder, num_shards=3)
    Preparation(
        source={},
        source_details={},
        max_images=None,
        channels=2,
        height=2,
        width=2,
        num_images=num_images,
        class_names=["a", "b", "c"],
        images_per_class=[10, 10, 10],
        fingerprint="sha256:0",
        files={path.name: path.stat().st_size for path in sorted(folder.glob("*.arrow"))},
    ).write(folder)
    return folder


ROWS = [bytes(range(row, row + 8)) for row in range(30)]
LABELS = [row % 3 for row in range(30)]


def with_row(rows: list, index: int, value) -> list:
    return [*rows[:index], value, *rows[index + 1 :]]


@pytest.mark.parametrize("in_memory", [False, True])
def test_rows_written_by_datasets_are_read(tmp_path, in_memory):
    # or else the damage below would not be what is refused
    folder = write_folder(tmp_path / "out", {"pixels": ROWS, "label": LABELS})
    batch = PreparedImages(folder, in_memory=in_memory)[list(range(30))]
    assert [bytes(image) for image in batch["pixel_values"].flatten(1).numpy()] == ROWS
    assert batch["class_labels"].tolist() == LABELS


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"pixels": with_row(ROWS, 25, b"1234567")}, r"7 bytes for image 25 instead of 8"),
        ({"pixels": with_row(ROWS, 0, b"123456789")}, "9 bytes for image 0 instead of 8"),
        ({"pixels": with_row(ROWS, 29, b"")}, "0 bytes for image 29 instead of 8"),
        ({"pixels": with_row(with_row(ROWS, 12, None), 22, b"")}, "no pixels for image 12 instead of 8"),
        # as many bytes as there should be
        ({"pixels": with_row(with_row(ROWS, 14, b"1234"), 15, b"123456789012")}, "4 bytes for image 14 instead of 8"),
        ({"pixels": [row.decode() for row in ROWS]}, 'a column "pixels" of type string instead of binary'),
        ({"pixels": pyarrow.array(ROWS, pyarrow.large_binary())}, 'a column "pixels" of type large_binary'),
        ({"image": ROWS}, 'files that cannot be read .*"pixels" does not exist'),
        ({"pixels": ROWS, "labels": LABELS}, 'files that cannot be read .*"label" does not exist'),
        ({"pixels": ROWS, "label": with_row(LABELS, 17, 3)}, "the label 3 for image 17, where labels go from 0 to 2"),
        ({"pixels": ROWS, "label": with_row(LABELS, 28, -1)}, "the label -1 for image 28"),
        ({"pixels": ROWS, "label": with_row(LABELS, 11, None)}, "the label None for image 11"),
        ({"pixels": ROWS, "label": [str(label) for label in LABELS]}, 'a column "label" of type string instead of'),
        ({"pixels": ROWS[:-1], "label": LABELS[:-1]}, "29 images instead of 30"),
        ({"pixels": ROWS * 2, "label": LABELS * 2}, "60 images instead of 30"),
    ],
)
def test_wrong_rows_are_found_on_opening(tmp_path, columns, found):
    if "labels" not in columns:
        columns = {"label": LABELS} | columns
    folder = write_folder(tmp_path / "out", columns)
    with pytest.raises(DataError, match=f"^{folder} is damaged: it has {found}.*with --overwrite$"):
        PreparedImages(folder)


def test_damaged_files_of_the_right_length_are_found_on_opening(tmp_path):
    folder = write_folder(tmp_path / "out", {"pixels": ROWS, "label": LABELS})
    path = sorted(folder.glob("*.arrow"))[1]
    whole = path.read_bytes()
    ends = (np.arange(11, dtype="<i4") * 8).tobytes()
    assert whole.count(ends) == 1
    for changed, found in [
        (whole.replace(ends, ends[:-4] + b"\xff\xff\xff\x7f"), "files that cannot be read"),
        (whole.replace(ends, ends[:-4] + b"\xff\xff\xff\xff"), "files that cannot be read"),
        (whole.replace(ends, ends[:4] + b"\x09" + ends[5:]), "9 bytes for image 10 instead of 8"),
        (b"\0" * len(whole), "files that cannot be read"),
    ]:
        assert len(changed) == len(whole)
        path.write_bytes(changed)
        with pytest.raises(DataError, match=f"out is damaged: it has {found}"):
            PreparedImages(folder)
    path.write_bytes(whole)
    assert len(PreparedImages(folder)) == 30
    (folder / "state.json").unlink()
    with pytest.raises(DataError, match="out is damaged: it has files that cannot be read"):
        PreparedImages(folder)


def test_to_model_range():
    stored = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(stored)
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close(values, (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float(), atol=1e-7, rtol=0)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), stored)
