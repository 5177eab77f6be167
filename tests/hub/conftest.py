"""A Hub on this machine, and this process or another pointed at it."""

import os
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN, LoopbackHub


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def online(hub, monkeypatch, tmp_path) -> LoopbackHub:
    """Points the Hub's client in this process at the loopback Hub: what HF_ENDPOINT and the like do at its import."""
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return hub


@pytest.fixture
def logged_in(online, monkeypatch) -> LoopbackHub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return online


@pytest.fixture
def run_python(hub, tmp_path, outside_python):
    """Runs a program where this package is not installed. It knows the loopback Hub alone, with an empty cache."""

    def run(program: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        command = [outside_python, "-E", "-c", program]
        finished = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr

    return run


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
