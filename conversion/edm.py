"""EDM's networks (https://github.com/NVlabs/edm) in terms of ours; those of EDM2 are in `edm2`."""

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ..models.unet_adm import ADMUNet2DModel
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..utils.nearest_names import perhaps
from . import families
from .families import FRACTION, Conversion, Shapes, block_modules, check_value, empty_network
from .pickle_reader import require


# fmt: off
# What the arguments of its networks may be, of those that EDM2's have too, and of all; None is checked elsewhere.
ALLOWED = {
    "img_resolution": range(4, 4097), "img_channels": range(1, 65), "label_dim": range(1_000_001),
    "model_channels": range(1, 65_537), "num_blocks": range(1, 65), "channel_mult": [range(1, 65)],
    "attn_resolutions": [range(1, 65_537)], "dropout": FRACTION, "sigma_data": None, "use_fp16": (False, True),
}
_ALLOWED = ALLOWED | {
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
# fmt: on
_CLASS_TABLE = "model.map_label.weight"


def convert_network(given: Mapping[str, Any], shapes: Shapes) -> Conversion:
    """The network of an ``EDMPrecond``, by its constructor's arguments; ``shapes`` are those found in the file."""
    options = check_options({**_DEFAULTS, **given}, _ALLOWED, len(shapes))
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
    places = [*_ENDS, *_places(network, sizes)]
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


def make_scheduler(options: Mapping[str, Any]) -> EDMHeunScheduler:
    """The published sampler, within the noise levels that the network of these arguments supports."""
    sigma_min, sigma_max = options.get("sigma_min", 0.0), options.get("sigma_max", math.inf)
    sigma_data = options.get("sigma_data", 0.5)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("sigma_data", sigma_data)):
        fits = type(value) in (int, float) and (value > 0 or (value == 0 and name == "sigma_min"))
        require(fits, f"{name} is {reprlib.repr(value)}, but must be a number above 0, or 0 for sigma_min")
    return EDMHeunScheduler(sigma_min=max(0.002, sigma_min), sigma_max=min(80.0, sigma_max), sigma_data=sigma_data)


def check_options(options: Mapping[str, Any], allowed: Mapping[str, Any], num_tensors: int) -> Mapping[str, Any]:
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


def block_names(sizes: list[int], num_blocks: int) -> tuple[list[str], list[str]]:
    """The official names of the blocks of encoder and decoder; ``sizes`` are those of the levels."""
    encoder, decoder = [], []
    for size in sizes:
        encoder += [f"enc.{size}x{size}_down", *(f"enc.{size}x{size}_block{index}" for index in range(num_blocks))]
    for size in reversed(sizes):
        decoder += [f"dec.{size}x{size}_up", *(f"dec.{size}x{size}_block{index}" for index in range(num_blocks + 1))]
    middle = [f"dec.{sizes[-1]}x{sizes[-1]}_in{index}" for index in range(2)]
    return encoder[1:], middle + decoder[1:]


def _places(network: ModelMixin, sizes: list[int]) -> Iterator[tuple[str, str]]:
    """Names of the modules of encoder and decoder, the official ones and ours."""
    yield f"model.enc.{sizes[0]}x{sizes[0]}_conv", "conv_in"
    middle = [["mid_block.resnets.0"], ["mid_block.resnets.1"]]
    middle[0] += ["mid_block.attentions.0"] if network.config.add_attention else []
    encoder, decoder = block_names(sizes, network.config.layers_per_block)
    ours = [*block_modules(network, "down"), *middle, *block_modules(network, "up")]
    for block, modules in zip([*encoder, *decoder], ours, strict=True):
        yield from ((f"model.{block}", module) for module in modules)
