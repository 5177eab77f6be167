"""DDPM sampling with a learned variance, on tables of double precision and without waiting for the device.

The file stands alone (torch and diffusers only), so that a Hub repository can carry it beside its configuration.

References:
    Ho et al. 2020, Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2006.11239
    Nichol & Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, https://arxiv.org/abs/2102.09672
    Salimans & Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, https://arxiv.org/abs/2202.00512
"""

import math
import operator
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
VARIANCE_TYPES = ("learned_range", "fixed_small", "fixed_large")

# Options of stock schedulers that change the samples and do not exist here: a config that switches one on is refused.
UNSUPPORTED_OPTIONS = ("rescale_betas_zero_snr", "thresholding")

# Lower clamp of a step's beta, and of the variances whose logarithm is taken.
MIN_VARIANCE = 1e-10


@dataclass
class LearnedVarianceDDPMSchedulerOutput(BaseOutput):
    """What [`LearnedVarianceDDPMScheduler.step`] returns.

    Args:
        prev_sample: The sample one step less noisy, the next input of the model. Shape
            (batch, channels, height, width), dtype of the sample that came in.
        pred_original_sample: The clean sample predicted at this step, clipped where `clip_sample` says so. Shape
            (batch, channels, height, width).
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class StepCoefficients(NamedTuple):
    """Everything a step needs to know about its timestep, abar being `alphas_cumprod`.

    Every field is a tensor of one shape: () for one step, (batch,) for a batch of timesteps.
    """

    signal_rate: torch.Tensor  # sqrt(abar_t)
    noise_rate: torch.Tensor  # sqrt(1 - abar_t)
    inverse_noise_rate: torch.Tensor  # 1 / sqrt(1 - abar_t), 0 where abar_t is 1
    previous_signal_rate: torch.Tensor  # sqrt(abar_prev)
    previous_noise_variance: torch.Tensor  # 1 - abar_prev
    posterior_original: torch.Tensor  # factor of x_0 in the posterior mean, Ho et al. eq. 7
    posterior_sample: torch.Tensor  # factor of x_t in the posterior mean, Ho et al. eq. 7
    beta: torch.Tensor  # 1 - abar_t / abar_prev, clamped
    beta_tilde: torch.Tensor  # (1 - abar_prev) / (1 - abar_t) * beta
    log_beta: torch.Tensor
    log_beta_tilde: torch.Tensor
    is_noisy: torch.Tensor  # 0 where abar_prev is 1 and noise has no place, else 1


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> list[float]:
    """Betas of the cosine schedule (Nichol & Dhariwal 2021, eq. 17), the "squaredcos_cap_v2" of diffusers.

    Args:
        num_train_timesteps: Number of betas.
        max_beta: Largest beta; the formula itself ends at 1, where nothing of the image would be left.

    Returns:
        The betas in the order of time, in double precision.
    """

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return [
        min(1 - alpha_bar((t + 1) / num_train_timesteps) / alpha_bar(t / num_train_timesteps), max_beta)
        for t in range(num_train_timesteps)
    ]


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices of an option.

    Raises:
        ValueError: naming the option, the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return the value as an int in [low, high].

    Raises:
        ValueError: naming the option, the value and the range.
    """
    wanted = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    try:
        number = operator.index(value)
    except TypeError as error:
        raise ValueError(f"{name} is {value!r}, but must be {wanted}.") from error
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} is {number}, but must be {wanted}.")
    return number


class LearnedVarianceDDPMScheduler(SchedulerMixin, ConfigMixin):
    """DDPM (Ho et al. 2020) with the learned variance of improved DDPM (Nichol & Dhariwal 2021).

    It differs from the stock `DDPMScheduler` where that one loses precision or time, or fails:

    - a model output may have C or 2C channels, whatever `variance_type` says;
    - tables are double precision, and betas of 0 are allowed (their logarithm is taken at 1e-10);
    - the previous timestep is looked up in the list of timesteps, and `step` may be called for any timestep in any
      order: nothing is remembered between calls;
    - `step` never waits for the device: a timestep may lie there as a tensor;
    - noise is added at every step but one that ends at abar = 1, so with `set_alpha_to_one=False` at the last too.

    Args:
        num_train_timesteps: Number of diffusion steps of the training, T. Timesteps run from 0 to T - 1.
        beta_start: First beta of the "linear" and "scaled_linear" schedules.
        beta_end: Last beta of the "linear" and "scaled_linear" schedules.
        beta_schedule: "linear", "scaled_linear" (linear in the square root) or "squaredcos_cap_v2" (cosine).
        trained_betas: The betas themselves, T values in [0, 1); the three options above are then not read.
        clip_sample: Clip the predicted clean sample to [-clip_sample_range, clip_sample_range].
        clip_sample_range: Largest absolute value of a clipped sample.
        set_alpha_to_one: Whether the step after the last timestep ends at abar = 1 (a clean sample) or at the abar
            of timestep 0.
        steps_offset: Added to the timesteps of the "leading" spacing.
        prediction_type: What the model predicts: "epsilon" (the noise), "sample" (the clean sample) or
            "v_prediction" (Salimans & Ho 2022).
        timestep_spacing: "leading", "trailing" or "linspace", as in the stock schedulers.
        variance_type: "learned_range" (the model's second C channels interpolate between the two bounds below in the
            logarithm, Nichol & Dhariwal eq. 15, with values of -1 for the lower and 1 for the upper bound),
            "fixed_small" (the posterior variance beta_tilde) or "fixed_large" (beta). A "learned_range" whose model
            output has C channels has no learned variance and falls to "fixed_small"; the fixed types ignore a
            second half.
        max_beta: Upper clamp in (0, 1] of a step's beta where it stands for a variance (beta, beta_tilde and the
            bounds of the learned variance). 1.0 is what stock schedulers do; "Diffusion models from scratch", whose
            checkpoints this package converts, uses 0.999. The posterior mean is not touched by it.

    Attributes:
        betas, alphas, alphas_cumprod: Tables of shape (num_train_timesteps,), float64 on the CPU.
        final_alpha_cumprod: The abar after the last timestep, float64, shape ().
        timesteps: The active timesteps in descending order, int64; T - 1 ... 0 before `set_timesteps`.
        accepts_learned_variance: True: `step` takes 2C channels. A pipeline reads it to decide whether to hand over
            the variance half of a model output, which most stock schedulers cannot bear.

    Raises:
        ValueError: for an unknown name or a value out of its range.
    """

    _compatibles = [*(scheduler.name for scheduler in KarrasDiffusionSchedulers), "EtaDDIMScheduler"]  # noqa: RUF012
    order = 1
    accepts_learned_variance = True

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: Sequence[float] | torch.Tensor | None = None,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        variance_type: Literal["learned_range", "fixed_small", "fixed_large"] = "learned_range",
        max_beta: float = 1.0,
    ):
        check_integer("num_train_timesteps", num_train_timesteps, 1)
        check_integer("steps_offset", steps_offset, 0)
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        if not clip_sample_range > 0:
            raise ValueError(f"clip_sample_range is {clip_sample_range}, but must be greater than 0.")
        if not 0 < max_beta <= 1:
            raise ValueError(f"max_beta is {max_beta}, but must lie in (0, 1].")

        if trained_betas is not None:
            self.betas = torch.as_tensor(trained_betas, dtype=torch.float64, device="cpu").clone()
            # A plain list is what the saved config can hold, whatever came in.
            self.register_to_config(trained_betas=self.betas.tolist())
            source = "trained_betas"
        else:
            check_choice("beta_schedule", beta_schedule, BETA_SCHEDULES)
            if beta_schedule == "squaredcos_cap_v2":
                self.betas = torch.tensor(cosine_betas(num_train_timesteps), dtype=torch.float64)
            elif beta_schedule == "scaled_linear":
                roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64)
                self.betas = roots**2
            else:
                self.betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
            source = f"beta_start {beta_start} and beta_end {beta_end}"
        if self.betas.shape != (num_train_timesteps,):
            raise ValueError(
                f"trained_betas has shape {tuple(self.betas.shape)} and num_train_timesteps is {num_train_timesteps}, "
                f"but there must be one beta for each timestep: shape ({num_train_timesteps},)."
            )
        if not bool(((self.betas >= 0) & (self.betas < 1)).all()):
            raise ValueError(
                f"{source} give betas in [{self.betas.min()}, {self.betas.max()}], but all must be in [0, 1)."
            )

        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        if not self.alphas_cumprod[-1] > 0:
            raise ValueError(
                f"{source} give alphas_cumprod that end at 0, but some signal must be left: lower the betas."
            )
        self.final_alpha_cumprod = (
            torch.tensor(1.0, dtype=torch.float64) if set_alpha_to_one else self.alphas_cumprod[0].clone()
        )

        # Standard deviation of the starting noise, part of the scheduler protocol.
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._activate(list(range(num_train_timesteps - 1, -1, -1)), device=None)

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build a scheduler from the config of this or a compatible class, as every diffusers scheduler can be.

        Raises:
            ValueError: if the config asks for an option of a stock scheduler that changes the samples and does not
                exist here (`rescale_betas_zero_snr`, `thresholding`). Pass it as False to go on without it.
        """
        if isinstance(config, dict):
            config = dict(config)
            for name in UNSUPPORTED_OPTIONS:
                if kwargs.pop(name, config.pop(name, False)):
                    raise ValueError(
                        f"{name} is True in the config, but {cls.__name__} does not have it: "
                        f"pass {name}=False to go on without."
                    )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return the sample as it is: this scheduler needs no scaling of the model's input.

        Args:
            sample: Shape (batch, channels, height, width).
            timestep: Not read, part of the scheduler protocol.
        """
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of a sampling run.

        Args:
            num_inference_steps: Number of steps in [1, num_train_timesteps], spread as `timestep_spacing` says.
            device: Where `timesteps` and the tables of `step` shall lie; None is the CPU.
            timesteps: The timesteps themselves instead, strictly descending integers in [0, num_train_timesteps).

        Raises:
            ValueError: if both or none of the two are given, or one is out of its range.
        """
        last = self.config.num_train_timesteps - 1
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps} and timesteps is {timesteps}, but exactly one of the "
                "two must be given."
            )
        if timesteps is not None:
            chosen = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
            if not chosen:
                raise ValueError("timesteps is empty, but must hold at least one timestep.")
            chosen = [check_integer(f"timesteps[{i}]", t, 0, last) for i, t in enumerate(chosen)]
            for i in range(1, len(chosen)):
                if chosen[i] >= chosen[i - 1]:
                    raise ValueError(
                        f"timesteps[{i}] is {chosen[i]} and follows {chosen[i - 1]}, but timesteps must be strictly "
                        "descending."
                    )
        else:
            chosen = self._spread(check_integer("num_inference_steps", num_inference_steps, 1, last + 1))
            if chosen[0] > last:
                raise ValueError(
                    f"steps_offset is {self.config.steps_offset}, which moves the first of {num_inference_steps} "
                    f"timesteps to {chosen[0]}, but it must be at most {last}: take a smaller offset or fewer steps."
                )
        self.num_inference_steps = len(chosen)
        self._activate(chosen, device)

    def _spread(self, steps: int) -> list[int]:
        """Timesteps of a spacing in descending order (Lin et al. 2023, https://arxiv.org/abs/2305.08891, table 2)."""
        total = self.config.num_train_timesteps
        if self.config.timestep_spacing == "leading":
            stride = total // steps
            ascending = [i * stride + self.config.steps_offset for i in range(steps)]
        elif self.config.timestep_spacing == "trailing":
            # The difference of the first two values, as numpy.arange takes it: where a value ends in .5 it decides.
            stride = total - (total - total / steps)
            ascending = [round(total - i * stride) - 1 for i in reversed(range(steps))]
        else:
            ascending = [round(i * ((total - 1) / max(steps - 1, 1))) for i in range(steps)]
        return ascending[::-1]

    def _activate(self, timesteps: list[int], device: str | torch.device | None) -> None:
        """Make a list of timesteps the active one and compute the coefficients of every timestep under it."""
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        self._ascending_timesteps = timesteps[::-1]

        # The previous timestep is the largest of the list that is smaller, for members of the list and all others.
        ascending = torch.tensor(self._ascending_timesteps)
        index = torch.searchsorted(ascending, torch.arange(self.config.num_train_timesteps)) - 1
        abar = self.alphas_cumprod
        abar_prev = torch.where(index >= 0, abar[ascending[index.clamp(min=0)]], self.final_alpha_cumprod)

        # Where abar is 1 there is no noise to divide by: x_t is the clean sample itself.
        has_noise = abar < 1
        noise_variance = torch.where(has_noise, 1 - abar, 1.0)
        alpha = abar / abar_prev
        beta = (1 - alpha).clamp(MIN_VARIANCE, self.config.max_beta)
        beta_tilde = (1 - abar_prev) / noise_variance * beta
        coefficients = StepCoefficients(
            signal_rate=abar.sqrt(),
            noise_rate=(1 - abar).sqrt(),
            inverse_noise_rate=torch.where(has_noise, noise_variance.rsqrt(), 0.0),
            previous_signal_rate=abar_prev.sqrt(),
            previous_noise_variance=1 - abar_prev,
            posterior_original=torch.where(has_noise, abar_prev.sqrt() * (1 - alpha) / noise_variance, 1.0),
            posterior_sample=torch.where(has_noise, alpha.sqrt() * (1 - abar_prev) / noise_variance, 0.0),
            beta=beta,
            beta_tilde=beta_tilde,
            log_beta=beta.log(),
            log_beta_tilde=beta_tilde.clamp(min=MIN_VARIANCE).log(),
            is_noisy=(abar_prev < 1).to(torch.float64),
        )
        # One row a timestep: a step then costs one look-up, not one for each coefficient.
        table = torch.stack(coefficients, dim=1)
        self._tables = {table.device: table}
        self._table(self.timesteps.device)

    def _table(self, device: torch.device) -> torch.Tensor:
        """The coefficients of all timesteps on a device, shape (num_train_timesteps, number of coefficients)."""
        if device not in self._tables:
            table = self._tables[torch.device("cpu")]
            # There is no float64 on Apple's devices.
            self._tables[device] = table.to(device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        return self._tables[device]

    def _step_coefficients(self, timestep: int | torch.Tensor, device: torch.device) -> StepCoefficients:
        """Coefficients of one timestep as tensors of shape (), usable beside tensors on the device."""
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(check_integer("timestep", timestep, 0, self.config.num_train_timesteps - 1))
        elif timestep.numel() != 1 or timestep.is_floating_point():
            raise ValueError(
                f"timestep is a tensor of shape {tuple(timestep.shape)} and {timestep.dtype}, "
                "but must hold a single integer."
            )
        # Subscripting with a tensor on the device would copy it to the host and wait; index_select does not.
        row = self._table(timestep.device).index_select(0, timestep.reshape(1).to(torch.int64)).squeeze(0)
        if row.device.type != "cpu":
            # Tensors of shape () on the CPU go with any device, those on a device only with their own.
            row = row.to(device)
        elif device.type == "mps":
            row = row.to(torch.float32)
        return StepCoefficients(*row.unbind())

    def _split_model_output(
        self, model_output: torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Part a model output into prediction and variance interpolation, both (batch, channels, height, width)."""
        channels = sample.shape[1]
        if model_output.shape == sample.shape:
            return model_output, None
        if model_output.shape == (sample.shape[0], 2 * channels, *sample.shape[2:]):
            prediction, interpolation = model_output.split(channels, dim=1)
            return prediction, interpolation
        raise ValueError(
            f"model_output has shape {tuple(model_output.shape)} for a sample of shape {tuple(sample.shape)}, but "
            f"must have {channels} channels (prediction) or {2 * channels} (with variance), else the same shape."
        )

    def _predict_original(
        self, prediction: torch.Tensor, sample: torch.Tensor, coefficients: StepCoefficients
    ) -> torch.Tensor:
        """The clean sample that a prediction stands for, clipped if the config says so."""
        if self.config.prediction_type == "epsilon":
            # Ho et al. 2020, eq. 15
            original = (sample - coefficients.noise_rate * prediction) / coefficients.signal_rate
        elif self.config.prediction_type == "sample":
            original = prediction
        else:
            # Salimans & Ho 2022, section 4
            original = coefficients.signal_rate * sample - coefficients.noise_rate * prediction
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return original

    def _standard_deviation(
        self, interpolation: torch.Tensor | None, coefficients: StepCoefficients, dtype: torch.dtype
    ) -> torch.Tensor:
        """Standard deviation of a step's noise: shape () if fixed, (batch, channels, height, width) if learned."""
        if self.config.variance_type == "fixed_large":
            deviation = coefficients.beta.sqrt()
        elif self.config.variance_type == "fixed_small" or interpolation is None:
            deviation = coefficients.beta_tilde.sqrt()
        else:
            # Nichol & Dhariwal 2021, eq. 15, with the interpolation in [-1, 1] as the models of diffusers give it
            fraction = (interpolation.to(dtype) + 1) / 2
            log_variance = fraction * coefficients.log_beta + (1 - fraction) * coefficients.log_beta_tilde
            deviation = (0.5 * log_variance.clamp(-30, 30)).exp()
        return coefficients.is_noisy * deviation

    def _draw_noise(
        self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Standard normal noise of the sample's shape; from a list of generators, one for each image."""
        if isinstance(generator, (list, tuple)):
            generator = list(generator)
            if len(generator) != sample.shape[0]:
                raise ValueError(
                    f"generator is a list of {len(generator)}, but must hold one for each image: {sample.shape[0]}."
                )
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> LearnedVarianceDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Go from the sample at a timestep to the sample at the previous one.

        Half precision is computed in float32, and its noise drawn in it. Nothing waits for the device.

        Args:
            model_output: The model's prediction, shape (batch, channels, height, width), or prediction and variance
                interpolation one after the other, shape (batch, 2 * channels, height, width).
            timestep: In [0, num_train_timesteps): an int, or an integer tensor with one element on the CPU or the
                sample's device. A tensor's value is not checked, since that would mean waiting for it.
            sample: The noisy sample, shape (batch, channels, height, width).
            generator: Source of the noise, or a list with one for each image. Noise is drawn at every step, also
                where its factor is 0.
            return_dict: Whether to return a [`LearnedVarianceDDPMSchedulerOutput`] or a plain tuple.

        Returns:
            The previous sample and the predicted clean sample, both in the shape and dtype of the sample.

        Raises:
            ValueError: if the model output has another shape, an int timestep is out of range, a tensor timestep does
                not hold one integer, or a list of generators has another length than the batch.
        """
        # 1. Look up the coefficients of this step, part the model output, and choose a precision to compute in.
        coefficients = self._step_coefficients(timestep, sample.device)
        prediction, interpolation = self._split_model_output(model_output, sample)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x_t = sample.to(dtype)

        # 2. Predict the clean sample x_0 (Ho et al. 2020, eq. 15) and clip it.
        original = self._predict_original(prediction.to(dtype), x_t, coefficients)

        # 3. Mean of the posterior q(x_prev | x_t, x_0) (Ho et al. 2020, eq. 7).
        mean = coefficients.posterior_original * original + coefficients.posterior_sample * x_t

        # 4. Add noise of the fixed (Ho et al. 2020, section 3.2) or learned variance (Nichol & Dhariwal 2021, eq. 15).
        deviation = self._standard_deviation(interpolation, coefficients, dtype)
        previous = mean + deviation * self._draw_noise(sample, generator, dtype)

        previous, original = previous.to(sample.dtype), original.to(sample.dtype)
        if not return_dict:
            return previous, original
        return LearnedVarianceDDPMSchedulerOutput(prev_sample=previous, pred_original_sample=original)

    def _rates(self, timesteps: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar) for a batch of timesteps, shaped to go with the sample."""
        if timesteps.is_floating_point() or timesteps.numel() not in (1, sample.shape[0]):
            raise ValueError(
                f"timesteps is a tensor of shape {tuple(timesteps.shape)} and {timesteps.dtype}, but must hold one "
                f"integer for each image: {sample.shape[0]}."
            )
        index = timesteps.flatten().to(device=sample.device, dtype=torch.int64)
        coefficients = StepCoefficients(*self._table(sample.device).index_select(0, index).unbind(dim=1))
        dtype = torch.promote_types(sample.dtype, torch.float32)
        shape = (-1,) + (1,) * (sample.ndim - 1)
        return coefficients.signal_rate.to(dtype).reshape(shape), coefficients.noise_rate.to(dtype).reshape(shape)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy samples at given timesteps, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4).

        Args:
            original_samples: Clean samples, shape (batch, channels, height, width).
            noise: Standard normal noise of the same shape.
            timesteps: Integers in [0, num_train_timesteps), shape (batch,), or one for all.

        Returns:
            The noisy samples in the shape and dtype of the clean ones.

        Raises:
            ValueError: if `timesteps` holds no integers or another number of them.
        """
        signal_rate, noise_rate = self._rates(timesteps, original_samples)
        return (signal_rate * original_samples + noise_rate * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Target of a v-prediction, v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0 (Salimans & Ho 2022, section 4).

        Args:
            sample: Clean samples, shape (batch, channels, height, width).
            noise: The noise that is added to them, same shape.
            timesteps: Integers in [0, num_train_timesteps), shape (batch,), or one for all.

        Returns:
            The velocities in the shape and dtype of the samples.

        Raises:
            ValueError: if `timesteps` holds no integers or another number of them.
        """
        signal_rate, noise_rate = self._rates(timesteps, sample)
        return (signal_rate * noise - noise_rate * sample).to(sample.dtype)

    def previous_timestep(self, timestep: int) -> int:
        """The timestep at which a step from `timestep` ends: the largest active one below it, or -1 if there is none.

        Args:
            timestep: In [0, num_train_timesteps). It need not be an active one. This is a look-up on the host; a
                tensor on a device would be waited for.

        Raises:
            ValueError: if it is out of range.
        """
        timestep = check_integer("timestep", timestep, 0, self.config.num_train_timesteps - 1)
        position = bisect_left(self._ascending_timesteps, timestep)
        return self._ascending_timesteps[position - 1] if position > 0 else -1

    def __len__(self) -> int:
        return self.config.num_train_timesteps
