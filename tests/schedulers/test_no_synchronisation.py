"""A step reads nothing back from the device."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from imagenet64_diffusion import EDMHeunScheduler, EtaDDIMScheduler, LearnedVarianceDDPMScheduler


SHAPE = (2, 3, 4, 4)
CASES = [(LearnedVarianceDDPMScheduler, {}), (EtaDDIMScheduler, {}), (EtaDDIMScheduler, {"eta": 0.5})]


class HostReadError(Exception):
    pass


class ForbidHostReads(TorchDispatchMode):
    """Fails on every operation whose result depends on a value that the host must wait for."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.FORBIDDEN:
            raise HostReadError(func)
        return func(*args, **(kwargs or {}))


def test_the_guard_sees_a_stock_scheduler():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    with pytest.raises(HostReadError), ForbidHostReads():
        scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE))


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize(("scheduler_class", "options"), CASES)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_nothing_is_read_back(scheduler_class, options, device):
    scheduler = scheduler_class()
    scheduler.set_timesteps(10, device=device)
    sample, output = torch.zeros(SHAPE, device=device), torch.zeros(2, 6, 4, 4, device=device)
    generator = torch.Generator(device).manual_seed(0)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidHostReads():
            for t in scheduler.timesteps:
                sample = scheduler.step(output, t, sample, generator=generator, **options).prev_sample
            scheduler.add_noise(sample, sample, scheduler.timesteps[:2])
            scheduler.get_velocity(sample, sample, scheduler.timesteps[:2])
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all()


@pytest.mark.parametrize(("scheduler_class", "options"), CASES)
@pytest.mark.parametrize("timestep_device", ["cuda", "cpu", None])
def test_devices_go_together(scheduler_class, options, timestep_device):
    # Fake tensors stand for tensors on a GPU that need not exist: they have devices and shapes, and no values to read.
    scheduler = scheduler_class()
    scheduler.set_timesteps(10)
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = torch.empty(SHAPE, device="cuda", dtype=torch.float16)
        output = torch.empty(2, 6, 4, 4, device="cuda", dtype=torch.float16)
        t = 900 if timestep_device is None else torch.full((), 900, device=timestep_device)
        out = scheduler.step(output, t, sample, **options)
        noisy = scheduler.add_noise(sample, sample, torch.full((2,), 3, device="cuda"))
    for tensor in (out.prev_sample, out.pred_original_sample, noisy):
        assert tensor.device.type == "cuda"
        assert tensor.dtype == torch.float16
        assert tensor.shape == SHAPE


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_nothing_is_read_back_by_edm(device):
    scheduler = EDMHeunScheduler(S_churn=10)
    scheduler.set_timesteps(10, device=device)
    sample = torch.zeros(SHAPE, device=device)
    generator = torch.Generator(device).manual_seed(0)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with ForbidHostReads():
            for t in scheduler.timesteps:
                output = scheduler.scale_model_input(sample, t)
                sample = scheduler.step(output, t, sample, generator=generator).prev_sample
            scheduler.add_noise(sample, sample, scheduler.timesteps[:2])
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert sample.isfinite().all()


def test_devices_of_edm_go_together():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(0)  # fake tensors have no place to be found by
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = torch.empty(SHAPE, device="cuda", dtype=torch.float16)
        for t in scheduler.timesteps[:3]:
            out = scheduler.step(scheduler.scale_model_input(sample, t), t, sample)
            for tensor in (out.prev_sample, out.pred_original_sample, scheduler.add_noise(sample, sample, t)):
                assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cuda", torch.float16, SHAPE)
