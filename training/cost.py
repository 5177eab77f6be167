"""What training a network costs, in operations and in memory, and what ``--dry_run`` says.

The network is built and run on fake tensors, which have shapes, types and devices but no contents: the answer takes
seconds whatever the size of the network, and next to no memory.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..utils.nearest_names import perhaps


if TYPE_CHECKING:
    from accelerate import Accelerator

    from .plan import Plan

_AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingCost:
    """What a network costs. FLOPs count a multiplication and the addition that follows as two.

    Attributes:
        parameters: Number of parameters.
        forward_flops: FLOPs of one forward pass of one image, of convolutions and matrix products alone.
        training_flops: FLOPs of one forward and backward pass of one image, with what gradient checkpointing
            computes a second time.
        weight_bytes: Bytes of the parameters; their gradients take as much.
        optimizer_bytes: Bytes of the two moments of AdamW.
        ema_bytes: Bytes of the EMA of the parameters, 0 if there is none.
        activation_bytes: Bytes that the forward pass keeps for the backward pass, and with gradient checkpointing
            those that the largest layer computes again.
        images: Images that pass at once.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    weight_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activation_bytes: int
    images: int

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors at most, without what libraries and allocators hold back."""
        return 2 * self.weight_bytes + self.optimizer_bytes + self.ema_bytes + self.activation_bytes


def estimate_cost(
    unet_config: Mapping[str, Any],
    *,
    images: int = 1,
    precision: str = "no",
    gradient_checkpointing: bool = False,
    use_ema: bool = True,
    device_type: str = "cpu",
) -> TrainingCost:
    """Counts what a network costs from its options alone. The loss is taken for a mean square.

    Args:
        unet_config: Options of `ClassConditionalUNet2DModel`; names that begin with an underscore are passed over.
        images: Images that pass at once.
        precision: ``"no"`` for float32, ``"fp16"`` or ``"bf16"`` for autocast with float32 weights.
        gradient_checkpointing: Whether activations inside the layers are computed again in the backward pass.
        use_ema: Whether an EMA of the weights is kept.
        device_type: ``"cpu"`` or ``"cuda"``; autocast leaves other operations in float32 on the one than on the other.

    Raises:
        ValueError: If precision is not one of these, or the options of the network do not fit together.
    """
    if precision not in _AUTOCAST_DTYPES:
        near = perhaps(precision, _AUTOCAST_DTYPES)
        raise ValueError(f"precision is {precision!r}, but must be one of {', '.join(_AUTOCAST_DTYPES)}{near}")
    options = {name: value for name, value in unet_config.items() if not name.startswith("_")}
    dtype = _AUTOCAST_DTYPES[precision]
    with FakeTensorMode():
        # on the CPU, because a backward pass even of fake tensors wants the GPU that they are on
        unet = ClassConditionalUNet2DModel(**options).train()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        forward_flops, training_flops = _count_flops(lambda: _forward(unet, 1))
        weight_bytes = sum(parameter.nbytes for parameter in unet.parameters())

        with torch.device(device_type), torch.autocast(device_type, dtype, enabled=dtype is not None):
            unet = ClassConditionalUNet2DModel(**options).train()
            recomputed = 0
            if gradient_checkpointing:
                recomputed = max(_saved_bytes_by_layer(unet, images))
                unet.enable_gradient_checkpointing()
            activation_bytes = recomputed + _saved_bytes(unet, lambda: _forward(unet, images))
    return TrainingCost(
        parameters=unet.num_parameters(),
        forward_flops=forward_flops,
        training_flops=training_flops,
        weight_bytes=weight_bytes,
        optimizer_bytes=2 * weight_bytes,
        ema_bytes=weight_bytes if use_ema else 0,
        activation_bytes=activation_bytes,
        images=images,
    )


def cost_report(cost: TrainingCost, images_per_step: int) -> str:
    """The cost in a few aligned lines for people; images_per_step are those of all ranks and accumulated passes."""
    memory = {
        "weights": cost.weight_bytes,
        "EMA": cost.ema_bytes,
        "gradients": cost.weight_bytes,
        "optimizer": cost.optimizer_bytes,
        "activations": cost.activation_bytes,
        "total": cost.memory_bytes,
    }
    unit, bytes_per_unit = ("GiB", 2**30) if cost.memory_bytes >= 2**30 else ("MiB", 2**20)
    step_flops = cost.training_flops * images_per_step
    lines = [
        f"parameters        {_with_prefix(cost.parameters)}",
        f"forward pass      {_with_prefix(cost.forward_flops)}FLOP for 1 image",
        f"training step     {_with_prefix(step_flops)}FLOP for {images_per_step:,} image(s)",
        f"memory of one rank, {cost.images:,} image(s) at once",
        *(f"  {name:<16}{size / bytes_per_unit:8.2f} {unit}" for name, size in memory.items()),
    ]
    return "\n".join(lines)


def describe_run(plan: "Plan", accelerator: "Accelerator") -> str:
    """What ``--dry_run`` prints; nothing is built in memory and nothing is written."""
    options = plan.options
    cost = estimate_cost(
        plan.unet_config,
        images=options.train_batch_size,
        precision=accelerator.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        use_ema=options.use_ema,
        device_type="cuda" if accelerator.device.type == "cuda" else "cpu",
    )
    if options.optimizer == "adamw_8bit":
        cost = dataclasses.replace(cost, optimizer_bytes=cost.optimizer_bytes // 4)
    steps = plan.max_train_steps - plan.first_step
    lines = [
        *plan.summary(accelerator.device.type, accelerator.mixed_precision, cost.parameters),
        f"to come: {steps:,} steps, {steps * plan.images_per_step / len(plan.dataset):.1f} epochs",
        "",
        "cost",
        *(f"  {line}" for line in cost_report(cost, plan.images_per_step).splitlines()),
    ]
    for title, values in (("network", plan.unet_config), ("options", vars(options))):
        width = max(map(len, values))
        lines += ["", title, *(f"  {name:<{width}}  {_shown(value)}" for name, value in values.items())]
    return "\n".join([*lines, "", "dry run: nothing has been written"])


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def _with_prefix(value: int) -> str:
    """Two decimals and the prefix of a power of 1000, as in ``  105.76 G``."""
    power = min((len(str(value)) - 1) // 3, 5)
    return f"{value / 1000**power:8.2f} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _forward(unet: ClassConditionalUNet2DModel, images: int) -> torch.Tensor:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    samples = torch.empty(images, unet.config.in_channels, height, width)
    timesteps = torch.zeros(images, dtype=torch.long)
    labels = None if unet.config.num_class_embeds is None else torch.zeros(images, dtype=torch.long)
    return unet(samples, timesteps, labels).sample


def _saved_bytes(network: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of what a forward pass saves for the backward pass, each storage once and the network's own not at all."""
    own = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    # the storages themselves, not their addresses alone: a free address may go to the next tensor
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def _saved_bytes_by_layer(unet: ClassConditionalUNet2DModel, images: int) -> list[int]:
    """Bytes that each layer saves, of those that gradient checkpointing runs again."""
    by_layer = []

    def measure(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        outputs = []
        by_layer.append(_saved_bytes(layer, lambda: outputs.append(layer(*inputs))))
        return outputs[0]

    unet.enable_gradient_checkpointing(measure)
    _forward(unet, images)
    return by_layer


def _count_flops(forward: Callable[[], torch.Tensor]) -> tuple[int, int]:
    """FLOPs of the forward pass, and of it and the backward pass together."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    # attention as plain matrix products: fused kernels differ by device, and not all can be counted
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = forward()
        forward_flops = counter.get_total_flops()
        output.float().square().mean().backward()
    return forward_flops, counter.get_total_flops()


def _convolution_backward_flops(
    grad_out_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *arguments: Any, out_shape: Any = None
) -> int:
    """The gradients of input and of filters cost as much as the convolution itself, each.

    torch's own count takes the filters of a convolution with groups for those of one without, which for a depthwise
    one is too much by the number of channels.
    """
    *_, transposed, _, _, output_mask = arguments
    positions = x_shape[2:] if transposed else grad_out_shape[2:]
    # the second size of the filters is that of one group already
    multiplications = x_shape[0] * math.prod(positions) * math.prod(weight_shape)
    return 2 * multiplications * (int(output_mask[0]) + int(output_mask[1]))
