"""Loading a pipeline folder or Hub repository with the installed classes, so that no code of the repository runs."""

import contextlib
import inspect
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.import_utils import DummyObject
from huggingface_hub import errors, snapshot_download
from huggingface_hub.utils.sha import sha_fileobj

from ..models.classifier_adm import ADMClassifierModel
from ..models.unet_adm import ADMUNet2DModel
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..models.unet_edm2 import EDM2UNet2DModel
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..utils.nearest_names import perhaps
from .noise_kinds import NoiseKind, VariancePreserving, check_scheduler
from .pipeline_class_conditional import ClassConditionalPipeline


# The networks that a pipeline folder may hold, by the class that its model_index.json names.
_NETWORKS = (ClassConditionalUNet2DModel, EDM2UNet2DModel, ADMUNet2DModel, UNet2DModel, ADMClassifierModel)
NETWORKS: dict[str, type[ModelMixin]] = {network.__name__: network for network in _NETWORKS}
OUR_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    scheduler.__name__: scheduler for scheduler in (EtaDDIMScheduler, LearnedVarianceDDPMScheduler, EDMHeunScheduler)
}


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The scheduler class of that name, ours or a stock one; ``Scheduler`` at the end may be left out."""
    for candidate in (name, f"{name}Scheduler"):
        found = OUR_SCHEDULERS.get(candidate) or getattr(diffusers, candidate, None)
        if isinstance(found, type) and issubclass(found, SchedulerMixin):
            return found
        if isinstance(found, DummyObject) and candidate.endswith("Scheduler"):
            libraries = " ".join(library for library in found._backends if library != "torch")
            raise ValueError(f"{candidate} needs a library that is not installed: pip install {libraries}")
    # without their common ending, which would make any two of them look alike
    known = [n.removesuffix("Scheduler") for n in (*OUR_SCHEDULERS, *dir(diffusers)) if n.endswith("Scheduler")]
    wanted = f"take {', '.join(OUR_SCHEDULERS)}, or one of diffusers such as UniPCMultistepScheduler"
    raise ValueError(f"there is no scheduler named {name!r}: {wanted}{perhaps(name.removesuffix('Scheduler'), known)}")


def scheduler_names(kind: type[NoiseKind] = VariancePreserving) -> list[str]:
    """The schedulers of a kind that can generate and whose libraries are installed, ours first."""
    names = []
    for name in (
        *OUR_SCHEDULERS,
        *sorted(entry for entry in dir(diffusers.schedulers) if entry.endswith("Scheduler")),
    ):
        with contextlib.suppress(ValueError):
            check_scheduler(scheduler_class(name), kind)
            names.append(name)
    return names


# The largest noise that stock solvers are given, as log(signal / noise): 164 times the signal. Cosine schedules reach
# 20,000 times: float32 loses the image in the noise, and solvers multiply the network's errors by the noise level.
MIN_LOG_SIGNAL_TO_NOISE = -5.1
# By how much it falls at least from one timestep to the next: enough for float32 to tell them apart.
MIN_LOG_SIGNAL_TO_NOISE_STEP = 1e-4

# These step over every noise level as ours do, and get the schedule as it is.
_TAKE_EVERY_SCHEDULE = (*OUR_SCHEDULERS, "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")


def solvable_betas(alphas_cumprod: torch.Tensor, distinct: bool = True) -> list[float]:
    """Betas of nearly the same noise schedule, without what stock solvers cannot step over.

    Noise beyond `MIN_LOG_SIGNAL_TO_NOISE` is cut, where less than 0.7 % of a sample is signal; equal levels, as
    thirteen of the original program's are, are moved apart if they shall be distinct.
    """
    abar = alphas_cumprod.detach().to("cpu", torch.float64)
    log_ratios = (torch.logit(abar) / 2).clamp(min=MIN_LOG_SIGNAL_TO_NOISE).tolist()
    for t in range(1, len(log_ratios)):
        if distinct or abar[t] < abar[t - 1]:
            log_ratios[t] = min(log_ratios[t], log_ratios[t - 1] - MIN_LOG_SIGNAL_TO_NOISE_STEP)
    abar = torch.sigmoid(2 * torch.tensor(log_ratios, dtype=torch.float64))
    return (1 - abar / torch.cat([torch.ones_like(abar[:1]), abar[:-1]])).clamp(min=0).tolist()


def _solvable(
    new_class: type[SchedulerMixin], accepted: Container[str], options: dict[str, Any], alphas_cumprod: Any
) -> dict[str, Any]:
    """The options that a scheduler needs to solve over the noise schedule of the training."""
    overrides: dict[str, Any] = {}
    if new_class.__name__ not in _TAKE_EVERY_SCHEDULE:
        # the polynomials of LMS go astray where steps are close together: it keeps equal levels, which are refused
        distinct = new_class.__name__ != "LMSDiscreteScheduler"
        overrides["trained_betas"] = solvable_betas(alphas_cumprod, distinct)
    if "lambda_min_clipped" in accepted:
        overrides["lambda_min_clipped"] = MIN_LOG_SIGNAL_TO_NOISE
    if "lower_order_final" in accepted and options.get("timestep_spacing") == "leading":
        overrides["timestep_spacing"] = "linspace"  # else these begin up to a fifth below the noisy end
    if "original_inference_steps" in accepted:
        overrides["original_inference_steps"] = options["num_train_timesteps"]
    return overrides


def swap_scheduler(pipeline: ClassConditionalPipeline, name: str | None = None, **scheduler_options: Any) -> None:
    """Gives a pipeline another scheduler on the same noise schedule, with the options that it needs there.

    More than ``from_config``: stock solvers get `solvable_betas` and a spacing that begins at the noisy end. A second
    swap begins with the options before the first. docs/schedulers.md has the errors of either way.

    Args:
        pipeline: The pipeline; its ``scheduler`` is replaced.
        name: As for `scheduler_class`; None stays with the class of the pipeline's scheduler.
        scheduler_options: Options of the new scheduler that are not those of the old one.

    Raises:
        ValueError: If there is none of that name, it cannot generate with such a network, or has no such option.
    """
    new_class = type(pipeline.scheduler) if name is None else scheduler_class(name)
    check_scheduler(new_class, pipeline.noise_kind)
    old = pipeline.scheduler
    # from_config leaves out what was not named when the scheduler was made: saving and loading would change a pipeline
    options = {key: value for key, value in old.config.items() if key != "_use_default_values"}
    options, alphas_cumprod = getattr(old, "_before_swap", (options, getattr(old, "alphas_cumprod", None)))
    accepted = inspect.signature(new_class.__init__).parameters
    for option in scheduler_options:
        if option not in accepted:
            raise ValueError(f"{new_class.__name__} has no option {option!r}{perhaps(option, accepted)}")
    overrides: dict[str, Any] = {}
    if pipeline.noise_kind is VariancePreserving and (name is not None or hasattr(old, "_before_swap")):
        overrides = _solvable(new_class, accepted, options, alphas_cumprod)
    # what it has no use for it keeps all the same, for a swap back; from_config would warn of it each time
    foreign = {key: options[key] for key in options.keys() - accepted.keys() if not key.startswith("_")}
    own = {key: value for key, value in options.items() if key not in foreign}
    pipeline.scheduler = new_class.from_config(own, **overrides | scheduler_options)
    pipeline.scheduler.register_to_config(**foreign)
    pipeline.scheduler._before_swap = (options, alphas_cumprod)


_STORED_OPTIONS: dict[str, Any] = {"id2label": None, "guide_variance": False}
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load_pipeline(
    pretrained_model_name_or_path: str | Path,
    *,
    pipeline_class: type[ClassConditionalPipeline] = ClassConditionalPipeline,
    unet: ModelMixin | None = None,
    scheduler: SchedulerMixin | None = None,
    guidance_unet: ModelMixin | None = None,
    classifier: ModelMixin | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ClassConditionalPipeline:
    """Loads a pipeline with the installed classes: safetensors and JSON are read, code is not.

    Args:
        pretrained_model_name_or_path: A folder written by `ClassConditionalPipeline.save_pretrained`, or a Hub id.
        pipeline_class: The class to make.
        unet, scheduler, guidance_unet, classifier: Used instead of the stored ones, which are not downloaded then.
        dtype: The dtype of the networks; by default that of its file. ``torch_dtype`` is its former name.
        variant: Which of several files of weights, such as ``"fp16"``.
        trust_remote_code: Accepted and not needed.
        options: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` for a Hub
            repository; ``id2label`` or ``guide_variance`` instead of the stored ones.

    Raises:
        ValueError: If the folder holds no pipeline of this kind, or an override is unknown.
        OSError: If there is no such folder or repository, or it cannot be reached, or its files are not whole.
    """
    unknown = sorted(set(options) - {*_STORED_OPTIONS, *_HUB_OPTIONS})
    if unknown:
        known = [*_STORED_OPTIONS, *_HUB_OPTIONS, *inspect.signature(load_pipeline).parameters]
        raise ValueError(f"unknown arguments of from_pretrained: {', '.join(unknown)}{perhaps(unknown[0], known)}")
    name = str(pretrained_model_name_or_path)
    folder = Path(name)
    networks: dict[str, Any] = {"unet": unet, "guidance_unet": guidance_unet, "classifier": classifier}
    if not folder.is_dir():
        # of several variants, the weights of this one alone
        weights = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
        patterns = [pipeline_class.config_name] + ["scheduler/*.json"] * (scheduler is None)
        for role in (role for role, given in networks.items() if given is None):
            patterns += [f"{role}/*.json", f"{role}/{weights}.safetensors", f"{role}/{weights}-*-of-*.safetensors"]
        folder = download_snapshot(name, patterns, **{key: options[key] for key in _HUB_OPTIONS if key in options})

    file = folder / pipeline_class.config_name
    if not file.is_file():
        raise ValueError(f"{folder} holds no pipeline: there is no {file.name}")
    try:
        index = dict(json.loads(file.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not JSON of a pipeline: {error}") from error
    kinds = {key: entry[1] if isinstance(entry, list) and len(entry) == 2 else entry for key, entry in index.items()}
    if kinds.get("_class_name") not in (ClassConditionalPipeline.__name__, pipeline_class.__name__):
        raise ValueError(f"{folder} holds a {kinds.get('_class_name')}, but must hold a ClassConditionalPipeline")
    for role in (role for role, given in networks.items() if given is None):
        kind = kinds.get(role)
        if kind is None and role in pipeline_class._optional_components:
            continue
        if kind not in NETWORKS:
            raise ValueError(f"{folder} has a {kind} as its {role}, but must have one of {', '.join(NETWORKS)}")
        networks[role] = NETWORKS[kind].from_pretrained(
            folder, subfolder=role, torch_dtype=dtype or torch_dtype, variant=variant
        )
        # not the place in this machine's cache, which saving and pushing would write down
        networks[role].register_to_config(_name_or_path=name)
    if scheduler is None:
        scheduler = scheduler_class(str(kinds.get("scheduler"))).from_pretrained(folder, subfolder="scheduler")
    own: dict[str, Any] = {key: options.get(key, index.get(key, default)) for key, default in _STORED_OPTIONS.items()}
    pipeline = pipeline_class(scheduler=scheduler, **networks, **own)
    pipeline.register_to_config(_name_or_path=name)
    return pipeline


# Not all connection errors are OSErrors: they are those of the client's HTTP library, which has changed twice.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, errors.HFValidationError, *errors.HfHubHTTPError.__bases__)


def download_snapshot(repo_id: str, patterns: list[str], **options: Any) -> Path:
    """As `huggingface_hub.snapshot_download` of these patterns; OSError, in a sentence, whatever the client raises."""
    try:
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
    except _HUB_ERRORS as error:
        raise OSError(f"{repo_id} is not a folder, and cannot be loaded from the Hub: {_reason(error)}") from error
    # the client compares sizes alone; where its cache has links, large files are called by the announced SHA-256
    for file in sorted(folder.rglob("*.safetensors")):
        # .../blobs/<digest>; one step only, because a blob may be a link itself
        announced = file.readlink() if file.is_symlink() else Path()
        if announced.parent.name != "blobs" or len(announced.name) != 64:
            continue
        with file.open("rb") as opened:
            digest = sha_fileobj(opened).hex()
        if digest != announced.name:
            told = f"its SHA-256 is {digest}, but the Hub announced {announced.name}; pass force_download=True"
            raise OSError(f"{file} is damaged: {told}")
    return folder


_REASONS: dict[type[Exception], str] = {
    errors.HFValidationError: "this cannot be the id of a repository",
    errors.GatedRepoError: "it is gated; accept its conditions on its page, and give your token (hf auth login)",
    errors.RepositoryNotFoundError: "there is none of that name, or it is private and needs a token (hf auth login)",
    errors.RevisionNotFoundError: "it has no such revision",
}


def _reason(error: Exception) -> str:
    """Why a repository could not be downloaded, in a part of a sentence."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    first_line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    if cause is not error:
        offline = isinstance(cause, errors.OfflineModeIsEnabled)
        why = f"the Hub does not answer as it should ({first_line})"
        why = "HF_HUB_OFFLINE is set" if offline else "local_files_only is set" if cause is None else why
        return f"{why}, and the cache has no whole copy"
    return next((reason for kind, reason in _REASONS.items() if isinstance(error, kind)), first_line)
