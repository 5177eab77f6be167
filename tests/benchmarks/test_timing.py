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


def test_the_stock_network_has_as_many_operations():
    config = networks.recipe_config("original/res_res_atn")
    flops = networks.network_flops(ClassConditionalUNet2DModel, config)
    found = networks.stock_config(config, flops)
    assert networks.network_flops(UNet2DModel, found) == pytest.approx(flops, rel=networks.TOLERANCE)
    # at the same resolutions
    assert len(found["block_out_channels"]) == len(config["block_out_channels"]) + 1


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
