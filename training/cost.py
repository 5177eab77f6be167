"""What training a network costs, in operations and in memory, found without running it.

The network is built and run on fake tensors, which have shapes, types and devices but no contents. So the
answer takes seconds whatever the size of the network, needs next to no memory, and can be had for a GPU on a
machine without one.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..utils.nearest_names import perhaps


_AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingCost:
    """What a network costs. FLOPs count a multiplication and the addition that follows as two.

    Attributes:
        parameters: Number of parameters.
        forward_flops: FLOPs of one forward pass of one image, of convolutions and matrix products alone.
        training_flops: FLOPs of one forward and backward pass of one image, with what gradient checkpointing
            computes a second time.
        weight_bytes: Bytes of the parameters.
        gradient_bytes: Bytes of their gradients.
        optimizer_bytes: Bytes of the two moments of AdamW.
        ema_bytes: Bytes of the moving average of the parameters, 0 if there is none.
        activation_bytes_per_image: Bytes that the forward pass keeps for the backward pass, for each image.
        activation_bytes_per_pass: Bytes that it keeps whatever the number of images: standardised filters,
            and copies of the weights in half precision.
        recomputed_bytes_per_image: Bytes for each image that gradient checkpointing makes again in the
            backward pass, in the one layer that needs most for an image; 0 without gradient checkpointing.
        recomputed_bytes_per_pass: Bytes that this layer needs whatever the number of images.
    """

    parameters: int
    forward_flops: int
    training_flops: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activation_bytes_per_image: int
    activation_bytes_per_pass: int
    recomputed_bytes_per_image: int
    recomputed_bytes_per_pass: int

    def activation_bytes(self, images: int) -> int:
        """Bytes of the activations while so many images pass at once."""
        per_image = self.activation_bytes_per_image + self.recomputed_bytes_per_image
        return images * per_image + self.activation_bytes_per_pass + self.recomputed_bytes_per_pass

    def memory_bytes(self, images: int) -> int:
        """Bytes that one process needs to train with so many images at once.

        It is what tensors take at most, as if all gradients were there while the most activations are. What a
        library takes besides is not in it: buffers of the convolutions and of the communication between
        processes, and memory that an allocator holds back.
        """
        constant = self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.ema_bytes
        return constant + self.activation_bytes(images)


def estimate_cost(
    unet_config: Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] | None = None,
    precision: str = "no",
    gradient_checkpointing: bool = False,
    use_ema: bool = True,
    device_type: str = "cpu",
) -> TrainingCost:
    """Counts what a network costs from its options alone; random number generators stay as they are.

    The loss is taken for a mean square: the few maps of the image's size that the true one keeps are not
    counted.

    Args:
        unet_config: Options of `ClassConditionalUNet2DModel`, for example ``unet.config``; names that begin
            with an underscore are passed over.
        image_size: Height and width of the images in pixels, one int or (height, width); by default the
            network's ``sample_size``.
        precision: ``"no"`` for float32, ``"fp16"`` or ``"bf16"`` for autocast with float32 weights.
        gradient_checkpointing: Whether the activations inside the layers are computed again in the backward
            pass.
        use_ema: Whether a moving average of the weights is kept.
        device_type: ``"cpu"`` or ``"cuda"``, which need not be there: autocast leaves other operations in
            float32 on the one than on the other.

    Raises:
        ValueError: If precision or device_type is not one of these, or the options of the network do not fit
            together.
    """
    if precision not in _AUTOCAST_DTYPES:
        near = perhaps(precision, _AUTOCAST_DTYPES)
        raise ValueError(f"precision is {precision!r}, but must be one of {', '.join(_AUTOCAST_DTYPES)}{near}")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device_type is {device_type!r}, but must be cpu or cuda")
    options = {name: value for name, value in unet_config.items() if not name.startswith("_")}
    dtype = _AUTOCAST_DTYPES[precision]

    with FakeTensorMode():
        # on the CPU, because a backward pass even of fake tensors wants the GPU that they are on
        with torch.device("cpu"):
            unet = ClassConditionalUNet2DModel(**options).train()
            if gradient_checkpointing:
                unet.enable_gradient_checkpointing()
            forward_flops, training_flops = _count_flops(lambda: _forward(unet, 1, image_size))
        parameters = unet.num_parameters()
        weight_bytes = sum(parameter.nbytes for parameter in unet.parameters())

        with torch.device(device_type), _autocast(device_type, dtype):
            unet = ClassConditionalUNet2DModel(**options).train()
            recomputed_bytes_per_image = recomputed_bytes_per_pass = 0
            if gradient_checkpointing:
                lines = _lines(lambda images: _saved_bytes_by_layer(unet, lambda: _forward(unet, images, image_size)))
                recomputed_bytes_per_image, recomputed_bytes_per_pass = max(lines)
                unet.enable_gradient_checkpointing()
            [(activation_bytes_per_image, activation_bytes_per_pass)] = _lines(
                lambda images: [_saved_bytes(unet, lambda: _forward(unet, images, image_size))]
            )

    return TrainingCost(
        parameters=parameters,
        forward_flops=forward_flops,
        training_flops=training_flops,
        weight_bytes=weight_bytes,
        gradient_bytes=weight_bytes,
        optimizer_bytes=2 * weight_bytes,
        ema_bytes=weight_bytes if use_ema else 0,
        activation_bytes_per_image=activation_bytes_per_image,
        activation_bytes_per_pass=activation_bytes_per_pass,
        recomputed_bytes_per_image=recomputed_bytes_per_image,
        recomputed_bytes_per_pass=recomputed_bytes_per_pass,
    )


def cost_report(cost: TrainingCost, images_per_process: int, images_per_step: int | None = None) -> str:
    """The cost in a few aligned lines for people.

    Args:
        cost: What `estimate_cost` found.
        images_per_process: Images that one process passes through the network at once.
        images_per_step: Images of one optimizer step, over all processes and accumulated passes; by default
            those of one process and pass.
    """
    images_per_step = images_per_step or images_per_process
    total = cost.memory_bytes(images_per_process)
    memory = {
        "weights": cost.weight_bytes,
        "moving average": cost.ema_bytes,
        "gradients": cost.gradient_bytes,
        "optimizer": cost.optimizer_bytes,
        "activations": cost.activation_bytes(images_per_process),
        "total": total,
    }
    unit, bytes_per_unit = ("GiB", 2**30) if total >= 2**30 else ("MiB", 2**20)
    lines = [
        f"parameters        {_with_prefix(cost.parameters)}",
        f"forward pass      {_with_prefix(cost.forward_flops)}FLOP for 1 image",
        f"training step     {_with_prefix(cost.training_flops * images_per_step)}FLOP for"
        f" {_count_images(images_per_step)}",
        f"memory of one process, {_count_images(images_per_process)} at once",
        *(f"  {name:<16}{size / bytes_per_unit:8.2f} {unit}" for name, size in memory.items()),
    ]
    return "\n".join(lines)


def _with_prefix(value: int) -> str:
    """Two decimals and the prefix of a power of 1000, as in ``  105.76 G``."""
    power = min(max((len(str(value)) - 1) // 3, 0), 5)
    return f"{value / 1000**power:8.2f} {('', 'k', 'M', 'G', 'T', 'P')[power]}"


def _count_images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _forward(unet: ClassConditionalUNet2DModel, images: int, image_size: int | Iterable[int] | None) -> torch.Tensor:
    """The network's answer to so many images, on the current device."""
    size = unet.config.sample_size if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    samples = torch.empty(images, unet.config.in_channels, height, width)
    timesteps = torch.zeros(images, dtype=torch.long)
    labels = None if unet.config.num_class_embeds is None else torch.zeros(images, dtype=torch.long)
    return unet(samples, timesteps, labels).sample


def _lines(bytes_for: Callable[[int], list[int]]) -> list[tuple[int, int]]:
    """Slope and intercept of each number of bytes over the number of images.

    Not from one image, whose tensors are contiguous in more than one way and may share memory where others do
    not.
    """
    lines = []
    for two, four in zip(bytes_for(2), bytes_for(4), strict=True):
        per_image = (four - two) // 2
        lines.append((per_image, two - 2 * per_image))
    return lines


@contextlib.contextmanager
def _autocast(device_type: str, dtype: torch.dtype | None) -> Iterator[None]:
    """What ``torch.autocast`` does, which turns itself off where the device is missing."""
    if dtype is None:
        yield
        return
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)
    torch.set_autocast_dtype(device_type, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


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


def _saved_bytes_by_layer(unet: ClassConditionalUNet2DModel, forward: Callable[[], torch.Tensor]) -> list[int]:
    """Bytes that each layer saves, of those that gradient checkpointing runs again, in the order of the pass."""
    by_layer = []

    def measure(layer: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        outputs = []
        by_layer.append(_saved_bytes(layer, lambda: outputs.append(layer(*inputs))))
        return outputs[0]

    unet.enable_gradient_checkpointing(measure)
    forward()
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
    grad_out_shape: torch.Size,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
    out_shape: Any = None,
) -> int:
    """The gradients of input and of filters cost as much as the convolution itself, each.

    torch's own count takes the filters of a convolution with groups for those of one without, which for a
    depthwise one is too much by the number of channels.
    """
    positions = x_shape[2:] if transposed else grad_out_shape[2:]
    # the second size of the filters is that of one group already
    multiplications = x_shape[0] * math.prod(positions) * math.prod(weight_shape)
    return 2 * multiplications * (int(output_mask[0]) + int(output_mask[1]))
