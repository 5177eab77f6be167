"""The hybrid loss of improved DDPM: a plain error for the prediction, a variational bound for the variance."""

from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..utils.nearest_names import perhaps


_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass
class LossTerms:
    """What one batch costs, each (batch,): the mean over the pixels of each image.

    Attributes:
        simple: Squared error of the prediction, times its weight if the loss weights by the signal-to-noise ratio.
        vlb: Weighted term of the variational bound, in nats per dimension.
    """

    simple: torch.Tensor
    vlb: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """simple + vlb, (batch,)."""
        return self.simple + self.vlb


class HybridLoss:
    r"""L_simple + lambda L_vlb (Nichol and Dhariwal 2021, https://arxiv.org/abs/2102.09672, equation 16).

    The bound is the Kullback-Leibler divergence between the true posterior q(x_{t-1} | x_t, x_0), with variance
    beta_tilde, and the predicted p(x_{t-1} | x_t), with the learned variance. The predicted mean in it is detached, so
    that it trains the variance alone. At the first timestep the posterior variance may be zero, where there is no
    divergence; that of the second timestep is used there, as the paper's authors do.

    Args:
        scheduler: A scheduler with ``alphas_cumprod`` and ``final_alpha_cumprod`` and a ``prediction_type`` in its
            config: what the network's first half predicts.
        vlb_weight: lambda.
        device: Where the losses are computed.
        snr_gamma: If given, L_simple has Min-SNR-gamma weights (Hang et al. 2023, https://arxiv.org/abs/2303.09556,
            section 3.4): an error of the predicted image counts min(SNR, gamma), where the signal-to-noise ratio SNR
            is abar / (1 - abar). As an error of the noise is SNR times that of the image and one of the velocity
            SNR + 1 times, these count min(SNR, gamma) / SNR and min(SNR, gamma) / (SNR + 1). The paper takes 5. The
            bound is not weighted.

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
        if self.prediction_type not in _PREDICTION_TYPES:
            raise ValueError(
                f"prediction_type is {self.prediction_type!r}, but must be one of {', '.join(_PREDICTION_TYPES)}"
                f"{perhaps(self.prediction_type, _PREDICTION_TYPES)}"
            )
        if snr_gamma is not None and not snr_gamma > 0:
            raise ValueError(f"snr_gamma is {snr_gamma}, but must be above 0")
        self.vlb_weight = vlb_weight

        # one value for each timestep, made in float64
        alpha_prod = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64, device="cpu")
        first = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64, device="cpu").reshape(1)
        alpha_prod_prev = torch.cat([first, alpha_prod[:-1]])
        max_beta = scheduler.config.get("max_beta", 1.0)
        beta = (1 - alpha_prod / alpha_prod_prev).clamp(1e-10, max_beta)
        beta_tilde = (1 - alpha_prod_prev) / (1 - alpha_prod) * beta
        if beta_tilde[0] == 0:
            beta_tilde[0] = beta_tilde[1]
        # Ho et al. 2020, equation 7
        mean_of_original = alpha_prod_prev.sqrt() * beta / (1 - alpha_prod)

        def table(values: torch.Tensor) -> torch.Tensor:
            return values.to(device=device, dtype=torch.float32)[:, None, None, None]

        self._sqrt_alpha_prod = table(alpha_prod.sqrt())
        self._sqrt_beta_prod = table((1 - alpha_prod).sqrt())
        self._log_beta = table(beta.log())
        self._log_beta_tilde = table(beta_tilde.clamp(min=1e-10).log())
        self._mean_of_original = table(mean_of_original)
        self._simple_weight = None
        if snr_gamma is not None:
            self._simple_weight = table(self._min_snr_weight(alpha_prod, snr_gamma)).flatten()

    def _min_snr_weight(self, alpha_prod: torch.Tensor, gamma: float) -> torch.Tensor:
        """The weight of the plain error at each timestep, (num_train_timesteps,)."""
        snr = alpha_prod / (1 - alpha_prod)
        if self.prediction_type == "epsilon":
            # as a ratio of its own, which is 1 and not 0 / 0 where nothing is left of the signal
            return (gamma / snr).clamp(max=1)
        weight = snr.clamp(max=gamma)
        return weight if self.prediction_type == "sample" else weight / (snr + 1)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4), (batch, channels, h, w)."""
        return self._sqrt_alpha_prod[timesteps] * original_samples + self._sqrt_beta_prod[timesteps] * noise

    def __call__(
        self,
        model_output: torch.Tensor,
        original_samples: torch.Tensor,
        noise: torch.Tensor,
        noisy_samples: torch.Tensor,
        timesteps: torch.Tensor,
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
        sqrt_alpha_prod, sqrt_beta_prod = self._sqrt_alpha_prod[timesteps], self._sqrt_beta_prod[timesteps]

        # 1. the plain error, equation 14 of Ho et al. for epsilon
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "sample":
            target = original_samples
        else:  # Salimans and Ho 2022, https://arxiv.org/abs/2202.00512, appendix D
            target = sqrt_alpha_prod * noise - sqrt_beta_prod * original_samples
        simple = (target - prediction).square().mean(dim=(1, 2, 3))
        if self._simple_weight is not None:
            simple = self._simple_weight[timesteps] * simple

        # 2. the predicted image, as the sampler would clip it
        with torch.no_grad():
            if self.prediction_type == "epsilon":
                predicted_original = (noisy_samples - sqrt_beta_prod * prediction) / sqrt_alpha_prod
            elif self.prediction_type == "sample":
                predicted_original = prediction
            else:
                predicted_original = sqrt_alpha_prod * noisy_samples - sqrt_beta_prod * prediction
            predicted_original = predicted_original.clamp(-1, 1)
            # both means have the same share of x_t, so that only the shares of x_0 differ
            mean_error = self._mean_of_original[timesteps] * (original_samples - predicted_original)

        # 3. divergence of two Gaussians, with the log-variances as equation 15 of Nichol and Dhariwal has them
        log_variance = self._log_beta_tilde[timesteps]
        fraction = (interpolation + 1) / 2
        predicted_log_variance = fraction * self._log_beta[timesteps] + (1 - fraction) * log_variance
        predicted_log_variance = predicted_log_variance.clamp(-30, 30)
        divergence = 0.5 * (
            predicted_log_variance
            - log_variance
            + torch.exp(log_variance - predicted_log_variance)
            + mean_error.square() * torch.exp(-predicted_log_variance)
            - 1
        )
        return LossTerms(simple=simple, vlb=self.vlb_weight * divergence.mean(dim=(1, 2, 3)))
