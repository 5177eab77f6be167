"""Who may reach the page, and so what it opens."""

import pytest

from imagenet64_diffusion.app import main
from imagenet64_diffusion.page.app_options import AppOptions


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("GRADIO_SHARE", "GRADIO_SERVER_NAME", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost", "::1", "[::1]"])
def test_only_this_machine(host):
    assert AppOptions(host=host).takes_any_model
    assert not AppOptions(host=host, allow_any_model=False).takes_any_model


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org"])
def test_other_machines_too(host):
    assert not AppOptions(host=host).takes_any_model
    assert AppOptions(host=host, allow_any_model=True).takes_any_model


@pytest.mark.parametrize("name", ["GRADIO_SHARE", "GRADIO_SERVER_NAME", "SPACE_ID"])
def test_the_environment_counts(monkeypatch, name):
    monkeypatch.setenv(name, {"GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}.get(name, "someone/space"))
    assert not AppOptions().takes_any_model


def test_a_shared_page():
    assert not AppOptions(share=True).takes_any_model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_images", "65"], "error: max_images is 65, but must be in [1, 64]"),
        (["--max_steps", "0"], "error: max_steps is 0, but must be at least 1"),
        (["--max_queue", "0"], "error: max_queue is 0, but must be at least 1"),
        (["--port", "70000"], "error: port is 70000, but must be in [1, 65535]"),
    ],
)
def test_wrong_options(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
