"""One model, one server and one browser, which all tests of the page share."""

from pathlib import Path

import pytest

from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.page.model_cache import ModelCache
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.page.browser import Browser
from imagenet64_diffusion.tests.page.serving import Server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A pipeline folder of random weights: 16x16 grey pixels, classes tabby, goldfish and crane."""
    folder = tmp_path_factory.mktemp("page") / "tiny"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tiny_model) -> ModelCache:
    """The tiny model and low limits."""
    limits = {"max_images": 12, "max_steps": 50, "max_evaluations": 400}
    return ModelCache(AppOptions(model=[str(tiny_model)], allow_any_model=False, device="cpu", **limits))


@pytest.fixture(scope="session")
def server(tmp_path_factory, tiny_model):
    """The digits and the tiny model."""
    pytest.importorskip("gradio", reason='pip install "imagenet64-diffusion[app]"')
    folder = tmp_path_factory.mktemp("server")
    page = Server(folder, "--model", DIGITS, tiny_model, "--allow_any_model", "false")
    yield page
    page.terminate()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()
