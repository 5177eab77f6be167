"""A Hub on this machine, and this process or another pointed at it."""

import os
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from imagenet64_diffusion.tests.hub.loopback_hub import LoopbackHub


# Put before a program that runs where this package is not installed.
WITHOUT_THE_PACKAGE = """
import sys

import torch
from diffusers import DiffusionPipeline

def generate(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "pt"}
    return pipeline([0, "goldfish"], generator=generator, **options).images
"""


@pytest.fixture
def hub():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def online(hub, monkeypatch, tmp_path) -> LoopbackHub:
    """Points the Hub's client in this process at the loopback Hub: what HF_ENDPOINT and the like do at its import."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return hub


@pytest.fixture
def run_python(hub, tmp_path, outside_python):
    """Runs a program where this package is not installed. It knows the loopback Hub alone, with an empty cache."""

    def run(program: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.url}
        kept |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(
            [outside_python, "-E", "-c", program],
            cwd=tmp_path,
            env={**kept, **environment},
            capture_output=True,
            text=True,
        )
        assert finished.returncode == 0, finished.stderr

    return run


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
