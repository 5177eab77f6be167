"""The U-Net as the plain composition of its layers, from the same weights: what ours must equal, and beat.

It computes what the original program computes in the way that program does: filters are standardised again at
every call, attention is written out, a class attention that has no effect is computed all the same, the two
branches of guidance are two forward passes, and nothing is kept from one call to the next. Of the network it
uses weights and settings alone, none of its methods.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from imagenet64_diffusion.models.unet_class_conditional import (
    ChannelAttentionLayer,
    ClassAttentionLayer,
    ClassConditionalUNet2DModel,
    ConvHead,
    ConvNextLayer,
    LayerStack,
    ResnetLayer,
    SelfAttentionLayer,
)


class PlainUNet(nn.Module):
    """A plain network with a copy of the weights of one of ours.

    Args:
        unet: Ours, which stays as it is.
    """

    def __init__(self, unet: ClassConditionalUNet2DModel):
        super().__init__()
        self.config = unet.config
        self.unet = copy.deepcopy(unet)
        for parameter in self.unet.parameters():
            parameter.data = parameter.data.contiguous()
        for layer in self.unet.modules():
            if isinstance(layer, ClassAttentionLayer) and layer.query is None:
                # ours drops what has no effect; the original computes it, whatever the weights are
                width, like = layer.out_conv.in_channels, layer.out_conv.weight
                for name in ("query", "key"):
                    linear = nn.Linear(self.config.class_embed_dim, width, device=like.device, dtype=like.dtype)
                    setattr(layer, name, linear)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.unet.conv_in.weight.dtype

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, channels, ...), timestep (batch,) or one, labels (batch,) -> (batch, 2 * channels, ...)."""
        unet = self.unet
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        time = embed_time(self, timestep)
        classes = None if unet.class_embedding is None else embed_class(self, class_labels, sample)

        hidden = convolve(unet.conv_in, sample)
        skips = []
        for block in unet.down_blocks:
            hidden = self.stack(block.stack, hidden, time, classes)
            skips.append(hidden)
            hidden = convolve(block.downsample, hidden)
        hidden = self.stack(unet.mid_block.stack1, hidden, time, classes)
        hidden = channel_attention(self, unet.mid_block.channel_attention, hidden, time, classes)
        hidden = self.stack(unet.mid_block.stack2, hidden, time, classes)
        for block in unet.up_blocks:
            up = block.upsample
            hidden = F.conv_transpose2d(hidden, up.weight, up.bias, up.stride, up.padding)
            hidden = self.stack(block.stack, torch.cat([hidden, skips.pop()], dim=1), time, classes)

        head = unet.head
        if isinstance(head, ConvHead):
            hidden = self.stack(head.stack, hidden, time, classes)
            return convolve(head.conv, F.silu(normalize(head.norm, hidden)))
        hidden = self.stack(head.stack1, hidden, time, classes)
        hidden = self.stack(head.stack2, hidden, time, classes)
        hidden = convolve(head.conv, hidden)
        channels = self.config.in_channels
        variance = convnext(self, head.variance_layer, hidden[:, :channels], None, None)
        noise = convnext(self, head.noise_layer, hidden[:, channels:], None, None)
        return torch.cat([noise, 2 * variance - 1], dim=1)

    def stack(
        self, stack: LayerStack, hidden: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None
    ) -> torch.Tensor:
        """The layers of one resolution."""
        for layer in stack.layers:
            hidden = PLAIN_LAYERS[type(layer)](self, layer, hidden, time, classes)
        return hidden


def embed_time(plain: PlainUNet, timestep: torch.Tensor) -> torch.Tensor:
    """(batch,) -> (batch, time_embed_dim)."""
    dim, kind = plain.config.time_embed_dim, plain.config.time_embedding_type
    if kind == "sinusoidal":
        frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2) / (dim // 2)).to(timestep.device)
        phases = timestep.float()[:, None] * frequencies
        encoding = torch.cat([phases.cos(), phases.sin()], dim=1)
        encoding = F.pad(encoding, (0, dim % 2))
    else:
        # on the CPU, as the last digit of such frequencies decides the phase
        frequencies = (10000.0 ** (2 * torch.arange(dim, dtype=torch.float32) / dim)).to(timestep.device)
        phases = (timestep.float().round() + 1)[:, None] * frequencies
        if kind == "original_sine":
            encoding = phases.sin()
        elif kind == "original_interleaved":
            encoding = phases.sin()
            encoding[:, 1::2] = phases[:, 1::2].cos()
        else:
            encoding = phases.sin()
            encoding[1::2] = phases[1::2].cos()
    first, second = plain.unet.time_embedding.linear_1, plain.unet.time_embedding.linear_2
    hidden = F.gelu(F.linear(encoding.to(plain.dtype), first.weight, first.bias))
    return F.linear(hidden, second.weight, second.bias)


def embed_class(plain: PlainUNet, class_labels: torch.Tensor | None, sample: torch.Tensor) -> torch.Tensor:
    """Labels (batch,) or None -> (batch, class_embed_dim): one-hot times a table, zero for the null class."""
    num_classes = plain.config.num_class_embeds
    if class_labels is None:
        class_labels = torch.full((len(sample),), num_classes, device=sample.device)
    one_hot = (class_labels[:, None] == torch.arange(num_classes, device=sample.device)).to(plain.dtype)
    return one_hot @ plain.unet.class_embedding.weight[:num_classes]


def convolve(conv: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
    """A convolution with the weight as it is."""
    return F.conv2d(hidden, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def convolve_standardized(conv: nn.Conv2d, hidden: torch.Tensor) -> torch.Tensor:
    """A convolution whose filters are standardised first, in float32."""
    weight = conv.weight.float()
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    variance = weight.var(dim=(1, 2, 3), correction=0, keepdim=True)
    weight = (weight - mean) * torch.rsqrt(variance + 1e-5)
    return F.conv2d(hidden, weight.to(conv.weight.dtype), conv.bias, conv.stride, conv.padding)


def normalize(norm: nn.GroupNorm, hidden: torch.Tensor) -> torch.Tensor:
    """GroupNorm."""
    return F.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)


def project(linear: nn.Linear, embedding: torch.Tensor) -> torch.Tensor:
    """(batch, features) -> (batch, channels, 1, 1)."""
    return F.linear(embedding, linear.weight, linear.bias)[:, :, None, None]


def shortcut(layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What goes around a layer: a 1x1 convolution where the width changes."""
    return hidden if isinstance(layer.shortcut, nn.Identity) else convolve(layer.shortcut, hidden)


def resnet(
    plain: PlainUNet, layer: ResnetLayer, hidden: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None
) -> torch.Tensor:
    """Two standardised convolutions with GroupNorm."""
    residual = shortcut(layer, hidden)
    hidden = normalize(layer.norm1, convolve_standardized(layer.conv1, hidden))
    hidden = hidden * project(layer.time_projection, F.silu(time))
    if classes is not None:
        hidden = hidden + project(layer.class_projection, F.silu(classes))
    hidden = F.dropout(F.silu(hidden), plain.config.dropout, plain.training)
    return F.silu(normalize(layer.norm2, convolve_standardized(layer.conv2, hidden))) + residual


def convnext(
    plain: PlainUNet,
    layer: ConvNextLayer,
    hidden: torch.Tensor,
    time: torch.Tensor | None,
    classes: torch.Tensor | None,
) -> torch.Tensor:
    """A ConvNeXt block; without time it is not modulated."""
    residual = shortcut(layer, hidden)
    hidden = normalize(layer.norm, convolve(layer.depthwise_conv, hidden))
    if time is not None:
        hidden = hidden * project(layer.time_projection, time)
        if classes is not None:
            hidden = hidden + project(layer.class_projection, classes)
    hidden = F.gelu(convolve(layer.expand_conv, hidden))
    if time is not None:
        hidden = F.dropout(hidden, plain.config.dropout, plain.training)
    return convolve(layer.project_conv, hidden) + residual


def class_attention(
    plain: PlainUNet, layer: ClassAttentionLayer, hidden: torch.Tensor, time: torch.Tensor, classes: torch.Tensor
) -> torch.Tensor:
    """Attention among channels, from the class; or what the original does with it, which has no effect."""
    residual = hidden
    hidden = normalize(layer.norm, hidden)
    query = F.linear(classes, layer.query.weight, layer.query.bias)
    key = F.linear(classes, layer.key.weight, layer.key.bias)
    scores = torch.einsum("nc,nd->ncd", key, query) / math.sqrt(hidden.shape[1])
    attention = scores.softmax(dim=-1)
    if plain.config.class_attention_type == "channel":
        hidden = torch.einsum("nclw,ncd->ndlw", hidden, attention)
    else:
        # each row of the attention, which sums to 1, multiplies its own channel
        hidden = torch.einsum("nclw,ncd->nclw", hidden, attention)
    return normalize(layer.out_norm, convolve(layer.out_conv, hidden)) + residual


def self_attention(
    plain: PlainUNet, layer: SelfAttentionLayer, hidden: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None
) -> torch.Tensor:
    """Attention inside patches, with the patches as the original reads them."""
    size = plain.config.attention_patch_size

    def tokens(features: torch.Tensor) -> torch.Tensor:  # (batch, patches, positions, channels)
        batch, channels, height, width = features.shape
        if size >= max(height, width):
            patches = features[:, None]
        else:
            # (batch, channels, patch rows, patch columns, size, size), reshaped without a permutation
            patches = features.unfold(2, size, size).unfold(3, size, size).reshape(batch, -1, channels, size, size)
        return patches.flatten(3).transpose(2, 3)

    parts = convolve(layer.key_query_value, normalize(layer.norm, hidden)).chunk(3, dim=1)
    key, query, value = (tokens(part) for part in parts)
    scores = query @ key.transpose(2, 3) / math.sqrt(size)
    attended = scores.softmax(dim=-1) @ value
    attended = attended.transpose(2, 3).reshape(hidden.shape)
    return convolve(layer.out_conv, attended) + hidden


def channel_attention(
    plain: PlainUNet,
    layer: ChannelAttentionLayer,
    hidden: torch.Tensor,
    time: torch.Tensor,
    classes: torch.Tensor | None,
) -> torch.Tensor:
    """Efficient channel attention."""
    pooled = hidden.mean(dim=(2, 3))[:, None, :]  # (batch, 1, channels)
    weight = F.conv1d(pooled, layer.conv.weight, padding=layer.conv.weight.shape[-1] // 2).sigmoid()
    return hidden * weight[:, 0, :, None, None]


PLAIN_LAYERS: dict[type[nn.Module], Callable[..., torch.Tensor]] = {
    ResnetLayer: resnet,
    ConvNextLayer: convnext,
    ClassAttentionLayer: class_attention,
    SelfAttentionLayer: self_attention,
    ChannelAttentionLayer: channel_attention,
}


@torch.no_grad()
def guided_prediction(
    plain: PlainUNet,
    sample: torch.Tensor,
    timestep: torch.Tensor | int,
    class_labels: torch.Tensor | None,
    guidance_scale: float,
    guide_variance: bool = False,
) -> torch.Tensor:
    """What a guided step takes: one forward pass for each branch, (batch, 2 * channels, height, width).

    With w = guidance_scale - 1 it is (1 + w) conditional - w null (Ho and Salimans 2022,
    https://arxiv.org/abs/2207.12598, equation 6); the variance is that of the conditional branch, or guided
    likewise.
    """
    model_input = sample.to(plain.dtype)
    conditional = plain(model_input, timestep, class_labels).to(sample.dtype)
    if class_labels is None:
        return conditional
    null_labels = torch.full_like(class_labels, plain.config.num_class_embeds)
    null = plain(model_input, timestep, null_labels).to(sample.dtype)
    weight = guidance_scale - 1
    guided = (1 + weight) * conditional - weight * null
    if guide_variance:
        return guided
    channels = sample.shape[1]
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)
