"""How the original program's checkpoints map to ours, both ways: a network's options, its weights and their names."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from ..models.unet_class_conditional import LAYER_TYPE_ALIASES


# The original's names inside each of its layer types -> ours. None marks weights that have no effect on its output:
# its class attention contracts the attention matrix with itself alone, so queries and keys do nothing.
_LAYER_WEIGHTS: dict[str, dict[str, str | None]] = {
    "resnet": {
        "t_mlp.1": "time_projection",
        "c_mlp.1": "class_projection",
        "block1.proj": "conv1",
        "block1.norm": "norm1",
        "block2.proj": "conv2",
        "block2.norm": "norm2",
        "res_conv": "shortcut",
    },
    "convnext": {
        "block.0": "depthwise_conv",
        "block.1": "norm",
        "block.2": "expand_conv",
        "block.4": "project_conv",
        "timeProj": "time_projection",
        "clsProj": "class_projection",
        "res": "shortcut",
    },
    "class_attention": {
        "LN": "norm",
        "out_emb.0": "out_conv",
        "out_emb.1": "out_norm",
        "Q_emb": None,
        "K_emb": None,
    },
    "self_attention": {"LN": "norm", "KQV_weight": "key_query_value", "O_conv": "out_conv"},
    "channel_attention": {"conv": "conv"},
}

# The attention_patch_size of checkpoints whose JSON file, being older, does not say it.
ATTENTION_RESOLUTION = 16

_TOP_WEIGHTS = {
    "unet.inConv": "conv_in",
    "unet.out": "head.conv",
    "unet.t_emb.0": "time_embedding.linear_1",
    "unet.t_emb.2": "time_embedding.linear_2",
}


def has_class_table(params: Mapping[str, Any]) -> bool:
    """Whether the network with these parameters knows classes."""
    return params["c_dim"] is not None and params["c_dim"] > 0


def _level_widths(params: Mapping[str, Any]) -> list[int]:
    """The width of the stem, then that of each level."""
    return [params["embCh"] * 2 ** (params["chMult"] * level) for level in range(params["num_blocks"] + 1)]


def original_unet_config(params: Mapping[str, Any], time_embedding_type: str = "original_sine") -> dict[str, Any]:
    """The options of `ClassConditionalUNet2DModel` for a network with the parameters of an original JSON file.

    Args:
        params: The content of a ``model_params_*.json`` file.
        time_embedding_type: The released checkpoints were trained with ``"original_alternating"`` and drawn, one image
            at a time, with ``"original_sine"``; checkpoints of the corrected code need ``"original_interleaved"``.
    """
    has_classes = has_class_table(params)
    return {
        "sample_size": 64,
        "in_channels": params["inCh"],
        "stem_channels": params["embCh"],
        "block_out_channels": tuple(_level_widths(params)[1:]),
        "layer_types": tuple(LAYER_TYPE_ALIASES[name] for name in params["blk_types"]),
        "num_class_embeds": params["num_classes"] if has_classes else None,
        "time_embed_dim": params["t_dim"],
        "class_embed_dim": params["c_dim"] if has_classes else 512,
        "attention_patch_size": params.get("atn_resolution", ATTENTION_RESOLUTION),
        "time_embedding_type": time_embedding_type,
        "class_attention_type": "identity",
        "output_head_type": "original",
        "num_train_timesteps": params["T"],
    }


def original_weight_name(name: str, params: Mapping[str, Any]) -> str | None:
    """Our name for one of the original's weights; None for a weight without effect.

    Raises:
        KeyError: If the original has no weight of that name.
    """
    if name == "c_emb.weight":
        return "class_embedding.weight"
    stem, _, kind = name.rpartition(".")  # "unet.inConv", "weight"
    if stem in _TOP_WEIGHTS:
        return f"{_TOP_WEIGHTS[stem]}.{kind}"
    if match := re.fullmatch(r"out_(mean|var)\.(.+)", stem):
        layer = {"mean": "head.noise_layer", "var": "head.variance_layer"}[match[1]]
        return f"{layer}.{_LAYER_WEIGHTS['convnext'][match[2]]}.{kind}"
    if stem == "unet.intermediate.1.conv":
        return f"mid_block.channel_attention.conv.{kind}"
    if match := re.fullmatch(r"unet\.(downBlocks|upBlocks)\.(\d+)", stem):
        level, resample = int(match[2]) // 2, {"downBlocks": "downsample", "upBlocks": "upsample"}[match[1]]
        return f"{match[1].removesuffix('Blocks')}_blocks.{level}.{resample}.{kind}"
    if match := re.fullmatch(r"unet\.(downBlocks|intermediate|upBlocks)\.(\d+)\.block\.(\d+)\.(.+)", stem):
        place, index, layer_index, inner = match[1], int(match[2]), int(match[3]), match[4]
        layer_type = LAYER_TYPE_ALIASES[params["blk_types"][layer_index]]
        inner_name = _LAYER_WEIGHTS[layer_type][inner]
        if inner_name is None:
            return None
        return f"{_stack_name(place, index, params['num_blocks'])}.layers.{layer_index}.{inner_name}.{kind}"
    raise KeyError(name)


def _stack_name(place: str, index: int, num_levels: int) -> str:
    """Where a block of the original stands among our stacks. Its lists hold the blocks and the resampling in turn."""
    if place == "downBlocks":
        return f"down_blocks.{index // 2}.stack"
    if place == "intermediate":
        return f"mid_block.stack{1 if index == 0 else 2}"
    if index < 2 * num_levels:
        return f"up_blocks.{index // 2}.stack"
    return f"head.stack{index - 2 * num_levels + 1}"


def map_original_weights(state_dict: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of `ClassConditionalUNet2DModel` with the weights of an original checkpoint.

    Args:
        state_dict: The original's state dict, without prefixes such as ``"module."``.
        params: The content of the ``model_params_*.json`` file that belongs to it.

    Raises:
        KeyError: If the checkpoint holds a weight that the original does not have.
    """
    weights = {}
    for name, tensor in state_dict.items():
        our_name = original_weight_name(name, params)
        if our_name is not None:
            weights[our_name] = reshape_weight(our_name, tensor)
    return weights


def reshape_weight(our_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One of the original's weights, or one of its optimizer's moments, in the shape of ours."""
    if our_name == "class_embedding.weight":
        # a linear map of one-hot vectors, (class_embed_dim, classes) -> a table with the null class as its last row
        return torch.cat([tensor.T, tensor.new_zeros(1, tensor.shape[0])])
    if our_name.endswith(".conv.weight") and tensor.shape[:3] == (1, 1, 1):
        return tensor[0]  # channel attention: the original slides over the channels with a two-dimensional convolution
    return tensor


def map_to_original_weights(
    weights: Mapping[str, torch.Tensor], params: Mapping[str, Any], unused: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The original's state dict for the weights of our network: the inverse of `map_original_weights`.

    Args:
        weights: The state dict of a `ClassConditionalUNet2DModel` with the options of `original_unet_config`.
        params: The content of the ``model_params_*.json`` file that shall describe it.
        unused: The original's weights without effect, by its names; those that are missing become zeros.

    Returns:
        Every weight of the original, in its order.
    """
    state_dict = {}
    for name, shape in original_weight_shapes(params).items():
        our_name = original_weight_name(name, params)
        if our_name is None:
            state_dict[name] = unused[name] if name in unused else torch.zeros(shape)
        elif our_name == "class_embedding.weight":
            state_dict[name] = weights[our_name][:-1].T.contiguous()
        else:
            state_dict[name] = weights[our_name].reshape(shape)
    return state_dict


# ---------------------------------------------------------------------- what a checkpoint must hold


def original_weight_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of the original's network with its shape, in the order in which the original registers them.

    It is the order of its state dict and of its optimizer's parameters. Computed from the parameters alone, so that a
    file can be compared with it before anything is built.

    Args:
        params: The content of a ``model_params_*.json`` file.
    """
    return dict(_all_shapes(params))


def _all_shapes(params: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    channels, time_dim = params["inCh"], params["t_dim"]
    stem, *widths = _level_widths(params)
    levels = list(itertools.pairwise([stem, *widths]))

    yield from _conv("unet.inConv", channels, stem, 7)
    for index, (lower, upper) in enumerate(levels):
        yield from _stack(f"unet.downBlocks.{2 * index}", lower, upper, params)
        yield from _conv(f"unet.downBlocks.{2 * index + 1}", upper, upper, 3)
    yield from _stack("unet.intermediate.0", widths[-1], widths[-1], params)
    yield from _channel_attention("unet.intermediate.1", widths[-1])
    yield from _stack("unet.intermediate.2", widths[-1], widths[-1], params)
    for index, (lower, upper) in enumerate(reversed(levels)):
        yield from _conv(f"unet.upBlocks.{2 * index}", upper, upper, 4)
        yield from _stack(f"unet.upBlocks.{2 * index + 1}", 2 * upper, lower, params)
    yield from _stack(f"unet.upBlocks.{2 * len(levels)}", stem, stem, params)
    yield from _stack(f"unet.upBlocks.{2 * len(levels) + 1}", stem, 2 * channels, params)
    yield from _conv("unet.out", 2 * channels, 2 * channels, 7)
    yield from _linear("unet.t_emb.0", time_dim, time_dim)
    yield from _linear("unet.t_emb.2", time_dim, time_dim)
    if has_class_table(params):
        yield "c_emb.weight", (params["c_dim"], params["num_classes"])
    for name in ("out_mean", "out_var"):
        yield from _convnext_body(name, channels, channels)


def _stack(
    name: str, in_channels: int, out_channels: int, params: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index, layer in enumerate(params["blk_types"]):
        width = in_channels if index == 0 else out_channels
        yield from _layer(f"{name}.block.{index}", layer, width, out_channels, params)


def _layer(
    name: str, layer: str, in_channels: int, out_channels: int, params: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    time_dim, class_dim = params["t_dim"], params["c_dim"] if has_class_table(params) else None
    changes_width = in_channels != out_channels
    if layer == "res":
        yield from _linear(f"{name}.t_mlp.1", time_dim, out_channels)
        if class_dim is not None:
            yield from _linear(f"{name}.c_mlp.1", class_dim, out_channels)
        for block, width in (("block1", in_channels), ("block2", out_channels)):
            yield from _conv(f"{name}.{block}.proj", width, out_channels, 3)
            yield from _norm(f"{name}.{block}.norm", out_channels)
        if changes_width:
            yield from _conv(f"{name}.res_conv", in_channels, out_channels, 1)
    elif layer == "conv":
        yield from _convnext_body(name, in_channels, out_channels)
        if changes_width:
            yield from _conv(f"{name}.res", in_channels, out_channels, 1)
        yield from _linear(f"{name}.timeProj", time_dim, in_channels)
        if class_dim is not None:
            yield from _linear(f"{name}.clsProj", class_dim, in_channels)
    elif layer == "clsAtn":
        # check_params refuses such a layer where there are no classes
        class_dim = cast(int, class_dim)
        yield from _linear(f"{name}.Q_emb", class_dim, out_channels)
        yield from _linear(f"{name}.K_emb", class_dim, out_channels)
        yield from _conv(f"{name}.out_emb.0", out_channels, out_channels, 1)
        yield from _norm(f"{name}.out_emb.1", out_channels)
        yield from _norm(f"{name}.LN", out_channels)
    elif layer == "atn":
        yield from _conv(f"{name}.KQV_weight", out_channels, 3 * out_channels, 1)
        yield from _conv(f"{name}.O_conv", out_channels, out_channels, 1)
        yield from _norm(f"{name}.LN", out_channels)
    else:
        yield from _channel_attention(name, out_channels)


def _convnext_body(name: str, in_channels: int, out_channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.block.0.weight", (in_channels, 1, 7, 7)
    yield f"{name}.block.0.bias", (in_channels,)
    yield from _norm(f"{name}.block.1", in_channels)
    yield from _conv(f"{name}.block.2", in_channels, 2 * in_channels, 1)
    yield from _conv(f"{name}.block.4", 2 * in_channels, out_channels, 1)


def _channel_attention(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    kernel_size = int(abs(math.log2(channels) / 2 + 1 / 2))
    yield f"{name}.conv.weight", (1, 1, 1, kernel_size + 1 - kernel_size % 2)


def _conv(name: str, in_channels: int, out_channels: int, kernel_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_channels, in_channels, kernel_size, kernel_size)
    yield f"{name}.bias", (out_channels,)


def _linear(name: str, in_features: int, out_features: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out_features, in_features)
    yield f"{name}.bias", (out_features,)


def _norm(name: str, channels: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (channels,)
    yield f"{name}.bias", (channels,)
