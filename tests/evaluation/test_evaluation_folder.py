"""The folder of an evaluation: rows, kept images, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from imagenet64_diffusion.evaluation import FeatureStatistics
from imagenet64_diffusion.evaluation.evaluation_folder import Evaluation, evenly_spread, write_evaluation


HEADER = {"protocol": {"protocol": "pixels"}, "images": {"source": "x"}}


def write_parts(folder, sizes=(4, 1, 6), channels=3) -> dict[str, np.ndarray]:
    """Parts of these sizes with random arrays, which are returned joined."""
    rng = np.random.default_rng(1)
    count = sum(sizes)
    arrays = {
        "features": rng.normal(size=(count, 5)).astype(np.float32),
        "probabilities": rng.dirichlet(np.ones(3), count).astype(np.float32),
        "pixels": rng.integers(0, 256, (count, channels, 6, 7)).astype(np.uint8),
    }
    arrays["labels"] = rng.integers(-1, 3, count)
    (folder / "parts").mkdir(parents=True)
    start = 0
    for size in sizes:
        stop = start + size
        part = {name: array[start:stop] for name, array in arrays.items()}
        np.savez(folder / "parts" / f"{start:09d}-{stop:09d}.npz", **part)
        start = stop
    return arrays


def test_rows_and_statistics(tmp_path):
    arrays = write_parts(tmp_path / "m")
    write_evaluation(tmp_path / "m", HEADER, 11, 4)
    found = Evaluation.load(tmp_path / "m")
    rows = [0, 3, 7, 10]
    assert np.load(tmp_path / "m" / "indices.npy").tolist() == rows
    for name in ("features", "probabilities", "labels"):
        array = getattr(found, name)
        assert isinstance(array, np.memmap)
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name][rows])
    features = arrays["features"].astype(np.float64)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features.T), rtol=1e-12)
    assert found.statistics.count == 11
    assert found.header == HEADER
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "features.npy",
        "indices.npy",
        "labels.npy",
        "probabilities.npy",
        "statistics.npz",
    ]
    # the statistics alone, elsewhere and by another name
    (tmp_path / "m" / "statistics.npz").rename(tmp_path / "reference.npz")
    alone = Evaluation.load(tmp_path / "reference.npz")
    assert alone.features is None
    assert alone.statistics.count == 11


def test_no_rows_and_all_rows(tmp_path):
    arrays = write_parts(tmp_path / "none")
    write_evaluation(tmp_path / "none", HEADER, 11, 0)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["statistics.npz"]
    write_parts(tmp_path / "all")
    write_evaluation(tmp_path / "all", HEADER, 11, 50_000)
    np.testing.assert_array_equal(Evaluation.load(tmp_path / "all").features, arrays["features"])


def test_evenly_spread():
    for total in (1, 2, 7, 100, 1001):
        for count in (1, 2, 3, total // 2 + 1, total - 1, total, total + 5):
            indices = evenly_spread(max(count, 1), total)
            assert len(indices) == min(max(count, 1), total)
            assert indices[0] == 0
            assert (np.diff(indices) >= 1).all()
            if len(indices) > 1:
                assert indices[-1] == total - 1
                # no gap is more than one larger than another
                assert np.diff(indices).max() - np.diff(indices).min() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_kept_images(tmp_path, channels):
    arrays = write_parts(tmp_path / "png", channels=channels)
    pixels = arrays["pixels"].transpose(0, 2, 3, 1)
    write_evaluation(tmp_path / "png", HEADER, 11, 0, "png")
    for number in range(11):
        with Image.open(tmp_path / "png" / "images" / f"{number:05d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image).reshape(6, 7, channels), pixels[number])
    write_parts(tmp_path / "npz", channels=channels)
    write_evaluation(tmp_path / "npz", HEADER, 11, 0, "npz")
    with np.load(tmp_path / "npz" / "images.npz", allow_pickle=False) as found:
        assert sorted(found) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], pixels)
        np.testing.assert_array_equal(found["arr_1"], arrays["labels"])


def test_stopped_at_any_moment_and_put_together_again(tmp_path):
    """Rows that a killed call had moved already, for another number of rows, do not stay."""
    arrays = write_parts(tmp_path / "m")
    np.save(tmp_path / "m" / "features.npy", np.zeros((9, 5), np.float32))
    np.save(tmp_path / "m" / "labels.npy", np.zeros(9, np.int64))
    with pytest.raises(ValueError, match="which is not finished"):
        Evaluation.load(tmp_path / "m")
    write_evaluation(tmp_path / "m", HEADER, 11, 3)
    found = Evaluation.load(tmp_path / "m")
    np.testing.assert_array_equal(found.features, arrays["features"][[0, 5, 10]])
    assert len(found.labels) == 3
    write_parts(tmp_path / "none")
    np.save(tmp_path / "none" / "features.npy", np.zeros((9, 5), np.float32))
    write_evaluation(tmp_path / "none", HEADER, 11, 0)
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["statistics.npz"]


def test_parts_that_are_not_all_there(tmp_path):
    write_parts(tmp_path / "m")
    with pytest.raises(ValueError, match="does not hold 12 images"):
        write_evaluation(tmp_path / "m", HEADER, 12, 3)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["parts"]


def test_what_is_no_evaluation(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not an evaluation: give a folder with statistics\.npz"):
        Evaluation.load(tmp_path / "nowhere")
    statistics = FeatureStatistics(2)
    statistics.update(np.ones((3, 2)))
    statistics.save(tmp_path / "bare" / "statistics.npz", {"note": "mine"})
    with pytest.raises(ValueError, match="does not say by which protocol"):
        Evaluation.load(tmp_path / "bare")
    write_parts(tmp_path / "m")
    write_evaluation(tmp_path / "m", HEADER, 11, 4)
    np.save(tmp_path / "m" / "labels.npy", np.zeros(9, np.int64))
    with pytest.raises(ValueError, match=r"has arrays of different lengths: \{'features': 4, 'probabilities': 4"):
        Evaluation.load(tmp_path / "m")
