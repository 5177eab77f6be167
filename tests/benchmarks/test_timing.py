"""What the benchmarks measure with: rounds, ratios, operations, networks."""

import re

import networks
import pytest
import torch
from diffusers import UNet2DModel
from report import ratios_to, spread

from imagenet64_diffusion import ClassConditionalUNet2DModel


def test_a_ratio_is_that_of_each_round():
    """A machine that slows down by the round slows both sides."""
    seconds = {"ours": [1.0, 10.0, 100.0], "other": [2.0, 20.0, 200.0]}
    assert ratios_to("ours", seconds) == {"other": {"median": 2.0, "quartiles": [2.0, 2.0]}}
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "quartiles": [2.0, 4.0]}
    assert spread([3.0]) == {"median": 3.0, "quartiles": [3.0, 3.0]}


def test_flops_of_a_convolution():
    conv = torch.nn.Conv2d(8, 16, 3, padding=1)
    forward = 2 * 4 * 5 * 6 * 8 * 16 * 9
    assert networks.count_flops(lambda: conv(torch.zeros(4, 8, 5, 6))) == forward
    # the input needs no gradient here
    assert networks.count_flops(lambda: conv(torch.zeros(4, 8, 5, 6)), backward=True) == 2 * forward


def test_the_stock_network_has_as_many_operations():
    config = networks.recipe_config("original/res_res_atn")
    flops = networks.network_flops(ClassConditionalUNet2DModel, config)
    found = networks.stock_config(config, flops)
    assert networks.network_flops(UNet2DModel, found) == pytest.approx(flops, rel=networks.TOLERANCE)
    # at the same resolutions
    assert len(found["block_out_channels"]) == len(config["block_out_channels"]) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_what_is_counted(dtype):
    """The most expensive convolutions come first; all compute in the given type."""
    config = networks.recipe_config("res_res", small=True)
    kernels = networks.kernels(config, "cpu", dtype, 2, small=True, count=1000)
    flops = [count for name, (count, _) in kernels.items() if name.startswith("Conv")]
    assert len(flops) >= 20
    assert flops == sorted(flops, reverse=True)
    for name, (count, call) in list(kernels.items())[:20]:
        assert call().dtype == dtype
        if "inner" not in name:  # oneDNN's own tensors are not counted
            assert networks.count_flops(call) == count, name


def test_the_ceiling_is_the_maximum_over_all_kernels():
    """A network at the rate of its convolutions, more than that of matrix products, has a share of at most 1."""
    call = torch.ones(1).sum
    kernels = {"matrix product 64": (1, call), "Conv": (1000, call), "inner product 128": (1, call)}
    columns, ceiling = networks.compare({"ours": [1.0], "other": [2.0]}, {"ours": 2e9, "other": 2e9}, kernels, True)
    assert columns["relative time"]["other"]["median"] == 2
    shares = columns["of the ceiling, %"]
    assert shares["ours"] == 2 * shares["other"]
    gflops = float(re.fullmatch(r"The ceiling is (.*) GFLOP/s \(Conv, .*\)\.", ceiling)[1])
    assert shares["ours"] == pytest.approx(100 * 2 / gflops, rel=1e-3)
