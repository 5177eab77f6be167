"""How the original program's checkpoints map to ours: the network's options and the names of its weights."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from .unet_class_conditional import LAYER_TYPE_ALIASES


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
        "res_conv": "shortcut",
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

_TOP_WEIGHTS = {
    "unet.inConv": "conv_in",
    "unet.out": "head.conv",
    "unet.t_emb.0": "time_embedding.linear_1",
    "unet.t_emb.2": "time_embedding.linear_2",
}


def original_unet_config(params: Mapping[str, Any], time_embedding_type: str = "original_sine") -> dict[str, Any]:
    """The options of `ClassConditionalUNet2DModel` for a network with the parameters of an original JSON file.

    Args:
        params: The content of a ``model_params_*.json`` file.
        time_embedding_type: The released checkpoints were trained with ``"original_alternating"`` and drawn, one image
            at a time, with ``"original_sine"``; checkpoints of the corrected code need ``"original_interleaved"``.
    """
    levels = range(1, params["num_blocks"] + 1)
    has_classes = params["c_dim"] is not None and params["c_dim"] > 0
    return {
        "sample_size": 64,
        "in_channels": params["inCh"],
        "stem_channels": params["embCh"],
        "block_out_channels": tuple(params["embCh"] * 2 ** (params["chMult"] * level) for level in levels),
        "layer_types": tuple(LAYER_TYPE_ALIASES[name] for name in params["blk_types"]),
        "num_class_embeds": params["num_classes"] if has_classes else None,
        "time_embed_dim": params["t_dim"],
        "class_embed_dim": params["c_dim"] if has_classes else 512,
        "attention_patch_size": params.get("atn_resolution", 16),
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
            weights[our_name] = _reshape_weight(our_name, tensor)
    return weights


def _reshape_weight(our_name: str, tensor: torch.Tensor) -> torch.Tensor:
    if our_name == "class_embedding.weight":
        # a linear map of one-hot vectors, (class_embed_dim, classes) -> a table with the null class as its last row
        return torch.cat([tensor.T, tensor.new_zeros(1, tensor.shape[0])])
    if our_name.endswith(".conv.weight") and tensor.shape[:3] == (1, 1, 1):
        return tensor[0]  # channel attention: the original slides over the channels with a two-dimensional convolution
    return tensor
