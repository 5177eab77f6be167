import pathlib
import pickle

import numpy as np
import pytest
import torch

from imagenet64_diffusion.data import preparation as preparation_module
from imagenet64_diffusion.data.class_names import imagenet64_id2label
from imagenet64_diffusion.data.dataset import PreparedImages, keep_batch, to_model_range
from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.preparation import write_prepared
from imagenet64_diffusion.data.published_source import PublishedSource
from imagenet64_diffusion.data.sampling import GlobalBatchSampler


@pytest.fixture
def prepared(tmp_path, make_batches, write_zips, monkeypatch) -> tuple[pathlib.Path, torch.Tensor, torch.Tensor]:
    """A folder of many small record batches and shards, and what it holds."""
    monkeypatch.setattr(preparation_module, "_RECORD_BATCH_BYTES", 192 * 50)
    monkeypatch.setattr(preparation_module, "_RECORD_BATCHES_PER_SHARD", 4)
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
    for options in ({"sampler": sampler, "batch_size": None}, {"batch_sampler": sampler, "collate_fn": keep_batch}):
        loader = torch.utils.data.DataLoader(images, num_workers=num_workers, **options)
        for indices, batch in zip(expected, loader, strict=False):
            assert torch.equal(batch["pixel_values"], pixels[indices])
            assert torch.equal(batch["class_labels"], labels[indices])


def test_no_prepared_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        PreparedImages(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"it has no preparation\.json.*imagenet64-prepare"):
        PreparedImages(tmp_path)


def test_to_model_range():
    stored = torch.arange(256, dtype=torch.uint8)
    values = to_model_range(stored)
    assert values.dtype == torch.float32
    assert (values[0], values[255]) == (-1, 1)
    torch.testing.assert_close(values, (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float(), atol=1e-7, rtol=0)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), stored)
