"""The schedule of the original program against its own tables, tests/fixtures/schedules.safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas, original_timesteps
from imagenet64_diffusion.schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from imagenet64_diffusion.schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler


SCHEDULES = load_file(Path(__file__).parents[1] / "fixtures" / "schedules.safetensors")


@pytest.mark.parametrize("scheduler_class", [LearnedVarianceDDPMScheduler, EtaDDIMScheduler])
@pytest.mark.parametrize(("total", "step_size"), [(1000, 1), (1000, 10), (1000, 7), (500, 50)])
def test_cosine_tables(scheduler_class, total, step_size):
    scheduler = scheduler_class(
        num_train_timesteps=total,
        trained_betas=original_cosine_betas(total),
        set_alpha_to_one=False,
        max_beta=0.999,
    )
    scheduler.set_timesteps(timesteps=original_timesteps(total, step_size))
    rows = [scheduler._step_coefficients(t, torch.device("cpu")) for t in scheduler.timesteps.flip(0)]
    ours = {
        "a_bar_t": torch.stack([row.signal_rate**2 for row in rows]),
        "a_bar_t1": torch.stack([row.previous_signal_rate**2 for row in rows]),
        "beta_t": torch.stack([row.beta for row in rows]),
        "beta_tilde_t": torch.stack([row.beta_tilde for row in rows]),
    }
    theirs = {name: SCHEDULES[f"cosine.T{total}.step{step_size}.{name}"].double() for name in ours}
    for name in ("a_bar_t", "a_bar_t1"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=2e-7)
    # The original's float32 carries abar with few digits where it is small; its betas are quotients of two such.
    precise = ours["a_bar_t"] > 0.01
    for name in ("beta_t", "beta_tilde_t"):
        torch.testing.assert_close(ours[name][precise], theirs[name][precise], rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(ours[name][~precise], theirs[name][~precise], rtol=1e-6, atol=4e-5)
    # Clamped betas are exact
    clamped = theirs["beta_t"] == torch.tensor(1e-10).double()
    assert clamped[0]
    torch.testing.assert_close(ours["beta_t"][clamped], theirs["beta_t"][clamped], rtol=1e-6, atol=0)
    torch.testing.assert_close(ours["beta_tilde_t"][clamped], theirs["beta_tilde_t"][clamped], rtol=1e-6, atol=0)
    assert ours["beta_t"].max() <= 0.999


@pytest.mark.parametrize("scheduler_class", [LearnedVarianceDDPMScheduler, EtaDDIMScheduler])
def test_linear_tables(scheduler_class):
    scheduler = scheduler_class(beta_schedule="linear")
    torch.testing.assert_close(scheduler.betas, SCHEDULES["linear.T1000.step1.beta_t"].double(), rtol=1e-5, atol=0)
    abar = SCHEDULES["linear.T1000.step1.a_bar_t"].double()
    torch.testing.assert_close(scheduler.alphas_cumprod, abar, rtol=2e-5, atol=0)


@pytest.mark.parametrize("total", [1, 2, 50, 500, 1000, 4000])
def test_betas_rebuild_the_clamped_schedule(total):
    betas = torch.tensor(original_cosine_betas(total), dtype=torch.float64)
    assert betas.shape == (total,)
    assert ((betas >= 0) & (betas < 1)).all()
    time = torch.arange(1, total + 1, dtype=torch.float64) / total
    start = torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2, dtype=torch.float64)) ** 2
    abar = (torch.cos((time + 0.008) / 1.008 * torch.pi / 2) ** 2 / start).clamp(1e-10, 0.999)
    torch.testing.assert_close(torch.cumprod(1 - betas, 0), abar, rtol=1e-9, atol=1e-15)


def test_timesteps():
    assert original_timesteps(10, 3) == [9, 6, 3, 0]
    assert original_timesteps(1000, 10) == list(range(990, -1, -10))
    assert original_timesteps(5, 1) == [4, 3, 2, 1, 0]
    assert original_timesteps(5, 5) == [0]


@pytest.mark.parametrize("step_size", [0, -1, 11])
def test_step_size_out_of_range(step_size):
    with pytest.raises(ValueError, match=rf"step_size is {step_size}, but must lie in \[1, 10\]"):
        original_timesteps(10, step_size)


def test_no_timesteps():
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        original_cosine_betas(0)
