"""ADM's networks (https://github.com/openai/guided-diffusion) in terms of diffusers' and ours.

What the weights say is read from them, the rest from the flags of the official program.
"""

import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D

from ..models.classifier_adm import ADMClassifierModel, AttentionPool2D
from ..models.unet_adm import ADMUNet2DModel
from ..schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler
from . import families
from .families import FRACTION, Conversion, Shapes, block_modules, check_value, empty_network
from .pickle_reader import require


Flags = Mapping[str, Any]

# fmt: off
# The flags of 64x64_diffusion.pt that its weights do not say, as the official README has them.
_RELEASED_FLAGS = {
    "image_size": 64, "num_head_channels": 64, "use_new_attention_order": True, "dropout": 0.1, "learn_sigma": True,
    "diffusion_steps": 1000, "noise_schedule": "cosine", "predict_xstart": False, "rescale_timesteps": False,
}
_RELEASED_NETWORK = {
    "in_channels": 3, "out_channels": 6, "block_out_channels": (192, 384, 576, 768), "layers_per_block": 3,
    "num_class_embeds": 1000, "resnet_time_scale_shift": "scale_shift",
    **families.block_types([False, True, True, True], resnet_resampling=True),
}
_ALLOWED = {
    "image_size": range(8, 4097), "num_head_channels": range(1, 65_537), "num_heads": range(1, 65_537),
    "use_new_attention_order": (False, True), "learn_sigma": (False, True), "predict_xstart": (False, True),
    "rescale_timesteps": (False, True), "diffusion_steps": range(2, 10_001), "noise_schedule": ("cosine", "linear"),
    "classifier_depth": range(1, 65), "dropout": FRACTION,
}

# Names inside the modules, the official ones and ours.
_INNER_NAMES: dict[type, dict[str, str]] = {
    ResnetBlock2D: {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
        "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
    },
    Attention: {"norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0"},
    Downsample2D: {"op": "conv"},
    Upsample2D: {"conv": "conv"},
    AttentionPool2D: {
        "positional_embedding": "positional_embedding", "qkv_proj": "to_q to_k to_v", "c_proj": "to_out",
    },
}
# fmt: on
_LARGEST_SIZE = 1 << 20


def convert_unet(flags: Flags | None, shapes: Shapes) -> Conversion:
    """The denoiser of ``*_diffusion.pt``: a plain ``UNet2DModel`` where its maths is the same, else ours."""
    # every level of the decoder ends with an upsampling, but the last
    ups = re.findall(r"output_blocks\.(\d{1,4})\.[12]\.(?:in_layers\.0|conv)\.weight", "\n".join(shapes))
    layers = min(map(int, ups), default=_count(shapes, "output_blocks") - 1)
    found, time_channels = _read_encoder(shapes, layers)
    images, outputs = found["in_channels"], _shape(shapes, "out.2.weight", 4)[0]
    require(outputs in (images, 2 * images), f"out.2.weight makes {outputs} channels of images of {images}")
    classes = _shape(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else None
    found |= {"out_channels": outputs, "num_class_embeds": classes}

    flags = {**(_RELEASED_FLAGS if found == _RELEASED_NETWORK else {}), **(flags or {})}
    said = {"num_channels": time_channels, "num_res_blocks": layers}
    said |= {"learn_sigma": outputs != images, "class_cond": classes is not None}
    said |= {"use_scale_shift_norm": found["resnet_time_scale_shift"] == "scale_shift"}
    _check_agreement(flags, said)

    widths, kinds = found["block_out_channels"], found["down_block_types"]
    with_attention = {widths[-1], *(width for width, kind in zip(widths, kinds, strict=True) if "Attn" in kind)}
    heads = _read_heads(flags, with_attention)
    options = {**found, **heads, "sample_size": _flag(flags, "image_size"), "dropout": _flag(flags, "dropout")}
    if time_channels == widths[0] and "attention_head_dim" in heads:
        network = empty_network(UNet2DModel, {**options, "attn_norm_num_groups": 32})
    else:
        times = {"time_embedding_channels": time_channels, "time_embedding_dim": 4 * time_channels}
        network = empty_network(ADMUNet2DModel, {**options, **times})

    decoder: list[list[str]] = []
    for modules in block_modules(network, "up"):
        if "upsamplers" in modules[0]:
            decoder[-1] += modules
        else:
            decoder.append(modules)
    places = [*_encoder_places(network), *_numbered("output_blocks", decoder)]
    places += [("out.0", "conv_norm_out"), ("out.2", "conv_out")]
    places += [("label_emb", "class_embedding")] if classes is not None else []
    axis = 0 if _flag(flags, "use_new_attention_order") else 1
    conversion = families.convert_modules(network, places, _INNER_NAMES, axis, kernel=(1,))
    return conversion._replace(scheduler=make_scheduler(flags))


def convert_classifier(flags: Flags | None, shapes: Shapes) -> Conversion:
    """The classifier of ``*_classifier.pt``."""
    flags = flags or {}
    layers = _classifier_layers(shapes)
    if "classifier_depth" in flags:
        depth = _flag(flags, "classifier_depth")
        # neighbouring levels of one width without attention look like one
        agreed = (layers + 1) % (depth + 1) == 0
        require(agreed, f"classifier_depth is {depth} in the flags, but {layers} by the weights")
        layers = depth
    options, time_channels = _read_encoder(shapes, layers)
    for decoders_own in ("up_block_types", "upsample_type"):
        del options[decoders_own]
    if "out.2.positional_embedding" in shapes:
        # its columns are the mean and every place of the last level
        last_size = math.isqrt(_shape(shapes, "out.2.positional_embedding", 2)[1] - 1)
        size, pool_type = last_size << (len(options["block_out_channels"]) - 1), "attention"
        last, head = "out.2.c_proj.weight", ("out.2", "pool")
    else:
        known = "out.3.weight" in shapes
        require(known, "the classifier's pool is neither attention nor adaptive, the two that are known")
        size, pool_type = _flag(flags, "image_size"), "adaptive"
        last, head = "out.3.weight", ("out.3", "pool.1")
    said = {"classifier_width": time_channels, "classifier_pool": pool_type, "image_size": size}
    said |= {"classifier_use_scale_shift_norm": options["resnet_time_scale_shift"] == "scale_shift"}
    _check_agreement(flags, said)

    options |= {"pool_type": pool_type, "sample_size": size, "num_classes": _shape(shapes, last)[0]}
    # the official program has no flags for the heads of its classifiers
    options |= {"attention_head_dim": 64, "time_embedding_channels": time_channels}
    network = empty_network(ADMClassifierModel, options)
    places = [*_encoder_places(network), ("out.0", "conv_norm_out"), head]
    return families.convert_modules(network, places, _INNER_NAMES, query_key_value_axis=1, kernel=(1,))


def make_scheduler(given: Flags) -> LearnedVarianceDDPMScheduler:
    """The official sampler, with its evenly spaced timesteps."""
    flags = {"predict_xstart": False, "rescale_timesteps": False, **given}
    steps = _flag(flags, "diffusion_steps")
    # a network that was told other numbers than the timesteps
    rescaled = _flag(flags, "rescale_timesteps") and steps != 1000
    require(not rescaled, f"rescale_timesteps is True, but must be False with {steps} diffusion_steps")
    options: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2"}
    if _flag(flags, "noise_schedule") == "linear":
        options = {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
    return LearnedVarianceDDPMScheduler(
        num_train_timesteps=steps,
        prediction_type="sample" if _flag(flags, "predict_xstart") else "epsilon",
        variance_type="learned_range" if _flag(flags, "learn_sigma") else "fixed_large",
        timestep_spacing="linspace",
        clip_sample=True,
        use_clipped_model_output=True,
        **options,
    )


def _read_encoder(shapes: Shapes, layers: int) -> tuple[dict[str, Any], int]:
    """What the weights say, as options of ``UNet2DModel``, and the channels of the time embedding."""
    num_blocks, period = _count(shapes, "input_blocks"), layers + 1
    regular = layers > 0 and num_blocks >= period and num_blocks % period == 0
    require(regular, f"the checkpoint has {num_blocks} input_blocks, which is no network of guided-diffusion")
    starts = [f"input_blocks.{index}" for index in range(1, num_blocks, period)]
    widths = tuple(_shape(shapes, f"{start}.0.out_layers.3.weight", 4)[0] for start in starts)
    scale_shift = _shape(shapes, f"{starts[0]}.0.emb_layers.1.weight", 2)[0] == 2 * widths[0]
    has_attention = [f"{start}.1.qkv.weight" in shapes for start in starts]
    options = {
        "in_channels": _shape(shapes, "input_blocks.0.0.weight", 4)[1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        **families.block_types(has_attention, f"input_blocks.{period}.0.op.weight" not in shapes),
    }
    return options, _shape(shapes, "time_embed.0.weight", 2)[1]


def _classifier_layers(shapes: Shapes) -> int:
    """Residual blocks of each level: levels are where width, size or attention change."""
    num_blocks = _count(shapes, "input_blocks")
    period, before = num_blocks, False
    for index in range(1, num_blocks):
        attention = f"input_blocks.{index}.1.qkv.weight" in shapes
        if f"input_blocks.{index}.0.skip_connection.weight" in shapes or (attention and not before):
            period = math.gcd(period, index - 1)  # first block of a level
        if f"input_blocks.{index}.0.op.weight" in shapes or (before and not attention):
            period = math.gcd(period, index)  # downsampling
        before = attention
    return period - 1


def _read_heads(flags: Flags, widths: set[int]) -> dict[str, int]:
    """Channels per head if they are the same everywhere, else the number of heads."""
    if "num_heads" not in flags or flags.get("num_head_channels", -1) != -1:
        head_dim = _flag(flags, "num_head_channels")
        wrong = [width for width in sorted(widths) if width % head_dim]
        require(not wrong, f"num_head_channels is {head_dim}, but must divide {wrong}, the widths with attention")
        return {"attention_head_dim": head_dim}
    heads = _flag(flags, "num_heads")
    upsample = flags.get("num_heads_upsample", -1)
    require(upsample in (-1, heads), f"num_heads_upsample is {reprlib.repr(upsample)}, but must be num_heads, {heads}")
    if len(widths) == 1 and max(widths) % heads == 0:
        return {"attention_head_dim": max(widths) // heads}
    return {"num_attention_heads": heads}


def _encoder_places(network: ModelMixin) -> Iterator[tuple[str, str]]:
    """Names of the modules of the encoder and the middle, the official ones and ours."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from _numbered("input_blocks", [["conv_in"], *block_modules(network, "down")])
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    yield from ((f"middle_block.{index}", module) for index, module in enumerate(middle))


def _numbered(name: str, blocks: list[list[str]]) -> Iterator[tuple[str, str]]:
    """The official names of modules, numbered in each block, and ours."""
    for index, modules in enumerate(blocks):
        yield from ((f"{name}.{index}.{place}", module) for place, module in enumerate(modules))


def _count(shapes: Shapes, name: str) -> int:
    """Number of blocks in a list of the official network."""
    return len({key.split(".")[1] for key in shapes if key.startswith(f"{name}.")})


def _shape(shapes: Shapes, name: str, dims: int | None = None) -> tuple[int, ...]:
    """The shape of a tensor that must be there."""
    shape = shapes.get(name, ())
    sound = 0 < len(shape) == (dims or len(shape)) and all(0 < size <= _LARGEST_SIZE for size in shape)
    require(sound, f"{name} is {shape or 'missing'}: it is no network of guided-diffusion")
    return shape


def _flag(flags: Flags, name: str) -> Any:
    """The value of a flag, checked."""
    require(name in flags, f"the weights do not say {name}: give the flags of the training, among them {name}")
    check_value(f"the flag {name}", flags[name], _ALLOWED[name])
    return flags[name]


def _check_agreement(flags: Flags, said: Mapping[str, Any]) -> None:
    """Refuses flags that belong to other weights."""
    for name, value in said.items():
        agreed = flags.get(name, value) == value
        require(agreed, f"{name} is {reprlib.repr(flags.get(name))} in the flags, but {value} by the weights")
