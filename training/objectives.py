"""What a network is trained on: how strong the noise is, the noisy image, the target, and what an error costs.

Each objective is a `TrainingObjective`, and has an entry in `OBJECTIVES` of `components`.
"""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor, nn


class LossTerms(NamedTuple):
    """What one batch costs, each (batch,): the mean over the pixels of each image."""

    simple: Tensor  # squared error of the prediction, with its weight and uncertainty if there are any
    vlb: Tensor  # weighted term of the variational bound, in nats per dimension; 0 without a learned variance

    @property
    def total(self) -> Tensor:
        """simple + vlb, (batch,)."""
        return self.simple + self.vlb


class TrainedNetwork(nn.Module):
    """A network with its uncertainty: one forward pass, which is what DDP wraps, reaches all parameters.

    That is its ``log_variance(timestep)``, (batch,), if it has one: the logarithm of how large it takes its squared
    error to be at a noise level.
    """

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The network's output, (batch, channels, height, width), and its log-variance, (batch,), or None."""
        model_output = self.unet(sample, timestep, class_labels, return_dict=False)[0]
        if not hasattr(self.unet, "log_variance"):
            return model_output, None
        return model_output, self.unet.log_variance(timestep)


class TrainingObjective(ABC):
    """What a training step asks of an objective, in this order."""

    level_name: str  # what a noise level is called

    @abstractmethod
    def sample_noise_levels(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns uniform numbers in [0, 1), float64 (batch,), into noise levels, (batch,).

        Beside them come the weights of their losses, float64 (batch,), that make the weighted mean an unbiased
        estimate of the mean over all noise levels.
        """

    @abstractmethod
    def add_noise(self, original_samples: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """The noisy images, (batch, channels, height, width)."""

    def model_inputs(self, noisy_samples: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """What the network is given: samples, (batch, channels, height, width), and timesteps, (batch,)."""
        return noisy_samples, levels

    @abstractmethod
    def target(self, original_samples: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the network should predict, (batch, channels, height, width)."""

    def weights(self, levels: Tensor) -> Tensor | float:
        """What an error of the prediction costs at these noise levels, (batch,)."""
        return 1.0

    def variance_bound(
        self, prediction: Tensor, variance: Tensor, original_samples: Tensor, noisy_samples: Tensor, levels: Tensor
    ) -> Tensor | float:
        """The term that trains a predicted variance, (batch,); 0 for objectives that train none."""
        return 0.0

    def __call__(
        self,
        model_output: Tensor,
        original_samples: Tensor,
        noise: Tensor,
        noisy_samples: Tensor,
        levels: Tensor,
        log_variance: Tensor | None = None,
    ) -> LossTerms:
        """The terms for each image of a batch.

        Args:
            model_output: (batch, channels, height, width): the prediction; with twice the channels the variance
                follows it.
            original_samples: Images in [-1, 1], (batch, channels, height, width), as are the two that follow.
            noise: The noise in the noisy images, of unit variance.
            noisy_samples: The noisy images.
            levels: (batch,).
            log_variance: u, (batch,), if the network has an uncertainty: an error e costs e / exp(u) + u (Karras et
                al. 2024, arXiv 2312.02696, equation 16), least where exp(u) is e; all noise levels weigh equally then.
        """
        channels = original_samples.shape[1]
        prediction, variance = model_output.float().tensor_split([channels], dim=1)
        errors = (self.target(original_samples, noise, levels) - prediction).square().mean(dim=(1, 2, 3))
        simple = self.weights(levels) * errors
        if log_variance is not None:
            simple = simple * torch.exp(-log_variance) + log_variance
        vlb = torch.zeros_like(simple)
        if variance.shape[1]:
            vlb = vlb + self.variance_bound(prediction, variance, original_samples, noisy_samples, levels)
        return LossTerms(simple, vlb)

    @abstractmethod
    def quantiles(self, levels: Tensor) -> Tensor:
        """The share of the training's noise levels that are weaker, in [0, 1], (batch,)."""

    def update(self, levels: np.ndarray, losses: np.ndarray) -> None:  # noqa: B027 (most remember nothing)
        """Tells the losses that the sampled noise levels had, each (images,)."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:  # noqa: B027
        """Resumes from what `state_dict` gave."""


class HybridLoss(TrainingObjective):
    r"""DDPM's objective: L_simple + lambda L_vlb (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 16).

    The bound is the Kullback-Leibler divergence between the true posterior q(x_{t-1} | x_t, x_0), with variance
    beta_tilde, and the predicted p(x_{t-1} | x_t), with the learned variance. The predicted mean in it is detached, so
    that it trains the variance alone. At the first timestep the posterior variance may be zero; that of the second is
    used there, as the paper's authors do. Without a predicted variance L_simple stands alone.

    Args:
        scheduler: A scheduler with ``alphas_cumprod`` and ``final_alpha_cumprod`` and a ``prediction_type`` in its
            config: what the network's first half predicts.
        vlb_weight: lambda.
        device: Where the losses are computed.
        snr_gamma: If given, L_simple has Min-SNR-gamma weights (Hang et al. 2023, arXiv 2303.09556, section 3.4):
            min(SNR, gamma) for a predicted image, and as errors of noise and velocity are SNR and SNR + 1 times that
            of the image, min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1) for these. The paper takes 5.

    Raises:
        ValueError: If snr_gamma is not above 0, or the scheduler has another prediction type.
    """

    level_name = "timesteps"

    def __init__(
        self,
        scheduler: SchedulerMixin,
        vlb_weight: float = 0.001,
        device: torch.device | str = "cpu",
        snr_gamma: float | None = None,
    ):
        self.prediction_type = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type is {self.prediction_type}, but must be epsilon, sample or v_prediction")
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma is {snr_gamma}, but must be above 0")
        self.vlb_weight = vlb_weight

        # one value for each timestep, made in float64
        alpha_prod = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu")
        first = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64, device="cpu").reshape(1)
        alpha_prod_prev = torch.cat([first, alpha_prod[:-1]])
        beta = (1 - alpha_prod / alpha_prod_prev).clamp(1e-10, scheduler.config.get("_max_beta", 1.0))
        beta_tilde = (1 - alpha_prod_prev) / (1 - alpha_prod) * beta
        if beta_tilde[0] == 0:
            beta_tilde[0] = beta_tilde[1]

        def table(values: Tensor) -> Tensor:
            return values.to(device=device, dtype=torch.float32)[:, None, None, None]

        self.num_train_timesteps = len(alpha_prod)
        self._sqrt_alpha_prod, self._sqrt_beta_prod = table(alpha_prod.sqrt()), table((1 - alpha_prod).sqrt())
        self._log_beta, self._log_beta_tilde = table(beta.log()), table(beta_tilde.clamp(min=1e-10).log())
        # Ho et al. 2020, equation 7
        self._mean_of_original = table(alpha_prod_prev.sqrt() * beta / (1 - alpha_prod))
        weight = torch.ones(len(alpha_prod))
        if snr_gamma is not None:
            snr = compute_snr(scheduler, torch.arange(len(alpha_prod)))
            if self.prediction_type == "epsilon":
                # as a ratio of its own, which is 1 and not 0 / 0 where nothing is left of the signal
                weight = (snr_gamma / snr).clamp(max=1)
            else:
                weight = snr.clamp(max=snr_gamma) / (1 if self.prediction_type == "sample" else snr + 1)
        self._weight = weight.to(device)

    def sample_noise_levels(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Uniform timesteps, int64 (batch,), counted from 0, and weights of 1."""
        timesteps = (uniforms * self.num_train_timesteps).astype(np.int64)
        return timesteps.clip(max=self.num_train_timesteps - 1), np.ones_like(uniforms)

    def quantiles(self, timesteps: Tensor) -> Tensor:
        return timesteps / self.num_train_timesteps

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4), (batch, channels, h, w)."""
        return self._sqrt_alpha_prod[timesteps] * original_samples + self._sqrt_beta_prod[timesteps] * noise

    def target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return original_samples
        # Salimans and Ho 2022, arXiv 2202.00512, appendix D
        return self._sqrt_alpha_prod[timesteps] * noise - self._sqrt_beta_prod[timesteps] * original_samples

    def weights(self, timesteps: Tensor) -> Tensor:
        return self._weight[timesteps]

    def variance_bound(
        self, prediction: Tensor, variance: Tensor, original_samples: Tensor, noisy_samples: Tensor, timesteps: Tensor
    ) -> Tensor:
        """lambda L_vlb, (batch,); the variance is an interpolation, 1 for log beta, -1 for log beta_tilde."""
        # 1. the predicted image, as the sampler would clip it
        with torch.no_grad():
            sqrt_alpha_prod, sqrt_beta_prod = self._sqrt_alpha_prod[timesteps], self._sqrt_beta_prod[timesteps]
            if self.prediction_type == "epsilon":
                predicted_original = (noisy_samples - sqrt_beta_prod * prediction) / sqrt_alpha_prod
            elif self.prediction_type == "sample":
                predicted_original = prediction
            else:
                predicted_original = sqrt_alpha_prod * noisy_samples - sqrt_beta_prod * prediction
            # both means have the same share of x_t, so that only the shares of x_0 differ
            mean_error = self._mean_of_original[timesteps] * (original_samples - predicted_original.clamp(-1, 1))

        # 2. divergence of two Gaussians, with the log-variances as equation 15 of Nichol and Dhariwal has them
        log_variance, fraction = self._log_beta_tilde[timesteps], (variance + 1) / 2
        predicted = (fraction * self._log_beta[timesteps] + (1 - fraction) * log_variance).clamp(-30, 30)
        relative_variance = torch.exp(log_variance - predicted)
        squared_error = mean_error.square() * torch.exp(-predicted)
        divergence = 0.5 * (predicted - log_variance + relative_variance + squared_error - 1)
        return self.vlb_weight * divergence.mean(dim=(1, 2, 3))


class ImportanceSampledLoss(HybridLoss):
    """The same loss with timesteps sampled by its second moment (Nichol and Dhariwal 2021, section 3.3).

    p_t is proportional to sqrt(E[L_t^2]) over the last losses of each timestep, and the loss is divided by T p_t.
    Until every timestep has a full history, and with a small probability always, timesteps are sampled uniformly.

    Args:
        history_length: How many losses of each timestep are kept.
        uniform_probability: Share of samples that stay uniform, so that no timestep is forgotten.
        arguments, options: Those of `HybridLoss`.
    """

    def __init__(self, *arguments: Any, history_length: int = 10, uniform_probability: float = 0.001, **options: Any):
        super().__init__(*arguments, **options)
        self.uniform_probability = uniform_probability
        self._history = np.zeros((self.num_train_timesteps, history_length))
        self._counts = np.zeros(self.num_train_timesteps, dtype=np.int64)

    def probabilities(self) -> np.ndarray:
        """p_t, float64 (num_train_timesteps,)."""
        count = self.num_train_timesteps
        moments = np.sqrt(np.square(self._history).mean(axis=1))
        if (self._counts < self._history.shape[1]).any() or moments.sum() == 0:
            return np.full(count, 1 / count)
        return (1 - self.uniform_probability) * moments / moments.sum() + self.uniform_probability / count

    def sample_noise_levels(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        probabilities = self.probabilities()
        cumulative = probabilities.cumsum()
        timesteps = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
        timesteps = timesteps.clip(max=self.num_train_timesteps - 1)
        return timesteps, 1 / (self.num_train_timesteps * probabilities[timesteps])

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        for timestep, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            # the oldest loss makes room; where it stands does not matter for the moment
            self._history[timestep, self._counts[timestep] % self._history.shape[1]] = loss
            self._counts[timestep] += 1

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"history": self._history.copy(), "counts": self._counts.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        # none in the checkpoint of a run that sampled uniformly
        if state:
            self._history, self._counts = state["history"].copy(), state["counts"].copy()


class EDMLoss(TrainingObjective):
    r"""EDM's objective (Karras et al. 2022, arXiv 2206.00364, table 1).

    Images with noise of standard deviation sigma, ln sigma ~ N(p_mean, p_std^2), are denoised to
    D = c_skip x + c_out F, where F is what the network makes of c_in x and log(sigma) / 4. The squared error of D has
    the weight lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. As lambda c_out^2 = 1, it is F's plain error.

    Args:
        scheduler: A scheduler with ``sigma_data``, the standard deviation of images in [-1, 1], in its config.
        p_mean, p_std: Of ln sigma. EDM has -1.2 and 1.2; EDM2 (Karras et al. 2024, arXiv 2312.02696) has -0.8 and 1.6
            for the pixels of ImageNet-64, -0.4 and 1 for latents.

    Raises:
        ValueError: If the scheduler takes F with the other sign.
    """

    level_name = "noise levels"

    def __init__(self, scheduler: SchedulerMixin, p_mean: float = -1.2, p_std: float = 1.2):
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"prediction_type is {scheduler.config.prediction_type}, but EDM's loss needs epsilon")
        self.sigma_data: float = scheduler.config.sigma_data
        self.p_mean, self.p_std = p_mean, p_std

    def sample_noise_levels(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """sigma, float32 (batch,), by the inverse of the normal distribution, and weights of 1."""
        # 0, which would be no noise, is as likely as one of the 2^53 others
        normal = torch.special.ndtri(torch.from_numpy(uniforms).clamp(min=2.0**-54)).numpy()
        return np.exp(self.p_mean + self.p_std * normal).astype(np.float32), np.ones_like(uniforms)

    def quantiles(self, sigmas: Tensor) -> Tensor:
        return torch.special.ndtr((sigmas.log() - self.p_mean) / self.p_std)

    def add_noise(self, original_samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return original_samples + sigmas[:, None, None, None] * noise

    def model_inputs(self, noisy_samples: Tensor, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x and c_noise."""
        return noisy_samples / self._norm(sigmas), sigmas.log() / 4

    def target(self, original_samples: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """(y - c_skip x) / c_out, without its difference of almost equal numbers where there is little noise."""
        share = sigmas[:, None, None, None] / self.sigma_data
        return (share * original_samples - self.sigma_data * noise) / self._norm(sigmas)

    def _norm(self, sigmas: Tensor) -> Tensor:
        """Standard deviation of the noisy images, (batch, 1, 1, 1)."""
        return (sigmas.square() + self.sigma_data**2).sqrt()[:, None, None, None]
