"""The models of the page: opened once, shared by everybody, and given out without what a request may change."""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..pipelines.generation import open_model
from ..pipelines.generation_options import Sampler
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..pretrained import DIGITS
from ..utils.devices import best_device
from .app_options import AppOptions


class ModelCache:
    """The models that the page may open, by their names, the first of which it begins with."""

    def __init__(self, options: AppOptions):
        self.options = options
        self.names = tuple(dict.fromkeys(options.model)) or (str(DIGITS),)
        self.takes_any, self.device = options.takes_any_model, options.device or best_device()
        # a lock for whoever loads the model, and the model when that is done
        cache = functools.lru_cache(options.max_loaded_models)
        self._entry: Callable[..., Any] = cache(lambda name: (threading.Lock(), []))

    def pipeline(self, name: str) -> ClassConditionalPipeline:
        """A pipeline of its own on the shared networks; ValueError or OSError where the name is not of one to open."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError("Model is empty: choose one")
        if name not in self.names and not self.takes_any:
            raise ValueError(f"Model is {name!r}, but this page has {' and '.join(map(title, self.names))} only")
        lock, loaded = self._entry(name)
        with lock:
            if not loaded:
                # what is typed is not fetched with the rights of whoever serves the page
                token = None if name in self.names else False
                dtype = getattr(torch, self.options.dtype)
                loaded.append(open_model(name, Sampler(), self.device, dtype, token=token))
        components = {**loaded[0].components, "scheduler": copy.deepcopy(loaded[0].scheduler)}
        options = {name: loaded[0].config[name] for name in ("id2label", "guide_variance")}
        pipeline = ClassConditionalPipeline(**components, **options)
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
    classes = "no classes" if pipeline.num_classes is None else f"{pipeline.num_classes:,} classes"
    parameters = f"{pipeline.unet.num_parameters() / 1e6:,.2f} M parameters"
    return f"{title(name)} · {parameters} · {width}x{height} pixels, {colors} · {classes} · on {pipeline.unet.device}"
