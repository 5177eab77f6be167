"""The noise schedule of "Diffusion models from scratch", which no stock beta schedule is."""

import math
from itertools import pairwise
from typing import Any


def original_cosine_betas(num_train_timesteps: int = 1000) -> list[float]:
    """Betas whose cumulative product gives the original's clamped cosine schedule.

    abar(t) = clamp(f(t) / f(0), 1e-10, 0.999) for t = 1..T, with f(t) = cos^2(((t / T + 0.008) / 1.008) * pi / 2)
    (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17); beta(1) = 1 - abar(1) and
    beta(t) = 1 - abar(t) / abar(t - 1). Because of the upper clamp the betas after the first begin with zeros. The
    first belongs to timestep 0.
    """
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}, but must be at least 1.")

    def f(t: int) -> float:
        return math.cos((t / num_train_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = [min(max(f(t) / f(0), 1e-10), 0.999) for t in range(1, num_train_timesteps + 1)]
    return [1 - abar[0]] + [1 - current / previous for previous, current in pairwise(abar)]


def original_timesteps(num_train_timesteps: int, step_size: int) -> list[int]:
    """Timesteps that the original visits with a step size, counted from 0 as in diffusers.

    With a step size s in [1, T], which need not divide T, it asks its models at t = ..., 1 + 2s, 1 + s, 1, which here
    is one less each.
    """
    if not 1 <= step_size <= num_train_timesteps:
        raise ValueError(f"step_size is {step_size}, but must lie in [1, {num_train_timesteps}].")
    return list(range(0, num_train_timesteps, step_size))[::-1]


def original_cosine_options(num_train_timesteps: int = 1000) -> dict[str, Any]:
    """The options by which a scheduler of ours samples as the original program; from_config carries what is named."""
    return {
        "num_train_timesteps": num_train_timesteps,
        "trained_betas": original_cosine_betas(num_train_timesteps),
        "set_alpha_to_one": False,
        "max_beta": 0.999,
        "timestep_spacing": "leading",
        "clip_sample": False,
    }
