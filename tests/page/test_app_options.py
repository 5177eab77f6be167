"""Who may reach the page, and so what it opens."""

import pytest

from imagenet64_diffusion.page.app_options import AppOptions


@pytest.mark.parametrize(
    ("options", "environment", "private"),
    [
        *(({"host": host}, {}, True) for host in (None, "127.0.0.1", "localhost", "::1", "[::1]")),
        *(({"host": host}, {}, False) for host in ("0.0.0.0", "::", "192.168.0.7", "example.org")),
        ({"share": True}, {}, False),
        ({}, {"GRADIO_SHARE": "True"}, False),
        ({}, {"GRADIO_SERVER_NAME": "0.0.0.0"}, False),
        ({}, {"SPACE_ID": "someone/space"}, False),
    ],
)
def test_any_model_is_opened_where_only_this_machine_can_ask(monkeypatch, options, environment, private):
    for name in ("GRADIO_SHARE", "GRADIO_SERVER_NAME", "SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert AppOptions(**options).takes_any_model is private
    assert AppOptions(**options, allow_any_model=not private).takes_any_model is not private
