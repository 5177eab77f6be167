"""The options of the web page."""

import functools
import ipaddress
import os
from dataclasses import dataclass

from ..utils.command_line import CheckedOptions, option


_address = functools.partial(option, group="address")
_model = functools.partial(option, group="model")
_limit = functools.partial(option, group="limits", at_least=1)


@dataclass
class AppOptions(CheckedOptions):
    """Options of the page. The help texts say what each one is."""

    model: list[str] = _model(
        [],
        "Pipeline folders or Hub ids to choose from (default: the handwritten digits that travel with this program).",
        metavar="MODEL",
    )
    allow_any_model: bool | None = _model(
        None,
        "Take any folder of this machine and any Hub id that is typed into the page (default: where only this machine"
        " can reach the page).",
    )
    dtype: str = _model("float32", "What the network computes in.", choices=["float32", "bfloat16", "float16"])
    device: str | None = _model(None, "Such as cpu, cuda, cuda:1, mps (default: the best there is).", metavar="DEVICE")
    max_loaded_models: int = _model(
        3, "Models in memory; the one that was not asked for the longest goes first.", at_least=1
    )

    host: str | None = _address(
        None,
        "Address to listen on (default: GRADIO_SERVER_NAME, else 127.0.0.1, which is this machine alone).",
        metavar="HOST",
    )
    port: int | None = _address(
        None, "Port (default: GRADIO_SERVER_PORT, else the first free one from 7860).", at_least=1, at_most=65_535
    )
    share: bool = _address(False, "Ask Gradio's servers for a public address, through which everything then goes.")

    # a request is one batch, as in generate_images.py by default: so they are the same images
    max_images: int = _limit(36, "Most images of a request, from 1 to 64.", at_most=64)
    max_steps: int = _limit(1000, "Most denoising steps of a request, at least 1.")
    max_evaluations: int = _limit(
        10_000, "Most evaluations of the network for a request, at least 1; a guided step takes two for each image."
    )
    max_concurrent: int = _limit(2, "Requests that are sampled at the same time, at least 1; the others wait.")
    max_queue: int = _limit(20, "Requests that wait, at least 1; further ones are turned away.")

    @property
    def takes_any_model(self) -> bool:
        """Whether the page opens what is typed into it: by default where only this machine can reach the page."""
        if self.allow_any_model is not None:
            return self.allow_any_model
        if self.share or os.environ.get("GRADIO_SHARE", "").lower() == "true" or "SPACE_ID" in os.environ:
            return False
        host = self.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
        try:
            return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return False
