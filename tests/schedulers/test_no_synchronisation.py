"""A step reads nothing back from the device, and works where its tensors are."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from imagenet64_diffusion import EDMHeunScheduler, EtaDDIMScheduler, LearnedVarianceDDPMScheduler


SHAPE = (2, 3, 4, 4)


@pytest.mark.parametrize(
    ("scheduler_class", "options"),
    [(LearnedVarianceDDPMScheduler, {}), (EtaDDIMScheduler, {}), (EtaDDIMScheduler, {"eta": 0.5})],
)
def test_nothing_is_read_back(scheduler_class, options):
    """Fake tensors have devices and shapes, and no values: an operation that reads one fails."""
    scheduler = scheduler_class()
    with FakeTensorMode(allow_non_fake_inputs=True):
        scheduler.set_timesteps(10, device="cuda")
        sample = torch.empty(SHAPE, device="cuda", dtype=torch.float16)
        output = torch.empty(2, 6, 4, 4, device="cuda", dtype=torch.float16)
        for t in (*scheduler.timesteps, torch.full((), 900), 900):
            out = scheduler.step(output, t, sample, **options)
        noisy = scheduler.add_noise(sample, sample, scheduler.timesteps[:2])
        velocity = scheduler.get_velocity(sample, sample, scheduler.timesteps[:2])
    for tensor in (out.prev_sample, out.pred_original_sample, noisy, velocity):
        assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cuda", torch.float16, SHAPE)


def test_nothing_is_read_back_by_edm():
    scheduler = EDMHeunScheduler(S_churn=10)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(0)  # fake tensors have no place to be found by
    with FakeTensorMode(allow_non_fake_inputs=True):
        sample = torch.empty(SHAPE, device="cuda", dtype=torch.float16)
        for t in scheduler.timesteps:
            noise = torch.empty_like(sample)
            out = scheduler.step(scheduler.scale_model_input(sample, t), t, sample, churn_noise=noise)
            for tensor in (out.prev_sample, out.pred_original_sample, scheduler.add_noise(sample, sample, t)):
                assert (tensor.device.type, tensor.dtype, tensor.shape) == ("cuda", torch.float16, SHAPE)
