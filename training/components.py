"""What a training run is made of, built from its options, its dataset and what it starts from."""

import importlib.util
import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..configs import CONFIG_DIR
from ..data.dataset import PreparedImages
from ..data.sampling import GlobalBatchSampler
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..utils.nearest_names import perhaps
from .checkpoints import Checkpoint
from .interruption import leave_stopping_to_parent
from .options import NETWORK_OPTIONS, TrainOptions


@dataclass
class Start:
    """What a run starts from; by default random weights."""

    checkpoint: Checkpoint | None = None  # to resume
    pretrained: ClassConditionalPipeline | None = None  # to fine-tune
    began_from: str | None = None  # the checkpoint or pipeline that the whole run began from
    damaged: list[tuple[Path, str]] = field(default_factory=list)  # checkpoints that are not whole, and why


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """The U-Net options of a recipe of this package or of a JSON file."""
    recipes = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.json"))
    file = CONFIG_DIR / f"{name_or_path}.json" if name_or_path in recipes else Path(name_or_path)
    if not file.is_file():
        known = f"{', '.join(recipes)}{perhaps(name_or_path, recipes)}"
        raise ValueError(f"model_config_name_or_path is {name_or_path!r}, but must be a JSON file or one of {known}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not JSON with an object of U-Net options: {error}") from error


def unet_config(options: TrainOptions, dataset: PreparedImages, start: Start) -> dict[str, Any]:
    """All options of the network: those asked for, or of what the run starts from."""
    name = options.pretrained_model_name_or_path or options.model_config_name_or_path
    if start.pretrained is not None:
        config = dict(start.pretrained.unet.config)
        if config["in_channels"] != dataset.channels:
            raise ValueError(f"{name} has in_channels {config['in_channels']}, but the images have {dataset.channels}")
        if (config["num_class_embeds"] is None) != options.unconditional:
            has = "has classes" if options.unconditional else "has no classes"
            raise ValueError(f"unconditional is {options.unconditional}, but {name} {has}")
    elif start.checkpoint is not None and options.model_config_name_or_path is None:
        config = dict(start.checkpoint.unet_config)
    else:
        name = options.model_config_name_or_path or "res"
        config = load_model_config(name) | {"num_train_timesteps": options.num_train_timesteps}
    height, width = training_size(options, dataset)
    config |= {key: value for key in NETWORK_OPTIONS if (value := getattr(options, key)) is not None}
    config |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": dataset.channels,
        "num_class_embeds": None if options.unconditional else dataset.num_classes,
    }
    try:
        # the network itself fills in defaults, knows the original's names, and refuses what does not fit
        with torch.device("meta"):
            unet = ClassConditionalUNet2DModel(**{key: config[key] for key in config if not key.startswith("_")})
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error
    return {key: value for key, value in unet.config.items() if not key.startswith("_")}


def training_size(options: TrainOptions, dataset: PreparedImages) -> tuple[int, int]:
    """(height, width) in pixels of the images as the network sees them."""
    if options.resize_to_power_of_two is None:
        return dataset.image_size
    rounded = math.ceil if options.resize_to_power_of_two == "up" else math.floor
    height, width = (2 ** rounded(math.log2(side)) for side in dataset.image_size)
    return height, width


def build_unet(config: Mapping[str, Any], start: Start) -> ClassConditionalUNet2DModel:
    """The network with the weights that the run starts from; a class table of another size begins anew."""
    unet = ClassConditionalUNet2DModel(**config)
    if start.checkpoint is not None:
        unet.load_state_dict(start.checkpoint.weights)
    elif start.pretrained is not None:
        own, weights = unet.state_dict(), start.pretrained.unet.state_dict()
        fitting = {key: value for key, value in weights.items() if value.shape == own[key].shape}
        unet.load_state_dict(own | fitting)
    return unet


def build_scheduler(options: TrainOptions, start: Start) -> EtaDDIMScheduler:
    """Holds the noise schedule; ValueError if the options name another one than the pretrained model has."""
    if start.checkpoint is not None:
        return EtaDDIMScheduler.from_config(start.checkpoint.scheduler_config)
    if start.pretrained is not None:
        config, name = start.pretrained.scheduler.config, options.pretrained_model_name_or_path
        scheduler = EtaDDIMScheduler.from_config(config, variance_type="learned_range")
        for key in ("prediction_type", "num_train_timesteps"):
            if getattr(options, key) != config[key]:
                raise ValueError(f"{key} is {getattr(options, key)}, but {name} has {config[key]}")
        if options.beta_schedule is not None:
            error = (build_scheduler(options, Start()).alphas_cumprod - scheduler.alphas_cumprod).abs().max()
            if error > 1e-6:
                raise ValueError(f"beta_schedule is {options.beta_schedule}, but {name} has another: leave it out")
        return scheduler
    common: dict[str, Any] = {name: getattr(options, name) for name in ("num_train_timesteps", "prediction_type")}
    common["variance_type"] = "learned_range"
    if options.beta_schedule == "original_cosine":
        return EtaDDIMScheduler(**(common | original_cosine_options(common["num_train_timesteps"])))
    # Trailing steps begin with pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3). No clipping: the image
    # and the noise of a DDIM step must belong together, or guidance makes it visible.
    common |= {"timestep_spacing": "trailing", "clip_sample": False}
    return EtaDDIMScheduler(beta_schedule=options.beta_schedule, **common)


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
