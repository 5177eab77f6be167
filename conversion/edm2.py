"""EDM2's networks in terms of ours: options, names and shapes of its class ``Precond``."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.unet_edm2 import EDM2UNet2DModel
from ..utils.nearest_names import perhaps
from .families import Conversion
from .pickle_reader import CheckpointError, require


# fmt: off
# Official options -> ours. The defaults are the same.
_OPTIONS = {
    "img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_class_embeds",
    "model_channels": "model_channels", "channel_mult": "channel_mult", "channel_mult_noise": "channel_mult_noise",
    "channel_mult_emb": "channel_mult_emb", "num_blocks": "layers_per_block", "dropout": "dropout",
    "attn_resolutions": "attention_resolutions", "channels_per_head": "attention_head_dim",
    "label_balance": "label_balance", "concat_balance": "concat_balance", "res_balance": "res_balance",
    "attn_balance": "attention_balance", "clip_act": "clip_activations", "logvar_channels": "logvar_channels",
}
_REQUIRED = ("img_resolution", "img_channels", "label_dim")
# The scheduler's, the machine's, and one of which only the default is known.
_OTHER_OPTIONS = ("sigma_data", "use_fp16", "resample_filter")

# Official names -> ours: of what a network has once, and of what is in each block.
_NETWORK = {
    "unet.emb_fourier.freqs": "time_fourier.frequencies", "unet.emb_fourier.phases": "time_fourier.phases",
    "unet.emb_noise.weight": "time_embedding.weight", "unet.emb_label.weight": "class_embedding.weight",
    "unet.out_conv.weight": "conv_out.weight", "unet.out_gain": "out_gain",
    "logvar_fourier.freqs": "logvar_fourier.frequencies", "logvar_fourier.phases": "logvar_fourier.phases",
    "logvar_linear.weight": "logvar_linear.weight",
}
_BLOCK = {
    "emb_gain": "embedding_gain", "emb_linear.weight": "embedding_projection.weight",
    "conv_res0.weight": "conv1.weight", "conv_res1.weight": "conv2.weight", "conv_skip.weight": "shortcut.weight",
    "attn_qkv.weight": "attention.query_key_value.weight", "attn_proj.weight": "attention.out_conv.weight",
}
# fmt: on


def convert_network(class_name: str, options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Conversion:
    """How a pickled network of EDM2's program becomes ours; CheckpointError if it is none that ours can be."""
    require(class_name == "Precond", f"the file holds a network of class {class_name!r}, but EDM2's is a Precond")
    known = (*_OPTIONS, *_OTHER_OPTIONS)
    for name in options:
        require(name in known, f"the network has the option {name!r}, which EDM2's has not{perhaps(name, known)}")
    missing = [name for name in _REQUIRED if name not in options]
    require(not missing, f"the network lacks the option {', '.join(missing)}: it is not one of EDM2's")
    resample_filter = options.get("resample_filter", [1, 1])
    require(resample_filter in ([1, 1], (1, 1)), f"resample_filter is {resample_filter!r}, but must be [1, 1]")
    config = {ours: options[name] for name, ours in _OPTIONS.items() if name in options}
    config["num_class_embeds"] = options["label_dim"] or None
    try:
        # a number of blocks that is not that of the weights could keep us busy without end
        num_blocks = len(config.get("channel_mult", ())) * config.get("layers_per_block", 1)
        require(num_blocks <= len(shapes), f"they ask for {num_blocks:,} blocks, more than the file has weights")
        with torch.device("meta"):
            network = EDM2UNet2DModel(**config).eval()
        weights = network.state_dict()
        names = {official: ours for official, ours in _names(network) if ours in weights}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"the options of the network describe none of EDM2's: {error}") from error

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: _reorder(name, tensors[official], network) for official, name in names.items()}

    return Conversion(network, {official: tuple(weights[name].shape) for official, name in names.items()}, convert)


def _names(network: EDM2UNet2DModel) -> Iterator[tuple[str, str]]:
    """Official names and ours, also of what only other networks have."""
    config = network.config
    sizes = [config.sample_size >> level for level in range(len(config.channel_mult))]
    blocks = range(config.layers_per_block)
    encoder, decoder = [], [f"{sizes[-1]}x{sizes[-1]}_in0", f"{sizes[-1]}x{sizes[-1]}_in1"]
    for size in sizes:
        encoder += [f"{size}x{size}_down"] * (size != sizes[0]) + [f"{size}x{size}_block{i}" for i in blocks]
    for size in reversed(sizes):
        decoder += [f"{size}x{size}_up"] * (size != sizes[-1])
        decoder += [f"{size}x{size}_block{i}" for i in range(config.layers_per_block + 1)]
    yield from _NETWORK.items()
    yield f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight", "conv_in.weight"
    for official_part, part, official_blocks in (("enc", "encoder", encoder), ("dec", "decoder", decoder)):
        for index, block in enumerate(official_blocks):
            for official, name in _BLOCK.items():
                yield f"unet.{official_part}.{block}.{official}", f"{part}.{index}.{name}"


def _reorder(name: str, tensor: Tensor, network: EDM2UNet2DModel) -> Tensor:
    """Its queries, keys and values alternate in every head; ours are one behind the other."""
    if not name.endswith("query_key_value.weight"):
        return tensor
    heads = network.get_submodule(name.rpartition(".query_key_value")[0]).heads
    return tensor.unflatten(0, (heads, -1, 3)).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
