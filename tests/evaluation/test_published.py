"""Files as guided-diffusion's, EDM's and EDM2's evaluation programs write them, and what is no such file."""

import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.evaluation.extractors import make_extractor, published_header
from imagenet64_diffusion.evaluation.protocols import COMPARED_ENTRIES, PUBLISHED
from imagenet64_diffusion.evaluation.published import read_published


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


@pytest.fixture(scope="module")
def moments():
    """Means and covariances of forty rows, under the names that the programs give them."""
    rng, found = np.random.default_rng(0), {}
    for ending, size in (("", 2048), ("_s", 2023)):
        rows = rng.normal(0.5, 1, (40, size))
        found |= {f"mu{ending}": rows.mean(axis=0), f"sigma{ending}": np.cov(rows, rowvar=False)}
    return found


def test_files_of_guided_diffusion(moments, tmp_path):
    np.savez(tmp_path / "VIRTUAL.npz", **moments, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    statistics, spatial = read_published(str(tmp_path / "VIRTUAL.npz"), 1281167)
    for found, ending in ((statistics, ""), (spatial, "_s")):
        assert found.count == 1281167
        np.testing.assert_array_equal(found.mean, moments[f"mu{ending}"])
        np.testing.assert_allclose(found.covariance, moments[f"sigma{ending}"], rtol=1e-12)


@pytest.mark.parametrize("kind", ["edm", "edm2", "edm2 with the number"])
def test_files_of_edm(moments, tmp_path, kind):
    mu, sigma = moments["mu"], moments["sigma"].copy()
    # a sum of outer products on a GPU is symmetric but for rounding
    sigma[0, 1] *= 1 + 1e-12
    if kind == "edm":
        file, number = tmp_path / "imagenet-64x64.npz", 50_000
        np.savez(file, mu=mu, sigma=sigma)
    else:
        file, number = tmp_path / "img64.pkl", 50_000 if kind == "edm2" else None
        stored = {} if number else {"num_images": 50_000}
        stored |= {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu[:4], "sigma": sigma[:4, :4]}}
        file.write_bytes(pickle.dumps(stored))
    statistics, spatial = read_published(str(file), number)
    assert (statistics.count, spatial) == (50_000, None)
    np.testing.assert_array_equal(statistics.mean, mu)
    np.testing.assert_allclose(statistics.covariance, sigma, rtol=1e-11)
    assert np.array_equal(statistics.covariance, statistics.covariance.T)


def test_other_sources_have_none(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "mu.txt").write_text("mu")
    for source in ("images.npz", "mu.txt", "missing.npz", "."):
        assert read_published(str(tmp_path / source), None) is None


FLAT, SQUARE = np.zeros(2048), np.eye(2048, dtype=np.float32)


def changed(place, value):
    """A unit covariance with another value in a place."""
    matrix = SQUARE.copy()
    matrix[place] = value
    return matrix


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({"sigma": None}, 9, r'"sigma" is no array, but must be of floating-point numbers \(2048, 2048\)'),
        ({"sigma": SQUARE[:-1]}, 9, r'"sigma" is float32 \(2047, 2048\), but must be of .* \(2048, 2048\)'),
        ({"mu": FLAT.astype(int)}, 9, r'"mu" is int64 \(2048,\), but must be of floating-point'),
        ({"mu": FLAT + np.nan}, 9, '"mu" and "sigma" are no statistics: .* must be .* finite'),
        ({"sigma": changed((3, 3), np.inf)}, 9, '"sigma" is not finite or not symmetric'),
        ({"sigma": changed((3, 4), 0.1)}, 9, '"sigma" is not finite or not symmetric'),
        ({"sigma": changed((3, 3), -1)}, 9, "must be .* without negative variances"),
        ({"mu_s": FLAT}, 9, r'"mu_s" is float64 \(2048,\), but must be of floating-point numbers \(2023,\)'),
        ({"mu_s": FLAT[:2023]}, 9, r'"sigma_s" is no array'),
        ({}, None, "num_images is None, but .* does not say of how .*: give their number, 1281167 for ImageNet's"),
        ({}, 1, "1 images, but must be"),
    ],
)
def test_arrays_that_are_no_statistics(tmp_path, changes, number, message):
    arrays = {name: array for name, array in ({"mu": FLAT, "sigma": SQUARE} | changes).items() if array is not None}
    np.savez_compressed(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(DataError, match=rf"wrong\.npz.*{message}" if number else message) as caught:
        read_published(str(tmp_path / "wrong.npz"), number)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "number", "message"),
    [
        ([], 9, "holds a list instead of a dict"),
        ({"mu": FLAT, "sigma": SQUARE}, 9, 'entry "fid" holds a NoneType instead of a dict'),
        ({"fid": FLAT}, 9, 'entry "fid" holds a .* instead of a dict'),
        ({"fid": {"mu": [0.0] * 2048, "sigma": SQUARE}}, 9, '"mu" is no array'),
        ({"fid": {"mu": FLAT, "sigma": SQUARE}, "num_images": "many"}, None, "num_images is 'many', but"),
        ({"fid": {"mu": FLAT, "sigma": SQUARE}, "num_images": 8}, 9, "num_images is 9, but .* says 8: leave it out"),
        ({"fid": {"mu": FLAT, "sigma": SQUARE}, "more": print}, 9, "wants builtins.print, .* nothing of it was run"),
    ],
)
def test_pickles_that_are_no_statistics(tmp_path, content, number, message):
    (tmp_path / "wrong.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read_published(str(tmp_path / "wrong.pkl"), number)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2048, 10**12), (10**6, 10**6)])
def test_sizes_are_not_believed(tmp_path, shape):
    """Of an array that says it is larger than any memory, and of one that would unpack to that."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "large.npz", "w") as archive:
        archive.writestr("sigma.npy", header.getvalue() + bytes(64))
        archive.writestr("mu.npy", header.getvalue())
    tracemalloc.start()
    with pytest.raises(DataError, match=r"large\.npz"):
        read_published(str(tmp_path / "large.npz"), 9)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", PUBLISHED)
def test_the_header_is_that_of_the_extractor_but_for_its_weights(protocol, stand_in):
    published, extractor = published_header(protocol), make_extractor(protocol, weights=stand_in).header
    different = {entry for entry in COMPARED_ENTRIES if published.get(entry) != extractor.get(entry)}
    # the stand-in has ten classes
    assert different == {"weights_sha256", "num_classes"}
