"""The networks of EDM and EDM2 (https://github.com/NVlabs/edm and edm2) in terms of ours."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..models.unet_adm import ADMUNet2DModel
from ..models.unet_edm2 import EDM2UNet2DModel
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..utils.nearest_names import perhaps
from . import families
from .families import FRACTION, Conversion, Shapes, block_modules, check_value, empty_network
from .pickle_reader import require


# fmt: off
# What the arguments of its networks may be, of those that EDM2's have too, and of all; None is checked elsewhere.
_ALLOWED_IN_BOTH = {
    "img_resolution": range(4, 4097), "img_channels": range(1, 65), "label_dim": range(1_000_001),
    "model_channels": range(1, 65_537), "num_blocks": range(1, 65), "channel_mult": [range(1, 65)],
    "attn_resolutions": [range(1, 65_537)], "dropout": FRACTION, "sigma_data": None, "use_fp16": (False, True),
}
_ALLOWED = _ALLOWED_IN_BOTH | {
    "channel_mult_emb": range(1, 65), "augment_dim": range(65_537), "label_dropout": FRACTION,
    "model_type": ("DhariwalUNet",), "sigma_min": None, "sigma_max": None,
}
_DEFAULTS = {
    "img_resolution": None, "img_channels": None, "label_dim": 0, "augment_dim": 0, "model_channels": 192,
    "num_blocks": 3, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4, "attn_resolutions": [32, 16, 8],
    "dropout": 0.1, "label_dropout": 0, "model_type": "DhariwalUNet",
}
_HEAD_DIM = 64

# Names inside the modules, the official ones and ours; attention has no module of its own there.
_INNER_NAMES: dict[type, dict[str, str]] = {
    ResnetBlock2D: {
        "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
        "skip": "conv_shortcut",
    },
    Attention: {"norm2": "group_norm", "qkv": "to_q to_k to_v", "proj": "to_out.0"},
}
_ENDS = [
    ("model.map_layer0", "time_embedding.linear_1"), ("model.map_layer1", "time_embedding.linear_2"),
    ("model.out_norm", "conv_norm_out"), ("model.out_conv", "conv_out"),
]

# The options of EDM2 -> ours; the defaults are the same.
_EDM2_OPTIONS = {
    "img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_class_embeds",
    "model_channels": "model_channels", "channel_mult": "channel_mult", "channel_mult_noise": "channel_mult_noise",
    "channel_mult_emb": "channel_mult_emb", "num_blocks": "layers_per_block", "dropout": "dropout",
    "attn_resolutions": "attention_resolutions", "channels_per_head": "attention_head_dim",
    "label_balance": "label_balance", "concat_balance": "concat_balance", "res_balance": "res_balance",
    "attn_balance": "attention_balance", "clip_act": "clip_activations", "logvar_channels": "logvar_channels",
}
# Those of EDM2 that must be given, and what is looked at here; the network checks those that EDM has not.
_EDM2_DEFAULTS = {
    "img_resolution": None, "img_channels": None, "label_dim": None, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
}
_EDM2_ALLOWED = dict.fromkeys(_EDM2_OPTIONS) | {"resample_filter": ([1, 1], (1, 1))} | _ALLOWED_IN_BOTH

# Names of EDM2 -> ours: of what a network has once, and of what is in each block, if it has all.
_EDM2_NETWORK = {
    "unet.emb_fourier.freqs": "time_fourier.frequencies", "unet.emb_fourier.phases": "time_fourier.phases",
    "unet.emb_noise.weight": "time_embedding.weight", "unet.emb_label.weight": "class_embedding.weight",
    "unet.out_conv.weight": "conv_out.weight", "unet.out_gain": "out_gain",
    "logvar_fourier.freqs": "logvar_fourier.frequencies", "logvar_fourier.phases": "logvar_fourier.phases",
    "logvar_linear.weight": "logvar_linear.weight",
}
_EDM2_BLOCK = {
    "emb_gain": "embedding_gain", "emb_linear.weight": "embedding_projection.weight",
    "conv_res0.weight": "conv1.weight", "conv_res1.weight": "conv2.weight", "conv_skip.weight": "shortcut.weight",
    "attn_qkv.weight": "attention.query_key_value.weight", "attn_proj.weight": "attention.out_conv.weight",
}
# fmt: on
_CLASS_TABLE = "model.map_label.weight"


def convert_edm(given: Mapping[str, Any], shapes: Shapes) -> Conversion:
    """The network of an ``EDMPrecond``, by its constructor's arguments; ``shapes`` are those found in the file."""
    options = _check_options({**_DEFAULTS, **given}, _ALLOWED, len(shapes))
    widths = tuple(options["model_channels"] * factor for factor in options["channel_mult"])
    sizes = [options["img_resolution"] >> level for level in range(len(widths))]
    # a width that is too small for a head has no attention
    has_attention = [
        size in options["attn_resolutions"] and width >= _HEAD_DIM for size, width in zip(sizes, widths, strict=True)
    ]
    config = {
        "sample_size": options["img_resolution"],
        "in_channels": options["img_channels"],
        "out_channels": options["img_channels"],
        "block_out_channels": widths,
        "layers_per_block": options["num_blocks"],
        **families.block_types(has_attention, resnet_resampling=True),
        "add_attention": widths[-1] >= _HEAD_DIM,
        "dropout": options["dropout"],
        "attention_head_dim": _HEAD_DIM,
        "min_channels_per_group": 4,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_dim": options["model_channels"] * options["channel_mult_emb"],
        "time_embedding_channels": options["model_channels"],
        "num_class_embeds": options["label_dim"] or None,
        "null_class": options["label_dropout"] > 0,
    }
    network = empty_network(ADMUNet2DModel, config)
    middle = [["mid_block.resnets.0"], ["mid_block.resnets.1"]]
    middle[0] += ["mid_block.attentions.0"] if config["add_attention"] else []
    blocks = [*block_modules(network, "down"), *middle, *block_modules(network, "up")]
    encoder, decoder = _block_names(sizes, options["num_blocks"])
    places = [*_ENDS, (f"model.enc.{sizes[0]}x{sizes[0]}_conv", "conv_in")]
    for name, modules in zip([*encoder, *decoder], blocks, strict=True):
        places += [(f"model.{name}", module) for module in modules]
    if options["label_dim"]:
        places.append(("model.map_label", "class_embedding"))
    fill = families.convert_modules(network, places, _INNER_NAMES, query_key_value_axis=2, kernel=(1, 1))
    expected = dict(fill.shapes)
    if options["label_dim"]:
        # a linear map of one-hot vectors; ours is a table
        expected[_CLASS_TABLE] = expected[_CLASS_TABLE][::-1]
    # what changes nothing: filters that average or repeat two pixels, and labels of augmentation
    resampling = [place for place, _ in places if place.endswith(("_down", "_up"))]
    layers = [f"{place}.{layer}" for place in resampling for layer in ("conv0", "skip")]
    expected |= {f"{layer}.resample_filter": (1, 1, 2, 2) for layer in layers}
    if options["augment_dim"]:
        expected["model.map_augment.weight"] = (options["model_channels"], options["augment_dim"])

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return fill.convert({name: tensor.T if name == _CLASS_TABLE else tensor for name, tensor in tensors.items()})

    return Conversion(network, expected, convert, make_scheduler(options))


def convert_edm2(given: Mapping[str, Any], shapes: Shapes) -> Conversion:
    """The network of an EDM2 pickle, by its constructor's arguments; ``shapes`` are those found in the file."""
    options = _check_options({**_EDM2_DEFAULTS, **given}, _EDM2_ALLOWED, len(shapes))
    config = {ours: options[name] for name, ours in _EDM2_OPTIONS.items() if name in options}
    network: Any = empty_network(EDM2UNet2DModel, {**config, "num_class_embeds": options["label_dim"] or None})
    sizes = [options["img_resolution"] >> level for level in range(len(options["channel_mult"]))]
    encoder, decoder = _block_names(sizes, options["num_blocks"])
    blocks = {f"unet.{block}": f"encoder.{index}" for index, block in enumerate(encoder)}
    blocks |= {f"unet.{block}": f"decoder.{index}" for index, block in enumerate(decoder)}
    names = _EDM2_NETWORK | {f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight": "conv_in.weight"}
    for block, our_block in blocks.items():
        names |= {f"{block}.{inner}": f"{our_block}.{our_inner}" for inner, our_inner in _EDM2_BLOCK.items()}
    weights = network.state_dict()
    names = {official: ours for official, ours in names.items() if ours in weights}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        filled = {ours: tensors[official] for official, ours in names.items()}
        for name, tensor in filled.items():
            if name.endswith("query_key_value.weight"):
                # they alternate in every head; ours are one behind the other
                heads = network.get_submodule(name.removesuffix(".query_key_value.weight")).heads
                filled[name] = tensor.unflatten(0, (heads, -1, 3)).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
        return filled

    expected = {official: tuple(weights[ours].shape) for official, ours in names.items()}
    return Conversion(network, expected, convert, make_scheduler(options))


def make_scheduler(options: Mapping[str, Any]) -> EDMHeunScheduler:
    """The published sampler, within the noise levels that the network of these arguments supports."""
    sigma_min, sigma_max = options.get("sigma_min", 0.0), options.get("sigma_max", math.inf)
    sigma_data = options.get("sigma_data", 0.5)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("sigma_data", sigma_data)):
        fits = type(value) in (int, float) and (value > 0 or (value == 0 and name == "sigma_min"))
        require(fits, f"{name} is {reprlib.repr(value)}, but must be a number above 0, or 0 for sigma_min")
    return EDMHeunScheduler(sigma_min=max(0.002, sigma_min), sigma_max=min(80.0, sigma_max), sigma_data=sigma_data)


def _check_options(options: Mapping[str, Any], allowed: Mapping[str, Any], num_tensors: int) -> Mapping[str, Any]:
    """A network's arguments, with defaults: all of them known and allowed, and no more blocks than tensors."""
    for name, values in allowed.items():
        if name in options and values is not None:
            check_value(name, options[name], values)
    for name in options:
        known = name in allowed
        require(known, f"the network has the option {name!r:.80}, which its class has not{perhaps(name, allowed)}")
    # they would only keep us busy
    num_blocks = len(options["channel_mult"]) * options["num_blocks"]
    require(0 < num_blocks <= num_tensors, f"the network has {num_blocks} blocks, but {num_tensors} tensors")
    return options


def _block_names(sizes: list[int], num_blocks: int) -> tuple[list[str], list[str]]:
    """The official names of the blocks of encoder and decoder; ``sizes`` are those of the levels."""
    encoder, decoder = [], []
    for size in sizes:
        encoder += [f"enc.{size}x{size}_down", *(f"enc.{size}x{size}_block{index}" for index in range(num_blocks))]
    for size in reversed(sizes):
        decoder += [f"dec.{size}x{size}_up", *(f"dec.{size}x{size}_block{index}" for index in range(num_blocks + 1))]
    middle = [f"dec.{sizes[-1]}x{sizes[-1]}_in{index}" for index in range(2)]
    return encoder[1:], middle + decoder[1:]
