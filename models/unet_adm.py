"""Dhariwal & Nichol's U-Net (ADM, https://arxiv.org/abs/2105.05233) where ``diffusers.UNet2DModel`` does not meet it.

The file imports torch and diffusers only, so that a repository on the Hub can carry it beside its weights.
"""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel, UNet2DOutput
from torch import Tensor, nn


class ADMUNet2DModel(UNet2DModel):
    """``diffusers.UNet2DModel`` with the heads, groups and classes of the networks of ADM and EDM.

    It takes every option of ``UNet2DModel`` and has its names of weights. Its class embedding has one row more, which
    is zero and stays so: no class. ADM's released networks need none of this and are plain ``UNet2DModel``s; those of
    EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364) do.

    Args:
        attention_head_dim: Channels per head. A width that it does not divide has ``width // attention_head_dim``
            wider heads.
        num_attention_heads: Number of heads of every attention instead.
        norm_num_groups: Number of groups of every GroupNorm, that of attention too, if the channels suffice.
        min_channels_per_group: Narrower layers have ``width // min_channels_per_group`` groups, 4 channels in EDM's.
        time_embedding_channels: Channels of the timestep's sinusoidal embedding; None is ``block_out_channels[0]``.
        null_class: Whether the network was trained without classes too, so that guidance away from no class works.
        **kwargs: Options of ``UNet2DModel``.

    Raises:
        ValueError: If heads or groups do not divide the channels of a layer.
    """

    @register_to_config
    def __init__(
        self,
        *,
        attention_head_dim: int = 64,
        num_attention_heads: int | None = None,
        norm_num_groups: int = 32,
        min_channels_per_group: int = 1,
        time_embedding_channels: int | None = None,
        null_class: bool = False,
        **kwargs: Any,
    ):
        # heads of one channel and a single group fit any width; each module gets its own number below
        super().__init__(**{**kwargs, "attention_head_dim": 1, "norm_num_groups": 1, "attn_norm_num_groups": 1})
        groups = {"norm_num_groups": norm_num_groups, "attn_norm_num_groups": norm_num_groups}
        self.register_to_config(attention_head_dim=attention_head_dim, **groups)
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                channels = module.query_dim
                heads = channels // attention_head_dim if num_attention_heads is None else num_attention_heads
                _check_parts(name, channels, heads, "heads: num_attention_heads or attention_head_dim")
                module.heads = module.sliceable_head_dim = heads
                module.scale = (channels / heads) ** -0.5
            elif isinstance(module, nn.GroupNorm):
                groups_that_fit = min(norm_num_groups, module.num_channels // min_channels_per_group)
                _check_parts(name, module.num_channels, groups_that_fit, "groups: norm_num_groups")
                module.num_groups = groups_that_fit
        embed_dim = self.time_embedding.linear_2.out_features
        if time_embedding_channels is not None:
            self.time_proj.num_channels = time_embedding_channels
            self.time_embedding.linear_1 = nn.Linear(time_embedding_channels, embed_dim)
        if (classes := self.config.num_class_embeds) is not None:
            self.class_embedding = nn.Embedding(classes + 1, embed_dim, padding_idx=classes)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """The options that a config may hold, which diffusers reads from the signature: those in kwargs too."""
        return UNet2DModel._get_init_keys(input_class) | UNet2DModel._get_init_keys(UNet2DModel)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """The network's answer to noisy images.

        Args:
            sample: (batch, in_channels, height, width); EDM's networks want it scaled by c_in.
            timestep: Scalar or (batch,), any real numbers; for EDM's networks log(sigma) / 4.
            class_labels: (batch,), int64 in [0, num_class_embeds]; ``num_class_embeds``, and None, are no class.
            return_dict: Whether to return a ``UNet2DOutput`` or a tuple.

        Returns:
            ``sample``, (batch, out_channels, height, width).

        Raises:
            ValueError: If there are labels, but the network has no classes.
        """
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, device=sample.device)  # UNet2DModel cuts off a number's fraction
        if class_labels is None and self.class_embedding is not None:
            class_labels = torch.full(sample.shape[:1], self.config.num_class_embeds, device=sample.device)
        return super().forward(sample, timestep, class_labels, return_dict)


def _check_parts(name: str, channels: int, parts: int, what: str) -> None:
    """ValueError unless there is a part, and the parts divide the channels."""
    if parts < 1 or channels % parts:
        raise ValueError(f"{name} has {channels} channels, which cannot have {parts} {what} must fit.")
