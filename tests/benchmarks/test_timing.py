"""What the benchmarks count with."""

import time

import pytest
import torch
from flops import count_flops
from networks import recipe_config
from sampling import count_branch_flops
from stock_unet import TOLERANCE, count_stock_flops, matching_config
from timing import Clock, alternate, ratios_to, spread

from imagenet64_diffusion import ClassConditionalUNet2DModel


def test_rounds_alternate():
    called = []

    def measure(name, seconds):
        called.append(name)
        return seconds

    seconds = alternate({"a": lambda: measure("a", 2.0), "b": lambda: measure("b", 3.0)}, rounds=3, warmup=1)
    assert seconds == {"a": [2.0] * 3, "b": [3.0] * 3}
    assert called == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert ratios_to("a", seconds) == {"b": {"median": 1.5, "quartiles": [1.5, 1.5]}}


def test_a_ratio_is_that_of_each_round():
    """A machine that slows down by the round slows both sides."""
    seconds = {"ours": [1.0, 10.0, 100.0], "other": [2.0, 20.0, 200.0]}
    assert ratios_to("ours", seconds)["other"] == {"median": 2.0, "quartiles": [2.0, 2.0]}


def test_spread():
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "quartiles": [2.0, 4.0]}
    assert spread([1 / 3]) == {"median": 0.3333, "quartiles": [0.3333, 0.3333]}


def test_clock_counts_what_is_inside_once():
    class Worker:
        def outer(self):
            self.inner()

        def inner(self):
            time.sleep(0.02)

    clock = Clock()
    put_back = [clock.around(Worker, "outer", "outer"), clock.around(Worker, "inner", "inner")]
    worker = Worker()
    worker.outer()
    assert clock.seconds["outer"] >= 0.02
    assert "inner" not in clock.seconds
    worker.inner()
    assert clock.seconds["inner"] >= 0.02
    for each in put_back:
        each()
    before = dict(clock.seconds)
    worker.outer()
    assert dict(clock.seconds) == before


def test_flops_of_a_convolution():
    conv = torch.nn.Conv2d(8, 16, 3, padding=1)
    forward = 2 * 4 * 5 * 6 * 8 * 16 * 9
    assert count_flops(lambda: conv(torch.zeros(4, 8, 5, 6))) == forward
    # the input needs no gradient here
    assert count_flops(lambda: conv(torch.zeros(4, 8, 5, 6)), backward=True) == 2 * forward


@pytest.mark.parametrize("recipe", ["res_res", "original/res_res_atn"])
def test_the_stock_network_has_as_many_operations(recipe):
    config = recipe_config(recipe)
    with torch.device("meta"):
        flops = count_branch_flops(ClassConditionalUNet2DModel(**config))
    found = matching_config(config, flops)
    assert abs(count_stock_flops(found) / flops - 1) < TOLERANCE
    # it looks at as much of an image as ours does, at the same resolutions
    assert len(found["block_out_channels"]) == len(config["block_out_channels"]) + 1
