"""EDM2's networks in terms of ours: options, names and shapes of its class ``Precond``."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..models.unet_edm2 import EDM2UNet2DModel
from .edm import ALLOWED, block_names, check_options, make_scheduler
from .families import Conversion, Shapes, empty_network


# fmt: off
# Official options -> ours; the defaults are the same.
_OPTIONS = {
    "img_resolution": "sample_size", "img_channels": "in_channels", "label_dim": "num_class_embeds",
    "model_channels": "model_channels", "channel_mult": "channel_mult", "channel_mult_noise": "channel_mult_noise",
    "channel_mult_emb": "channel_mult_emb", "num_blocks": "layers_per_block", "dropout": "dropout",
    "attn_resolutions": "attention_resolutions", "channels_per_head": "attention_head_dim",
    "label_balance": "label_balance", "concat_balance": "concat_balance", "res_balance": "res_balance",
    "attn_balance": "attention_balance", "clip_act": "clip_activations", "logvar_channels": "logvar_channels",
}
# Those that must be given, and what is looked at here; the network checks those that EDM has not.
_DEFAULTS = {
    "img_resolution": None, "img_channels": None, "label_dim": None, "channel_mult": [1, 2, 3, 4], "num_blocks": 3,
}
_ALLOWED: dict[str, Any] = {**dict.fromkeys(_OPTIONS), "resample_filter": ([1, 1], (1, 1)), **ALLOWED}

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


def convert_network(given: Mapping[str, Any], shapes: Shapes) -> Conversion:
    """The network of an EDM2 pickle, by its constructor's arguments; ``shapes`` are those found in the file."""
    options = check_options({**_DEFAULTS, **given}, _ALLOWED, len(shapes))
    config = {ours: options[name] for name, ours in _OPTIONS.items() if name in options}
    network: Any = empty_network(EDM2UNet2DModel, {**config, "num_class_embeds": options["label_dim"] or None})
    weights = network.state_dict()
    names = {official: ours for official, ours in _names(network.config) if ours in weights}

    def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {ours: _reorder(ours, tensors[official], network) for official, ours in names.items()}

    expected = {official: tuple(weights[ours].shape) for official, ours in names.items()}
    return Conversion(network, expected, convert, make_scheduler(options))


def _names(config: Any) -> Iterator[tuple[str, str]]:
    """Official names and ours, also of what only other networks have."""
    sizes = [config.sample_size >> level for level in range(len(config.channel_mult))]
    encoder, decoder = block_names(sizes, config.layers_per_block)
    yield from _NETWORK.items()
    yield f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight", "conv_in.weight"
    for part, blocks in (("encoder", encoder), ("decoder", decoder)):
        for index, block in enumerate(blocks):
            yield from ((f"unet.{block}.{official}", f"{part}.{index}.{ours}") for official, ours in _BLOCK.items())


def _reorder(name: str, tensor: Tensor, network: EDM2UNet2DModel) -> Tensor:
    """Its queries, keys and values alternate in every head; ours are one behind the other."""
    if not name.endswith("query_key_value.weight"):
        return tensor
    heads = network.get_submodule(name.rpartition(".query_key_value")[0]).heads
    return tensor.unflatten(0, (heads, -1, 3)).permute(2, 0, 1, 3, 4, 5).flatten(0, 2)
