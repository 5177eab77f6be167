"""Class-conditional pixel diffusion on ImageNet 64x64, at home in diffusers and accelerate.

Everything public is importable from here and loaded on first use, so that ``import imagenet64_diffusion`` is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__


# public name -> module that defines it
_EXPORTS = {
    "ClassConditionalPipeline": "pipelines.pipeline_class_conditional",
    "ClassConditionalUNet2DModel": "models.unet_class_conditional",
    "EtaDDIMScheduler": "schedulers.scheduling_ddim_eta",
    "LearnedVarianceDDPMScheduler": "schedulers.scheduling_ddpm_learned",
    "swap_scheduler": "pipelines.loading",
}

__all__ = [
    "ClassConditionalPipeline",
    "ClassConditionalUNet2DModel",
    "EtaDDIMScheduler",
    "LearnedVarianceDDPMScheduler",
    "__version__",
    "swap_scheduler",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from .models.unet_class_conditional import ClassConditionalUNet2DModel
    from .pipelines.loading import swap_scheduler
    from .pipelines.pipeline_class_conditional import ClassConditionalPipeline
    from .schedulers.scheduling_ddim_eta import EtaDDIMScheduler
    from .schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler
