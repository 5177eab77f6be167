"""A network that needs no training, because its data are Gaussian, and what sampling with it must give.

The images of class c have independent pixels x_0 ~ N(mean_c, s^2). Then x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise is
Gaussian too, E[noise | x_t] is linear in x_t, and the probability-flow ODE (Song et al. 2021,
https://arxiv.org/abs/2011.13456, section 4.3) keeps every pixel at its quantile: its solution is known. Guidance
extrapolates the means and leaves the variance, so that with it all this holds as well.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_options
from imagenet64_diffusion.tests.components import seeded


SCHEDULES = ("original", "cosine")


class GaussianToy(ModelMixin, ConfigMixin):
    """The exact prediction for Gaussian images, computed in float64, with the call of the class-conditional U-Net.

    Between two timesteps the logarithm of the noise level is linear; ``round_timesteps`` is as the time embeddings of
    the original program do. The last of the class means is that of the null class.
    """

    @register_to_config
    def __init__(
        self,
        alphas_cumprod: list[float],
        class_means: tuple[float, ...] = (0.2, -0.1, 0.3, 0.0),
        standard_deviation: float = 0.3,
        prediction_type: str = "epsilon",
        round_timesteps: bool = False,
        in_channels: int = 1,
        sample_size: int = 64,
        num_class_embeds: int = 3,
    ):
        super().__init__()
        self.prediction_error = 0.0  # added to every prediction, for a network that is not perfect
        self.means = torch.nn.Parameter(torch.tensor(class_means), requires_grad=False)
        abar = torch.tensor(alphas_cumprod, dtype=torch.float64)
        self.log_noise_levels = -torch.logit(abar) / 2

    def rates(self, timestep: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of a timestep."""
        last = len(self.log_noise_levels) - 1
        timestep = torch.as_tensor(timestep, dtype=torch.float64).clamp(0, last)
        if self.config.round_timesteps:
            timestep = timestep.round()
        below = timestep.floor().long().clamp(max=last - 1)
        level = torch.lerp(self.log_noise_levels[below], self.log_noise_levels[below + 1], timestep - below)
        return torch.sigmoid(-2 * level).sqrt(), torch.sigmoid(2 * level).sqrt()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, return_dict: bool
    ) -> tuple[torch.Tensor]:
        signal_rate, noise_rate = self.rates(timestep)
        means = self.means[class_labels].double().reshape(-1, 1, 1, 1)
        data_variance = self.config.standard_deviation**2
        deviation = (sample.double() - signal_rate * means) / (signal_rate**2 * data_variance + noise_rate**2)
        prediction = noise_rate * deviation
        if self.config.prediction_type == "v_prediction":
            prediction = signal_rate * prediction - noise_rate * (means + signal_rate * data_variance * deviation)
        prediction = prediction + self.prediction_error
        # the lower end of the learned variance, that of the posterior
        return (torch.cat([prediction, -torch.ones_like(prediction)], dim=1).to(sample.dtype),)


def make_gaussian_pipeline(schedule: str, **options) -> ClassConditionalPipeline:
    """A pipeline as the converter makes it ("original") or the training ("cosine"), without clipping."""
    if schedule == "original":
        scheduler = EtaDDIMScheduler(**original_cosine_options())
        options = {"round_timesteps": True, **options}
    else:
        common = {"prediction_type": "v_prediction", "clip_sample": False}
        scheduler = EtaDDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **common)
        options = {"prediction_type": "v_prediction", **options}
    pipeline = ClassConditionalPipeline(GaussianToy(scheduler.alphas_cumprod.tolist(), **options), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass
class GaussianSamples:
    """Images and what they ought to be, all (images, channels, height, width) in float64.

    ``ends`` are the solutions of the ODE at the three places where schedulers may end: ``"clean"`` is its very end,
    ``"last_level"`` the sample at the noise level of timestep 0, ``"denoised"`` the expected image given that sample.
    """

    images: torch.Tensor
    means: torch.Tensor
    ends: dict[str, torch.Tensor]
    standard_deviation: float

    def error(self, end: str) -> float:
        """Root mean square distance from the solution, as a fraction of the standard deviation."""
        return (self.images - self.ends[end]).square().mean().sqrt().item() / self.standard_deviation

    @property
    def mean_error(self) -> float:
        """Distance of the images' mean from the class means, as a fraction of the standard deviation."""
        return abs((self.images - self.means).mean().item()) / self.standard_deviation

    @property
    def relative_deviation(self) -> float:
        """The standard deviation of the images' pixels as a multiple of the right one."""
        return (self.images - self.means).std().item() / self.standard_deviation


def sample_gaussian(
    pipeline: ClassConditionalPipeline, num_inference_steps: int, guidance_scale: float = 2.0, **options
) -> GaussianSamples:
    """An image of every class, and the solution from where the scheduler starts: its first input and timestep."""
    toy, first_inputs = pipeline.unet, []
    hook = toy.register_forward_pre_hook(lambda module, arguments: first_inputs.append(arguments[:2]))
    labels = list(range(toy.config.num_class_embeds))
    options |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    images = pipeline(labels, generator=seeded(*labels), **options).images
    hook.remove()

    means, deviation = toy.means.double(), toy.config.standard_deviation
    means = torch.lerp(means[-1], means[:-1], guidance_scale).reshape(-1, 1, 1, 1)
    sample, timestep = first_inputs[0]
    signal_rate, noise_rate = toy.rates(timestep)
    spread = (signal_rate**2 * deviation**2 + noise_rate**2).sqrt()
    quantiles = (sample[: len(labels)].double() - signal_rate * means) / spread
    signal_rate, noise_rate = toy.rates(0)
    spread = (signal_rate**2 * deviation**2 + noise_rate**2).sqrt()
    ends = {
        "clean": means + deviation * quantiles,
        "last_level": signal_rate * means + spread * quantiles,
        "denoised": means + signal_rate * deviation**2 / spread * quantiles,
    }
    return GaussianSamples(images.double(), means, ends, deviation)
