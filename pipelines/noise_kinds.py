"""How networks and schedulers meet, for each way to describe noise levels: told by the scheduler, not by the network.

The file imports torch and diffusers only, because a repository on the Hub carries it. Adding a kind: write the class,
name it in `NOISE_KINDS`.
"""

import inspect
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_ddpm_parallel import DDPMParallelScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging


logger = logging.get_logger(__name__)

# They divide by the difference of two noise levels or take its logarithm: two steps at one level give NaN.
_NEED_DIFFERENT_NOISE_LEVELS = {
    *("DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler"),
    *("LMSDiscreteScheduler", "SASolverScheduler", "UniPCMultistepScheduler"),
}

# Of errors of the noise prediction; with more nothing can be recognised. The original program stays below 160.
_MAX_FIRST_STEP_GAIN = 1000.0


class NoiseKind(ABC):
    """One way to describe noise levels; methods take a scheduler whose timesteps are set, or say otherwise."""

    name: ClassVar[str]  # in messages: "a network trained with ..."
    example: ClassVar[str]  # a stock scheduler that works well
    unsuitable: ClassVar[dict[str, str]] = {}  # schedulers that have such levels and fail all the same, and why

    @classmethod
    @abstractmethod
    def knows(cls, scheduler: SchedulerMixin | type[SchedulerMixin]) -> bool:
        """Whether a scheduler, or a class of them, describes noise in this way."""

    @classmethod
    def takes_learned_variance(cls, scheduler: SchedulerMixin) -> bool:
        """Whether its step takes 2 * channels: the prediction, and the interpolation of the variance."""
        return False

    @classmethod  # noqa: B027 (most have nothing to check)
    def check_steps(cls, scheduler: SchedulerMixin) -> None:
        """Raises ValueError where the scheduler cannot step over its timesteps."""

    @classmethod
    @abstractmethod
    def sigmas(cls, scheduler: SchedulerMixin) -> torch.Tensor:
        """Standard deviation of the noise over that of the image, at each timestep, (timesteps,) on the CPU."""

    @classmethod
    def shift_by_score(
        cls, model_output: torch.Tensor, gradient: torch.Tensor, timestep: torch.Tensor, scheduler: SchedulerMixin
    ) -> torch.Tensor:
        """The prediction with a classifier's guidance; ``gradient`` is that of log p(y | network input), scaled."""
        raise ValueError(
            f"classifier_scale needs a scheduler with alphas_cumprod, but {type(scheduler).__name__} has noise levels"
            " that the classifier was not trained with: leave it 0, and give a guidance_unet instead"
        )


class VariancePreserving(NoiseKind):
    """DDPM's timesteps and ``alphas_cumprod`` (Ho et al. 2020, https://arxiv.org/abs/2006.11239)."""

    name, example = "alphas_cumprod", "UniPCMultistepScheduler"
    unsuitable: ClassVar[dict[str, str]] = {
        "LCMScheduler": "it takes each prediction for a finished image, as only a network distilled for that gives it",
        "CogVideoXDDIMScheduler": "it shifts the noise levels of the training, which this network does not know",
        "CogVideoXDPMScheduler": "it shifts the noise levels of the training, which this network does not know",
        "DDIMInverseScheduler": "it runs from an image to its noise",
        "DPMSolverMultistepInverseScheduler": "it runs from an image to its noise",
        "IPNDMScheduler": "it asks for times between 0 and 1, and this network knows timesteps of num_train_timesteps",
        "RePaintScheduler": "it fills a hole in a given image",
        "UnCLIPScheduler": "it must be told the previous timestep at every step",
    }

    @classmethod
    def knows(cls, scheduler: SchedulerMixin | type[SchedulerMixin]) -> bool:
        is_class = isinstance(scheduler, type)
        return hasattr(scheduler, "alphas_cumprod") or (
            is_class and "trained_betas" in inspect.signature(scheduler.__init__).parameters
        )

    @classmethod
    def takes_learned_variance(cls, scheduler: SchedulerMixin) -> bool:
        # by its class, as from_config carries any option
        if not isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)):
            return getattr(scheduler, "accepts_learned_variance", False)
        if scheduler.config.variance_type == "learned":
            raise ValueError("the scheduler's variance_type is 'learned', but the network predicts 'learned_range'")
        return scheduler.config.variance_type == "learned_range"

    @classmethod
    def check_steps(cls, scheduler: SchedulerMixin) -> None:
        # ours can step over all
        if getattr(scheduler, "accepts_learned_variance", False):
            return
        timesteps = scheduler.timesteps.detach().cpu()
        steps = getattr(scheduler, "num_inference_steps", len(timesteps))
        name, names = type(scheduler).__name__, {base.__name__ for base in type(scheduler).__mro__}
        if not timesteps.isfinite().all():
            raise ValueError(
                f"{name} finds no {steps} timesteps on this noise schedule: take more, or 'leading' spacing"
            )
        # schedulers of second order have a timestep of their own between any two
        levels = cls._abar(scheduler, timesteps[:: getattr(scheduler, "order", 1)])
        equal = (levels[1:] == levels[:-1]).nonzero().flatten().tolist()
        # the upper end of a learned variance is a beta, whose logarithm is taken
        if equal and (names & _NEED_DIFFERENT_NOISE_LEVELS or cls.takes_learned_variance(scheduler)):
            remedy = f"take fewer than {steps} steps, or EulerDiscreteScheduler"
            raise ValueError(f"{name} needs a different noise level at every step, but two are the same: {remedy}")
        # x_0 = (x_t - sqrt(1 - abar_t) noise) / sqrt(abar_t), and the next sample has sqrt(abar_next) of it
        gain = ((levels[1] if len(levels) > 1 else 1.0) / levels[0]) ** 0.5
        if scheduler.config.get("prediction_type") == "epsilon" and gain > _MAX_FIRST_STEP_GAIN:
            told = f"the first step, from timestep {timesteps[0]:.0f}, multiplies errors of the noise prediction by"
            logger.warning(f"{name}: {told} {gain:.0f}; take timestep_spacing='leading'")

    @classmethod
    def sigmas(cls, scheduler: SchedulerMixin) -> torch.Tensor:
        abar = cls._abar(scheduler, scheduler.timesteps.detach().cpu())
        return ((1 - abar) / abar).sqrt()

    @classmethod
    def shift_by_score(
        cls, model_output: torch.Tensor, gradient: torch.Tensor, timestep: torch.Tensor, scheduler: SchedulerMixin
    ) -> torch.Tensor:
        # Dhariwal and Nichol 2021, https://arxiv.org/abs/2105.05233, algorithm 2: the noise prediction changes by
        # -sqrt(1 - abar) gradient, and with it what else can be predicted of the same sample
        abar = cls._abar(scheduler, timestep.cpu()).item()
        noise = -((1 - abar) ** 0.5)
        factor = {
            "epsilon": noise,
            "sample": -noise * (1 - abar) ** 0.5 / abar**0.5,
            "v_prediction": noise / abar**0.5,
        }[scheduler.config.prediction_type]
        channels = gradient.shape[1]
        shifted = model_output[:, :channels] + factor * gradient
        return torch.cat([shifted, model_output[:, channels:]], dim=1)

    @staticmethod
    def _abar(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
        visited = timesteps.to(torch.int64).clamp(0, len(scheduler.alphas_cumprod) - 1)
        return scheduler.alphas_cumprod.detach().cpu()[visited]


class EDMNoise(NoiseKind):
    """EDM's noise levels sigma (Karras et al. 2022, https://arxiv.org/abs/2206.00364): x = image + sigma * noise.

    The network sees the scaled sample and log(sigma) / 4 as its timestep, and gives the raw F; the scheduler
    preconditions both, as stock `EDMEulerScheduler` does.
    """

    name, example = "EDM's noise levels", "EDMDPMSolverMultistepScheduler"
    unsuitable: ClassVar[dict[str, str]] = {
        "CosineDPMSolverMultistepScheduler": "it tells the network the arc tangent of sigma, not log(sigma) / 4"
    }

    @classmethod
    def knows(cls, scheduler: SchedulerMixin | type[SchedulerMixin]) -> bool:
        return hasattr(scheduler, "precondition_outputs")

    @classmethod
    def sigmas(cls, scheduler: SchedulerMixin) -> torch.Tensor:
        return scheduler.sigmas[: len(scheduler.timesteps)].cpu()


NOISE_KINDS: tuple[type[NoiseKind], ...] = (VariancePreserving, EDMNoise)


def known_kind(scheduler: SchedulerMixin | type[SchedulerMixin]) -> type[NoiseKind] | None:
    """The kind of a scheduler, or of a class of them; None for one that knows another kind of noise."""
    return next((kind for kind in NOISE_KINDS if kind.knows(scheduler)), None)


def check_scheduler(scheduler: SchedulerMixin | type[SchedulerMixin], trained: type[NoiseKind]) -> None:
    """Raises ValueError if a scheduler, or a class of them, cannot generate with a network trained on that kind."""
    scheduler_class = scheduler if isinstance(scheduler, type) else type(scheduler)
    kind = known_kind(scheduler)
    reason: str | None
    if kind is None:
        known = " nor ".join(each.name for each in NOISE_KINDS)
        reason = f"it knows neither {known}, as flow matching does not"
    elif kind is not trained:
        reason = f"it has {kind.name}, but the network was trained with {trained.name}"
    else:
        names = (base.__name__ for base in scheduler_class.__mro__)
        reason = next((kind.unsuitable[name] for name in names if name in kind.unsuitable), None)
    if reason is not None:
        told = f"{scheduler_class.__name__} cannot generate with this network: {reason}"
        raise ValueError(f"{told}; take {trained.example}")
