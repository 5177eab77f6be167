"""The original's network in terms of ours, both ways: options, names and shapes of weights, optimizer state."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..models.unet_class_conditional import (
    LAYER_TYPE_ALIASES,
    ChannelAttentionLayer,
    ClassAttentionLayer,
    ClassConditionalUNet2DModel,
    ConvNextLayer,
    LayerStack,
    OriginalTimesteps,
    ResnetLayer,
    SelfAttentionLayer,
)
from ..utils.nearest_names import perhaps
from .errors import CheckpointError


TIME_EMBEDDINGS = ("original_sine", "original_alternating", "original_interleaved")

# The original's names inside each layer -> ours, in the order in which it registers them. Queries and keys have no
# effect on its output, as its class attention contracts the attention matrix with itself alone: ours has none.
_LAYER_WEIGHTS: dict[type[nn.Module], dict[str, str | None]] = {
    ResnetLayer: {
        "t_mlp.1": "time_projection",
        "c_mlp.1": "class_projection",
        "block1.proj": "conv1",
        "block1.norm": "norm1",
        "block2.proj": "conv2",
        "block2.norm": "norm2",
        "res_conv": "shortcut",
    },
    ConvNextLayer: {
        "block.0": "depthwise_conv",
        "block.1": "norm",
        "block.2": "expand_conv",
        "block.4": "project_conv",
        "res": "shortcut",
        "timeProj": "time_projection",
        "clsProj": "class_projection",
    },
    ClassAttentionLayer: {
        "Q_emb": None,
        "K_emb": None,
        "out_emb.0": "out_conv",
        "out_emb.1": "out_norm",
        "LN": "norm",
    },
    SelfAttentionLayer: {"KQV_weight": "key_query_value", "O_conv": "out_conv", "LN": "norm"},
    ChannelAttentionLayer: {"conv": "conv"},
}


class OriginalWeight(NamedTuple):
    """A weight of the original: its name, its shape, and the name of ours, None for one without effect."""

    name: str
    our_name: str | None
    shape: tuple[int, ...]


def original_unet_config(params: Mapping[str, Any], time_embedding_type: str = "original_sine") -> dict[str, Any]:
    """The options of `ClassConditionalUNet2DModel` for a network with the parameters of an original JSON file.

    Args:
        params: The content of a ``model_params_*.json`` file.
        time_embedding_type: One of `TIME_EMBEDDINGS`. The released checkpoints were trained with
            ``"original_alternating"`` and sampled from, one image at a time, with ``"original_sine"``; checkpoints of
            the corrected code need ``"original_interleaved"``.
    """
    has_classes = params["c_dim"] is not None and params["c_dim"] > 0
    levels = range(1, params["num_blocks"] + 1)
    return {
        "sample_size": 64,
        "in_channels": params["inCh"],
        "stem_channels": params["embCh"],
        "block_out_channels": tuple(params["embCh"] * 2 ** (params["chMult"] * level) for level in levels),
        "layer_types": tuple(LAYER_TYPE_ALIASES[name] for name in params["blk_types"]),
        "num_class_embeds": params["num_classes"] if has_classes else None,
        "time_embed_dim": params["t_dim"],
        "class_embed_dim": params["c_dim"] if has_classes else 512,
        # older files do not say it
        "attention_patch_size": params.get("atn_resolution", 16),
        "time_embedding_type": time_embedding_type,
        "class_attention_type": "identity",
        "output_head_type": "original",
        "num_train_timesteps": params["T"],
    }


def build_empty_unet(
    params: Mapping[str, Any], time_embedding: str = "original_sine", params_name: str = "the JSON file"
) -> ClassConditionalUNet2DModel:
    """The network without weights: its parameters take no memory, ``load_state_dict(assign=True)`` gives them some.

    Raises:
        CheckpointError: If there is no such network.
    """
    if time_embedding not in TIME_EMBEDDINGS:
        raise CheckpointError(
            f"time_embedding is {time_embedding!r}, but must be one of {', '.join(TIME_EMBEDDINGS)}"
            f"{perhaps(time_embedding, TIME_EMBEDDINGS)}"
        )
    try:
        with torch.device("meta"):
            unet = ClassConditionalUNet2DModel(**original_unet_config(params, time_embedding))
    except ValueError as error:
        raise CheckpointError(f"{params_name} describes no network: {error}") from error
    # its tables are no weights, and no file holds them
    unet.time_encoding = OriginalTimesteps(params["t_dim"], params["T"], time_embedding)
    return unet.eval()


def original_layout(unet: ClassConditionalUNet2DModel) -> Iterator[OriginalWeight]:
    """Every weight of the original's network, in the order of its state dict and of its optimizer's parameters.

    Args:
        unet: A network with the options of `original_unet_config`; it may be on the meta device.
    """
    for name, our_name in _blocks(len(unet.config.block_out_channels)):
        module = unet.get_submodule(our_name)
        if isinstance(module, LayerStack):
            for index, layer in enumerate(module.layers):
                yield from _layer(f"{name}.block.{index}", f"{our_name}.layers.{index}", layer, unet)
        else:
            yield from _layer(name, our_name, module, unet)
        if our_name == "time_embedding.linear_2" and unet.class_embedding is not None:
            yield OriginalWeight("c_emb.weight", "class_embedding.weight", _class_table_shape(unet))


def _blocks(num_levels: int) -> Iterator[tuple[str, str]]:
    """The original's blocks and ours; its lists hold stacks of layers and resampling in turn."""
    yield "unet.inConv", "conv_in"
    for level in range(num_levels):
        yield f"unet.downBlocks.{2 * level}", f"down_blocks.{level}.stack"
        yield f"unet.downBlocks.{2 * level + 1}", f"down_blocks.{level}.downsample"
    for index, module in enumerate(("stack1", "channel_attention", "stack2")):
        yield f"unet.intermediate.{index}", f"mid_block.{module}"
    for level in range(num_levels):
        yield f"unet.upBlocks.{2 * level}", f"up_blocks.{level}.upsample"
        yield f"unet.upBlocks.{2 * level + 1}", f"up_blocks.{level}.stack"
    yield f"unet.upBlocks.{2 * num_levels}", "head.stack1"
    yield f"unet.upBlocks.{2 * num_levels + 1}", "head.stack2"
    yield "unet.out", "head.conv"
    yield "unet.t_emb.0", "time_embedding.linear_1"
    yield "unet.t_emb.2", "time_embedding.linear_2"
    yield "out_mean", "head.noise_layer"
    yield "out_var", "head.variance_layer"


def _layer(name: str, our_name: str, layer: Any, unet: ClassConditionalUNet2DModel) -> Iterator[OriginalWeight]:
    for inner, our_inner in _LAYER_WEIGHTS.get(type(layer), {"": ""}).items():
        prefix = f"{name}.{inner}".rstrip(".")
        if our_inner is None:
            channels = layer.norm.num_channels
            yield OriginalWeight(f"{prefix}.weight", None, (channels, unet.config.class_embed_dim))
            yield OriginalWeight(f"{prefix}.bias", None, (channels,))
        elif (module := getattr(layer, our_inner) if our_inner else layer) is not None:
            for kind, parameter in module.named_parameters():
                shape = tuple(parameter.shape)
                # channel attention: the original slides over the channels with a two-dimensional convolution
                shape = (1, *shape) if isinstance(module, nn.Conv1d) else shape
                yield OriginalWeight(f"{prefix}.{kind}", f"{our_name}.{our_inner}".rstrip(".") + f".{kind}", shape)


def _class_table_shape(unet: ClassConditionalUNet2DModel) -> tuple[int, int]:
    """That of a linear map of one-hot vectors; ours is a table whose last row is the null class."""
    return unet.config.class_embed_dim, unet.config.num_class_embeds


def original_weight_shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of the original's network with the parameters of its JSON file, in its order."""
    return {weight.name: weight.shape for weight in original_layout(build_empty_unet(params))}


def _to_ours(our_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One of the original's weights, or one of its optimizer's moments, in the shape of ours."""
    if our_name == "class_embedding.weight":
        return torch.cat([tensor.T, tensor.new_zeros(1, tensor.shape[0])])
    return tensor[0] if tensor.ndim == 4 and tensor.shape[:3] == (1, 1, 1) and ".conv." in our_name else tensor


def map_original_weights(state_dict: Mapping[str, torch.Tensor], params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The state dict of `ClassConditionalUNet2DModel` with the weights of an original checkpoint.

    Args:
        state_dict: The original's state dict, without prefixes such as ``"module."``.
        params: The content of the ``model_params_*.json`` file that belongs to it.

    Raises:
        KeyError: If the checkpoint holds a weight that the original does not have.
    """
    our_names = {weight.name: weight.our_name for weight in original_layout(build_empty_unet(params))}
    renamed = ((our_names[name], tensor) for name, tensor in state_dict.items())
    return {our_name: _to_ours(our_name, tensor) for our_name, tensor in renamed if our_name is not None}


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
    for name, our_name, shape in original_layout(build_empty_unet(params)):
        if our_name is None:
            state_dict[name] = unused[name] if name in unused else torch.zeros(shape)
        elif our_name == "class_embedding.weight":
            state_dict[name] = weights[our_name][:-1].T.contiguous()
        else:
            state_dict[name] = weights[our_name].reshape(shape)
    return state_dict


def map_original_optimizer(optimizer_state: Mapping[str, Any], unet: ClassConditionalUNet2DModel) -> dict[str, Any]:
    """A state dict for ``torch.optim.AdamW(unet.parameters())``, with the moments in the order and shapes of ours.

    The null class gets moments of zero, as it never has a gradient. Those of weights without effect are left out.

    Args:
        optimizer_state: The original's ``AdamW.state_dict()``.
        unet: The network that the checkpoint was converted to.
    """
    index_of = {name: index for index, (name, _) in enumerate(unet.named_parameters())}
    state = {}
    for original_index, (_, our_name, _) in enumerate(original_layout(unet)):
        entry = optimizer_state["state"].get(original_index)
        if entry is None or our_name is None:
            continue
        state[index_of[our_name]] = {
            # a tensor of its own for each parameter, as AdamW keeps it
            "step": torch.as_tensor(entry["step"], dtype=torch.float32).clone(),
            **{kind: _to_ours(our_name, entry[kind]) for kind in ("exp_avg", "exp_avg_sq")},
        }
    group = {**optimizer_state["param_groups"][0], "params": list(range(len(index_of)))}
    return {"state": dict(sorted(state.items())), "param_groups": [group]}
