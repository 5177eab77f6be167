"""The parts that a training run is made of: network, scheduler, objective, optimizer and batches."""

import importlib.util
import json
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch.utils.data import DataLoader

from ..configs import CONFIG_DIR
from ..data.dataset import GlobalBatchSampler, PreparedImages
from ..models.classifier_adm import ADMClassifierModel
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.loading import NETWORKS as PIPELINE_NETWORKS
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler
from ..utils.nearest_names import perhaps
from .checkpoints import Checkpoint
from .interruption import leave_stopping_to_parent
from .objectives import EDMLoss, HybridLoss, ImportanceSampledLoss, TrainingObjective
from .options import NETWORK_OPTIONS, TrainOptions


# Those that denoise, by the names of their classes.
NETWORKS = {name: network for name, network in PIPELINE_NETWORKS.items() if network is not ADMClassifierModel}


@dataclass
class Start:
    """What a run starts from; by default random weights."""

    checkpoint: Checkpoint | None = None  # to resume
    pretrained: ClassConditionalPipeline | None = None  # to fine-tune
    began_from: str | None = None  # the checkpoint or pipeline that the whole run began from
    damaged: list[tuple[Path, str]] = field(default_factory=list)  # checkpoints that are not whole, and why


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """The options of a network, with its ``_class_name``: of a recipe of this package, a JSON file or its folder."""
    recipes = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.json"))
    file = CONFIG_DIR / f"{name_or_path}.json" if name_or_path in recipes else Path(name_or_path)
    file = file / ModelMixin.config_name if file.is_dir() else file
    if not file.is_file():
        known = f"{', '.join(recipes)}{perhaps(name_or_path, recipes)}"
        raise ValueError(f"model_config_name_or_path is {name_or_path!r}, but must be a JSON file or one of {known}")
    try:
        config = {"_class_name": ClassConditionalUNet2DModel.__name__, **json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not JSON with an object of U-Net options: {error}") from error
    if config["_class_name"] not in NETWORKS:
        raise ValueError(f"{file} is of a {config['_class_name']}, but must be of one of {', '.join(NETWORKS)}")
    return config


def starting_config(options: TrainOptions, start: Start) -> dict[str, Any]:
    """The network's options before the images and the command line have their say, with its ``_class_name``."""
    if start.pretrained is not None:
        return {**start.pretrained.unet.config, "_class_name": type(start.pretrained.unet).__name__}
    if start.checkpoint is not None and options.model_config_name_or_path is None:
        # the only class of earlier versions
        return {"_class_name": ClassConditionalUNet2DModel.__name__, **start.checkpoint.unet_config}
    return load_model_config(options.model_config_name_or_path or "res")


def unet_config(options: TrainOptions, dataset: PreparedImages, start: Start) -> dict[str, Any]:
    """All options of the network: those asked for, or of what the run starts from."""
    name = options.pretrained_model_name_or_path or options.model_config_name_or_path or "res"
    config = starting_config(options, start)
    if start.pretrained is not None:
        if config["in_channels"] != dataset.channels:
            raise ValueError(f"{name} has in_channels {config['in_channels']}, but the images have {dataset.channels}")
        if (config["num_class_embeds"] is None) != options.unconditional:
            has = "has classes" if options.unconditional else "has no classes"
            raise ValueError(f"unconditional is {options.unconditional}, but {name} {has}")
    height, width = training_size(options, dataset)
    config |= {key: value for key in NETWORK_OPTIONS if (value := getattr(options, key)) is not None}
    known = {
        "sample_size": height if height == width else (height, width),
        "in_channels": dataset.channels,
        "out_channels": dataset.channels * (2 if predicts_variance(config) else 1),
        "num_class_embeds": None if options.unconditional else _num_class_embeds(config, options, dataset, start),
        "null_class": not options.unconditional and (config.get("null_class") or options.class_dropout_prob > 0),
    }
    if options.num_train_timesteps is not None:
        known["num_train_timesteps"] = options.num_train_timesteps
    network = NETWORKS[config["_class_name"]]
    # not its signature, where a subclass of diffusers' class may have keyword arguments of any name
    config |= {key: value for key, value in known.items() if key in network._get_init_keys(network)}
    try:
        # the network itself fills in defaults, knows the original's names, and refuses what does not fit
        with torch.device("meta"):
            own = make_network(config).config
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    encoding = own.get("time_embedding_type", "positional")
    if encoding not in ("sinusoidal", "positional") and (options.objective == "edm" or encoding == "fourier"):
        told = f"time_embedding_type of {name} is {encoding}, but objective {options.objective} needs another"
        raise ValueError(f"{told}: sinusoidal, or positional for a UNet2DModel")
    levels = len(own.get("channel_mult", own.get("block_out_channels")))
    if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
        raise ValueError(f"the images are {height}x{width}, which {levels} levels of {name} cannot halve: resize them")
    return {"_class_name": config["_class_name"]} | {key: own[key] for key in own if not key.startswith("_")}


def make_network(config: Mapping[str, Any]) -> ModelMixin:
    """The network of such options, which are one of ours if they have no ``_class_name``."""
    network = NETWORKS[config.get("_class_name", ClassConditionalUNet2DModel.__name__)]
    return network(**{key: value for key, value in config.items() if not key.startswith("_")})


def predicts_variance(config: Mapping[str, Any]) -> bool:
    """Whether a network of such options has two output channels for each input channel."""
    if config["_class_name"] == ClassConditionalUNet2DModel.__name__:
        return True
    return config.get("out_channels") == 2 * config.get("in_channels", 3)


def _num_class_embeds(config: Mapping[str, Any], options: TrainOptions, dataset: PreparedImages, start: Start) -> int:
    """The number of classes, and for a stock network one for the null class, which is its last embedding."""
    classes, needs_null_class = dataset.num_classes, options.class_dropout_prob > 0
    if config["_class_name"] != UNet2DModel.__name__:
        return classes
    found = config.get("num_class_embeds") if start.checkpoint or start.pretrained else None
    if found == classes and needs_null_class:
        told = f"the UNet2DModel that the run starts from has {found} embeddings, all of classes, none for no class"
        advice = f"set class_dropout_prob to 0, or begin with a network of num_class_embeds {classes + 1}"
        raise ValueError(f"class_dropout_prob is {options.class_dropout_prob}, but {told}: {advice}")
    return classes + 1 if needs_null_class or found == classes + 1 else classes


def training_size(options: TrainOptions, dataset: PreparedImages) -> tuple[int, int]:
    """(height, width) in pixels of the images as the network sees them."""
    if options.resize_to_power_of_two is None:
        return dataset.image_size
    rounded = math.ceil if options.resize_to_power_of_two == "up" else math.floor
    height, width = dataset.image_size
    return 2 ** rounded(math.log2(height)), 2 ** rounded(math.log2(width))


def build_unet(config: Mapping[str, Any], start: Start) -> ModelMixin:
    """The network with the weights that the run starts from; a class table of another size begins anew."""
    unet = make_network(config)
    if start.checkpoint is not None:
        unet.load_state_dict(start.checkpoint.weights)
    elif start.pretrained is not None:
        own, weights = unet.state_dict(), start.pretrained.unet.state_dict()
        fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
        unet.load_state_dict(own | fitting)
    return unet


class ObjectiveParts(NamedTuple):
    """What an objective needs, made from the options."""

    scheduler_class: type[SchedulerMixin]
    new_scheduler: Callable[[Any, bool], SchedulerMixin]  # of a network that learns the variance, or not
    loss: Callable[[Any, SchedulerMixin, torch.device], TrainingObjective]


def _ddpm_scheduler(options: TrainOptions, learns_variance: bool) -> EtaDDIMScheduler:
    common: dict[str, Any] = {name: getattr(options, name) for name in ("num_train_timesteps", "prediction_type")}
    common["variance_type"] = "learned_range" if learns_variance else "fixed_small"
    if options.beta_schedule == "original_cosine":
        return EtaDDIMScheduler(**(common | original_cosine_options(common["num_train_timesteps"])))
    # Trailing steps begin with pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3). No clipping: the image
    # and the noise of a DDIM step must belong together, or guidance makes it visible.
    common |= {"timestep_spacing": "trailing", "clip_sample": False}
    return EtaDDIMScheduler(beta_schedule=options.beta_schedule, **common)


def _ddpm_loss(options: TrainOptions, scheduler: SchedulerMixin, device: torch.device) -> HybridLoss:
    loss = ImportanceSampledLoss if options.timestep_sampling == "importance" else HybridLoss
    return loss(scheduler, options.vlb_weight, device, options.snr_gamma)


# Adding an objective: write its class, name it here and in the options, where those of it alone have a group.
OBJECTIVES: dict[str | None, ObjectiveParts] = {
    "ddpm": ObjectiveParts(EtaDDIMScheduler, _ddpm_scheduler, _ddpm_loss),
    "edm": ObjectiveParts(
        EDMHeunScheduler,
        lambda options, _: EDMHeunScheduler(sigma_data=options.sigma_data),
        lambda options, scheduler, device: EDMLoss(scheduler, options.p_mean, options.p_std),
    ),
}


def build_scheduler(options: TrainOptions, start: Start, learns_variance: bool = True) -> SchedulerMixin:
    """Holds the noise schedule."""
    scheduler_class, new_scheduler, _ = OBJECTIVES[options.objective]
    if start.checkpoint is not None:
        return scheduler_class.from_config(start.checkpoint.scheduler_config)
    if start.pretrained is None:
        return new_scheduler(options, learns_variance)
    config, name = start.pretrained.scheduler.config, options.pretrained_model_name_or_path
    # a scheduler that was swapped in may not have used the variance
    variance = {"variance_type": "learned_range"} if learns_variance and options.objective == "ddpm" else {}
    scheduler = scheduler_class.from_config(config, **variance)
    for key in ("prediction_type", "num_train_timesteps", "sigma_data"):
        asked = getattr(options, key)
        if asked is not None and asked != config[key]:
            raise ValueError(f"{key} is {asked}, but {name} has {config[key]}")
    if options.beta_schedule is not None:
        error = (new_scheduler(options, learns_variance).alphas_cumprod - scheduler.alphas_cumprod).abs().max()
        if error > 1e-6:
            raise ValueError(f"beta_schedule is {options.beta_schedule}, but {name} has another: leave it out")
    return scheduler


def build_optimizer(
    options: TrainOptions, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over parameters that are on the device already."""
    arguments: dict[str, Any] = {"lr": options.learning_rate, "betas": (options.adam_beta1, options.adam_beta2)}
    arguments |= {"weight_decay": options.adam_weight_decay, "eps": options.adam_epsilon}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type in ("cpu", "cuda", "mps", "xpu"), **arguments)
    if importlib.util.find_spec("bitsandbytes") is None or device.type != "cuda":
        raise ValueError("optimizer is adamw_8bit, which needs CUDA and bitsandbytes: take adamw, or install it")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **arguments)


def image_batches(
    options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator, first_image: int
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This rank's pieces of batches, without end; ``close`` ends the processes that read images."""
    # not prepared by accelerate: the sampler gives each rank its share
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batch_size = options.train_batch_size * accelerator.num_processes
    sampler = GlobalBatchSampler(len(dataset), batch_size, options.seed, **ranks, first_image=first_image)
    yield from DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=leave_stopping_to_parent,
        pin_memory=accelerator.device.type == "cuda",
    )
