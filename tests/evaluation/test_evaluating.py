"""Parts of an evaluation: what is missing, what overlaps, and who makes it."""

import random

import numpy as np
import pytest
import torch
from accelerate import PartialState

from imagenet64_diffusion.evaluation.evaluating import extract_parts
from imagenet64_diffusion.evaluation.evaluation_folder import find_parts, missing_batches, read_parts
from imagenet64_diffusion.evaluation.extractors import PixelExtractor


class Numbers:
    """Images whose pixels are their numbers, and that note which ones were read."""

    image_size = (1, 8, 8)

    def __init__(self, count: int, broken: int | None = None):
        self.count, self.broken, self.read_numbers = count, broken, []

    def __len__(self) -> int:
        return self.count

    def read(self, start, stop):
        if self.broken is not None and start <= self.broken < stop:
            raise ValueError(f"image {self.broken} is broken")
        self.read_numbers += range(start, stop)
        numbers = torch.arange(start, stop, dtype=torch.uint8)
        return numbers[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), numbers.long()


@pytest.fixture
def state() -> PartialState:
    return PartialState(cpu=True)


def extract(images, folder, state, batch_size, keep_pixels=False):
    folder.mkdir(exist_ok=True)
    extractor = PixelExtractor(channels=1)
    extract_parts(images, extractor, folder, batch_size=batch_size, keep_pixels=keep_pixels, state=state)


def joined(folder, name="labels"):
    return np.concatenate([part[name] for part in read_parts(folder, name)])


def test_what_is_missing():
    """Of parts at random, with and without overlaps, against sets of numbers."""
    rng = random.Random(0)
    for _ in range(200):
        num_images, batch_size = rng.randint(1, 40), rng.randint(1, 12)
        starts = [rng.randrange(num_images) for _ in range(rng.randint(0, 5))]
        parts = sorted((start, rng.randint(start + 1, num_images), None) for start in starts)
        held = {number for start, stop, _ in parts for number in range(start, stop)}
        found = list(missing_batches(parts, num_images, batch_size))
        numbers = [number for start, stop in found for number in range(start, stop)]
        assert numbers == [number for number in range(num_images) if number not in held]
        assert all(0 < stop - start <= batch_size for start, stop in found)


def test_only_what_is_missing_is_read(tmp_path, state):
    images = Numbers(23)
    extract(images, tmp_path / "parts", state, 5)
    parts = find_parts(tmp_path / "parts")
    assert [(start, stop) for start, stop, _ in parts] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    for _, _, file in (parts[1], parts[3]):
        file.unlink()
    images = Numbers(23)
    extract(images, tmp_path / "parts", state, 3, keep_pixels=True)
    assert images.read_numbers == [5, 6, 7, 8, 9, 15, 16, 17, 18, 19]
    assert joined(tmp_path / "parts").tolist() == list(range(23))
    np.testing.assert_allclose(joined(tmp_path / "parts", "features")[:, 0], np.arange(23) / 255, rtol=1e-6)


def test_each_image_comes_once_from_parts_that_overlap(tmp_path, state):
    """As where one process of two was killed, and the other wrote a last part beside those of the next run."""
    extract(Numbers(20), tmp_path / "parts", state, 7)
    extract(Numbers(20), tmp_path / "other", state, 4)
    for name in ("000000004-000000008.npz", "000000008-000000012.npz", "000000012-000000016.npz"):
        (tmp_path / "other" / name).rename(tmp_path / "parts" / name)
    assert joined(tmp_path / "parts").tolist() == list(range(20))
    # what a killed writer left is no part
    (tmp_path / "parts" / ".writing.000000000-000000020.npz").write_bytes(b"half")
    assert joined(tmp_path / "parts").tolist() == list(range(20))
    (tmp_path / "parts" / "000000012-000000016.npz").unlink()
    (tmp_path / "parts" / "000000007-000000014.npz").unlink()
    with pytest.raises(ValueError, match="has no part with image 12: remove it and evaluate again"):
        joined(tmp_path / "parts")


def test_what_was_evaluated_before_an_error_stays(tmp_path, state):
    with pytest.raises(ValueError, match="image 12 is broken"):
        extract(Numbers(20, broken=12), tmp_path / "parts", state, 5)
    assert [(start, stop) for start, stop, _ in find_parts(tmp_path / "parts")] == [(0, 5), (5, 10)]
    images = Numbers(20)
    extract(images, tmp_path / "parts", state, 5)
    assert images.read_numbers == list(range(10, 20))


def test_features_that_are_not_finite_are_no_part(tmp_path, state):
    class Infinite(PixelExtractor):
        def _extract(self, images):
            features = super()._extract(images)
            return features._replace(features=features.features / 0)

    (tmp_path / "parts").mkdir()
    with pytest.raises(ValueError, match="not finite for image 0"):
        extract_parts(
            Numbers(4), Infinite(channels=1), tmp_path / "parts", batch_size=2, keep_pixels=False, state=state
        )
    assert not find_parts(tmp_path / "parts")
