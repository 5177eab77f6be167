"""The original's networks in terms of ours, both ways: its JSON file, and names, shapes and moments of weights."""

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import unet_class_conditional as unets
from ..models.unet_class_conditional import LAYER_TYPE_ALIASES, ClassConditionalUNet2DModel
from ..utils.nearest_names import perhaps
from .pickle_reader import CheckpointError, require


# fmt: off
# Numbers of the JSON file, within bounds that keep a wrong one from asking for tables and loops without end.
_NUMBERS = {
    "inCh": range(1, 65), "embCh": range(1, 16_385), "chMult": range(5), "num_blocks": range(1, 7),
    "T": range(1, 10_001), "t_dim": range(1, 65_537), "c_dim": range(1, 65_537), "num_classes": range(1, 1_000_001),
    "atn_resolution": range(1, 65_537), "epoch": range(10**12), "step": range(10**12),
}
_NAMES = {"blk_types": tuple(LAYER_TYPE_ALIASES), "beta_sched": ("cosine", "linear")}
KNOWN_PARAMS = (*_NUMBERS, *_NAMES)
# Older files lack the first, and the other two say nothing of the network.
_OPTIONAL = ("atn_resolution", "epoch", "step")
_LARGEST_WIDTH, _MOST_LAYERS, _LARGEST_FILE = 65_536, 64, 1 << 20

# Options of our network that the original calls otherwise.
_OPTIONS = {"in_channels": "inCh", "stem_channels": "embCh", "time_embed_dim": "t_dim", "num_train_timesteps": "T"}
TIME_EMBEDDINGS = ("original_sine", "original_alternating", "original_interleaved")

# The original's names inside each layer -> ours, in the order in which it registers them. Queries and keys have no
# effect on its output, as its class attention contracts the attention matrix with itself alone: ours has none.
_LAYER_WEIGHTS: dict[type, dict[str, str | None]] = {
    unets.ResnetLayer: {
        "t_mlp.1": "time_projection", "c_mlp.1": "class_projection", "block1.proj": "conv1", "block1.norm": "norm1",
        "block2.proj": "conv2", "block2.norm": "norm2", "res_conv": "shortcut",
    },
    unets.ConvNextLayer: {
        "block.0": "depthwise_conv", "block.1": "norm", "block.2": "expand_conv", "block.4": "project_conv",
        "res": "shortcut", "timeProj": "time_projection", "clsProj": "class_projection",
    },
    unets.ClassAttentionLayer: {
        "Q_emb": None, "K_emb": None, "out_emb.0": "out_conv", "out_emb.1": "out_norm", "LN": "norm",
    },
    unets.SelfAttentionLayer: {"KQV_weight": "key_query_value", "O_conv": "out_conv", "LN": "norm"},
    unets.ChannelAttentionLayer: {"conv": "conv"},
}
# What comes last in its network, behind its lists of layers.
_LAST_MODULES = {
    "unet.out": "head.conv", "unet.t_emb.0": "time_embedding.linear_1", "unet.t_emb.2": "time_embedding.linear_2",
    "c_emb": "class_embedding", "out_mean": "head.noise_layer", "out_var": "head.variance_layer",
}
# fmt: on
_CLASS_TABLE = "class_embedding.weight"


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file of parameters or flags holds."""
    require(file.is_file(), f"params is {file}, but there is no such file")
    size = file.stat().st_size
    require(size <= _LARGEST_FILE, f"{file.name} has {size:,} bytes, far too many for the JSON of a checkpoint")
    try:
        params = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not JSON ({error}): give the model_params_*.json file") from error
    require(
        isinstance(params, dict), f"{file.name} holds a {type(params).__name__}, but must hold an object of parameters"
    )
    return params


def read_params(file: Path) -> dict[str, Any]:
    """The content of a ``model_params_*.json`` file, checked."""
    return check_params(read_json(file), file.name)


def check_params(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The content of a JSON file of that name, its types and ranges checked, ``c_dim`` None without classes."""
    missing = [key for key in KNOWN_PARAMS if key not in params and key not in _OPTIONAL]
    require(not missing, f"{name} lacks {', '.join(missing)}: it is not the JSON of an original checkpoint")
    # the original writes null for num_classes too where there are no classes
    without_classes = params["c_dim"] in (None, -1)
    absent = {"c_dim": without_classes, "num_classes": without_classes and params["num_classes"] is None}
    for key, allowed in _NUMBERS.items():
        value, wanted = params.get(key, allowed[0]), f"a whole number in [{allowed[0]}, {allowed[-1]}]"
        # True and False are ints to Python
        fits = absent.get(key) or (type(value) is int and value in allowed)
        require(fits, f"{name}: {key} is {reprlib.repr(value)}, but must be {wanted}")
    layers = params["blk_types"]
    some = type(layers) is list and 0 < len(layers) <= _MOST_LAYERS
    require(some, f"{name}: blk_types must be a list of 1 to {_MOST_LAYERS} names")
    for key, value in [("beta_sched", params["beta_sched"]), *(("blk_types", layer) for layer in layers)]:
        wanted = f"one of {', '.join(_NAMES[key])}{perhaps(value, _NAMES[key])}"
        require(value in _NAMES[key], f"{name}: {key} is {reprlib.repr(value)}, but must be {wanted}")
    widest = params["embCh"] * 2 ** (params["chMult"] * params["num_blocks"])
    require(widest <= _LARGEST_WIDTH, f"{name} makes {widest:,} channels, but at most {_LARGEST_WIDTH:,} make sense")
    return {**params, "c_dim": None if without_classes else params["c_dim"]}


def original_unet_config(params: Mapping[str, Any], time_embedding_type: str = "original_sine") -> dict[str, Any]:
    """The options of `ClassConditionalUNet2DModel` for a network with the parameters of an original JSON file."""
    has_classes = params["c_dim"] is not None
    levels = range(1, params["num_blocks"] + 1)
    return {
        **{option: params[key] for option, key in _OPTIONS.items()},
        "block_out_channels": tuple(params["embCh"] * 2 ** (params["chMult"] * level) for level in levels),
        "layer_types": tuple(LAYER_TYPE_ALIASES[name] for name in params["blk_types"]),
        "num_class_embeds": params["num_classes"] if has_classes else None,
        "class_embed_dim": params["c_dim"] if has_classes else 512,
        "attention_patch_size": params.get("atn_resolution", 16),
        "time_embedding_type": time_embedding_type,
        "class_attention_type": "identity",
        "output_head_type": "original",
    }


def nearest_original_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `original_unet_config`, for a network that has one."""
    names = {ours: original for original, ours in LAYER_TYPE_ALIASES.items()}
    has_classes, widths = config["num_class_embeds"] is not None, config["block_out_channels"]
    return {
        **{key: config[option] for option, key in _OPTIONS.items()},
        "chMult": max(widths[0] // config["stem_channels"], 1).bit_length() - 1,
        "num_blocks": len(widths),
        "blk_types": [names[layer] for layer in config["layer_types"]],
        "beta_sched": "cosine",
        "c_dim": config["class_embed_dim"] if has_classes else None,
        # the original wants a number even where there are no classes
        "num_classes": config["num_class_embeds"] if has_classes else 1,
        "atn_resolution": config["attention_patch_size"],
    }


def build_empty_unet(
    params: Mapping[str, Any], time_embedding: str = "original_sine", params_name: str = "the JSON file"
) -> ClassConditionalUNet2DModel:
    """The network on the meta device, for ``load_state_dict(assign=True)``."""
    wanted = f"one of {', '.join(TIME_EMBEDDINGS)}{perhaps(time_embedding, TIME_EMBEDDINGS)}"
    require(time_embedding in TIME_EMBEDDINGS, f"time_embedding is {time_embedding!r}, but must be {wanted}")
    try:
        with torch.device("meta"):
            unet = ClassConditionalUNet2DModel(**original_unet_config(params, time_embedding))
    except ValueError as error:
        raise CheckpointError(f"{params_name} describes no network: {error}") from error
    # its tables are no weights, and no file holds them
    unet.time_encoding = unets.OriginalTimesteps(params["t_dim"], params["T"], time_embedding)
    return unet.eval()


def original_layout(unet: ClassConditionalUNet2DModel) -> Iterator[tuple[str, str | None, tuple[int, ...]]]:
    """Name, our name (None if without effect) and shape of the original's weights, in the order of its state dict."""
    config = unet.config
    shapes: dict[str, tuple[int, ...]] = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
    if unet.class_embedding is not None:
        # a linear map of one-hot vectors; ours is a table whose last row is the null class
        shapes[_CLASS_TABLE] = (config.class_embed_dim, config.num_class_embeds)
    levels = range(len(config.block_out_channels))
    down = [f"down_blocks.{level}.{part}" for level in levels for part in ("stack", "downsample")]
    middle = ["mid_block.stack1", "mid_block.channel_attention", "mid_block.stack2"]
    up = [f"up_blocks.{level}.{part}" for level in levels for part in ("upsample", "stack")]
    lists = {"downBlocks": down, "intermediate": middle, "upBlocks": [*up, "head.stack1", "head.stack2"]}
    names = {"unet.inConv": "conv_in"}
    names |= {f"unet.{name}.{i}": part for name, parts in lists.items() for i, part in enumerate(parts)}
    modules: dict[str, Any] = dict(unet.named_modules())
    places: list[tuple[str, str]] = []
    for name, our_name in (names | _LAST_MODULES).items():
        stacked = range(len(getattr(modules.get(our_name), "layers", ())))
        places += [(f"{name}.block.{i}", f"{our_name}.layers.{i}") for i in stacked] or [(name, our_name)]
    for name, our_name in places:
        layer: Any = modules.get(our_name)
        for inner, our_inner in _LAYER_WEIGHTS.get(type(layer), {"": ""}).items():
            for kind in ("weight", "bias"):
                full_name = f"{name}.{inner}.{kind}".replace("..", ".")
                our_full_name = f"{our_name}.{our_inner}.{kind}".replace("..", ".")
                if our_inner is None:
                    widths = (layer.norm.num_channels, config.class_embed_dim)
                    yield full_name, None, widths if kind == "weight" else widths[:1]
                elif our_full_name in shapes:
                    shape = shapes[our_full_name]
                    # channel attention: the original slides over the channels with a two-dimensional convolution
                    yield full_name, our_full_name, (1, *shape) if len(shape) == 3 else shape


def _to_ours(our_name: str, tensor: Tensor, unet: ClassConditionalUNet2DModel) -> Tensor:
    """One of the original's weights, or one of its optimizer's moments, in the shape of ours."""
    if our_name == _CLASS_TABLE:
        return torch.cat([tensor.T, tensor.new_zeros(1, tensor.shape[0])])
    return tensor.reshape(unet.get_parameter(our_name).shape)


def map_original_weights(state_dict: Mapping[str, Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of our network with the weights of an original one; KeyError for a name that it does not have."""
    unet = build_empty_unet(params)
    our_names = {name: our_name for name, our_name, _ in original_layout(unet)}
    renamed = ((our_names[name], tensor) for name, tensor in state_dict.items())
    return {our_name: _to_ours(our_name, tensor, unet) for our_name, tensor in renamed if our_name is not None}


def map_to_original_weights(unet: ClassConditionalUNet2DModel, unused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original's state dict; weights without effect that are not in ``unused`` become zeros."""
    weights = unet.state_dict()
    if unet.class_embedding is not None:
        weights[_CLASS_TABLE] = weights[_CLASS_TABLE][:-1].T
    return {
        name: weights[our_name].float().reshape(shape).contiguous()
        if our_name
        else unused.get(name, torch.zeros(shape))
        for name, our_name, shape in original_layout(unet)
    }


def map_original_optimizer(optimizer_state: Mapping[str, Any], unet: ClassConditionalUNet2DModel) -> dict[str, Any]:
    """The state of ``torch.optim.AdamW(unet.parameters())`` with the original's moments, zero for the null class."""
    original_index = {our_name: index for index, (_, our_name, _) in enumerate(original_layout(unet))}
    state: dict[int, dict[str, Tensor]] = {}
    for index, (our_name, _) in enumerate(unet.named_parameters()):
        if entry := optimizer_state["state"].get(original_index[our_name]):
            # a step of its own for each parameter, as AdamW keeps it
            state[index] = {"step": torch.tensor(float(entry["step"]))}
            state[index] |= {kind: _to_ours(our_name, entry[kind], unet) for kind in ("exp_avg", "exp_avg_sq")}
    group = {**optimizer_state["param_groups"][0], "params": list(range(len(list(unet.parameters()))))}
    return {"state": state, "param_groups": [group]}
