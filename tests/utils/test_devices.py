"""The device that an option names."""

import pytest
import torch

from imagenet64_diffusion.utils.devices import find_device


def test_devices_that_are_there():
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cdua", "", "cuda:99", "cpu:x"])
def test_devices_that_are_not(name):
    with pytest.raises(
        ValueError, match=f"device is {name}, but must be one that torch has on this machine"
    ) as caught:
        find_device(name)
    assert "\n" not in str(caught.value)
