"""A class-conditional U-Net for pixel-space diffusion, in the manner of ``diffusers.UNet2DModel``.

The file imports torch and diffusers only, so that a repository on the Hub can carry it beside its weights.
"""

import difflib
import itertools
import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn


_CHOICES = {
    "time_embedding_type": ("sinusoidal", "original_interleaved", "original_sine", "original_alternating"),
    "class_attention_type": ("channel", "identity"),
    "output_head_type": ("conv", "original"),
}

# How the original program calls the layer types.
LAYER_TYPE_ALIASES = {
    "res": "resnet",
    "conv": "convnext",
    "clsAtn": "class_attention",
    "atn": "self_attention",
    "chnAtn": "channel_attention",
}


def _group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with groups of four channels, or of the next larger size that divides."""
    groups = next(groups for groups in range(max(channels // 4, 1), 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels)


def _silu(hidden_states: Tensor) -> Tensor:
    """SiLU of a tensor that nobody else needs: in its place where no gradient is asked for."""
    return F.silu(hidden_states, inplace=not torch.is_grad_enabled())


class Layer(nn.Module):
    """A layer type: made of widths and the network's config, called with features and the two embeddings."""

    changes_width = False  # whether out_channels may differ from in_channels
    needs_classes = False


class ModulatedLayer(Layer):
    """A layer whose features time scales and class shifts, and which may change their number."""

    changes_width = True

    def _add_projections(self, channels: int, config: FrozenDict) -> None:
        self.time_projection = nn.Linear(config.time_embed_dim, channels)
        # time multiplies the features as they are: around 1 they pass, around 0 they would vanish
        nn.init.ones_(self.time_projection.bias)
        if config.num_class_embeds is not None:
            self.class_projection = nn.Linear(config.class_embed_dim, channels)

    def _modulate(self, hidden_states: Tensor, time_embedding: Tensor, class_embedding: Tensor | None) -> Tensor:
        scale = self.time_projection(time_embedding)[:, :, None, None]
        if class_embedding is None:
            return hidden_states * scale
        return torch.addcmul(self.class_projection(class_embedding)[:, :, None, None], hidden_states, scale)


class StandardizedConv2d(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019, https://arxiv.org/abs/1903.10520, section 3): mean 0, variance 1."""

    def effective_weight(self) -> Tensor:
        """What is convolved with, (out_channels, in_channels, height, width)."""
        # float32, as a filter's variance is often below what half precision holds
        filters = self.weight.float().flatten(1)
        standardized = F.layer_norm(filters, filters.shape[1:], eps=1e-5)
        return standardized.view(self.weight.shape).to(self.weight.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self._conv_forward(hidden_states, self.effective_weight(), self.bias)


class ResnetLayer(ModulatedLayer):
    """Two standardised convolutions with GroupNorm, modulated between them."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        self._add_projections(out_channels, config)
        self.conv1 = StandardizedConv2d(in_channels, out_channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(8 if in_channels % 8 == out_channels % 8 == 0 else 1, out_channels)
        self.conv2 = StandardizedConv2d(out_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8 if out_channels % 8 == 0 else 1, out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> Tensor:
        activated = (None if embedding is None else F.silu(embedding) for embedding in embeddings)
        features = self._modulate(self.norm1(self.conv1(hidden_states)), *activated)
        features = self.dropout(_silu(features))
        return _silu(self.norm2(self.conv2(features))) + self.shortcut(hidden_states)


class ConvNextLayer(ModulatedLayer):
    """A ConvNeXt block (Liu et al. 2022, https://arxiv.org/abs/2201.03545) with GroupNorm; plain without a config."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict | None):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(in_channels, in_channels, 7, padding=3, groups=in_channels)
        self.norm = _group_norm(in_channels)
        self.expand_conv = nn.Conv2d(in_channels, 2 * in_channels, 1)
        self.project_conv = nn.Conv2d(2 * in_channels, out_channels, 1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.dropout = nn.Dropout(config.dropout if config else 0.0)
        if config:
            self._add_projections(in_channels, config)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None, class_embedding: Tensor | None) -> Tensor:
        features = self.norm(self.depthwise_conv(hidden_states))
        if time_embedding is not None:
            features = self._modulate(features, time_embedding, class_embedding)
        features = self.dropout(F.gelu(self.expand_conv(features)))
        return self.project_conv(features) + self.shortcut(hidden_states)


class ClassAttentionLayer(Layer):
    """Mixes the channels of an image by an attention matrix made from its class alone.

    Query and key have an entry per channel, A = softmax(key query^T / sqrt(channels)), and output channel d is the sum
    over c of A[c, d] x[c]. With "identity" A is the identity, as the original contracts it with itself alone.
    """

    needs_classes = True

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        attends = config.class_attention_type == "channel"
        self.norm = _group_norm(in_channels)
        self.query = nn.Linear(config.class_embed_dim, in_channels) if attends else None
        self.key = nn.Linear(config.class_embed_dim, in_channels) if attends else None
        self.out_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.out_norm = _group_norm(in_channels)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, class_embedding: Tensor) -> Tensor:
        features = self.norm(hidden_states)
        if self.query is not None:
            query, key = self.query(class_embedding), self.key(class_embedding)  # (batch, channels) each
            scores = key[:, :, None] * query[:, None, :] / math.sqrt(features.shape[1])
            attention = scores.softmax(dim=-1).to(features.dtype)  # (batch, channels in, channels out)
            features = (attention.mT @ features.flatten(2)).view_as(features)
        return self.out_norm(self.out_conv(features)) + hidden_states


class SelfAttentionLayer(Layer):
    """Dot-product attention among the positions inside square patches, scaled by 1 / sqrt(patch size).

    A map not larger than the patch is one patch. The (channels, patches) axes of a larger one are read in this order
    as (patches, channels), as the original's checkpoints need it: head p attends with the features of the p-th P-th of
    the channels, from every one of the P patches at once.
    """

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        self.patch_size = config.attention_patch_size
        self.norm = _group_norm(in_channels)
        self.key_query_value = nn.Conv2d(in_channels, 3 * in_channels, 1)
        self.out_conv = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor, class_embedding: Tensor | None) -> Tensor:
        batch, channels, height, width = hidden_states.shape
        whole = self.patch_size >= max(height, width)
        rows, columns = (height, width) if whole else (self.patch_size, self.patch_size)
        if height % rows or width % columns:
            raise ValueError(f"attention_patch_size {self.patch_size} does not divide a map of {height}x{width}")
        parts = self.key_query_value(self.norm(hidden_states)).chunk(3, dim=1)
        grid = (batch, channels, height // rows, rows, width // columns, columns)
        patches = (part.reshape(grid).transpose(3, 4) for part in parts)
        # each (batch, patches, positions, channels)
        key, query, value = (part.reshape(batch, -1, channels, rows * columns).mT for part in patches)
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.patch_size**-0.5)
        # the tokens fill the image in memory order, as the original does
        return self.out_conv(attended.transpose(2, 3).reshape(hidden_states.shape)) + hidden_states


class ChannelAttentionLayer(Layer):
    """Efficient channel attention: Wang et al. 2020, https://arxiv.org/abs/1910.03151, equations 5 and 12."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        kernel_size = int(abs(math.log2(in_channels) / 2 + 1 / 2)) | 1  # the next odd number
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, hidden_states: Tensor, time_embedding: Tensor | None, class_embedding: Tensor | None) -> Tensor:
        pooled = hidden_states.mean(dim=(2, 3))  # (batch, channels)
        weight = self.conv(pooled[:, None, :]).sigmoid().transpose(1, 2)  # (batch, channels, 1)
        return hidden_states * weight[..., None]


# Adding a layer type: write the class, name it here.
LAYER_TYPES: dict[str, type[Layer]] = {
    "resnet": ResnetLayer,
    "convnext": ConvNextLayer,
    "class_attention": ClassAttentionLayer,
    "self_attention": SelfAttentionLayer,
    "channel_attention": ChannelAttentionLayer,
}


class LayerStack(nn.Module):
    """The layers of one resolution, in order; the first one makes ``out_channels`` of ``in_channels``."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        first, *others = (LAYER_TYPES[name] for name in config.layer_types)
        self.layers = nn.ModuleList([first(in_channels, out_channels, config)])
        self.layers.extend(layer(out_channels, out_channels, config) for layer in others)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> Tensor:
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, *embeddings)
            else:
                hidden_states = layer(hidden_states, *embeddings)
        return hidden_states


class DownBlock(nn.Module):
    """One level on the way down. Returns what goes on, at half the resolution, and the skip connection."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        self.stack = LayerStack(in_channels, out_channels, config)
        self.downsample = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> tuple[Tensor, Tensor]:
        skip = self.stack(hidden_states, *embeddings)
        return self.downsample(skip), skip


class MidBlock(nn.Module):
    """The lowest resolution: two stacks with a channel attention between them."""

    def __init__(self, channels: int, config: FrozenDict):
        super().__init__()
        self.stack1 = LayerStack(channels, channels, config)
        self.channel_attention = ChannelAttentionLayer(channels, channels, config)
        self.stack2 = LayerStack(channels, channels, config)

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> Tensor:
        hidden_states = self.channel_attention(self.stack1(hidden_states, *embeddings), *embeddings)
        return self.stack2(hidden_states, *embeddings)


class UpBlock(nn.Module):
    """One level on the way up: doubles the resolution, then joins the skip connection."""

    def __init__(self, in_channels: int, out_channels: int, config: FrozenDict):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels, 4, stride=2, padding=1)
        self.stack = LayerStack(2 * in_channels, out_channels, config)

    def forward(self, hidden_states: Tensor, skip: Tensor, *embeddings: Tensor | None) -> Tensor:
        return self.stack(torch.cat([self.upsample(hidden_states), skip], dim=1), *embeddings)


class ConvHead(nn.Module):
    """A stack at the stem's width, then GroupNorm, SiLU and a 3x3 convolution."""

    def __init__(self, config: FrozenDict):
        super().__init__()
        self.stack = LayerStack(config.stem_channels, config.stem_channels, config)
        self.norm = _group_norm(config.stem_channels)
        self.conv = nn.Conv2d(config.stem_channels, 2 * config.in_channels, 3, padding=1)
        # the first prediction is zero, the best constant guess of noise and of velocity
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> Tensor:
        return self.conv(_silu(self.norm(self.stack(hidden_states, *embeddings))))


class OriginalHead(nn.Module):
    """The original's head of few channels, which has the variance first, as a fraction in [0, 1]."""

    def __init__(self, config: FrozenDict):
        super().__init__()
        channels = 2 * config.in_channels
        self.stack1 = LayerStack(config.stem_channels, config.stem_channels, config)
        self.stack2 = LayerStack(config.stem_channels, channels, config)
        self.conv = nn.Conv2d(channels, channels, 7, padding=3)
        self.noise_layer = ConvNextLayer(config.in_channels, config.in_channels, None)
        self.variance_layer = ConvNextLayer(config.in_channels, config.in_channels, None)

    def forward(self, hidden_states: Tensor, *embeddings: Tensor | None) -> Tensor:
        hidden_states = self.stack2(self.stack1(hidden_states, *embeddings), *embeddings)
        variance, noise = self.conv(hidden_states).chunk(2, dim=1)
        noise, variance = self.noise_layer(noise, None, None), self.variance_layer(variance, None, None)
        return torch.cat([noise, 2 * variance - 1], dim=1)


class OriginalTimesteps(nn.Module):
    """The original's encodings of t = timestep + 1: phase d is t * 10000^(2 d / dim), for d = 0..dim-1.

    They are tables, as float32 rounding decides the values of phases up to 1e8. ``interleaved`` is sine for even and
    cosine for odd d. Released checkpoints were trained with sine for even and cosine for odd rows of the batch,
    ``alternating``, and sample one image at a time, all ``sine``.
    """

    def __init__(self, dim: int, num_train_timesteps: int, kind: str):
        super().__init__()
        frequencies = 10000.0 ** (2 * torch.arange(dim, dtype=torch.float32) / dim)
        phases = torch.arange(1, num_train_timesteps + 1, dtype=torch.float32)[:, None] * frequencies
        sine, cosine = phases.sin(), phases.cos()
        mixed = torch.where(torch.arange(dim) % 2 == 0, sine, cosine)
        tables = {"original_sine": [sine], "original_interleaved": [mixed], "original_alternating": [sine, cosine]}
        # Kept as bit patterns: a module cast to half precision and back must not lose digits of its tables.
        self.register_buffer("table", torch.stack(tables[kind]).view(torch.int32), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        """(batch,) timesteps counted from 0, rounded to whole ones -> (batch, dim) float32."""
        index = timestep.round().long()
        # (1 or 2, timesteps, dim) tables, which the rows of the batch use in turn
        tables = self.table.view(torch.float32)
        return tables[torch.arange(len(index), device=index.device) % len(tables), index]


class ClassConditionalUNet2DModel(ModelMixin, ConfigMixin):
    r"""A U-Net that predicts the noise (or velocity, or image) and the reverse variance, given timestep and class.

    Every resolution runs the same list of layer types. There is a stride-2 convolution after each level, so with three
    levels a 64x64 image meets in the middle at 8x8.

    Args:
        sample_size: Height and width of the images, one int or (height, width), in pixels.
        in_channels: Channels of the images.
        stem_channels: Width of the first convolution and of the last level on the way up.
        block_out_channels: Width of each level, from the highest resolution to the lowest.
        layer_types: The layers of every resolution in order: ``"resnet"``, ``"convnext"``, ``"class_attention"``,
            ``"self_attention"``, ``"channel_attention"``, or the original's names ``res``, ``conv``, ``clsAtn``,
            ``atn``, ``chnAtn``. The first must be ``"resnet"`` or ``"convnext"``, the two that can change the width.
        num_class_embeds: Number of classes, or None for a network without classes.
        time_embed_dim: Width of the time embedding.
        class_embed_dim: Width of the class embedding.
        attention_patch_size: Side of the patches that self-attention looks at, in cells of the feature map.
        dropout: Probability of dropping a feature inside ``resnet`` and ``convnext`` layers, in [0, 1).
        time_embedding_type: ``"sinusoidal"`` (Vaswani et al. 2017), or one of the original's encodings
            ``"original_interleaved"``, ``"original_sine"``, ``"original_alternating"``, see [`OriginalTimesteps`].
        class_attention_type: ``"channel"``, or ``"identity"`` for the original's, in which the class has no effect.
        output_head_type: ``"conv"``, or ``"original"`` for the original's narrow head.
        num_train_timesteps: How many timesteps the tables of the original's encodings hold.

    Raises:
        ValueError: If the options do not fit together.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("DownBlock", "MidBlock", "UpBlock", "ConvHead", "OriginalHead")
    _repeated_blocks = ("LayerStack",)

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        stem_channels: int = 128,
        block_out_channels: tuple[int, ...] = (256, 512, 1024),
        layer_types: tuple[str, ...] = ("resnet", "class_attention", "channel_attention"),
        num_class_embeds: int | None = 1000,
        time_embed_dim: int = 512,
        class_embed_dim: int = 512,
        attention_patch_size: int = 16,
        dropout: float = 0.0,
        time_embedding_type: str = "sinusoidal",
        class_attention_type: str = "channel",
        output_head_type: str = "conv",
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        layer_types = tuple(LAYER_TYPE_ALIASES.get(name, name) for name in layer_types)
        self.register_to_config(layer_types=layer_types, block_out_channels=tuple(block_out_channels))
        self._check_config()
        config = self.config
        self.time_encoding = Timesteps(time_embed_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        if time_embedding_type != "sinusoidal":
            self.time_encoding = OriginalTimesteps(time_embed_dim, num_train_timesteps, time_embedding_type)
        self.time_embedding = TimestepEmbedding(time_embed_dim, time_embed_dim, act_fn="gelu")
        self.class_embedding = None
        if num_class_embeds is not None:
            # the last row is the null class: zero, and kept so because padding_idx gets no gradient
            self.class_embedding = nn.Embedding(num_class_embeds + 1, class_embed_dim, padding_idx=num_class_embeds)

        levels = list(itertools.pairwise([stem_channels, *block_out_channels]))
        self.conv_in = nn.Conv2d(in_channels, stem_channels, 7, padding=3)
        self.down_blocks = nn.ModuleList(DownBlock(lower, upper, config) for lower, upper in levels)
        self.mid_block = MidBlock(block_out_channels[-1], config)
        self.up_blocks = nn.ModuleList(UpBlock(upper, lower, config) for lower, upper in reversed(levels))
        self.head = ConvHead(config) if output_head_type == "conv" else OriginalHead(config)

    def _check_config(self) -> None:
        config = self.config
        for option, choices in _CHOICES.items():
            if config[option] not in choices:
                raise ValueError(f"{option} is {config[option]!r}, but must be one of {', '.join(choices)}")
        for option in ("layer_types", "block_out_channels"):
            if not config[option]:
                raise ValueError(f"{option} is empty, but must have at least one entry")
        for name in config.layer_types:
            if name not in LAYER_TYPES:
                known = f"{', '.join(LAYER_TYPES)} (or the original's names {', '.join(LAYER_TYPE_ALIASES)})"
                near = difflib.get_close_matches(name, [*LAYER_TYPES, *LAYER_TYPE_ALIASES], n=1)
                hint = f"; perhaps {near[0]}" if near else ""
                raise ValueError(f"layer_types names {name!r}, but must be made of {known}{hint}")
            if LAYER_TYPES[name].needs_classes and config.num_class_embeds is None:
                raise ValueError(f"layer_types names {name!r}, which needs classes, but num_class_embeds is None")
        first = config.layer_types[0]
        if not LAYER_TYPES[first].changes_width:
            able = " or ".join(name for name, layer in LAYER_TYPES.items() if layer.changes_width)
            raise ValueError(f"layer_types begins with {first!r}, which cannot change the width: begin with {able}")
        options = ["in_channels", "stem_channels", "time_embed_dim", "class_embed_dim", "attention_patch_size"]
        options += ["num_class_embeds"] if config.num_class_embeds is not None else []
        counts = {option: config[option] for option in options}
        counts |= {f"block_out_channels[{i}]": width for i, width in enumerate(config.block_out_channels)}
        for option, count in counts.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{option} is {count!r}, but must be a whole number of at least 1")
        if not 0.0 <= config.dropout < 1.0:
            raise ValueError(f"dropout is {config.dropout}, but must be in [0, 1)")

        size, patch = config.sample_size, config.attention_patch_size
        height, width = (size, size) if isinstance(size, int) else size
        self._check_size(height, width, "sample_size")
        for level in range(len(config.block_out_channels) + 1) if "self_attention" in config.layer_types else ():
            rows, columns = height >> level, width >> level
            if patch < max(rows, columns) and (rows % patch or columns % patch):
                wanted = f"the feature map of {rows}x{columns} that sample_size {size} gives at level {level}"
                raise ValueError(f"attention_patch_size is {patch}, but must divide {wanted}, or be larger")

    def _check_size(self, height: int, width: int, what: str) -> None:
        levels = len(self.config.block_out_channels)
        if min(height, width) < 1 or height % 2**levels or width % 2**levels:
            fault = f"which {levels} levels cannot halve: take multiples of {2**levels}"
            raise ValueError(f"{what} is {height}x{width}, {fault}")

    def _check_input(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels:
            wanted = f"(batch, {self.config.in_channels}, height, width)"
            raise ValueError(f"sample has shape {tuple(sample.shape)}, but must be {wanted}")
        self._check_size(sample.shape[2], sample.shape[3], "sample")
        if len(timestep) not in (1, len(sample)):
            raise ValueError(f"timestep has {len(timestep)} entries, but must have 1 or {len(sample)}")
        if class_labels is not None and self.class_embedding is None:
            raise ValueError("class_labels were given, but num_class_embeds is None")
        if class_labels is not None and class_labels.shape != (len(sample),):
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}, but must be ({len(sample)},)")

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predicts noise (or what the network was trained to predict) and variance of the noisy images.

        Args:
            sample: Noisy images, (batch, in_channels, height, width), height and width multiples of 2^levels.
            timestep: Counted from 0, one for all images or one each, (batch,). The original's encodings round
                fractions to the nearest whole timestep.
            class_labels: int64 (batch,) in 0..num_class_embeds, where num_class_embeds is the null class, as is None.
            return_dict: Whether to return a `UNet2DOutput` instead of a tuple.

        Returns:
            `UNet2DOutput` with (batch, 2 * in_channels, height, width): first the prediction, then the interpolation
            between the two fixed log-variances, -1 for the smaller and 1 for the larger one (Nichol and Dhariwal 2021,
            https://arxiv.org/abs/2102.09672, equation 15, read as diffusers' ``learned_range``).

        Raises:
            ValueError: If channels, size or labels do not fit the network.
        """
        timestep = torch.as_tensor(timestep, device=sample.device).reshape(-1)
        self._check_input(sample, timestep, class_labels)
        encoding = self.time_encoding(timestep.expand(len(sample))).to(sample.dtype)
        if class_labels is None and self.class_embedding is not None:
            class_labels = torch.full((len(sample),), self.config.num_class_embeds, device=sample.device)
        class_embedding = None if class_labels is None else self.class_embedding(class_labels)
        embeddings = self.time_embedding(encoding), class_embedding  # (batch, width) each

        if sample.device.type == "cpu" and not torch.is_grad_enabled():
            # what oneDNN is fastest with, but for gradients; on a GPU the layout of the weights decides
            sample = sample.contiguous(memory_format=torch.channels_last)
        hidden_states = self.conv_in(sample)  # (batch, stem_channels, height, width)
        skips = []
        for block in self.down_blocks:  # (batch, block_out_channels[i], height / 2^(i+1), width / 2^(i+1))
            hidden_states, skip = block(hidden_states, *embeddings)
            skips.append(skip)
        hidden_states = self.mid_block(hidden_states, *embeddings)
        for block in self.up_blocks:
            hidden_states = block(hidden_states, skips.pop(), *embeddings)
        prediction = self.head(hidden_states, *embeddings).contiguous()
        return UNet2DOutput(sample=prediction) if return_dict else (prediction,)
