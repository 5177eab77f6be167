"""Parts of an evaluation: what is missing and what overlaps; and the folder that they become."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

from imagenet64_diffusion.evaluation import FeatureStatistics
from imagenet64_diffusion.evaluation.evaluating import (
    Evaluation,
    extract_parts,
    find_parts,
    read_parts,
    write_evaluation,
)
from imagenet64_diffusion.evaluation.extractors import PixelExtractor


HEADER = {"protocol": {"protocol": "pixels", "num_features": 5}, "images": {"source": "x"}}


class Numbers:
    """Images whose pixels and labels are their numbers, and that note which ones were read."""

    image_size = (1, 8, 8)

    def __init__(self, count: int, broken: int = -1):
        self.count, self.broken, self.read_numbers = count, broken, []

    def __len__(self) -> int:
        return self.count

    def read(self, start, stop):
        if start <= self.broken < stop:
            raise ValueError(f"image {self.broken} is broken")
        self.read_numbers += range(start, stop)
        numbers = torch.arange(start, stop, dtype=torch.uint8)
        return numbers[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), numbers.long()


def extract(images, folder, batch_size, keep_pixels=False) -> list[tuple[int, int]]:
    """Extracts what is missing, and gives the parts that there are then."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    extract_parts(images, PixelExtractor(channels=1), folder, batch_size, keep_pixels, PartialState(cpu=True))
    return [(start, stop) for start, stop, _ in find_parts(folder / "parts")]


def joined(folder, name="labels", num_images=20) -> list[float]:
    return np.concatenate([part[name] for _, part in read_parts(folder / "parts", num_images)]).tolist()


def test_only_what_is_missing_is_read(tmp_path):
    with pytest.raises(ValueError, match="image 12 is broken"):
        extract(Numbers(23, broken=12), tmp_path, 5)
    # what was evaluated before the error stays
    assert extract(Numbers(23), tmp_path, 5) == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 23)]
    (tmp_path / "parts" / "000000005-000000010.npz").unlink()
    (tmp_path / "parts" / "000000015-000000020.npz").unlink()
    images = Numbers(23)
    extract(images, tmp_path, 3, keep_pixels=True)
    assert images.read_numbers == [5, 6, 7, 8, 9, 15, 16, 17, 18, 19]
    assert joined(tmp_path, num_images=23) == list(range(23))
    features = np.array(joined(tmp_path, "features", 23))
    np.testing.assert_allclose(features[:, 0], np.arange(23) / 255, rtol=1e-6)


def test_each_image_comes_once_from_parts_that_overlap(tmp_path):
    """As where one process of two was killed, and the other wrote a last part beside those of the next run."""
    parts = tmp_path / "parts"
    extract(Numbers(20), tmp_path, 7)
    extract(Numbers(20), tmp_path / "other", 4)
    for name in ("000000004-000000008.npz", "000000008-000000012.npz", "000000012-000000016.npz"):
        (tmp_path / "other" / "parts" / name).rename(parts / name)
    # what a killed writer left is no part
    (parts / ".writing.000000000-000000020.npz").write_bytes(b"half")
    assert joined(tmp_path) == list(range(20))
    (parts / "000000012-000000016.npz").unlink()
    (parts / "000000007-000000014.npz").unlink()
    with pytest.raises(ValueError, match="has no part with image 12: remove it and evaluate again"):
        joined(tmp_path)
    images = Numbers(20)
    extract(images, tmp_path, 1)
    assert images.read_numbers == [12, 13]
    assert joined(tmp_path) == list(range(20))


def write_parts(folder) -> dict[str, np.ndarray]:
    """Parts of 4, 1 and 6 images with random arrays, which are returned joined."""
    rng = np.random.default_rng(1)
    arrays = {
        "features": rng.normal(size=(11, 5)).astype(np.float32),
        "probabilities": rng.dirichlet(np.ones(3), 11).astype(np.float32),
        "labels": rng.integers(-1, 3, 11),
    }
    (folder / "parts").mkdir(parents=True)
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        part = {name: array[start:stop] for name, array in arrays.items()}
        np.savez(folder / "parts" / f"{start:09d}-{stop:09d}.npz", **part)
    return arrays


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("num_rows", "rows"), [(4, [0, 3, 7, 10]), (50_000, list(range(11))), (0, None)])
def test_rows_and_statistics(tmp_path, num_rows, rows):
    """Also where a call was killed that had written rows of another number."""
    folder = tmp_path / "m"
    arrays = write_parts(folder)
    for name in ("features", "labels"):
        np.save(folder / f"{name}.npy", np.zeros((9, 5)))
    with pytest.raises(ValueError, match="which is not finished"):
        Evaluation.load(folder)
    write_evaluation(folder, HEADER, 11, num_rows)
    found = Evaluation.load(folder)
    features = arrays["features"].astype(np.float64)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features.T), rtol=1e-12)
    assert (found.statistics.count, found.header) == (11, HEADER)
    if rows is None:
        assert names(folder) == ["statistics.npz"]
        return
    assert names(folder) == ["features.npy", "indices.npy", "labels.npy", "probabilities.npy", "statistics.npz"]
    assert np.load(folder / "indices.npy").tolist() == rows
    for name, array in arrays.items():
        assert isinstance(getattr(found, name), np.memmap)
        np.testing.assert_array_equal(getattr(found, name), array[rows], strict=True)
    # the statistics alone, elsewhere and by another name
    (folder / "statistics.npz").rename(tmp_path / "reference.npz")
    alone = Evaluation.load(tmp_path / "reference.npz")
    assert (alone.features, alone.statistics.count) == (None, 11)


def test_what_is_no_evaluation(tmp_path):
    folder = tmp_path / "m"
    with pytest.raises(ValueError, match=r"nowhere is not an evaluation: give a folder with statistics\.npz"):
        Evaluation.load(tmp_path / "nowhere")
    statistics = FeatureStatistics(2)
    statistics.update(np.ones((3, 2)))
    statistics.save(tmp_path / "bare" / "statistics.npz", {"note": "mine"})
    with pytest.raises(ValueError, match="does not say by which protocol"):
        Evaluation.load(tmp_path / "bare")
    write_parts(folder)
    with pytest.raises(ValueError, match="has no part with image 11"):
        write_evaluation(folder, HEADER, 12, 3)
    assert names(folder) == ["parts"]
    write_evaluation(folder, HEADER, 11, 4)
    np.save(folder / "labels.npy", np.zeros(9, np.int64))
    with pytest.raises(ValueError, match=r"has arrays of different lengths: \{'features': 4, 'probabilities': 4"):
        Evaluation.load(folder)
