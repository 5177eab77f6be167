"""Faster sampling on a CPU: what depends on a network's weights alone is computed once, not at every denoising step.

The file imports torch only, because a repository on the Hub carries it.
"""

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


# How many callers are inside `cached_weights`, for each network; threads may share one.
_users: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def cached_weights(network: nn.Module) -> Iterator[None]:
    """A time in which the layers of a network prepare their weights once instead of at every call.

    For loops that call a network many times without gradients. Weights are standardised once, and on a CPU those of
    convolutions are brought once to the layout that oneDNN computes with, which takes as much memory as these weights
    once more. They may be changed or moved meanwhile, but not through ``weight.data`` (as diffusers'
    ``EMAModel.copy_to`` does): such changes would go unnoticed. Calls may nest and overlap. A compiled network stays
    as it is.

    Args:
        network: Any network. Its ``nn.Conv2d``, and its ``nn.ConvTranspose2d`` that double the resolution, become
            faster. Convolutions and linear layers of other classes take part if their method ``effective_weight()``
            gives what they multiply with, made of ``weight`` alone.
    """
    with _lock:
        _users[network] = _users.get(network, 0) + 1
        modules = list(network.modules())
        compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)
        for module in modules if _users[network] == 1 and not compiled else []:
            # where the instance has a forward of its own, somebody else (offloading, quantisation) has wrapped it
            if "forward" not in vars(module) and _can_be_cached(module):
                module.forward = _CachedLayer(module)
    try:
        yield
    finally:
        with _lock:
            _users[network] -= 1
            if not _users[network]:
                del _users[network]
                for module in network.modules():
                    if isinstance(vars(module).get("forward"), _CachedLayer):
                        del module.forward


def _can_be_cached(module: nn.Module) -> bool:
    if type(module) is nn.ConvTranspose2d:
        options = (module.kernel_size, module.stride, module.padding, module.output_padding, module.dilation)
        return options == ((4, 4), (2, 2), (1, 1), (0, 0), (1, 1)) and module.groups == 1
    has_effective_weight = hasattr(module, "effective_weight")
    if type(module) is nn.Conv2d or (isinstance(module, nn.Conv2d) and has_effective_weight):
        return module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) and has_effective_weight


class _CachedLayer:
    """The forward of a layer whose prepared weights are kept until its weight is written to or replaced."""

    # for even and odd rows (columns): which of the four of a transposed filter meet the earlier and the later row
    _taps = ((3, 1), (2, 0))

    def __init__(self, layer: Any):
        self.layer = layer
        # what the weights were made of, and they: one assignment, as threads may share a network
        self.kept: tuple[tuple, tuple[torch.Tensor, ...]] = ((), ())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.layer,)  # a copy of the network makes its own

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return type(layer).forward(layer, images)
        # tensors made in inference mode have no version, but cannot be written to outside of it either
        version = 0 if layer.weight.is_inference() else layer.weight._version
        autocast = torch.is_autocast_enabled(images.device.type)
        source = (layer.weight.data_ptr(), version, layer.weight.dtype, layer.weight.device, images.shape, autocast)
        kept = self.kept
        if source != kept[0]:
            kept = self.kept = (source, self._prepare(images.shape))
        weights = kept[1]
        if len(weights) == 4:
            return self._double(images, weights)
        if weights[0].is_mkldnn:
            options = (layer.padding, layer.stride, layer.dilation, layer.groups)
            return _convolve(images, weights[0], layer.bias, options)
        if isinstance(layer, nn.Linear):
            return F.linear(images, weights[0], layer.bias)
        if isinstance(layer, nn.ConvTranspose2d):
            return type(layer).forward(layer, images)
        return layer._conv_forward(images, weights[0], layer.bias)

    def _prepare(self, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        layer = self.layer
        weight = layer.effective_weight() if hasattr(layer, "effective_weight") else layer.weight
        onednn = torch.backends.mkldnn
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32 and not isinstance(layer, nn.Linear)
        if not (on_cpu and onednn.is_available() and onednn.enabled and not torch.is_autocast_enabled("cpu")):
            return (weight,)
        if isinstance(layer, nn.ConvTranspose2d):
            padded = [*shape[:2], shape[2] + 1, shape[3] + 1]
            filters = weight.transpose(0, 1)  # (out_channels, in_channels, 4, 4)
            return tuple(
                _pack(filters[:, :, rows][:, :, :, columns], padded) for rows in self._taps for columns in self._taps
            )
        return (_pack(weight, shape, (layer.padding, layer.stride, layer.dilation, layer.groups)),)

    def _double(self, images: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The transposed convolution as four 2x2 ones whose results interleave, in half the time of oneDNN's."""
        batch, _, height, width = images.shape
        padded = F.pad(images, (1, 1, 1, 1))
        doubled = padded.new_empty((batch, self.layer.out_channels, 2 * height, 2 * width))
        doubled = doubled.contiguous(memory_format=torch.channels_last)
        for number, weight in enumerate(weights):
            # row 2 i of the result is made of the rows i - 1 and i of the images, row 2 i + 1 of i and i + 1
            row, column = divmod(number, 2)
            part = padded[:, :, row : row + height + 1, column : column + width + 1]
            doubled[:, :, row::2, column::2] = _convolve(part, weight, self.layer.bias)
        return doubled


# padding, stride, dilation and groups of the four convolutions that double
_PLAIN = ((0, 0), (1, 1), (1, 1), 1)


def _pack(weight: torch.Tensor, shape: Sequence[int], options: tuple[Any, ...] = _PLAIN) -> torch.Tensor:
    """A weight in the layout that oneDNN wants for images of this shape, which it would bring it to at every call."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.contiguous().to_mkldnn(), *options, list(shape))


def _convolve(
    images: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...] = _PLAIN
) -> torch.Tensor:
    # the layout that oneDNN is fastest with
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise(images, packed, bias, *options, "none", [], "")
