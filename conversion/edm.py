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
from . import edm2
from .families import Conversion, block_types, convert_modules, empty_network
from .pickle_reader import require


# fmt: off
# The arguments of EDMPrecond and DhariwalUNet: what they are if not given, and what makes sense.
_WHOLE_NUMBERS = {
    "img_resolution": (None, range(4, 4097)), "img_channels": (None, range(1, 65)), "label_dim": (0, range(1_000_001)),
    "augment_dim": (0, range(65_537)), "model_channels": (192, range(1, 65_537)), "num_blocks": (3, range(1, 65)),
    "channel_mult_emb": (4, range(1, 65)),
}
_LISTS = {"channel_mult": ([1, 2, 3, 4], range(1, 65)), "attn_resolutions": ([32, 16, 8], range(1, 65_537))}
_FRACTIONS = {"dropout": 0.1, "label_dropout": 0}
_OTHERS = ("model_type", "use_fp16", "sigma_min", "sigma_max", "sigma_data")

_HEAD_DIM, _MOST_LEVELS = 64, 16

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


def convert_network(class_name: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Conversion:
    """The network of an EDM or EDM2 pickle.

    Args:
        class_name: Name of the official class, ``EDMPrecond`` or EDM2's ``Precond``.
        options: Its constructor's arguments, by name.
        shapes: Shapes of the tensors in the file, by name.

    Raises:
        CheckpointError: If it is another network, or an argument makes no sense.
    """
    if class_name == "Precond":
        return edm2.convert_network(class_name, options, shapes)
    require(class_name == "EDMPrecond", f"the network is a {class_name}, but must be an EDMPrecond or EDM2's Precond")
    options = _check_options(options, len(shapes))
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
        **block_types(has_attention, resnet_resampling=True),
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
    fill = convert_modules(network, places, _INNER_NAMES, query_key_value_axis=2, kernel=(1, 1))

    def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # a linear map of one-hot vectors; ours is a table
        table = {_CLASS_TABLE: tensors[_CLASS_TABLE].T} if options["label_dim"] else {}
        return fill.convert({**tensors, **table})

    transposed = {_CLASS_TABLE: fill.shapes[_CLASS_TABLE][::-1]} if options["label_dim"] else {}
    return Conversion(network, {**fill.shapes, **transposed, **_unused_shapes(options, sizes)}, convert)


def make_scheduler(options: Mapping[str, Any]) -> EDMHeunScheduler:
    """The published sampler, within the noise levels that the network of these arguments supports."""
    sigma_min, sigma_max = options.get("sigma_min", 0.0), options.get("sigma_max", math.inf)
    sigma_data = options.get("sigma_data", 0.5)
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max), ("sigma_data", sigma_data)):
        fits = type(value) in (int, float) and value >= 0
        require(fits, f"{name} is {reprlib.repr(value)} in the file, but must be a number of at least 0")
    return EDMHeunScheduler(sigma_min=max(0.002, sigma_min), sigma_max=min(80.0, sigma_max), sigma_data=sigma_data)


def _check_options(options: Mapping[str, Any], num_tensors: int) -> dict[str, Any]:
    """All arguments that concern the network, checked."""
    model_type = options.get("model_type", "DhariwalUNet")
    require(model_type == "DhariwalUNet", f"model_type is {reprlib.repr(model_type)}, but must be 'DhariwalUNet'")
    for name in options:
        known = name in {*_WHOLE_NUMBERS, *_LISTS, *_FRACTIONS, *_OTHERS}
        require(known, f"the network has the argument {reprlib.repr(name)}, which EDM's DhariwalUNet has not")
    checked: dict[str, Any] = {}
    for name, (default, allowed) in (_WHOLE_NUMBERS | _LISTS).items():
        value: Any = options.get(name, default)
        checked[name] = value
        numbers = value if name in _LISTS and type(value) in (list, tuple) else [value]
        fits = len(numbers) <= _MOST_LEVELS and all(type(number) is int and number in allowed for number in numbers)
        fits = fits and (name not in _LISTS or numbers is value)
        kind = "whole numbers" if name in _LISTS else "a whole number"
        wanted = f"{kind} in [{allowed[0]}, {allowed[-1]}]"
        require(fits, f"{name} of the network is {reprlib.repr(value)}, but must be {wanted}")
    for name, fraction in _FRACTIONS.items():
        value = checked[name] = options.get(name, fraction)
        fits = type(value) in (int, float) and 0 <= value < 1
        require(fits, f"{name} of the network is {reprlib.repr(value)}, but must be in [0, 1)")
    # more blocks than the file has tensors would only keep us busy
    num_blocks = len(checked["channel_mult"]) * checked["num_blocks"]
    require(0 < num_blocks <= num_tensors, f"the network has {num_blocks} blocks, but {num_tensors} tensors")
    return checked


def _places(network: ModelMixin, sizes: list[int]) -> Iterator[tuple[str, str]]:
    """Names of the modules of encoder and decoder, the official ones, which begin with the size, and ours."""
    yield f"model.enc.{sizes[0]}x{sizes[0]}_conv", "conv_in"
    middle = sizes[-1]
    for index, inner in enumerate(("resnets.0", "resnets.1")):
        yield f"model.dec.{middle}x{middle}_in{index}", f"mid_block.{inner}"
    if network.config.add_attention:
        yield f"model.dec.{middle}x{middle}_in0", "mid_block.attentions.0"
    halves = (("enc", "down_blocks", "down", sizes), ("dec", "up_blocks", "up", sizes[::-1]))
    for part, blocks, way, half_sizes in halves:
        for level, block in enumerate(getattr(network, blocks)):
            size, ours = half_sizes[level], f"{blocks}.{level}"
            for layer in range(len(block.resnets)):
                yield f"model.{part}.{size}x{size}_block{layer}", f"{ours}.resnets.{layer}"
                if hasattr(block, "attentions"):
                    yield f"model.{part}.{size}x{size}_block{layer}", f"{ours}.attentions.{layer}"
            if level < len(sizes) - 1:
                # the block that changes the size opens the next level there, and closes this one here
                size = half_sizes[level + 1]
                yield f"model.{part}.{size}x{size}_{way}", f"{ours}.{way}samplers.0"


def _unused_shapes(options: Mapping[str, Any], sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Tensors that change nothing: filters that average or repeat two pixels, and labels of augmentation."""
    resampling = [f"enc.{size}x{size}_down" for size in sizes[1:]] + [f"dec.{size}x{size}_up" for size in sizes[:-1]]
    layers = [f"model.{name}.{layer}" for name in resampling for layer in ("conv0", "skip")]
    unused: dict[str, tuple[int, ...]] = {f"{layer}.resample_filter": (1, 1, 2, 2) for layer in layers}
    if options["augment_dim"]:
        unused["model.map_augment.weight"] = (options["model_channels"], options["augment_dim"])
    return unused
