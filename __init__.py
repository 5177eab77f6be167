"""Class-conditional pixel diffusion on ImageNet 64x64, at home in diffusers and accelerate.

Everything public is importable from here and loaded on first use, so that ``import imagenet64_diffusion`` is quick.
"""

from typing import TYPE_CHECKING

from .utils.lazy_exports import lazy_exports
from .version import __version__


_MODULES = {
    "ADMClassifierModel": "models.classifier_adm",
    "ADMUNet2DModel": "models.unet_adm",
    "ClassConditionalPipeline": "pipelines.pipeline_class_conditional",
    "ClassConditionalUNet2DModel": "models.unet_class_conditional",
    "EDM2UNet2DModel": "models.unet_edm2",
    "EDMHeunScheduler": "schedulers.scheduling_edm_heun",
    "EtaDDIMScheduler": "schedulers.scheduling_ddim_eta",
    "LearnedVarianceDDPMScheduler": "schedulers.scheduling_ddpm_learned",
    "swap_scheduler": "pipelines.loading",
    "__version__": "version",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_exports(__name__, _MODULES)

if TYPE_CHECKING:
    from .models.classifier_adm import ADMClassifierModel
    from .models.unet_adm import ADMUNet2DModel
    from .models.unet_class_conditional import ClassConditionalUNet2DModel
    from .models.unet_edm2 import EDM2UNet2DModel
    from .pipelines.loading import swap_scheduler
    from .pipelines.pipeline_class_conditional import ClassConditionalPipeline
    from .schedulers.scheduling_ddim_eta import EtaDDIMScheduler
    from .schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler
    from .schedulers.scheduling_edm_heun import EDMHeunScheduler
