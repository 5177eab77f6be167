"""A Hub on this machine, and this process or another pointed at it."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN, LoopbackHub


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


def point_at(url: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Points the Hub's client in this process at a Hub: what HF_ENDPOINT and the like do at its import."""
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)


@pytest.fixture
def online(hub, monkeypatch, tmp_path) -> LoopbackHub:
    """Points the Hub's client in this process at the loopback Hub."""
    point_at(hub.url, tmp_path, monkeypatch)
    return hub


@pytest.fixture
def logged_in(online, monkeypatch) -> LoopbackHub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return online


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
