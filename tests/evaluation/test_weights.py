import hashlib
import logging
import os
import subprocess
import sys
import time

import pytest

from imagenet64_diffusion.evaluation.weights import (
    INCEPTION_2015,
    MIRROR_VARIABLE,
    TORCHVISION_INCEPTION,
    WeightsFile,
    find_weights,
)


CONTENT = bytes(range(256)) * 5000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def published(server) -> WeightsFile:
    (server.folder / "weights.pt").write_bytes(CONTENT)
    return WeightsFile("weights.pt", f"{server.url}/weights.pt", DIGEST)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def visible(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_weights_are_fetched_once(server, published, cache):
    for _ in range(2):
        file, digest = find_weights(published, cache_dir=cache)
        assert (file, digest) == (cache / "weights.pt", DIGEST)
        assert file.read_bytes() == CONTENT
    assert server.requests == ["/weights.pt"]
    assert visible(cache) == ["weights.pt"]


def test_first_digits_of_a_digest_are_enough_and_must_be_right(server, published, cache):
    assert find_weights(WeightsFile("weights.pt", published.url, DIGEST[:8]), cache_dir=cache)[1] == DIGEST
    with pytest.raises(ValueError, match=f"SHA-256 is {DIGEST} instead of 00000000: not kept"):
        find_weights(WeightsFile("other.pt", published.url, "00000000"), cache_dir=cache)
    assert visible(cache) == ["weights.pt"]


@pytest.mark.parametrize("cut_after", [0, 1, 1 << 20, len(CONTENT) - 1])
def test_a_broken_connection_leaves_nothing_and_the_next_call_fetches_the_whole(server, published, cache, cut_after):
    server.cut_after = cut_after
    with pytest.raises(ValueError, match=rf"gave {cut_after:,} bytes whose SHA-256 .*not kept; .*give its path"):
        find_weights(published, cache_dir=cache)
    assert visible(cache) == []
    server.cut_after = None
    assert find_weights(published, cache_dir=cache)[0].read_bytes() == CONTENT


def test_what_a_killed_process_left_is_no_obstacle(published, cache):
    cache.mkdir()
    (cache / ".writing.weights.pt").write_bytes(CONTENT[:1000])
    (cache / ".weights.pt.fetching.lock").touch()
    assert find_weights(published, cache_dir=cache)[0].read_bytes() == CONTENT
    assert visible(cache) == ["weights.pt"]


def test_a_damaged_copy_is_fetched_again(server, published, cache, caplog):
    file, _ = find_weights(published, cache_dir=cache)
    file.write_bytes(CONTENT[:-1] + b"\0")
    with caplog.at_level(logging.WARNING):
        assert find_weights(published, cache_dir=cache)[1] == DIGEST
    assert "is damaged" in caplog.text
    assert file.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_missing_file_and_a_machine_without_network_are_said_with_the_way_out(server, published, cache, monkeypatch):
    missing = WeightsFile("missing.pt", f"{server.url}/missing.pt", DIGEST)
    with pytest.raises(OSError, match=f"missing.pt cannot be fetched from {server.url}.*404.*give its path as the"):
        find_weights(missing, cache_dir=cache)
    # nothing listens there
    with pytest.raises(OSError, match=rf"\(.*refused\): fetch .* a mirror that {MIRROR_VARIABLE} names"):
        find_weights(WeightsFile("weights.pt", "http://127.0.0.1:1/weights.pt", DIGEST), cache_dir=cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"weights.pt is not in .* and HF_HUB_OFFLINE is set: fetch"):
        find_weights(published, cache_dir=cache)
    assert visible(cache) == []
    assert server.requests == ["/missing.pt"]


def test_a_mirror_serves_files_by_their_names(server, cache, monkeypatch, tmp_path):
    (server.folder / "mirror").mkdir()
    (server.folder / "mirror" / "weights.pt").write_bytes(CONTENT)
    elsewhere = WeightsFile("weights.pt", "http://127.0.0.1:1/weights.pt", DIGEST)
    for mirror in (f"{server.url}/mirror", f"{server.url}/mirror/", (server.folder / "mirror").as_uri()):
        monkeypatch.setenv(MIRROR_VARIABLE, mirror)
        file, _ = find_weights(elsewhere, cache_dir=cache / mirror.replace("/", "_"))
        assert file.read_bytes() == CONTENT
    assert server.requests == ["/mirror/weights.pt"] * 2
    # a mirror is trusted no more than the publisher
    (server.folder / "mirror" / "weights.pt").write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match="not kept"):
        find_weights(elsewhere, cache_dir=tmp_path / "other")
    monkeypatch.setenv(MIRROR_VARIABLE, "mirror.example")
    with pytest.raises(ValueError, match=f"{MIRROR_VARIABLE} is mirror.example, but must be a URL"):
        find_weights(elsewhere, cache_dir=tmp_path / "other")


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
    with pytest.raises(OSError, match=r"absent.pt: no such file; it must be a copy of weights.pt from http"):
        find_weights(published, tmp_path / "absent.pt")


FIND = """
import sys
from imagenet64_diffusion.evaluation.weights import WeightsFile, find_weights
print("begin", flush=True)
print(*find_weights(WeightsFile("weights.pt", sys.argv[1], sys.argv[2])))
"""


def test_of_two_processes_one_fetches_into_the_cache_of_hugging_face(server, published, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf")}
    environment.pop("HF_ASSETS_CACHE", None)
    command = [sys.executable, "-c", FIND, published.url, DIGEST]
    server.may_answer.clear()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == b"begin\n"
    # enough for the second to come to the lock of the first
    time.sleep(0.5)
    server.may_answer.set()
    output = {process.communicate(timeout=60)[0].decode().strip() for process in processes}
    file = tmp_path / "hf" / "assets" / "imagenet64_diffusion" / "evaluation" / "weights" / "weights.pt"
    assert output == {f"{file} {DIGEST}"}
    assert server.requests == ["/weights.pt"]


def test_published_files():
    assert len(INCEPTION_2015.sha256) == 64
    assert INCEPTION_2015.url.endswith(INCEPTION_2015.name)
    torchvision_models = pytest.importorskip("torchvision.models")
    assert torchvision_models.Inception_V3_Weights.IMAGENET1K_V1.url == TORCHVISION_INCEPTION.url
    # torchvision too checks the digits in the name
    assert TORCHVISION_INCEPTION.sha256 in TORCHVISION_INCEPTION.name
    cleanfid = pytest.importorskip("cleanfid.downloads_helper")
    assert cleanfid.inception_url == INCEPTION_2015.url
