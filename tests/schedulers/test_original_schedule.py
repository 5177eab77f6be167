"""The schedule of the original program against its own tables, tests/fixtures/schedules.safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagenet64_diffusion import EtaDDIMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas, original_timesteps
from imagenet64_diffusion.schedulers.scheduling_ddim_eta import StepCoefficients


SCHEDULES = load_file(Path(__file__).parents[1] / "fixtures" / "schedules.safetensors")


@pytest.mark.parametrize(("total", "step_size"), [(1000, 1), (1000, 10), (1000, 7), (500, 50)])
def test_cosine_tables(total, step_size):
    betas = original_cosine_betas(total)
    scheduler = EtaDDIMScheduler(total, trained_betas=betas, set_alpha_to_one=False, max_beta=0.999)
    scheduler.set_timesteps(timesteps=original_timesteps(total, step_size))
    rows = StepCoefficients(*scheduler._table(torch.device("cpu"))[scheduler.timesteps.flip(0)].unbind(dim=1))
    ours = {
        "a_bar_t": rows.signal_rate**2,
        "a_bar_t1": rows.previous_signal_rate**2,
        "beta_t": rows.beta,
        "beta_tilde_t": rows.beta_tilde,
    }
    theirs = {name: SCHEDULES[f"cosine.T{total}.step{step_size}.{name}"].double() for name in ours}
    for name in ("a_bar_t", "a_bar_t1"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=2e-7)
    # The original's float32 carries abar with few digits where it is small; its betas are quotients of two such.
    precise = ours["a_bar_t"] > 0.01
    # Clamped betas are exact
    clamped = theirs["beta_t"] == torch.tensor(1e-10).double()
    assert clamped[0]
    for name in ("beta_t", "beta_tilde_t"):
        for which, tolerance in ((precise, 2e-6), (~precise, 4e-5), (clamped, 0)):
            torch.testing.assert_close(ours[name][which], theirs[name][which], rtol=1e-6, atol=tolerance)
    assert ours["beta_t"].max() <= 0.999


def test_timesteps():
    assert original_timesteps(10, 3) == [9, 6, 3, 0]
    assert original_timesteps(1000, 10) == list(range(990, -1, -10))
    assert original_timesteps(5, 5) == [0]
    for step_size in (0, -1, 11):
        with pytest.raises(ValueError, match=rf"step_size is {step_size}, but must lie in \[1, 10\]"):
            original_timesteps(10, step_size)
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        original_cosine_betas(0)
