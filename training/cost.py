"""What training a network costs, counted on tensors without contents, and what ``--dry_run`` says."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .components import make_network
from .plan import Plan


class TrainingCost(NamedTuple):
    """What a network costs. A multiplication and the addition that follows are two FLOPs."""

    parameters: int  # float32; gradients, EMA and each of AdamW's two moments take as much memory
    forward_flops: int  # of one image, of convolutions and matrix products alone
    training_flops: int  # of one image, forward and backward, with what gradient checkpointing computes again
    activation_bytes: int  # kept for the backward pass, with what gradient checkpointing computes again at once


def estimate_cost(
    unet_config: Mapping[str, Any],
    *,
    images: int = 1,
    precision: str = "no",
    gradient_checkpointing: bool = False,
    device_type: str = "cpu",
) -> TrainingCost:
    """Counts what a network costs from its options alone, with a mean square as its loss.

    ``images`` pass at once. ``device_type`` matters because autocast leaves other operations in float32 on a CPU.
    """
    with torch.device("meta"):
        unet = make_network(unet_config).train()
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        forward_flops, training_flops = count_flops(lambda: _forward(unet, 1))
    # what runs in 8 bits keeps its activations in bf16
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with FakeTensorMode(), torch.device(device_type), torch.autocast(device_type, dtype, enabled=precision != "no"):
        unet = make_network(unet_config).train()
        activation_bytes = _activation_bytes(unet, images, gradient_checkpointing)
    return TrainingCost(unet.num_parameters(), forward_flops, training_flops, activation_bytes)


def describe_run(plan: Plan, accelerator: Accelerator) -> str:
    """What ``--dry_run`` prints; nothing is built in memory and nothing is written."""
    options, images = plan.options, plan.options.train_batch_size
    cost = estimate_cost(
        plan.unet_config,
        images=images,
        precision=accelerator.mixed_precision,
        gradient_checkpointing=options.gradient_checkpointing,
        device_type="cuda" if accelerator.device.type == "cuda" else "cpu",
    )
    weights = 4 * cost.parameters
    memory = {
        "weights": weights,
        "EMA": weights if options.use_ema else 0,
        "gradients": weights,
        "optimizer": 2 * weights if options.optimizer == "adamw" else weights // 2,
        "activations": cost.activation_bytes,
    }
    memory["total"] = sum(memory.values())
    unit, bytes_per_unit = ("GiB", 2**30) if memory["total"] >= 2**30 else ("MiB", 2**20)
    steps = plan.max_train_steps - plan.first_step
    flops_of_step = _with_prefix(cost.training_flops * plan.images_per_step)
    lines = [
        plan.summary(accelerator.device.type, accelerator.mixed_precision, cost.parameters),
        f"to come: {steps:,} steps, {steps * plan.images_per_step / len(plan.dataset):.1f} epochs",
        "",
        "cost",
        f"  parameters        {_with_prefix(cost.parameters)}",
        f"  forward pass      {_with_prefix(cost.forward_flops)}FLOP for 1 image",
        f"  training step     {flops_of_step}FLOP for {plan.images_per_step:,} image(s)",
        f"  memory of one rank, {images:,} image(s) at once",
        *(f"    {name:<16}{size / bytes_per_unit:8.2f} {unit}" for name, size in memory.items()),
    ]
    for title, values in (("network", plan.unet_config), ("options", vars(options))):
        lines += ["", title]
        for name, value in values.items():
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else "-" if value is None else value
            lines.append(f"  {name:<{max(map(len, values))}}  {shown}")
    return "\n".join([*lines, "", "dry run: nothing has been written"])


def _with_prefix(value: int) -> str:
    power = min((len(str(value)) - 1) // 3, 5)
    return f"{value / 1000**power:8.2f} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _forward(unet: ModelMixin, images: int) -> Tensor:
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    samples = torch.empty(images, unet.config.in_channels, height, width)
    timesteps = torch.zeros(images, dtype=torch.long)
    return unet(samples, timesteps, None if unet.config.num_class_embeds is None else timesteps).sample


def _activation_bytes(unet: ModelMixin, images: int, gradient_checkpointing: bool) -> int:
    """Bytes of what a forward pass saves for the backward pass, each storage once and the weights not at all."""
    own = {tensor.untyped_storage()._cdata for tensor in (*unet.parameters(), *unet.buffers())}
    largest = 0

    def saved_by(forward: Callable[[], object], saved: dict[int, torch.UntypedStorage]) -> int:
        def pack(tensor: Tensor) -> Tensor:
            # the storages themselves, not their addresses alone: a free address may go to the next tensor
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward()
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)

    outside: dict[int, torch.UntypedStorage] = {}

    def run_layer(layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        nonlocal largest
        storages = [tensor.untyped_storage() for tensor in inputs if tensor is not None]
        outside.update({storage._cdata: storage for storage in storages})
        outputs: list[Tensor] = []
        largest = max(largest, saved_by(lambda: outputs.append(layer(*inputs)), {}))
        return outputs[0]

    if gradient_checkpointing:
        unet.enable_gradient_checkpointing(run_layer)
    return saved_by(lambda: _forward(unet, images), outside) + largest


def count_flops(forward: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOPs of a forward pass, and of it and the backward pass together."""
    own = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    counter = FlopCounterMode(display=False, custom_mapping=own)
    # attention as plain matrix products: fused kernels differ by device, and not all can be counted
    with counter, sdpa_kernel(SDPBackend.MATH):
        output = forward()
        forward_flops = counter.get_total_flops()
        output.float().square().mean().backward()
    return forward_flops, counter.get_total_flops()


def _convolution_backward_flops(
    grad_out_shape: torch.Size, x_shape: torch.Size, weight_shape: torch.Size, *arguments: Any, out_shape: Any = None
) -> int:
    """The gradients of input and of filters cost as much as the convolution; torch's own count forgets its groups."""
    *_, transposed, _, _, output_mask = arguments
    positions = x_shape[2:] if transposed else grad_out_shape[2:]
    # the second size of the filters is that of one group already
    multiplications = x_shape[0] * math.prod(positions) * math.prod(weight_shape)
    return 2 * multiplications * (int(output_mask[0]) + int(output_mask[1]))
