"""Forms of the page as a browser sends them."""

from dataclasses import replace
from typing import Any

from imagenet64_diffusion.page.live import View, draw
from imagenet64_diffusion.page.request import NOTHING, OWN_SCHEDULER, Form
from imagenet64_diffusion.page.shelf import ModelShelf


GOOD = Form(
    model="",
    classes=["0", "goldfish", "null"],
    images_per_class=2,
    seed=7,
    compare=NOTHING,
    other_scheduler="DPMSolverMultistepScheduler",
    other_guidance_scale=4,
    guidance_scale=2.5,
    steps=4,
    scheduler=OWN_SCHEDULER,
    eta=0,
    guidance_begin=0,
    guidance_end=1,
)


def form(shelf: ModelShelf, **changes: Any) -> Form:
    """A good form for the first model of a shelf, but for the changes."""
    return replace(GOOD, **{"model": shelf.names[0], **changes})


def draw_all(filled: Form, shelf: ModelShelf, limits: Any) -> tuple[list[View], dict[str, bytes]]:
    """Every view, and the downloads' contents by their names."""
    views, contents = [], {}
    for view in draw(filled, shelf, limits):
        views.append(view)
        contents.update({file.name: file.read_bytes() for file in view.files or []})
    return views, contents
