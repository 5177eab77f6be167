"""The models of the page: opened once, shared by everybody, and given out without what a request may change."""

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..pipelines.generation import open_model
from ..pipelines.generation_options import Sampler
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..pretrained import DIGITS


class ModelCache:
    """Pipelines by their names.

    Args:
        names: Folders or Hub ids to choose from; the first is what the page begins with.
        takes_any: Whether others are opened too.
        device, dtype: Where, and in what, the networks compute.
        max_loaded: How many are kept in memory.
    """

    def __init__(
        self,
        names: Sequence[str],
        takes_any: bool = False,
        device: str = "cpu",
        dtype: str = "float32",
        max_loaded: int = 3,
    ):
        self.names = tuple(dict.fromkeys(names)) or (str(DIGITS),)
        self.takes_any, self.device, self.dtype = takes_any, device, dtype
        # a lock for whoever loads the model, and the model when that is done
        self._entry: Callable[..., Any] = functools.lru_cache(max_loaded)(lambda name: (threading.Lock(), []))

    def pipeline(self, name: str) -> ClassConditionalPipeline:
        """A pipeline of its own on the shared network, whose scheduler may be changed and stepped.

        ValueError if the page does not take the name or there is no such pipeline, OSError if nothing has that name.
        """
        if not isinstance(name, str) or not name.strip():
            raise ValueError("Model is empty: choose one")
        if name not in self.names and not self.takes_any:
            raise ValueError(f"Model is {name!r}, but this page has {' and '.join(map(title, self.names))} only")
        lock, loaded = self._entry(name)
        with lock:
            if not loaded:
                # what is typed is not fetched with the rights of whoever serves the page
                token = None if name in self.names else False
                dtype = getattr(torch, self.dtype)
                loaded.append(open_model(name, Sampler(), self.device, dtype, token=token))
        unet, scheduler, config = loaded[0].unet, copy.deepcopy(loaded[0].scheduler), loaded[0].config
        pipeline = ClassConditionalPipeline(unet, scheduler, config.id2label, config.guide_variance)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def title(name: str) -> str:
    """What a person calls a model by."""
    return "the digits of this package" if name == str(DIGITS) else name


def facts(name: str, pipeline: ClassConditionalPipeline) -> str:
    """Its title, size, images and classes in one line."""
    config = pipeline.unet.config
    height, width = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    colors = {1: "grey", 3: "RGB"}.get(config.in_channels, f"{config.in_channels} channels")
    classes = "no classes" if config.num_class_embeds is None else f"{config.num_class_embeds:,} classes"
    parameters = f"{pipeline.unet.num_parameters() / 1e6:,.2f} M parameters"
    return f"{title(name)} · {parameters} · {width}x{height} pixels, {colors} · {classes} · on {pipeline.unet.device}"
