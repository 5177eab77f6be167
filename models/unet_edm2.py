"""EDM2's magnitude-preserving U-Net: Karras et al. 2024, https://arxiv.org/abs/2312.02696, configuration G, figure 21.

The file imports torch and diffusers only, so that a repository on the Hub can carry it beside its weights.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


# Equation 81: SiLU divided by this preserves the magnitude of unit normal features. Here the weights that follow it
# are divided instead, which spares the features a pass.
SILU_MAGNITUDE = 0.596


def normalize(values: Tensor, dims: tuple[int, ...], scale: float = 1.0) -> Tensor:
    """Values of magnitude (root mean square over ``dims``) 1, times ``scale``."""
    wide = torch.promote_types(values.dtype, torch.float32)
    norm = torch.linalg.vector_norm(values, dim=dims, keepdim=True, dtype=wide)
    count = math.prod(values.shape[dim] for dim in dims)
    return values * (scale / (norm / math.sqrt(count) + 1e-4)).to(values.dtype)


def balance(t: float) -> tuple[float, float]:
    """The factors of the two terms of a magnitude-preserving sum (equation 88), ``t`` the share of the second."""
    magnitude = math.hypot(1 - t, t)
    return (1 - t) / magnitude, t / magnitude


class MagnitudePreserving(nn.Module):
    """Equation 47: a layer without bias that computes with normalised filters, so that magnitudes pass unchanged.

    What it computes, times ``gain``, depends on the directions of its filters alone.
    """

    weight: Tensor
    gain: float

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)

    def effective_weight(self) -> Tensor:
        """What is multiplied with, in the shape of the weight."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        scale = self.gain / math.sqrt(weight[0].numel())
        return normalize(weight, tuple(range(1, weight.ndim)), scale).to(self.weight.dtype)

    @torch.no_grad()
    def force_normalization(self) -> None:
        """Equation 66: brings the filters to magnitude 1, lest they grow and the effective learning rate shrink."""
        self.weight.copy_(normalize(self.weight, tuple(range(1, self.weight.ndim))))


class MPConv2d(MagnitudePreserving, nn.Conv2d):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float = 1.0):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.gain = gain

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._conv_forward(hidden_states, self.effective_weight(), None)


class MPLinear(MagnitudePreserving, nn.Linear):
    def __init__(self, in_features: int, out_features: int, gain: float = 1.0):
        super().__init__(in_features, out_features, bias=False)
        self.gain = gain

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.linear(hidden_states, self.effective_weight())


class FourierFeatures(nn.Module):
    """Equation 75: sqrt(2) cos(2 pi (f x + p)), f unit normal and p uniform in [0, 1), fixed and always float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FourierFeatures":
        # moves, but never rounds: half precision would turn the phases of a timestep into others
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, values: Tensor) -> Tensor:
        """(batch,) float32 -> (batch, channels) float32."""
        return math.sqrt(2) * (values[:, None] * self.frequencies + self.phases).cos()


class SelfAttention(nn.Module):
    """Cosine attention among all positions: queries, keys and values have magnitude 1 in every head."""

    def __init__(self, channels: int, heads: int, attention_balance: float):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention_head_dim asks for {heads} heads, but must divide {channels} channels evenly")
        self.heads = heads
        self.main_scale, branch_scale = balance(attention_balance)
        self.query_key_value = MPConv2d(channels, 3 * channels, 1)
        self.out_conv = MPConv2d(channels, channels, 1, gain=branch_scale)

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = self.query_key_value(hidden_states).flatten(2).transpose(1, 2)  # (batch, positions, 3 * channels)
        tokens = normalize(tokens.unflatten(2, (3, self.heads, -1)).contiguous(), (4,))
        query, key, value = tokens.permute(2, 0, 3, 1, 4)  # each (batch, heads, positions, channels of a head)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = attended.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return torch.add(self.out_conv(attended), hidden_states, alpha=self.main_scale)


def embedding_width(config: FrozenDict) -> int:
    """Features of the embedding that every block of the network with that config is given."""
    return config.model_channels * (config.channel_mult_emb or max(config.channel_mult))


class Block(nn.Module):
    """What blocks of encoder and decoder share: the residual branch, its sum with the main path, self-attention."""

    shortcut_first: bool  # whether the shortcut is of the main path or a branch of its own

    def __init__(
        self,
        config: FrozenDict,
        in_channels: int,
        out_channels: int,
        attends: bool = False,
        resamples: bool = False,
        skip_channels: int = 0,
    ):
        super().__init__()
        self.resamples, self.skip_channels, self.clip = resamples, skip_channels, config.clip_activations
        self.main_scale, residual_scale = balance(config.res_balance)
        width = in_channels + skip_channels
        if skip_channels:
            # equation 103: a concatenation to which both parts contribute by their shares, whatever their widths
            scales = zip(balance(config.concat_balance), (in_channels, skip_channels), strict=True)
            self.concat_scales = [scale * math.sqrt(width / channels) for scale, channels in scales]
        self.shortcut = MPConv2d(width, out_channels, 1) if width != out_channels else None
        first_width = out_channels if self.shortcut_first else width
        self.conv1 = MPConv2d(first_width, out_channels, 3, gain=1 / SILU_MAGNITUDE)
        self.embedding_projection = MPLinear(embedding_width(config), out_channels, gain=1 / SILU_MAGNITUDE)
        self.embedding_gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = MPConv2d(out_channels, out_channels, 3, gain=residual_scale / SILU_MAGNITUDE)
        heads = out_channels // config.attention_head_dim if attends else 0
        self.attention = SelfAttention(out_channels, heads, config.attention_balance) if heads else None

    def residual(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        """The branch's term of the sum, its factor in the weights."""
        scale = self.embedding_projection(embedding) * self.embedding_gain + 1
        hidden_states = self.conv1(F.silu(hidden_states)) * scale[:, :, None, None]
        hidden_states = F.silu(hidden_states, inplace=not torch.is_grad_enabled())
        return self.conv2(self.dropout(hidden_states))

    def join(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        hidden_states = torch.add(residual, hidden_states, alpha=self.main_scale)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states)
        return hidden_states if self.clip is None else hidden_states.clamp_(-self.clip, self.clip)


class EncoderBlock(Block):
    """Halves the resolution if it ``resamples``, and normalises the features of every pixel."""

    shortcut_first = True

    def forward(self, hidden_states: Tensor, embedding: Tensor) -> Tensor:
        if self.resamples:
            hidden_states = F.avg_pool2d(hidden_states, 2)
        if self.shortcut is not None:
            hidden_states = self.shortcut(hidden_states)
        hidden_states = normalize(hidden_states, (1,))
        return self.join(hidden_states, self.residual(hidden_states, embedding))


class DecoderBlock(Block):
    """Doubles the resolution if it ``resamples``, and joins a skip connection if it has ``skip_channels``."""

    shortcut_first = False

    def forward(self, hidden_states: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.resamples:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0)
        if skip is not None:
            main_scale, skip_scale = self.concat_scales
            hidden_states = torch.cat([hidden_states * main_scale, skip * skip_scale], dim=1)
        residual = self.residual(hidden_states, embedding)
        if self.shortcut is not None:
            hidden_states = self.shortcut(hidden_states)
        return self.join(hidden_states, residual)


class EDM2UNet2DModel(ModelMixin, ConfigMixin):
    r"""EDM2's U-Net, whose layers all preserve the magnitude of what passes through them.

    In `train()` mode each pass first brings the filters back to unit magnitude: call backward before the next pass.

    Args:
        sample_size: Height and width of the images, one int or (height, width), in pixels.
        in_channels: Channels of the images.
        num_class_embeds: Number of classes, or None for a network without classes.
        model_channels: Width that the multipliers multiply.
        channel_mult: Width of each level, from the highest resolution to the lowest.
        channel_mult_noise: Width of the Fourier features; None is that of the first level.
        channel_mult_emb: Width of the embedding; None is that of the widest level.
        layers_per_block: Blocks of each level on the way down; there is one more on the way up.
        attention_resolutions: Heights of the feature maps, in pixels, with self-attention; the middle always has it.
        attention_head_dim: Channels of a head. Narrower levels have no attention.
        label_balance: Share of the class in the embedding, in [0, 1].
        concat_balance: Share of the skip connection where it joins, in [0, 1].
        res_balance: Share of the residual branch, in [0, 1].
        attention_balance: Share of the attention, in [0, 1].
        clip_activations: Largest absolute value of what leaves a block, or None for no bound.
        dropout: Probability of dropping a feature inside the blocks, in [0, 1).
        logvar_channels: Fourier features of the uncertainty.
        null_class: Whether the network was trained without labels too, so that guidance can lead away from no class.

    Raises:
        ValueError: If the options do not fit together; the message says which value was found and what would be right.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("EncoderBlock", "DecoderBlock")
    _repeated_blocks = ("EncoderBlock", "DecoderBlock")
    _keep_in_fp32_modules = ["time_fourier", "logvar_fourier"]  # noqa: RUF012 diffusers wants a list

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        num_class_embeds: int | None = 1000,
        model_channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (16, 8),
        attention_head_dim: int = 64,
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        res_balance: float = 0.3,
        attention_balance: float = 0.3,
        clip_activations: float | None = 256.0,
        dropout: float = 0.0,
        logvar_channels: int = 128,
        null_class: bool = False,
    ):
        super().__init__()
        self.register_to_config(channel_mult=tuple(channel_mult), attention_resolutions=tuple(attention_resolutions))
        self._check_config()
        widths = [model_channels * factor for factor in channel_mult]
        fourier_width = model_channels * (channel_mult_noise or channel_mult[0])
        embed_dim = embedding_width(self.config)
        height = sample_size if isinstance(sample_size, int) else sample_size[0]
        attends = [height >> level in attention_resolutions for level in range(len(widths))]

        self.time_fourier = FourierFeatures(fourier_width)
        self.time_embedding = MPLinear(fourier_width, embed_dim)
        self.class_embedding = MPLinear(num_class_embeds, embed_dim) if num_class_embeds is not None else None

        # a channel of ones beside the image stands in for biases
        self.conv_in = MPConv2d(in_channels + 1, widths[0], 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = widths[0]
        skips = [channels]  # widths of the skip connections
        for level, width in enumerate(widths):
            if level > 0:
                self.encoder.append(EncoderBlock(self.config, channels, channels, resamples=True))
                skips.append(channels)
            for _ in range(layers_per_block):
                self.encoder.append(EncoderBlock(self.config, channels, width, attends[level]))
                skips.append(channels := width)
        self.decoder.append(DecoderBlock(self.config, channels, channels, attends=True))
        self.decoder.append(DecoderBlock(self.config, channels, channels))
        for level, width in reversed(list(enumerate(widths))):
            if level < len(widths) - 1:
                self.decoder.append(DecoderBlock(self.config, channels, channels, resamples=True))
            for _ in range(layers_per_block + 1):
                block = DecoderBlock(self.config, channels, width, attends[level], skip_channels=skips.pop())
                self.decoder.append(block)
                channels = width
        self.conv_out = MPConv2d(channels, in_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros(()))

        self.logvar_fourier = FourierFeatures(logvar_channels)
        self.logvar_linear = MPLinear(logvar_channels, 1)
        self.gradient_checkpointing = False

    def _check_config(self) -> None:
        config = self.config
        if not config.channel_mult:
            raise ValueError("channel_mult is empty, but must have at least one entry")
        options = ["in_channels", "model_channels", "layers_per_block", "attention_head_dim", "logvar_channels"]
        counts = {option: config[option] for option in options}
        counts |= {f"channel_mult[{i}]": factor for i, factor in enumerate(config.channel_mult)}
        optional = ("num_class_embeds", "channel_mult_noise", "channel_mult_emb")
        counts |= {option: config[option] for option in optional if config[option] is not None}
        for option, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{option} is {count!r}, but must be a whole number of at least 1")
        for option in ("label_balance", "concat_balance", "res_balance", "attention_balance"):
            if not 0.0 <= config[option] <= 1.0:
                raise ValueError(f"{option} is {config[option]}, but must be in [0, 1]")
        if not 0.0 <= config.dropout < 1.0:
            raise ValueError(f"dropout is {config.dropout}, but must be in [0, 1)")
        if config.clip_activations is not None and not config.clip_activations > 0.0:
            raise ValueError(f"clip_activations is {config.clip_activations}, but must be above 0, or None")
        size = config.sample_size
        self._check_size(*((size, size) if isinstance(size, int) else size), "sample_size")

    def _check_size(self, height: int, width: int, what: str) -> None:
        halvings = len(self.config.channel_mult) - 1
        if height < 1 or width < 1 or height % 2**halvings or width % 2**halvings:
            wanted = f"multiples of {2**halvings}"
            raise ValueError(f"{what} is {height}x{width}, which {halvings} halvings do not divide: take {wanted}")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """The raw output F, to be preconditioned (Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 7).

        Args:
            sample: c_in x, the noisy images brought to unit variance, (batch, in_channels, height, width), height and
                width multiples of 2^(levels - 1).
            timestep: c_noise = log(sigma) / 4, one for all images or one each, (batch,).
            class_labels: int64 (batch,) in 0..num_class_embeds; num_class_embeds itself is no class. None is no class
                for all images.
            return_dict: Whether to return a `UNet2DOutput` instead of a tuple.

        Returns:
            `UNet2DOutput` whose ``sample`` is F, (batch, in_channels, height, width).

        Raises:
            ValueError: If channels, size or labels do not fit the network.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            wanted = f"(batch, {self.config.in_channels}, height, width)"
            raise ValueError(f"sample has shape {tuple(sample.shape)}, but must be {wanted}")
        self._check_size(sample.shape[2], sample.shape[3], "sample")
        if self.training:
            # here and not in the layers, which gradient checkpointing calls twice
            for module in self.modules():
                if isinstance(module, MagnitudePreserving) and module is not self.logvar_linear:
                    module.force_normalization()

        embedding = self._embed(timestep, class_labels, sample)  # (batch, width)
        if sample.device.type == "cpu" and not torch.is_grad_enabled():
            # what oneDNN is fastest with, but for gradients; on a GPU the layout of the weights decides
            sample = sample.contiguous(memory_format=torch.channels_last)
        hidden_states = self.conv_in(F.pad(sample, (0, 0, 0, 0, 0, 1), value=1.0))
        skips = [hidden_states]
        for block in self.encoder:
            hidden_states = self._call(block, hidden_states, embedding)
            skips.append(hidden_states)
        for block in self.decoder:
            hidden_states = self._call(block, hidden_states, embedding, skips.pop() if block.skip_channels else None)
        output = (self.conv_out(hidden_states) * self.out_gain).contiguous()
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def log_variance(self, timestep: Tensor | float) -> Tensor:
        """The uncertainty u(sigma) of the training loss, a logarithm of its variance (equation 21).

        Args:
            timestep: c_noise = log(sigma) / 4, a number or (batch,).

        Returns:
            (batch,), or (1,) for a number.
        """
        if self.training:
            self.logvar_linear.force_normalization()
        weight = self.logvar_linear.weight
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=weight.device).reshape(-1)
        with torch.autocast(weight.device.type, enabled=False):
            return self.logvar_linear(self.logvar_fourier(timestep).to(weight.dtype)).squeeze(1)

    def _call(self, block: Block, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _embed(self, timestep: Tensor | float, class_labels: Tensor | None, sample: Tensor) -> Tensor:
        batch, num_classes = len(sample), self.config.num_class_embeds
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device)
        if timestep.numel() not in (1, batch):
            raise ValueError(f"timestep has {timestep.numel()} entries, but must have 1 or {batch}")
        timestep = timestep.reshape(-1).expand(batch)
        embedding = self.time_embedding(self.time_fourier(timestep).to(sample.dtype))
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels were given, but num_class_embeds is None")
            return F.silu(embedding)
        if class_labels is None:
            class_labels = torch.full((batch,), num_classes, device=sample.device)
        elif class_labels.shape != (batch,):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}, but must be ({batch},)")
        # one-hot vectors of magnitude 1, all zero for no class
        one_hot = F.one_hot(class_labels, num_classes + 1)[:, :-1].to(sample.dtype)
        time_scale, class_scale = balance(self.config.label_balance)
        classes = self.class_embedding(one_hot * math.sqrt(num_classes))
        return F.silu(torch.add(embedding * time_scale, classes, alpha=class_scale))
