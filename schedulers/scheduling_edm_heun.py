"""The second-order sampler of EDM with churn, in double precision inside, never waiting for the device.

The file imports torch and diffusers only: a repository on the Hub carries it. Karras et al. 2022 is
https://arxiv.org/abs/2206.00364.
"""

import math
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, SupportsIndex

import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler, EDMEulerSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor


CHOICES = {
    "sigma_schedule": ("karras", "exponential"),
    "prediction_type": ("epsilon", "v_prediction"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# Stock schedulers have no such options, and warn of every one that they find in a config.
CHURN_DEFAULTS = {"S_churn": 0.0, "S_min": 0.0, "S_max": math.inf, "S_noise": 1.0}


def _double(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or in float32 on Apple's devices, which have no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


class EDMHeunScheduler(EDMEulerScheduler):
    """Heun's method with churn, the sampler of EDM and EDM2 (Karras et al. 2022, algorithm 2).

    The stock `EDMEulerScheduler` gives it the preconditioning (table 1): ``precondition_inputs``,
    ``precondition_noise`` and ``precondition_outputs``. As with the stock `HeunDiscreteScheduler` a loop over
    ``timesteps`` calls `step` once for each evaluation of the network, 2N - 1 times for N steps.

    The network must see the sample after its churn, so a call of `step` that completes a step adds the noise that the
    next step asks for, and the churn of the first step is part of ``init_noise_sigma``.

    ``sigmas`` are the noise levels at which the network is evaluated, and the final one, (2N,), float64 on the CPU;
    ``timesteps`` are log(sigma) / 4, (2N - 1,), float32.
    """

    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]  # noqa: RUF012
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        sigma_schedule: Literal["karras", "exponential"] = "karras",
        num_train_timesteps: int = 1000,
        prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
        rho: float = 7.0,
        final_sigmas_type: Literal["zero", "sigma_min"] = "zero",
        S_churn: float = 0.0,  # noqa: N803 (the names of the paper)
        S_min: float = 0.0,  # noqa: N803
        S_max: float = math.inf,  # noqa: N803
        S_noise: float = 1.0,  # noqa: N803
    ):
        """The first eight options are the stock scheduler's; ValueError for one that is out of its range.

        Args:
            sigma_min, sigma_max: Lowest and highest noise level, 0 < sigma_min <= sigma_max.
            sigma_data: Standard deviation of the training images, positive.
            sigma_schedule: "karras" (eq. 5) or "exponential" (even steps of the logarithm).
            num_train_timesteps: Steps of the schedule before `set_timesteps` is called; nothing else reads it.
            prediction_type: "epsilon", or "v_prediction" for a network whose output has the other sign.
            rho: Exponent of the karras schedule, positive.
            final_sigmas_type: Whether a run ends at noise level "zero" or at "sigma_min".
            S_churn: Amount of new noise, at least 0; the noise level rises by the factor
                1 + min(S_churn / num_inference_steps, sqrt(2) - 1) before a step. At 0 sampling is deterministic.
            S_min, S_max: Noise levels between which there is churn, 0 <= S_min <= S_max.
            S_noise: Standard deviation of the new noise, at least 0.
        """
        for name, choices in CHOICES.items():
            if self.config[name] not in choices:
                raise ValueError(f"{name} is {self.config[name]!r}, but must be one of {choices}.")
        for name, value, is_right, wanted in (
            ("sigma_min", sigma_min, 0 < sigma_min <= sigma_max, f"in (0, sigma_max], and sigma_max is {sigma_max}"),
            ("sigma_max", sigma_max, sigma_max < math.inf, "finite"),
            ("sigma_data", sigma_data, 0 < sigma_data < math.inf, "positive"),
            ("rho", rho, 0 < rho < math.inf, "positive"),
            ("S_churn", S_churn, S_churn >= 0, "at least 0"),
            ("S_min", S_min, 0 <= S_min <= S_max, f"in [0, S_max], and S_max is {S_max}"),
            ("S_noise", S_noise, 0 <= S_noise < math.inf, "at least 0"),
        ):
            if not is_right:
                raise ValueError(f"{name} is {value}, but must be {wanted}.")
        options = {name: value for name, value in self.config.items() if CHURN_DEFAULTS.get(name) != value}
        self._internal_dict = FrozenDict(options)
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps: int | None = None

    @property
    def config(self) -> FrozenDict:
        """The options. Those of churn can be read, but are among the items only if they are not the defaults."""
        for name in CHURN_DEFAULTS.keys() - self._internal_dict.keys():
            object.__setattr__(self._internal_dict, name, CHURN_DEFAULTS[name])
        return self._internal_dict

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run starts from, with that of the first step's churn."""
        return self._init_noise_sigma

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """Chooses the noise levels of a sampling run; ValueError if they are out of their range.

        Args:
            num_inference_steps: Number of steps N, at least 1, spread as `sigma_schedule` says.
            device: Where `timesteps` shall lie; None is the CPU.
            sigmas: The noise levels themselves instead, strictly descending and positive, without the final one.
        """
        options = self.config
        if (num_inference_steps is None) == (sigmas is None):
            raise ValueError(f"num_inference_steps is {num_inference_steps} and sigmas is {sigmas}: give one.")
        if sigmas is not None:
            levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
            chosen = levels.tolist()
            if not chosen or not all(s > following for s, following in pairwise([math.inf, *chosen, 0.0])):
                raise ValueError(f"sigmas is {chosen}, but must be strictly descending and positive, at least one.")
        else:
            steps = operator.index(num_inference_steps) if isinstance(num_inference_steps, SupportsIndex) else 0
            if steps < 1:
                raise ValueError(f"num_inference_steps is {num_inference_steps!r}, but must be an integer >= 1.")
            low, high = options.sigma_min, options.sigma_max
            ramp = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
            if options.sigma_schedule == "karras":  # Karras et al. 2022, eq. 5
                first, last = high ** (1 / options.rho), low ** (1 / options.rho)
                levels = (first + ramp * (last - first)) ** options.rho
            else:
                levels = high * (low / high) ** ramp

        # Algorithm 2, lines 4 and 5: a step begins at a level that churn has raised.
        gamma = min(options.S_churn / len(levels), math.sqrt(2) - 1)
        raised = torch.where((levels >= options.S_min) & (levels <= options.S_max), levels * (1 + gamma), levels)
        variance = levels[0] ** 2 + (raised[0] ** 2 - levels[0] ** 2) * options.S_noise**2
        self._init_noise_sigma = variance.sqrt().item()
        # A step asks for the level that it begins at, and then for the one that it ends at.
        end = levels[-1:] if options.final_sigmas_type == "sigma_min" else torch.zeros_like(levels[-1:])
        self.sigmas = torch.stack([raised, torch.cat([levels[1:], end])], dim=1).flatten()
        timesteps = self.precondition_noise(self.sigmas[:-1]).to(torch.float32)
        # What the host decides by, it has in lists.
        self._levels, self._timesteps = self.sigmas.tolist(), timesteps.tolist()
        self.timesteps = timesteps.to(device)
        self.num_inference_steps = len(levels)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._first_half: tuple[torch.Tensor, torch.Tensor] | None = None  # x_hat and its derivative

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Index of a timestep at which a step begins; ValueError if there is none.

        An element of ``timesteps`` is found by its place; the value of another tensor is read, which means waiting for
        its device.
        """
        place = self.timesteps.untyped_storage().data_ptr()
        if isinstance(timestep, torch.Tensor) and timestep.untyped_storage().data_ptr() == place:
            return int(timestep.storage_offset())
        value = float(timestep)
        indices = [index for index in range(0, len(self._timesteps), 2) if self._timesteps[index] == value]
        if not indices:
            raise ValueError(f"timestep is {value}, but must be one of scheduler.timesteps, where a step begins.")
        return indices[0]

    def _current_index(self, timestep: float | torch.Tensor) -> int:
        """The index of the evaluation that is due."""
        index = self._begin_index if self._step_index is None else self._step_index
        if index is None:
            index = self.index_for_timestep(timestep)
        if index >= len(self._timesteps):
            raise ValueError(f"all {self.num_inference_steps} steps are done: call set_timesteps before the next run.")
        if index % 2 == 1 and self._first_half is None:
            raise ValueError(f"a run begins at index {index} of timesteps, but steps begin at even ones.")
        self._step_index = index
        return index

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor) -> torch.Tensor:
        """The sample as the network takes it, times c_in (Karras et al. 2022, table 1)."""
        return self.precondition_inputs(sample, self._levels[self._current_index(timestep)])

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        churn_noise: torch.Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """What follows one evaluation of the network: the first half of a step, or the second, and the next churn.

        Args:
            model_output: The network's raw output F, (batch, channels, height, width).
            timestep: The element of ``timesteps`` that is due; read for the first call after `set_timesteps` only.
            sample: The sample that the network was evaluated at, unscaled, (batch, channels, height, width).
            generator: Source of the noise, or a list with one for each image. Noise is sampled only by a call that
                ends a step, and only if the next step has churn.
            return_dict: Whether to return an `EDMEulerSchedulerOutput` or a plain tuple.
            churn_noise: That noise itself instead of a generator, standard normal, of the sample's shape; not read by
                calls that need none.

        Returns:
            The sample for the next evaluation and the denoised one, both in the shape and dtype of the sample.
        """
        for name, tensor in (("model_output", model_output), ("churn_noise", churn_noise)):
            if tensor is not None and tensor.shape != sample.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(sample.shape)} as the sample.")
        if churn_noise is not None and generator is not None:
            raise ValueError("generator and churn_noise are both given, but at most one of the two can be.")
        if isinstance(generator, list) and len(generator) != sample.shape[0]:
            raise ValueError(f"generator is a list of {len(generator)}, not one for each image: {sample.shape[0]}.")
        index = self._current_index(timestep)
        sigma, following = self._levels[index : index + 2]

        # 1. The denoised sample (eq. 7) and the derivative (algorithm 2, lines 7 and 10).
        x = _double(sample)
        original = self.precondition_outputs(x, _double(model_output), sigma)
        derivative = (x - original) / sigma

        if self._first_half is None:
            # 2. An Euler step (line 8); the last one is left as it is (line 9).
            previous = x + (following - sigma) * derivative
            self._first_half = (x, derivative) if index + 1 < len(self._timesteps) else None
        else:
            # 3. The step anew with the mean of both derivatives (line 11).
            x_hat, first = self._first_half
            previous = x_hat + (sigma - self._levels[index - 1]) * (first + derivative) / 2
            self._first_half = None
            # 4. The churn of the next step (line 6).
            if following > sigma:
                if churn_noise is None:
                    dtype = torch.promote_types(sample.dtype, torch.float32)
                    churn_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
                previous = previous + math.sqrt(following**2 - sigma**2) * self.config.S_noise * _double(churn_noise)

        self._step_index = index + 1
        previous, original = previous.to(sample.dtype), original.to(sample.dtype)
        return EDMEulerSchedulerOutput(previous, original) if return_dict else (previous, original)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy samples, x = x_0 + sigma noise, with sigma = exp(4 timestep).

        Samples and noise are (batch, channels, height, width), timesteps floating point, (batch,), or one for all.
        """
        if not timesteps.is_floating_point() or timesteps.numel() not in (1, original_samples.shape[0]):
            found = f"a tensor of {tuple(timesteps.shape)} {timesteps.dtype}"
            raise ValueError(f"timesteps is {found}, but must hold log(sigma) / 4 for all or for each image.")
        sigma = (4 * _double(timesteps.to(original_samples.device))).exp()
        sigma = sigma.reshape(-1, *[1] * (original_samples.ndim - 1))
        return (original_samples + sigma * noise).to(original_samples.dtype)
