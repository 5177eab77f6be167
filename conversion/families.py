"""What the converters of published networks have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from .pickle_reader import CheckpointError


class Conversion(NamedTuple):
    """A network to be filled, and how the official tensors fill it."""

    network: ModelMixin  # on the meta device, for load_state_dict(assign=True)
    shapes: dict[str, tuple[int, ...]]  # every official tensor that the file must hold
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # official tensors -> the network's state dict


def empty_network(network_class: Callable[..., ModelMixin], options: Mapping[str, Any]) -> ModelMixin:
    """The network on the meta device, ready to be filled."""
    try:
        with init_empty_weights(include_buffers=False):
            return network_class(**options).eval()
    except ValueError as error:
        raise CheckpointError(f"the checkpoint describes no network: {error}") from error


def block_types(has_attention: Sequence[bool], resnet_resampling: bool) -> dict[str, Any]:
    """The options of ``UNet2DModel`` that say which levels have attention, and how they are left."""
    kind, resampling = ("Resnet{}sampleBlock2D", "resnet") if resnet_resampling else ("{}Block2D", "conv")
    down, up = (
        [f"Attn{way}Block2D" if attention else kind.format(way) for attention in has_attention]
        for way in ("Down", "Up")
    )
    types = {"down_block_types": tuple(down), "up_block_types": tuple(reversed(up))}
    return {**types, "downsample_type": resampling, "upsample_type": resampling}


def convert_modules(
    network: ModelMixin,
    places: Iterable[tuple[str, str]],
    inner_names: Mapping[type, Mapping[str, str]],
    query_key_value_axis: int,
    kernel: tuple[int, ...],
) -> Conversion:
    """The conversion of a network whose modules correspond one to one, but for the layout of attention and classes.

    Args:
        network: The network to be filled, with the names of ``UNet2DModel``.
        places: Names of the official modules and of ours.
        inner_names: For each class of our modules the official names inside and ours, three of them where one official
            layer gives queries, keys and values; a class that is not named has its weights directly.
        query_key_value_axis: Where, in (heads, channels), the official order has queries, keys and values: 1 for
            (head, query-key-value, channel), 2 for (head, channel, query-key-value), 0 for heads inside.
        kernel: The kernel size of the convolutions that serve as the official linear layers of attention.
    """
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
