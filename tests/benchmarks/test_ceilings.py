"""The ceiling is the best of several kernels, the benchmarked network's own convolutions among them."""

import ceilings
import pytest
import torch
from flops import count_flops
from networks import recipe_config
from sampling import branch_forward

from imagenet64_diffusion import ClassConditionalUNet2DModel


@pytest.fixture(scope="module")
def convolutions():
    with torch.device("meta"):
        unet = ClassConditionalUNet2DModel(**recipe_config("res_res", small=True))
    return ceilings.network_convolutions(branch_forward(unet), count=1000)


def test_the_most_expensive_convolutions_come_first(convolutions):
    kernels = ceilings.kernels("cpu", torch.float32, convolutions, 2, small=True)
    flops = [count for name, (count, _) in kernels.items() if name.startswith("convolution")]
    assert len(flops) == 2 * len(convolutions) >= 20
    assert flops == sorted(flops, reverse=True)
    config = recipe_config("res_res", small=True)
    width, size = config["block_out_channels"][0], config["sample_size"]
    assert any(shape[0][1:] == (size, size) and shape[1] == (width, width, 3, 3) for shape in convolutions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_do_what_is_counted_in_the_given_type(convolutions, dtype):
    for name, (flops, call) in ceilings.kernels("cpu", dtype, convolutions[:6], 2, small=True).items():
        assert call().dtype == dtype
        if "inner" not in name:  # oneDNN's own tensors are not counted
            assert count_flops(call) == flops, name


def test_the_ceiling_is_the_maximum_over_all_kernels(convolutions, monkeypatch):
    """A network at the rate of its convolutions, twice that of matrix products, once had a share of 200 %."""
    names = list(ceilings.kernels("cpu", torch.float32, convolutions[:2], 2, small=True))
    for fastest in names:
        rates = iter([2e9 if name == fastest else 1e9 for name in names] + [1.0])
        monkeypatch.setattr(ceilings, "best_rate", lambda kernel, small, rates=rates: next(rates))
        found = ceilings.Ceilings("cpu", torch.float32, convolutions[:2], 2, small=True)
        assert found.share(2e9, 1.0) == 1.0
        assert (found.figures()["kernel"], found.figures()["gflops"]) == (fastest, 2.0)
