"""What a training run is made of, built from its options, its dataset and what it starts from."""

import importlib.util
import inspect
import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from ..configs import CONFIG_DIR
from ..data.dataset import GlobalBatchSampler, PreparedImages
from ..models.unet_class_conditional import LAYER_TYPE_ALIASES, LAYER_TYPES, ClassConditionalUNet2DModel
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..utils.nearest_names import perhaps
from .checkpoints import Checkpoint
from .interruption import leave_stopping_to_parent
from .options import NETWORK_OPTIONS, TrainOptions


DEFAULT_RECIPE = "res"


@dataclass
class Start:
    """What a run starts from; by default random weights."""

    checkpoint: Checkpoint | None = None  # to resume
    pretrained: ClassConditionalPipeline | None = None  # to fine-tune
    began_from: str | None = None  # for the record: the checkpoint or pipeline that the whole run began from
    damaged: list[tuple[Path, str]] = field(default_factory=list)  # checkpoints that are not whole, and why


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """The U-Net options of a recipe of this package or of a JSON file; ValueError if there is neither."""
    file = CONFIG_DIR / f"{name_or_path}.json"
    if not file.is_file():
        file = Path(name_or_path)
    if not file.is_file():
        recipes = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.json"))
        raise ValueError(
            f"model_config_name_or_path is {name_or_path!r}, but must be a JSON file or one of {', '.join(recipes)}"
            f"{perhaps(name_or_path, recipes)}"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, but must hold an object of U-Net options")
    return config


def unet_config(options: TrainOptions, dataset: PreparedImages, start: Start | None = None) -> dict[str, Any]:
    """All options of the network: those asked for, or of what the run starts from; ValueError if they do not fit."""
    start = start or Start()
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
        name = options.model_config_name_or_path or DEFAULT_RECIPE
        config = load_model_config(name) | {"num_train_timesteps": options.num_train_timesteps}
    height, width = training_size(options, dataset)
    config |= {key: value for key in NETWORK_OPTIONS if (value := getattr(options, key)) is not None}
    config |= {
        "sample_size": height if height == width else (height, width),
        "in_channels": dataset.channels,
        "num_class_embeds": None if options.unconditional else dataset.num_classes,
    }
    parameters = inspect.signature(ClassConditionalUNet2DModel.__init__).parameters.items()
    defaults = {key: parameter.default for key, parameter in parameters if key != "self"}
    config = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        raise ValueError(f"{name}: the U-Net has no option {', '.join(unknown)}{perhaps(unknown[0], defaults)}")
    known = (*LAYER_TYPES, *LAYER_TYPE_ALIASES)
    for layer in config["layer_types"]:
        if layer not in known:
            raise ValueError(
                f"layer_types names {layer!r}, but must be made of {', '.join(known)}{perhaps(layer, known)}"
            )
    config["layer_types"] = [LAYER_TYPE_ALIASES.get(layer, layer) for layer in config["layer_types"]]
    return config


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


def build_scheduler(options: TrainOptions, start: Start | None = None) -> EtaDDIMScheduler:
    """Holds the noise schedule; ValueError if the options name another one than the pretrained model has."""
    if start is not None and start.checkpoint is not None:
        return EtaDDIMScheduler.from_config(start.checkpoint.scheduler_config)
    if start is not None and start.pretrained is not None:
        config, name = start.pretrained.scheduler.config, options.pretrained_model_name_or_path
        scheduler = EtaDDIMScheduler.from_config(config, variance_type="learned_range")
        for key in ("prediction_type", "num_train_timesteps"):
            if getattr(options, key) != config[key]:
                raise ValueError(f"{key} is {getattr(options, key)}, but {name} has {config[key]}")
        if options.beta_schedule is not None:
            error = float((build_scheduler(options).alphas_cumprod - scheduler.alphas_cumprod).abs().max())
            if error > 1e-6:
                raise ValueError(
                    f"beta_schedule is {options.beta_schedule}, but {name} has another (alphas_cumprod differ by up to"
                    f" {error:.2g}): leave it out"
                )
        return scheduler
    common: dict[str, Any] = {name: getattr(options, name) for name in ("num_train_timesteps", "prediction_type")}
    common["variance_type"] = "learned_range"
    if options.beta_schedule == "original_cosine":
        return EtaDDIMScheduler(**(common | original_cosine_options(cast(int, options.num_train_timesteps))))
    # Trailing steps begin at the last timestep, whose images are the noise that sampling begins with
    # (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.3). No clipping: a DDIM step whose image was
    # clipped and whose noise was not does not belong together, which guidance makes visible.
    return EtaDDIMScheduler(
        beta_schedule=options.beta_schedule, timestep_spacing="trailing", clip_sample=False, **common
    )


def build_optimizer(
    options: TrainOptions, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, on the device of its parameters; ValueError for 8-bit moments where they cannot be had."""
    arguments: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=device.type in ("cpu", "cuda", "mps", "xpu"), **arguments)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("optimizer is adamw_8bit, which needs bitsandbytes: pip install bitsandbytes")
    if device.type != "cuda":
        raise ValueError(f"optimizer is adamw_8bit, which needs CUDA, but the run is on {device.type}: take adamw")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **arguments)


def build_lr_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, step: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule after so many steps; prepared by accelerate, it would step once for every rank."""
    max_train_steps = cast(int, options.max_train_steps)  # make_plan has filled it in
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = options.learning_rate
    steps = {"num_warmup_steps": min(options.lr_warmup_steps, max_train_steps), "num_training_steps": max_train_steps}
    return get_scheduler(options.lr_scheduler, optimizer, last_epoch=step - 1, **steps)


def image_batches(
    options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator, first_image: int
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This rank's pieces of batches, without end; ``close`` ends the processes that read images."""
    # not prepared by accelerate: the sampler gives each rank its share
    sampler = GlobalBatchSampler(
        len(dataset),
        options.train_batch_size * accelerator.num_processes,
        options.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_image=first_image,
    )
    yield from DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=options.dataloader_num_workers,
        worker_init_fn=leave_stopping_to_parent,
        pin_memory=accelerator.device.type == "cuda",
    )
