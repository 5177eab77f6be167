"""The noise-aware classifier of ADM (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4).

The file imports torch and diffusers only, so that a repository on the Hub can carry it beside its weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from diffusers.utils import BaseOutput
from torch import Tensor, nn


@dataclass
class ADMClassifierOutput(BaseOutput):
    """``logits``: (batch, num_classes), before the softmax."""

    logits: Tensor


class AttentionPool2D(nn.Module):
    """One attention over all places, asked by their mean (Radford et al. 2021, section 2.4): one vector an image."""

    def __init__(self, size: int, channels: int, head_dim: int, out_features: int):
        super().__init__()
        self.heads = channels // head_dim
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / channels**0.5)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_features)

    def forward(self, hidden_states: Tensor) -> Tensor:
        places = hidden_states.flatten(2)  # (batch, channels, places)
        places = torch.cat([places.mean(dim=2, keepdim=True), places], dim=2) + self.positional_embedding
        places = places.transpose(1, 2)
        # the mean alone asks: nobody reads what the places would get
        tokens = self.to_q(places[:, :1]), self.to_k(places), self.to_v(places)
        query, key, value = (token.unflatten(2, (self.heads, -1)).transpose(1, 2) for token in tokens)
        pooled = F.scaled_dot_product_attention(query, key, value)  # (batch, heads, 1, channels per head)
        return self.to_out(pooled.flatten(1))


class ADMClassifierModel(ModelMixin, ConfigMixin):
    """The contracting half of ADM's U-Net with a pooled head: log p(class | noisy image, timestep).

    The names of its options and of its weights are those of ``diffusers.UNet2DModel``.

    Args:
        sample_size: Height and width of the images. Attention pooling takes no other.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        block_out_channels: Width of each level.
        down_block_types: Type of each level, a block of diffusers: ``"AttnDownBlock2D"`` has attention,
            ``"DownBlock2D"`` and ``"ResnetDownsampleBlock2D"`` have none.
        layers_per_block: Residual blocks of each level.
        downsample_type: ``"resnet"`` or ``"conv"``, for the levels with attention.
        dropout: Dropout probability of the residual blocks.
        attention_head_dim: Channels per head, those of the attention pooling too.
        norm_num_groups: Groups of every GroupNorm.
        resnet_time_scale_shift: ``"scale_shift"``, or ``"default"`` for a shift alone.
        time_embedding_channels: Channels of the timestep's sinusoidal embedding; None is ``block_out_channels[0]``.
        pool_type: ``"attention"``, or ``"adaptive"`` for the mean of all places.

    Raises:
        ValueError: If the channels of a head do not divide a width with attention, or ``pool_type`` is neither.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        num_classes: int = 1000,
        block_out_channels: Sequence[int] = (128, 256, 384, 512),
        down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
        layers_per_block: int = 4,
        downsample_type: Literal["resnet", "conv"] = "resnet",
        dropout: float = 0.0,
        attention_head_dim: int = 64,
        norm_num_groups: int = 32,
        resnet_time_scale_shift: Literal["scale_shift", "default"] = "scale_shift",
        time_embedding_channels: int | None = None,
        pool_type: Literal["attention", "adaptive"] = "attention",
    ):
        super().__init__()
        if pool_type not in ("attention", "adaptive"):
            raise ValueError(f"pool_type is {pool_type!r}, but must be 'attention' or 'adaptive'.")
        if len(down_block_types) != len(block_out_channels):
            raise ValueError(f"down_block_types is {down_block_types}, but must have {len(block_out_channels)} types.")
        last = block_out_channels[-1]
        for channels, kind in zip((*block_out_channels, last), (*down_block_types, "AttnMidBlock2D"), strict=True):
            if "Attn" in kind and channels % attention_head_dim:
                raise ValueError(f"attention_head_dim is {attention_head_dim}, but must divide {channels} channels.")

        time_channels = time_embedding_channels or block_out_channels[0]
        common: dict[str, Any] = {
            "temb_channels": 4 * time_channels,
            "resnet_time_scale_shift": resnet_time_scale_shift,
        }
        common |= {"resnet_groups": norm_num_groups, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "dropout": dropout}
        common |= {"attention_head_dim": attention_head_dim}
        self.time_proj = Timesteps(time_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(time_channels, 4 * time_channels)
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        widths = pairwise((block_out_channels[0], *block_out_channels))
        for level, (kind, (in_width, width)) in enumerate(zip(down_block_types, widths, strict=True), start=1):
            shape = {"num_layers": layers_per_block, "in_channels": in_width, "out_channels": width}
            down = {"add_downsample": level < len(block_out_channels), "downsample_type": downsample_type}
            self.down_blocks.append(get_down_block(kind, **shape, **down, downsample_padding=1, **common))
        self.mid_block = UNetMidBlock2D(last, attn_groups=norm_num_groups, **common)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, last, eps=1e-5)
        if pool_type == "attention":
            size = sample_size >> (len(block_out_channels) - 1)
            self.pool: nn.Module = AttentionPool2D(size, last, attention_head_dim, num_classes)
        else:
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(last, num_classes, 1), nn.Flatten())

    def forward(
        self, sample: Tensor, timestep: Tensor | float, return_dict: bool = True
    ) -> ADMClassifierOutput | tuple[Tensor]:
        """The classes of noisy images.

        Args:
            sample: (batch, in_channels, sample_size, sample_size), in [-1, 1] before noise was added.
            timestep: Scalar or (batch,), counted from 0.
            return_dict: Whether to return an `ADMClassifierOutput` or a tuple.

        Returns:
            ``logits``, (batch, num_classes).
        """
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time_embedding = self.time_embedding(self.time_proj(timesteps).to(self.dtype))
        hidden_states = self.conv_in(sample)
        for block in self.down_blocks:
            hidden_states, _ = block(hidden_states, time_embedding)
        hidden_states = self.mid_block(hidden_states, time_embedding)
        logits = self.pool(F.silu(self.conv_norm_out(hidden_states)))
        return ADMClassifierOutput(logits) if return_dict else (logits,)
