"""What the converters of the four programs have in common: checks of named values, and networks to be filled."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from ..utils.nearest_names import perhaps
from .pickle_reader import CheckpointError, require


Shapes = Mapping[str, tuple[int, ...]]
FRACTION = "a number in [0, 1)"


class Conversion(NamedTuple):
    """A network to be filled, and how the official tensors fill it."""

    network: ModelMixin  # on the meta device, for load_state_dict(assign=True)
    shapes: dict[str, tuple[int, ...]]  # every official tensor that the file must hold
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # official tensors -> the network's state dict
    scheduler: SchedulerMixin | None = None  # the published sampler of a denoiser


class Source(NamedTuple):
    """The components of a pipeline with a checkpoint's weights, and what there is to say of it."""

    components: dict[str, Any]
    num_weights: int
    report: dict[str, str]
    card_facts: dict[str, Any]
    write_more: Callable[[Path], None]  # writes what the pipeline does not hold, before its weights get their dtype


def check_value(name: str, value: Any, allowed: Any) -> None:
    """Refuses what is not ``allowed``: a range of whole numbers, a list with that of its own, choices, or FRACTION."""
    if allowed == FRACTION:
        fits, wanted = type(value) in (int, float) and 0 <= value < 1, FRACTION
    elif isinstance(allowed, tuple):
        choices = [str(choice) for choice in allowed]
        fits = type(value) in map(type, allowed) and value in allowed
        wanted = f"one of {', '.join(choices)}{perhaps(value, choices)}"
    elif isinstance(allowed, list):
        (numbers,) = allowed
        fits = type(value) in (list, tuple) and len(value) <= 16
        fits = fits and all(type(number) is int and number in numbers for number in value)
        wanted = f"a list of at most 16 whole numbers in [{numbers[0]}, {numbers[-1]}]"
    else:
        # True and False are ints to Python
        fits = type(value) is int and value in allowed
        wanted = f"a whole number in [{allowed[0]}, {allowed[-1]}]"
    require(fits, f"{name} is {reprlib.repr(value)}, but must be {wanted}")


def empty_network(
    network_class: Callable[..., ModelMixin], options: Mapping[str, Any], whose: str = "the checkpoint"
) -> ModelMixin:
    """The network on the meta device, ready to be filled."""
    try:
        with torch.device("meta"):
            return network_class(**options).eval()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{whose} describes no network: {error}") from error


def block_types(has_attention: Sequence[bool], resnet_resampling: bool) -> dict[str, Any]:
    """The options of ``UNet2DModel`` that say which levels have attention, and how they are left."""
    kind, resampling = ("Resnet{}sampleBlock2D", "resnet") if resnet_resampling else ("{}Block2D", "conv")
    down, up = (
        [f"Attn{way}Block2D" if attention else kind.format(way) for attention in has_attention]
        for way in ("Down", "Up")
    )
    types = {"down_block_types": tuple(down), "up_block_types": tuple(reversed(up))}
    return {**types, "downsample_type": resampling, "upsample_type": resampling}


def block_modules(network: ModelMixin, way: str) -> Iterator[list[str]]:
    """Names of the modules of a ``UNet2DModel``'s "down" or "up": each layer's with its attention, each resampling."""
    for level, block in enumerate(getattr(network, f"{way}_blocks")):
        place = f"{way}_blocks.{level}"
        kinds = [kind for kind in ("resnets", "attentions") if hasattr(block, kind)]
        yield from ([f"{place}.{kind}.{layer}" for kind in kinds] for layer in range(len(block.resnets)))
        if getattr(block, f"{way}samplers") is not None:
            yield [f"{place}.{way}samplers.0"]


def convert_modules(
    network: ModelMixin,
    places: Iterable[tuple[str, str]],
    inner_names: Mapping[type, Mapping[str, str]],
    query_key_value_axis: int,
    kernel: tuple[int, ...],
) -> Conversion:
    """The conversion of a network whose modules correspond one to one, but for the layout of attention and classes."""
    # places and inner_names: official names and ours, of modules and, by their classes, inside of them; three of ours
    # where one official layer gives queries, keys and values, on that axis of (heads, channels): 0 is heads inside
    # kernel: that of the convolutions that serve as linear layers of the official attention
    parameters = dict(network.named_parameters())
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, tuple[list[str], list[int], int]] = {}  # our names, and how to split what lies in one tensor
    for place, our_place in places:
        module = network.get_submodule(our_place)
        heads = getattr(module, "heads", None)
        # attention pooling always has the heads inside
        axis = query_key_value_axis if isinstance(module, Attention) else 0
        for inner, our_inner in inner_names.get(type(module), {"": ""}).items():
            for kind in ("weight", "bias", ""):
                ours = [".".join(filter(None, (our_place, part, kind))) for part in our_inner.split(" ")]
                if ours[0] not in parameters:
                    continue
                name, (rows, *rest) = ".".join(filter(None, (place, inner, kind))), parameters[ours[0]].shape
                if module is getattr(network, "class_embedding", None):
                    rows = network.config.num_class_embeds
                linear = kind == "weight" and heads and len(rest) == 1
                shapes[name] = (rows * len(ours), *rest, *(kernel if linear else ()))
                sizes = [heads, rows // heads] if len(ours) == 3 else []
                sources[name] = ours, [*sizes[:axis], 3, *sizes[axis:]], axis

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights: dict[str, Tensor] = {}
        for name, (ours, sizes, axis) in sources.items():
            tensor = tensors[name]
            parts = tensor.unflatten(0, sizes).movedim(axis, 0) if len(ours) == 3 else tensor[None]
            for our_name, part in zip(ours, parts, strict=True):
                rows, *rest = parameters[our_name].shape
                part = part.reshape(-1, *rest)
                # the row for no class is zero, and no file holds it
                weights[our_name] = part if len(part) == rows else F.pad(part, (0, 0, 0, rows - len(part)))
        return weights

    return Conversion(network, shapes, convert)
