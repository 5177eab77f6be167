"""Counting operations of convolutions and matrix products: a multiplication and an addition are two."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from imagenet64_diffusion.training.cost import _convolution_backward_flops


def count_flops(forward: Callable[[], torch.Tensor], backward: bool = False) -> int:
    """FLOPs of what a call does, by `torch.utils.flop_counter`.

    Args:
        forward: The call. Networks on the meta device count in no time, and without memory.
        backward: Whether to count the backward pass from its result, too.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    # attention as plain matrix products: not all fused kernels can be counted
    with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        output = forward()
        if backward:
            output.float().square().mean().backward()
    return counter.get_total_flops()
