"""The options of the web page."""

import ipaddress
import os
from dataclasses import dataclass

from ..utils.command_line import CheckedOptions, option, option_list


# All images of a request are sampled as one batch, which is generate_images.py's own: so they are the same images.
_BATCH_SIZE = 64


@dataclass
class AppOptions(CheckedOptions):
    """Options of the page. The help texts say what each one is."""

    model: list[str] = option_list(
        [],
        "Pipeline folders or Hub ids to choose from (default: the handwritten digits that travel with this program).",
        group="model",
        metavar="MODEL",
    )
    allow_any_model: bool | None = option(
        None,
        "Take any folder of this machine and any Hub id that is typed into the page (default: where only this machine"
        " can reach the page).",
        group="model",
    )
    dtype: str = option(
        "float32", "What the network computes in.", group="model", choices=["float32", "bfloat16", "float16"]
    )
    device: str | None = option(
        None, "Such as cpu, cuda, cuda:1, mps (default: the best there is).", group="model", metavar="DEVICE"
    )
    max_loaded_models: int = option(
        3, "Models in memory; the one that was not asked for the longest goes first.", at_least=1, group="model"
    )

    host: str | None = option(
        None,
        "Address to listen on (default: GRADIO_SERVER_NAME, else 127.0.0.1, which is this machine alone).",
        group="address",
        metavar="HOST",
    )
    port: int | None = option(
        None,
        "Port (default: GRADIO_SERVER_PORT, else the first free one from 7860).",
        at_least=1,
        at_most=65_535,
        group="address",
    )
    share: bool = option(
        False, "Ask Gradio's servers for a public address, through which everything then goes.", group="address"
    )

    max_images: int = option(
        36, "Most images of a request, from 1 to 64.", at_least=1, at_most=_BATCH_SIZE, group="limits"
    )
    max_steps: int = option(1000, "Most denoising steps of a request, at least 1.", at_least=1, group="limits")
    max_evaluations: int = option(
        10_000,
        "Most evaluations of the network for a request, at least 1; a guided step takes two for each image.",
        at_least=1,
        group="limits",
    )
    max_concurrent: int = option(
        2, "Requests that are sampled at the same time, at least 1; the others wait.", at_least=1, group="limits"
    )
    max_queue: int = option(
        20, "Requests that wait, at least 1; further ones are turned away.", at_least=1, group="limits"
    )

    @property
    def takes_any_model(self) -> bool:
        """Whether the page opens what is typed into it."""
        return self.is_private if self.allow_any_model is None else self.allow_any_model

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the page."""
        if self.share or os.environ.get("GRADIO_SHARE", "").lower() == "true" or "SPACE_ID" in os.environ:
            return False
        host = self.host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
        try:
            return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
        except ValueError:
            return False
