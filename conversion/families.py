"""What the converters of the families of networks have in common."""

from collections.abc import Callable
from typing import NamedTuple

from diffusers import ModelMixin
from torch import Tensor


class Conversion(NamedTuple):
    """A network to be filled, and how the official tensors fill it."""

    network: ModelMixin  # on the meta device
    shapes: dict[str, tuple[int, ...]]  # every official tensor that the file must hold
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # official tensors -> the network's state dict
