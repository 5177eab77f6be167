"""DDIM with eta and DDPM with a learned variance, on tables of double precision, never waiting for the device.

The file imports torch and diffusers only: a repository on the Hub carries it. Song et al. 2020 is
https://arxiv.org/abs/2010.02502, Ho et al. 2020 https://arxiv.org/abs/2006.11239, Nichol & Dhariwal 2021
https://arxiv.org/abs/2102.09672, Dhariwal & Nichol 2021 https://arxiv.org/abs/2105.05233, and Salimans & Ho 2022
https://arxiv.org/abs/2202.00512.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor


CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "variance_type": ("learned_range", "fixed_small", "fixed_large"),
}
# Options of stock schedulers that change the samples and do not exist here: a config that switches one on is refused.
UNSUPPORTED_OPTIONS = ("rescale_betas_zero_snr", "thresholding")
# Options that stock schedulers do not have, and their defaults.
OWN_OPTIONS = {"max_beta": 1.0, "use_clipped_model_output": False}
MIN_VARIANCE = 1e-10  # lower clamp of a step's beta, and of the variances whose logarithm is taken


class StepCoefficients(NamedTuple):
    """What a step needs to know of its timestep, float64 tensors of shape (); abar is `alphas_cumprod`."""

    signal_rate: torch.Tensor  # sqrt(abar_t)
    noise_rate: torch.Tensor  # sqrt(1 - abar_t)
    inverse_noise_rate: torch.Tensor  # 1 / sqrt(1 - abar_t), 0 where abar_t is 1
    previous_signal_rate: torch.Tensor  # sqrt(abar_prev)
    previous_noise_variance: torch.Tensor  # 1 - abar_prev
    posterior_original: torch.Tensor  # factor of x_0 in the posterior mean, Ho et al. eq. 7
    posterior_sample: torch.Tensor  # factor of x_t in the posterior mean, Ho et al. eq. 7
    beta: torch.Tensor  # 1 - abar_t / abar_prev, clamped
    beta_tilde: torch.Tensor  # (1 - abar_prev) / (1 - abar_t) * beta
    least_variance: torch.Tensor  # beta_tilde; of a step to a clean sample, whose own is 0, that of the step before


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value as an int in [low, high]; ValueError if it is none."""
    if not hasattr(value, "__index__") or value < low or (high is not None and value > high):
        wanted = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise ValueError(f"{name} is {value!r}, but must be {wanted}.")
    return operator.index(value)


class LearnedVarianceScheduler(SchedulerMixin, ConfigMixin):
    """Options, tables of double precision, timesteps and variances of the schedulers of this package.

    ``betas``, ``alphas`` and ``alphas_cumprod`` are (num_train_timesteps,), float64 on the CPU; ``timesteps`` are the
    active ones in descending order, int64. ``accepts_learned_variance`` tells pipelines that `step` takes 2C channels.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]  # noqa: RUF012
    _compatibles += ["EtaDDIMScheduler", "LearnedVarianceDDPMScheduler"]
    order = 1
    init_noise_sigma = 1.0
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
        use_clipped_model_output: bool = False,
    ):
        """Options have the names and meanings of the stock schedulers'; ValueError for one that is out of its range.

        Args:
            num_train_timesteps: Number of timesteps of the training, T; they run from 0 to T - 1.
            beta_start, beta_end: First and last beta of the "linear" and "scaled_linear" schedules.
            beta_schedule: "linear", "scaled_linear" (linear in the square root) or "squaredcos_cap_v2" (cosine).
            trained_betas: The betas themselves, T values in [0, 1); the three options above are then not read.
            clip_sample, clip_sample_range: Clip the predicted clean sample to [-clip_sample_range, clip_sample_range].
            set_alpha_to_one: Whether the last step ends at abar = 1 (a clean sample) or at the abar of timestep 0.
            steps_offset: Added to the timesteps of the "leading" spacing.
            prediction_type: "epsilon" (the noise), "sample" (the clean sample) or "v_prediction" (Salimans & Ho 2022).
            timestep_spacing: "leading", "trailing" or "linspace" (Lin et al. 2023, https://arxiv.org/abs/2305.08891).
            variance_type: "fixed_small" (the posterior variance beta_tilde), "fixed_large" (beta), or "learned_range":
                the model's second C channels interpolate in the logarithm from the smaller, -1, to the larger, 1
                (Nichol & Dhariwal 2021, eq. 15); an output of C channels gets "fixed_small" then.
            max_beta: Upper clamp in (0, 1] of a step's beta where it stands for a variance, not in the posterior mean:
                1.0 in stock schedulers, 0.999 in "Diffusion models from scratch".
            use_clipped_model_output: What the argument of that name of [`EtaDDIMScheduler.step`] is where it is not
                given; True in ADM's program.
        """
        self.max_beta = max_beta
        self._own_options = {"max_beta": max_beta, "use_clipped_model_output": use_clipped_model_output}
        for name, choices in CHOICES.items():
            if self.config[name] not in choices and (name != "beta_schedule" or trained_betas is None):
                raise ValueError(f"{name} is {self.config[name]!r}, but must be one of {choices}.")
        _check_integer("num_train_timesteps", num_train_timesteps, 1)
        _check_integer("steps_offset", steps_offset, 0)
        for name, high in (("clip_sample_range", math.inf), ("max_beta", 1)):
            if not 0 < self.config[name] <= high:
                raise ValueError(f"{name} is {self.config[name]}, but must lie in (0, {high}].")

        if trained_betas is not None:
            self.betas = torch.as_tensor(trained_betas, dtype=torch.float64, device="cpu").clone()
            self.register_to_config(trained_betas=self.betas.tolist())  # what JSON can hold
        elif beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            time = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
            abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            self.betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            power = 0.5 if beta_schedule == "scaled_linear" else 1.0
            ends = beta_start**power, beta_end**power
            self.betas = torch.linspace(*ends, num_train_timesteps, dtype=torch.float64) ** (1 / power)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        source = f"beta_start {beta_start} and beta_end {beta_end}" if trained_betas is None else "trained_betas"
        if self.betas.shape != (num_train_timesteps,):
            shape = tuple(self.betas.shape)
            raise ValueError(f"trained_betas has shape {shape} and num_train_timesteps is {num_train_timesteps}.")
        if not ((self.betas >= 0) & (self.betas < 1)).all():
            raise ValueError(f"{source} give betas in [{self.betas.min()}, {self.betas.max()}], not in [0, 1).")
        if not self.alphas_cumprod[-1] > 0:
            raise ValueError(f"{source} give alphas_cumprod that end at 0: lower the betas.")
        self.final_alpha_cumprod = torch.ones_like(self.alphas[0]) if set_alpha_to_one else self.alphas_cumprod[0]

        options = {name: value for name, value in self.config.items() if name not in OWN_OPTIONS}
        changed = {name: value for name, value in self._own_options.items() if value != OWN_OPTIONS[name]}
        options |= {f"_{name}": value for name, value in changed.items()}
        self._internal_dict = FrozenDict(options)
        self.num_inference_steps: int | None = None
        self._activate(list(range(num_train_timesteps - 1, -1, -1)), device=None)

    @property
    def config(self) -> FrozenDict:
        """The options. Those of `OWN_OPTIONS` can be read, but are not among the items, which others warn of."""
        for name, value in self._own_options.items():
            object.__setattr__(self._internal_dict, name, value)
        return self._internal_dict

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """What `from_config` and `from_pretrained` read of the config of this or a compatible class."""
        config_dict = dict(config_dict)
        for name in UNSUPPORTED_OPTIONS:
            if kwargs.pop(name, config_dict.pop(name, False)):
                raise ValueError(f"{name} is True, but {cls.__name__} does not have it: pass {name}=False.")
        for name in OWN_OPTIONS.keys() & {key[1:] for key in config_dict}:
            config_dict[name] = config_dict.pop(f"_{name}")
        return super().extract_init_dict(config_dict, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: these schedulers need no scaling of the model's input."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps of a sampling run; ValueError if one is out of its range.

        Args:
            num_inference_steps: Number of steps in [1, num_train_timesteps], spread as `timestep_spacing` says.
            device: Where `timesteps` and the tables of `step` shall lie; None is the CPU.
            timesteps: The timesteps themselves instead, strictly descending integers in [0, num_train_timesteps).
        """
        total = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(f"num_inference_steps is {num_inference_steps} and timesteps is {timesteps}: give one.")
        if timesteps is not None:
            chosen = [_check_integer(f"timesteps[{i}]", t, 0, total - 1) for i, t in enumerate(timesteps)]
            if not chosen or any(t <= following for t, following in pairwise(chosen)):
                raise ValueError(f"timesteps is {chosen}, but must be strictly descending, at least one.")
        else:
            steps = _check_integer("num_inference_steps", num_inference_steps, 1, total)
            if self.config.timestep_spacing == "leading":
                chosen = [i * (total // steps) + self.config.steps_offset for i in range(steps)]
            elif self.config.timestep_spacing == "trailing":
                # the difference of the first two values, as numpy.arange takes it: it decides where one ends in .5
                stride = total - (total - total / steps)
                chosen = [round(total - i * stride) - 1 for i in reversed(range(steps))]
            else:
                chosen = [round(i * ((total - 1) / max(steps - 1, 1))) for i in range(steps)]
            chosen.reverse()
            if chosen[0] >= total:
                raise ValueError(f"steps_offset is {self.config.steps_offset}: the first timestep is {chosen[0]}.")
        self.num_inference_steps = len(chosen)
        self._activate(chosen, device)

    def _activate(self, timesteps: list[int], device: str | torch.device | None) -> None:
        """Makes timesteps the active ones, and computes the coefficients of every timestep under them."""
        self.timesteps = torch.tensor(timesteps, dtype=torch.int64, device=device)
        # the previous timestep is the largest of the list that is smaller, for members of the list and all others
        ascending = torch.tensor(timesteps[::-1])
        index = torch.searchsorted(ascending, torch.arange(self.config.num_train_timesteps)) - 1
        abar = self.alphas_cumprod
        abar_prev = torch.where(index >= 0, abar[ascending[index.clamp(min=0)]], self.final_alpha_cumprod)

        # where abar is 1 there is no noise to divide by: x_t is the clean sample itself
        has_noise = abar < 1
        noise_variance = torch.where(has_noise, 1 - abar, 1.0)
        alpha = abar / abar_prev
        beta = (1 - alpha).clamp(MIN_VARIANCE, self.max_beta)
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
            least_variance=torch.where(abar_prev < 1, beta_tilde, beta_tilde[timesteps[-2:][0]]),
        )
        # one row a timestep: a step then costs one look-up, not one for each coefficient
        self._tables = {torch.device("cpu"): torch.stack(coefficients, dim=1)}
        self._table(self.timesteps.device)

    def _table(self, device: torch.device) -> torch.Tensor:
        """The coefficients on a device, shape (num_train_timesteps, number of coefficients)."""
        if device not in self._tables:
            dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's devices have not
            self._tables[device] = self._tables[torch.device("cpu")].to(device, dtype=dtype)
        return self._tables[device]

    def _prepare(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[StepCoefficients, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Coefficients, prediction, interpolation of the variance or None, and sample, in what to compute in."""
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.tensor(_check_integer("timestep", timestep, 0, self.config.num_train_timesteps - 1))
        elif timestep.numel() != 1 or timestep.is_floating_point():
            raise ValueError(f"timestep is a tensor of {tuple(timestep.shape)} {timestep.dtype}, not of one integer.")
        # subscripting with a tensor on the device would wait for it; index_select does not
        row = self._table(timestep.device).index_select(0, timestep.reshape(1).to(torch.int64)).squeeze(0)
        if row.device.type != "cpu":
            row = row.to(sample.device)  # tensors of shape () on the CPU go with any device, others with their own
        elif sample.device.type == "mps":
            row = row.to(torch.float32)

        (batch, channels, *size), shape = sample.shape, tuple(model_output.shape)
        if shape not in ((batch, channels, *size), (batch, 2 * channels, *size)):
            wanted = f"{channels} channels (prediction) or {2 * channels} (with variance), else the same shape"
            raise ValueError(f"model_output has shape {shape} for a sample of {tuple(sample.shape)}, not {wanted}.")
        output = model_output.to(torch.promote_types(sample.dtype, torch.float32))
        interpolation = None if shape[1] == channels else output[:, channels:]
        return StepCoefficients(*row.unbind()), output[:, :channels], interpolation, sample.to(output.dtype)

    def _predict_original(self, prediction: torch.Tensor, sample: torch.Tensor, c: StepCoefficients) -> torch.Tensor:
        """The clean sample that a prediction stands for, clipped if the config says so."""
        if self.config.prediction_type == "epsilon":
            original = (sample - c.noise_rate * prediction) / c.signal_rate  # Ho et al. 2020, eq. 15
        elif self.config.prediction_type == "sample":
            original = prediction
        else:
            original = c.signal_rate * sample - c.noise_rate * prediction  # Salimans & Ho 2022, section 4
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return original

    def _variance(self, interpolation: torch.Tensor | None, c: StepCoefficients) -> torch.Tensor:
        """Variance of a step: shape () if fixed, (batch, channels, height, width) if learned."""
        if self.config.variance_type == "fixed_large":
            return torch.where(c.previous_noise_variance > 0, c.beta, c.least_variance)
        if self.config.variance_type == "fixed_small" or interpolation is None:
            return c.beta_tilde
        # Nichol & Dhariwal 2021, eq. 15, with the interpolation in [-1, 1] as the models of diffusers give it
        fraction = (interpolation + 1) / 2
        log_variance = fraction * c.beta.log() + (1 - fraction) * c.least_variance.clamp(min=MIN_VARIANCE).log()
        return log_variance.clamp(-30, 30).exp()

    def _standard_deviation(self, interpolation: torch.Tensor | None, c: StepCoefficients) -> torch.Tensor:
        """Standard deviation of a step's noise, shaped as its variance; a step to a clean sample adds none."""
        return (c.previous_noise_variance > 0) * self._variance(interpolation, c).sqrt()

    def _sample_noise(
        self, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        """Standard normal noise of the sample's shape; from a list of generators, one for each image."""
        if isinstance(generator, list) and len(generator) != sample.shape[0]:
            raise ValueError(f"generator is a list of {len(generator)}, not one for each image: {sample.shape[0]}.")
        return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)

    def _rates(self, timesteps: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar) for a batch of timesteps, shaped to go with the sample."""
        if timesteps.is_floating_point() or timesteps.numel() not in (1, sample.shape[0]):
            found = f"a tensor of {tuple(timesteps.shape)} {timesteps.dtype}"
            raise ValueError(f"timesteps is {found}, but must hold one integer for each image: {sample.shape[0]}.")
        index = timesteps.flatten().to(device=sample.device, dtype=torch.int64)
        rates = self._table(sample.device).index_select(0, index)[:, :2]
        rates = rates.to(torch.promote_types(sample.dtype, torch.float32))
        signal, noise = (rate.reshape(-1, *[1] * (sample.ndim - 1)) for rate in rates.unbind(dim=1))
        return signal, noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noisy samples, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, eq. 4).

        Samples and noise are (batch, channels, height, width), timesteps integers, (batch,), or one for all.
        """
        signal_rate, noise_rate = self._rates(timesteps, original_samples)
        return (signal_rate * original_samples + noise_rate * noise).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Target of a v-prediction, sqrt(abar_t) noise - sqrt(1 - abar_t) x_0; arguments are those of `add_noise`."""
        signal_rate, noise_rate = self._rates(timesteps, sample)
        return (signal_rate * noise - noise_rate * sample).to(sample.dtype)


class EtaDDIMScheduler(LearnedVarianceScheduler):
    """DDIM (Song et al. 2020) from deterministic (eta 0) to the noise of DDPM (eta 1), its variance learned or fixed.

    It differs from the stock `DDIMScheduler`: a model output may have C or 2C channels, and a learned variance is used
    for the noise of eta > 0. Betas may be 0 (their logarithm is taken at 1e-10). The previous timestep is looked up in
    the list, so that every spacing and custom lists work, and `step` may be called in any order. Noise is added at
    every step but one that ends at abar = 1. With S = eta^2 it samples as "Diffusion models from scratch", whose "DDIM
    scale" is S.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One denoising step, from the sample at a timestep to that at the previous one; half precision in float32.

        Args:
            model_output: The model's prediction, shape (batch, channels, height, width), or prediction and variance
                interpolation one after the other, shape (batch, 2 * channels, height, width).
            timestep: In [0, num_train_timesteps): an int, or an integer tensor with one element on the CPU or the
                sample's device. A tensor's value is not checked, since that would mean waiting for it.
            sample: The noisy sample, shape (batch, channels, height, width).
            eta: Share of DDPM's noise in [0, 1], a factor of the standard deviation. At 0 no noise is sampled.
            use_clipped_model_output: Whether to compute the noise prediction anew from the clipped clean sample; None
                is as the config says.
            generator: Source of the noise, or a list with one for each image. With eta > 0 noise is sampled at every
                step, also where its factor is 0.
            variance_noise: The noise itself instead of a generator, standard normal, of the sample's shape.
            return_dict: Whether to return a `DDIMSchedulerOutput` or a plain tuple.

        Returns:
            The previous sample and the predicted clean sample, both in the shape and dtype of the sample.
        """
        if not isinstance(eta, numbers.Real) or not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta!r}, but must be a number in [0, 1].")
        if variance_noise is not None and generator is not None:
            raise ValueError("generator and variance_noise are both given, but at most one of the two can be.")
        if variance_noise is not None and variance_noise.shape != sample.shape:
            raise ValueError(f"variance_noise has shape {tuple(variance_noise.shape)}, not {tuple(sample.shape)}.")

        # 1. Look up the coefficients of this step, split the model output, and choose a precision to compute in.
        c, prediction, interpolation, x_t = self._prepare(model_output, timestep, sample)

        # 2. Predict the clean sample x_0 (Song et al. 2020, eq. 9), clip it, and predict the noise.
        original = self._predict_original(prediction, x_t, c)
        if self.config.use_clipped_model_output if use_clipped_model_output is None else use_clipped_model_output:
            noise = (x_t - c.signal_rate * original) * c.inverse_noise_rate
        elif self.config.prediction_type == "epsilon":
            noise = prediction
        elif self.config.prediction_type == "sample":
            noise = (x_t - c.signal_rate * prediction) * c.inverse_noise_rate
        else:
            noise = c.signal_rate * prediction + c.noise_rate * x_t  # Salimans & Ho 2022, section 4

        # 3. "Direction pointing to x_t" (Song et al. 2020, eq. 12), with sigma^2 = eta^2 beta_tilde (eq. 16) whatever
        #    the variance type. Rounding may take what is left for it below 0.
        direction = (c.previous_noise_variance - eta**2 * c.beta_tilde).clamp(min=0).sqrt() * noise

        # 4. The previous sample without random noise (Song et al. 2020, eq. 12).
        previous = c.previous_signal_rate * original + direction

        # 5. Random noise of eta times the fixed or learned (Nichol & Dhariwal 2021, eq. 15) standard deviation.
        if eta > 0:
            if variance_noise is None:
                variance_noise = self._sample_noise(x_t, generator)
            previous = previous + eta * self._standard_deviation(interpolation, c) * variance_noise.to(x_t.dtype)

        previous, original = previous.to(sample.dtype), original.to(sample.dtype)
        return DDIMSchedulerOutput(previous, original) if return_dict else (previous, original)


class LearnedVarianceDDPMScheduler(LearnedVarianceScheduler):
    """DDPM (Ho et al. 2020) with the learned variance of improved DDPM (Nichol & Dhariwal 2021).

    It differs from the stock `DDPMScheduler` as [`EtaDDIMScheduler`] differs from its own. Unlike eta-DDIM with eta 1,
    the clipped clean sample decides the whole mean, which `max_beta` does not touch.
    """

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        score_gradient: torch.Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One denoising step, from the sample at a timestep to the sample at the previous one.

        Arguments, result and errors are those of [`EtaDDIMScheduler.step`]. Noise is sampled at every step.

        Args:
            score_gradient: For classifier guidance (Dhariwal & Nichol 2021, algorithm 1) the gradient of
                log p(y | x_t) at the sample, times the scale, (batch, channels, height, width). Times the variance of
                the step it is added to the mean; a step to a clean sample has a variance here too, if it is no
                "fixed_small" one: its posterior variance, 0, is replaced by that of the step before.
        """
        if score_gradient is not None and score_gradient.shape != sample.shape:
            raise ValueError(f"score_gradient has shape {tuple(score_gradient.shape)}, not {tuple(sample.shape)}.")
        # 1. Look up the coefficients of this step, split the model output, and choose a precision to compute in.
        c, prediction, interpolation, x_t = self._prepare(model_output, timestep, sample)

        # 2. Predict the clean sample x_0 (Ho et al. 2020, eq. 15) and clip it.
        original = self._predict_original(prediction, x_t, c)

        # 3. Mean of the posterior q(x_prev | x_t, x_0) (Ho et al. 2020, eq. 7).
        mean = c.posterior_original * original + c.posterior_sample * x_t

        # 4. Classifier guidance shifts it (Dhariwal & Nichol 2021, algorithm 1).
        if score_gradient is not None:
            mean = mean + self._variance(interpolation, c) * score_gradient.to(x_t.dtype)

        # 5. Add noise of the fixed (Ho et al. 2020, section 3.2) or learned variance (Nichol & Dhariwal 2021, eq. 15).
        previous = mean + self._standard_deviation(interpolation, c) * self._sample_noise(x_t, generator)

        previous, original = previous.to(sample.dtype), original.to(sample.dtype)
        return DDPMSchedulerOutput(previous, original) if return_dict else (previous, original)
