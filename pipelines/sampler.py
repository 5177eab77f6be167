"""How images are drawn from a pipeline: the settings that a number measured on them must be read with."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ..schedulers.original_schedule import original_timesteps
from .loading import swap_scheduler
from .pipeline_class_conditional import ClassConditionalPipeline


@dataclass(frozen=True)
class Sampler:
    """Settings of a sampling run.

    Attributes:
        scheduler: Another scheduler than the pipeline's own, as for `swap_scheduler`.
        num_inference_steps: Denoising steps, at least 1; 100 where step_size is not given either.
        step_size: The original program's way to say the steps: every step_size-th timestep, beginning at the first.
        guidance_scale: As for `ClassConditionalPipeline`; up to 1 it draws without guidance.
        guidance_interval: Begin and end of guidance as fractions of the steps, from 0 to 1.
        eta: 0 is DDIM, 1 is DDPM (Song et al. 2020, https://arxiv.org/abs/2010.02502, equation 16).
        clip_sample: Whether the predicted image is clipped at each step; None as the model says.

    Raises:
        ValueError: If a value is of the wrong type or out of range, or both ways to say the steps are taken.
    """

    scheduler: str | None = None
    num_inference_steps: int | None = None
    step_size: int | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    eta: float = 0.0
    clip_sample: bool | None = None

    def __post_init__(self) -> None:
        if self.num_inference_steps is not None and self.step_size is not None:
            raise ValueError("num_inference_steps and step_size both say the number of steps: give one of them")
        for name in ("num_inference_steps", "step_size"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}, but must be a whole number")
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1")
        for name in ("guidance_scale", "eta"):
            value = getattr(self, name)
            if not _is_finite(value) or value < 0:
                raise ValueError(f"{name} is {value!r}, but must be a number that is at least 0")
        interval = self.guidance_interval
        is_pair = isinstance(interval, tuple) and len(interval) == 2 and all(map(_is_finite, interval))
        if not is_pair or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(
                f"guidance_interval is {interval}, but must be two fractions of the steps, 0 <= begin <= end <= 1"
            )
        if self.clip_sample not in (None, True, False):
            raise ValueError(f"clip_sample is {self.clip_sample!r}, but must be true, false, or nothing at all")
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ValueError(f"scheduler is {self.scheduler!r}, but must be a name")

    @classmethod
    def from_options(cls, options: Any) -> "Sampler":
        """The settings among the options of a command that have these names."""
        values = {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        return cls(**{**values, "guidance_interval": tuple(options.guidance_interval)})

    def prepare(self, pipeline: ClassConditionalPipeline) -> None:
        """Gives the pipeline the scheduler, if another one than its own is asked for.

        Raises:
            ValueError: What `swap_scheduler` raises.
        """
        if self.scheduler is not None:
            swap_scheduler(pipeline, self.scheduler)

    def arguments(self, pipeline: ClassConditionalPipeline) -> dict[str, Any]:
        """Arguments of the pipeline's call.

        Raises:
            ValueError: If step_size does not fit the number of timesteps that the model was trained with.
        """
        steps: dict[str, Any] = {"num_inference_steps": self.num_inference_steps or 100}
        if self.step_size is not None:
            num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
            steps = {"timesteps": original_timesteps(num_train_timesteps, self.step_size)}
        return {
            **steps,
            "guidance_scale": self.guidance_scale,
            "guidance_interval": self.guidance_interval,
            "eta": self.eta,
            "clip_sample": self.clip_sample,
        }

    def title(self) -> str:
        """A few words that tell it from others in a chart, such as ``DDIM, 50 steps, guidance 2``."""
        steps = f"step size {self.step_size}" if self.step_size else f"{self.num_inference_steps or 100} steps"
        words = [self.scheduler.removesuffix("Scheduler") if self.scheduler else "own scheduler", steps]
        if self.guidance_scale > 1:
            words.append(f"guidance {self.guidance_scale:g}")
            if self.guidance_interval != (0.0, 1.0):
                words[-1] += f" in [{self.guidance_interval[0]:g}, {self.guidance_interval[1]:g}]"
        if self.eta:
            words.append(f"eta {self.eta:g}")
        if self.clip_sample is not None:
            words.append("clipped" if self.clip_sample else "not clipped")
        return ", ".join(words)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
