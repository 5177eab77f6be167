"""Models and limits that the tests of the page share."""

import importlib.util
from pathlib import Path

import pytest

from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.page.model_cache import ModelCache
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.page.browser import Browser, find_browser
from imagenet64_diffusion.tests.page.serving import Server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A pipeline folder of random weights: 16x16 grey pixels, classes tabby, goldfish and crane."""
    folder = tmp_path_factory.mktemp("page") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tiny_model) -> ModelCache:
    return ModelCache([str(tiny_model)])


@pytest.fixture(scope="session")
def limits() -> AppOptions:
    return AppOptions(max_images=12, max_steps=50, max_evaluations=400)


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_model):
    """app.py as a process of its own, with the digits and the tiny model."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip('the page needs gradio: pip install "imagenet64-diffusion[app]"')
    from imagenet64_diffusion.pretrained import DIGITS

    with Server(
        tmp_path_factory.mktemp("server"), "--model", DIGITS, tiny_model, "--allow_any_model", "false"
    ) as page:
        yield page


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium that reaches this machine alone."""
    find_browser()
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def browser(chromium, server) -> Browser:
    """Chromium with the page just opened, on a wide screen."""
    chromium.open(server.address)
    return chromium
