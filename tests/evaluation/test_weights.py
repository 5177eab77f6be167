"""Published weights: fetched once, whole or not at all, or named by a path."""

import hashlib
import logging
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import pytest

from imagenet64_diffusion.evaluation.weights import (
    INCEPTION_2015,
    MIRROR_VARIABLE,
    TORCHVISION_INCEPTION,
    WeightsFile,
    find_weights,
)
from imagenet64_diffusion.tests.commands import processes  # noqa: F401 - its server of processes has imported torch


CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CACHE_NAME = "imagenet64_diffusion/evaluation/weights"


@pytest.fixture
def published(server) -> WeightsFile:
    (server.folder / "weights.pt").write_bytes(CONTENT)
    return WeightsFile(f"{server.url}/weights.pt", DIGEST)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / CACHE_NAME


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_weights_are_fetched_once(server, published, cache, caplog):
    # what a killed process left is no obstacle
    cache.mkdir(parents=True)
    (cache / ".weights.pt.fetching.lock").touch()
    for _ in range(2):
        file, digest = find_weights(published)
        assert (file, digest) == (cache / "weights.pt", DIGEST)
        assert file.read_bytes() == CONTENT
    assert server.requests == ["/weights.pt"]
    assert files(cache) == ["weights.pt"]
    # a damaged copy is fetched again
    file.write_bytes(CONTENT[:-1] + b"\0")
    with caplog.at_level(logging.WARNING):
        assert find_weights(published)[1] == DIGEST
    assert "is damaged" in caplog.text
    assert file.read_bytes() == CONTENT
    assert len(server.requests) == 2
    # its first digits are enough, and must be right
    assert find_weights(published._replace(sha256=DIGEST[:8]))[1] == DIGEST
    with pytest.raises(OSError, match=f'expected "00000000", got "{DIGEST}'):
        find_weights(published._replace(sha256="00000000"))


@pytest.mark.parametrize("cut_after", [0, len(CONTENT) - 1])
def test_a_broken_connection_leaves_nothing_and_the_next_call_fetches_the_whole(server, published, cache, cut_after):
    server.cut_after = cut_after
    with pytest.raises(OSError, match=f"cannot be fetched from {published.url} .*give its path as the weights"):
        find_weights(published)
    assert files(cache) == []
    server.cut_after = None
    assert find_weights(published)[0].read_bytes() == CONTENT


def test_what_cannot_be_fetched_is_said_with_the_way_out(server, published, cache, monkeypatch):
    # nothing listens at the second
    for url, reason in ((f"{server.url}/missing.pt", "404"), ("http://127.0.0.1:1/weights.pt", "refused")):
        with pytest.raises(OSError, match=rf"from {url} \(.*{reason}.*give its path .* mirror that {MIRROR_VARIABLE}"):
            find_weights(published._replace(url=url))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"weights.pt is not in .*\(HF_HUB_OFFLINE is set\): fetch"):
        find_weights(published)
    assert files(cache) == []
    assert server.requests == ["/missing.pt"]


def test_a_mirror_serves_files_by_their_names(server, published, cache, monkeypatch):
    elsewhere = published._replace(url="http://127.0.0.1:1/weights.pt")
    for mirror in (server.url, f"{server.url}/", server.folder.as_uri()):
        monkeypatch.setenv(MIRROR_VARIABLE, mirror)
        file, _ = find_weights(elsewhere)
        assert file.read_bytes() == CONTENT
        file.unlink()
    assert server.requests == ["/weights.pt"] * 2
    # a mirror is trusted no more than the publisher
    (server.folder / "weights.pt").write_bytes(CONTENT[1:])
    with pytest.raises(OSError, match="invalid hash"):
        find_weights(elsewhere)
    monkeypatch.setenv(MIRROR_VARIABLE, "mirror.example")
    with pytest.raises(OSError, match=f"from mirror.example/weights.pt .*{MIRROR_VARIABLE} names, a URL"):
        find_weights(elsewhere)


def test_a_named_file_is_taken_as_it_is(published, tmp_path, caplog):
    file = tmp_path / "mine.pt"
    file.write_bytes(CONTENT)
    assert find_weights(published, file) == (file, DIGEST)
    assert not caplog.records
    file.write_bytes(b"other")
    assert find_weights(published, str(file))[1] == hashlib.sha256(b"other").hexdigest()
    assert "mine.pt is not the published weights.pt" in caplog.text
    # a folder stands for the file in it, as for clean-fid
    (tmp_path / "weights.pt").write_bytes(CONTENT)
    assert find_weights(published, tmp_path) == (tmp_path / "weights.pt", DIGEST)


def find_in_cache(published, assets):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", assets)
        return find_weights(published)


def test_of_two_processes_one_fetches(server, published, tmp_path):
    server.may_answer.clear()
    with ProcessPoolExecutor(2, multiprocessing.get_context("forkserver")) as pool:
        found = [pool.submit(find_in_cache, published, str(tmp_path)) for _ in range(2)]
        while not server.requests:
            time.sleep(0.01)
        # enough for the second to come to the lock of the first
        time.sleep(0.5)
        server.may_answer.set()
        assert {each.result() for each in found} == {(tmp_path / CACHE_NAME / "weights.pt", DIGEST)}
    assert server.requests == ["/weights.pt"]


def test_published_files():
    torchvision_models = pytest.importorskip("torchvision.models")
    assert torchvision_models.Inception_V3_Weights.IMAGENET1K_V1.url == TORCHVISION_INCEPTION.url
    # torchvision too checks the digits in the name
    assert TORCHVISION_INCEPTION.sha256 in TORCHVISION_INCEPTION.name
    cleanfid = pytest.importorskip("cleanfid.downloads_helper")
    assert cleanfid.inception_url == INCEPTION_2015.url
