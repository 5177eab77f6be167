"""Streamed mean and covariance against numpy's of the whole, and the file."""

import contextlib
import io
import itertools
import json
import math
import zipfile

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation import FeatureStatistics


HEADER = {"protocol": "pixels", "images": 5, "note": "größer"}


def random_features(num_images=3000, num_features=24, mean=5.0):
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((num_features, num_features))
    return rng.standard_normal((num_images, num_features)) @ mixing + mean


def streamed(features, *batch_sizes):
    statistics, sizes, start = FeatureStatistics(features.shape[1]), itertools.cycle(batch_sizes), 0
    while start < len(features):
        size = next(sizes)
        statistics.update(features[start : start + size])
        start += size
    return statistics


def assert_moments(statistics, features):
    covariance = np.cov(features, rowvar=False)
    assert statistics.count == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, covariance, rtol=0, atol=1e-12 * np.abs(covariance).max())
    np.testing.assert_array_equal(statistics.covariance, statistics.covariance.T)
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64


@pytest.mark.parametrize("batch_sizes", [[1], [7, 1, 300, 2], [1024], [2999, 1]])
def test_batches_of_any_size(batch_sizes):
    features = random_features()
    statistics = streamed(features, *batch_sizes)
    assert_moments(statistics, features)
    np.testing.assert_array_equal(statistics.covariance, streamed(features, 128).covariance)


def test_merging_in_any_order_leaves_the_other_as_it_is():
    features = random_features()
    whole = np.split(features, [1, 1, 40, 2600])
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        merged = FeatureStatistics(24)
        for index in order:
            merged.merge(streamed(whole[index], 33))
        assert_moments(merged, features)
    first, second = features[:30], features[30:70]
    statistics, other = streamed(first, 8), streamed(second, 8)
    statistics.merge(other)
    assert_moments(other, second)
    statistics.merge(statistics)
    assert_moments(statistics, np.concatenate([first, second] * 2))


def test_mean_far_from_zero():
    """Sums of squares would lose all digits here."""
    features = random_features(2000, mean=1e8)
    expected = np.cov(features - 1e8, rowvar=False)
    np.testing.assert_allclose(streamed(features, 100).covariance, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, np.float32, np.longdouble])
def test_tensors_and_arrays(dtype):
    if isinstance(dtype, torch.dtype):
        features = torch.from_numpy(random_features(100)).to(dtype).requires_grad_()
        assert_moments(streamed(features, 30), features.detach().double().numpy())
    else:
        features = random_features(100).astype(dtype)[:, ::-1]
        assert_moments(streamed(features, 30), features.astype(np.float64))


def test_wrong_batches_are_not_taken_in():
    features = random_features(20)
    statistics = streamed(features, 6)
    broken = features.copy()
    broken[[7, 12], 3] = math.nan, -math.inf
    for wrong, message in [
        (broken, "must be finite, but row 7 is not"),
        (np.ones((3, 5)), "of 24 features, but there are 5"),
        (np.ones(24), r"\(images, features\), but are float64 \(24,\)"),
        (np.ones((3, 24), dtype=np.uint8), "floating-point numbers .* but are uint8"),
        (torch.ones(3, 24, dtype=torch.int64), "floating-point numbers .* but are torch.int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            statistics.update(wrong)
    with pytest.raises(ValueError, match="of 24 features, but the others are of 5"):
        statistics.merge(FeatureStatistics(5))
    assert_moments(statistics, features)
    with pytest.raises(ValueError, match="num_features must be at least 1"):
        FeatureStatistics(0)


def test_file(tmp_path):
    features = random_features()
    file = tmp_path / "deep" / "statistics.npz"
    streamed(features[:2000], 64).save(file, HEADER)
    with np.load(file, allow_pickle=False) as arrays:
        np.testing.assert_allclose(arrays["covariance"], np.cov(features[:2000], rowvar=False), rtol=0, atol=1e-10)
        assert (int(arrays["count"]), json.loads(str(arrays["header"]))) == (2000, HEADER)
    loaded = FeatureStatistics.load(file)
    assert loaded.header == HEADER
    assert_moments(loaded, features[:2000])
    loaded.update(features[2000:])
    assert_moments(loaded, features)
    loaded.save(file)
    assert FeatureStatistics.load(str(file)).header == HEADER
    # equal statistics make equal files, and one that is refused leaves the old one
    content = file.read_bytes()
    loaded.save(file)
    for header in ({"a": object()}, {"a": math.nan}):
        with pytest.raises(ValueError, match="must be of JSON values"):
            loaded.save(file, header)
    assert file.read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == ["statistics.npz"]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(tmp_path, count):
    features = random_features(50)
    few = streamed(features[:count], 1)
    few.update(features[:0])
    for name, least in (("mean", 1), ("covariance", 2)):
        with contextlib.nullcontext() if count >= least else pytest.raises(ValueError, match="needs at least"):
            getattr(few, name)
    few.save(tmp_path / "few.npz")
    loaded = FeatureStatistics.load(tmp_path / "few.npz")
    assert (loaded.count, loaded.header) == (count, {})
    loaded.update(features[count:])
    assert_moments(loaded, features)


@pytest.fixture
def saved(tmp_path):
    streamed(random_features(50, 6), 10).save(tmp_path / "saved.npz", HEADER)
    return tmp_path / "saved.npz"


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("covariance", None, "holds no whole feature statistics .*covariance"),
        ("format", lambda text: np.array('{"name": "other", "version": 1}'), "must be .* but says .*other"),
        ("header", lambda text: np.array("[1]"), "must be of the format"),
        ("header", lambda text: np.array("{"), "holds no whole feature statistics"),
        ("header", lambda text: np.array({"a": 1}, dtype=object), "Object arrays cannot be loaded"),
        ("count", lambda count: np.array(50.0), r"float64', \(\)\).* must be int64"),
        ("count", lambda count: np.array(-1), "-1 images, but must be"),
        ("count", lambda count: np.array(1), " 1 images, but must be"),
        ("mean", lambda mean: mean[:-1], r"are .*\(5,\)\), .*\(6, 6\).* but must be"),
        ("mean", lambda mean: mean.astype(np.float32), "are .*float32.* but must be"),
        ("mean", lambda mean: mean * np.nan, "but must be .* finite"),
        ("covariance", lambda matrix: matrix * np.inf, "but must be .* finite"),
        ("covariance", np.triu, "but must be .* symmetric"),
        ("covariance", lambda matrix: -matrix, "but must be .* without negative variances"),
    ],
)
def test_wrong_files(saved, key, change, message):
    with np.load(saved) as file:
        arrays = dict(file)
    array = arrays.pop(key)
    np.savez(saved, **arrays, **({key: change(array)} if change else {}))
    with pytest.raises(ValueError, match=rf"saved\.npz.*{message}"):
        FeatureStatistics.load(saved)


def test_damaged_files(saved):
    whole = saved.read_bytes()
    middle = whole.index(np.load(saved)["covariance"].tobytes()) + 40
    one_bit = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    # a header that asks for terabytes is seen before memory is
    header, hostile = io.BytesIO(), io.BytesIO()
    description = {"descr": "<f8", "fortran_order": False, "shape": (10**7, 10**7)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(saved) as archive, zipfile.ZipFile(hostile, "w") as copy:
        for name in archive.namelist():
            copy.writestr(name, header.getvalue() + bytes(64) if name == "covariance.npy" else archive.read(name))
    for content in (whole[: len(whole) // 2], b"", one_bit, b"\x93NUMPY" * 100, hostile.getvalue()):
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=r"saved\.npz.*holds no whole feature statistics"):
            FeatureStatistics.load(saved)
