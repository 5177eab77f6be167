"""Loading a pipeline folder or Hub repository with the installed classes, so that no code of the repository runs."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import snapshot_download

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler
from .pipeline_class_conditional import ClassConditionalPipeline


OUR_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    scheduler.__name__: scheduler for scheduler in (EtaDDIMScheduler, LearnedVarianceDDPMScheduler)
}


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The scheduler class of that name, ours or a stock one; ``Scheduler`` at the end may be left out.

    Raises:
        ValueError: If there is none.
    """
    for candidate in (name, f"{name}Scheduler"):
        found = OUR_SCHEDULERS.get(candidate) or getattr(diffusers, candidate, None)
        if isinstance(found, type) and issubclass(found, SchedulerMixin):
            return found
    raise ValueError(
        f"there is no scheduler named {name!r}: take {', '.join(OUR_SCHEDULERS)}, or one of diffusers such as"
        " DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler"
    )


def swap_scheduler(pipeline: ClassConditionalPipeline, name: str) -> None:
    """Gives a pipeline another scheduler on the same noise schedule.

    Args:
        pipeline: The pipeline; its ``scheduler`` is replaced.
        name: As for `scheduler_class`.

    Raises:
        ValueError: If there is none of that name.
    """
    new_class = scheduler_class(name)
    overrides = {}
    if "lambda_min_clipped" in inspect.signature(new_class.__init__).parameters:
        # the last timesteps of cosine schedules have log-SNRs that these solvers cannot step from
        overrides["lambda_min_clipped"] = -5.1
    pipeline.scheduler = new_class.from_config(pipeline.scheduler.config, **overrides)


def load_pipeline(
    pretrained_model_name_or_path: str | Path,
    *,
    pipeline_class: type[ClassConditionalPipeline] = ClassConditionalPipeline,
    unet: ClassConditionalUNet2DModel | None = None,
    scheduler: SchedulerMixin | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    trust_remote_code: bool = False,
    **overrides: Any,
) -> ClassConditionalPipeline:
    """Loads a pipeline with the installed classes: safetensors and JSON are read, code is not.

    Args:
        pretrained_model_name_or_path: A folder written by `ClassConditionalPipeline.save_pretrained`, or a Hub id.
        pipeline_class: The class to make.
        unet: A network to use instead of the stored one.
        scheduler: A scheduler to use instead of the stored one.
        dtype: The dtype of the network; by default that of its file. ``torch_dtype`` is its former name.
        variant: Which of several files of weights, such as ``"fp16"``.
        revision: Branch, tag or commit of a Hub repository; likewise ``token``, ``cache_dir``, ``local_files_only``
            and ``force_download``.
        trust_remote_code: Accepted and not needed.
        overrides: ``id2label`` or ``guide_variance`` instead of the stored ones.

    Raises:
        ValueError: If the folder holds no pipeline of this kind, or an override is unknown.
    """
    unknown = set(overrides) - {"id2label", "guide_variance"}
    if unknown:
        raise ValueError(f"unknown arguments of from_pretrained: {', '.join(sorted(unknown))}")
    folder = Path(pretrained_model_name_or_path)
    if not folder.is_dir():
        folder = _download(
            str(pretrained_model_name_or_path),
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )

    index_file = folder / pipeline_class.config_name
    if not index_file.is_file():
        raise ValueError(f"{folder} holds no pipeline: there is no {pipeline_class.config_name}")
    index = json.loads(index_file.read_text(encoding="utf-8"))
    stored_class = index["_class_name"][1] if isinstance(index["_class_name"], list) else index["_class_name"]
    if stored_class != "ClassConditionalPipeline":
        raise ValueError(f"{folder} holds a {stored_class}, but must hold a ClassConditionalPipeline")

    if unet is None:
        unet = ClassConditionalUNet2DModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype or torch_dtype, variant=variant
        )
    if scheduler is None:
        scheduler = scheduler_class(index["scheduler"][1]).from_pretrained(folder, subfolder="scheduler")
    options = {"id2label": index.get("id2label"), "guide_variance": index.get("guide_variance", False), **overrides}
    pipeline = pipeline_class(unet=unet, scheduler=scheduler, **options)
    pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
    return pipeline


def _download(repo_id: str, **kwargs: Any) -> Path:
    """The local snapshot of a repository, without the code that it carries."""
    patterns = ["model_index.json", "unet/*.json", "unet/*.safetensors", "scheduler/*.json"]
    return Path(snapshot_download(repo_id, allow_patterns=patterns, **kwargs))
