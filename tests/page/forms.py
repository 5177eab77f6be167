"""Forms of the page as a browser sends them."""

from typing import Any

from imagenet64_diffusion.page.generation import View, generate
from imagenet64_diffusion.page.model_cache import ModelCache
from imagenet64_diffusion.page.request import NOTHING, OWN_SCHEDULER


# in the order of the page's controls
GOOD = {
    "model": "",
    "class_labels": ["0", "goldfish", "null"],
    "num_images_per_label": 2,
    "seed": 7,
    "compare": NOTHING,
    "other_scheduler": "DPMSolverMultistepScheduler",
    "other_guidance_scale": 4,
    "guidance_scale": 2.5,
    "num_inference_steps": 4,
    "scheduler": OWN_SCHEDULER,
    "eta": 0,
    "guidance_begin": 0,
    "guidance_end": 1,
}


def form(models: ModelCache, **changes: Any) -> dict[str, Any]:
    """A good form for the first of the models, but for the changes."""
    return {**GOOD, "model": models.names[0], **changes}


def generate_all(filled: dict[str, Any], models: ModelCache) -> tuple[list[View], dict[str, bytes]]:
    """Every view, and the downloads' contents by their names."""
    views, contents = [], {}
    for view in generate(filled, models):
        views.append(view)
        contents.update({file.name: file.read_bytes() for file in view.files or []})
    return views, contents
