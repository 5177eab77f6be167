"""What a network is trained on: how strong the noise is, the noisy image, the target, and what an error costs.

Each objective is one class with the methods of `HybridLoss`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor


class LossTerms(NamedTuple):
    """What one batch costs, each (batch,): the mean over the pixels of each image."""

    simple: Tensor  # squared error of the prediction, with its Min-SNR weight if there is one
    vlb: Tensor  # weighted term of the variational bound, in nats per dimension

    @property
    def total(self) -> Tensor:
        """simple + vlb, (batch,)."""
        return self.simple + self.vlb


class HybridLoss:
    r"""DDPM's objective: L_simple + lambda L_vlb (Nichol and Dhariwal 2021, arXiv 2102.09672, equation 16).

    The bound is the Kullback-Leibler divergence between the true posterior q(x_{t-1} | x_t, x_0), with variance
    beta_tilde, and the predicted p(x_{t-1} | x_t), with the learned variance. The predicted mean in it is detached, so
    that it trains the variance alone. At the first timestep the posterior variance may be zero; that of the second is
    used there, as the paper's authors do. Timesteps are sampled uniformly.

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
        self._weight = None
        if snr_gamma is not None:
            snr = compute_snr(scheduler, torch.arange(len(alpha_prod)))
            if self.prediction_type == "epsilon":
                # as a ratio of its own, which is 1 and not 0 / 0 where nothing is left of the signal
                weight = (snr_gamma / snr).clamp(max=1)
            else:
                weight = snr.clamp(max=snr_gamma) / (1 if self.prediction_type == "sample" else snr + 1)
            self._weight = weight.to(device)

    def sample_noise_levels(self, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Turns uniform numbers in [0, 1) into timesteps.

        Args:
            uniforms: float64 (batch,).

        Returns:
            Timesteps, int64 (batch,), counted from 0, and the weight of each one's loss, float64 (batch,), that makes
            the weighted mean an unbiased estimate of the mean over all timesteps.
        """
        timesteps = (uniforms * self.num_train_timesteps).astype(np.int64)
        return timesteps.clip(max=self.num_train_timesteps - 1), np.ones_like(uniforms)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4), (batch, channels, h, w)."""
        return self._sqrt_alpha_prod[timesteps] * original_samples + self._sqrt_beta_prod[timesteps] * noise

    def target(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict, (batch, channels, height, width)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return original_samples
        # Salimans and Ho 2022, arXiv 2202.00512, appendix D
        return self._sqrt_alpha_prod[timesteps] * noise - self._sqrt_beta_prod[timesteps] * original_samples

    def __call__(
        self, model_output: Tensor, original_samples: Tensor, noise: Tensor, noisy_samples: Tensor, timesteps: Tensor
    ) -> LossTerms:
        """The terms for each image of a batch.

        Args:
            model_output: (batch, 2 * channels, height, width): prediction, then variance interpolation, 1 for log beta
                and -1 for log beta_tilde.
            original_samples: x_0 in [-1, 1], (batch, channels, height, width), as are the two that follow.
            noise: The noise in x_t.
            noisy_samples: x_t.
            timesteps: int64 (batch,), counted from 0.
        """
        prediction, interpolation = model_output.float().chunk(2, dim=1)

        # 1. the plain error, equation 14 of Ho et al. for epsilon
        simple = (self.target(original_samples, noise, timesteps) - prediction).square().mean(dim=(1, 2, 3))
        if self._weight is not None:
            simple = self._weight[timesteps] * simple

        # 2. the predicted image, as the sampler would clip it
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

        # 3. divergence of two Gaussians, with the log-variances as equation 15 of Nichol and Dhariwal has them
        log_variance, fraction = self._log_beta_tilde[timesteps], (interpolation + 1) / 2
        predicted = (fraction * self._log_beta[timesteps] + (1 - fraction) * log_variance).clamp(-30, 30)
        relative_variance = torch.exp(log_variance - predicted)
        squared_error = mean_error.square() * torch.exp(-predicted)
        divergence = 0.5 * (predicted - log_variance + relative_variance + squared_error - 1)
        return LossTerms(simple=simple, vlb=self.vlb_weight * divergence.mean(dim=(1, 2, 3)))

    def update(self, timesteps: np.ndarray, losses: np.ndarray) -> None:
        """Tells the losses that the sampled timesteps had, each (images,)."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a checkpoint must keep."""
        return {}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Resumes from what `state_dict` gave."""


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
