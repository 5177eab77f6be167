"""What a training run is made of, built from its options and its dataset."""

import importlib.util
import inspect
import json
import math
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..configs import CONFIG_DIR
from ..data.dataset import PreparedImages
from ..data.sampling import GlobalBatchSampler
from ..models.unet_class_conditional import LAYER_TYPE_ALIASES, LAYER_TYPES, ClassConditionalUNet2DModel
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..utils.nearest_names import perhaps
from .interruption import leave_stopping_to_parent
from .objectives import HybridLoss, ImportanceSampledLoss
from .options import NETWORK_OPTIONS, TrainOptions


if TYPE_CHECKING:
    from .plan import Start

DEFAULT_RECIPE = "res"
# Where torch has an AdamW in one kernel.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def load_model_config(name_or_path: str) -> dict[str, Any]:
    """The U-Net options of a recipe of this package or of a JSON file.

    Raises:
        ValueError: If there is neither, or the file is not a JSON object.
    """
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


def image_batches(
    options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator, first_image: int
) -> Generator[dict[str, torch.Tensor], None, None]:
    """This rank's pieces of batches, from a place in the endless order of images on, without end.

    A generator, whose ``close`` ends the processes that read images: they must not outlive a run that stops.
    """
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


def build_unet(config: Mapping[str, Any], start: "Start") -> ClassConditionalUNet2DModel:
    """The network of a config; with the weights of the pretrained one, if the run begins with that.

    A pretrained network of another number of classes gets a new table of classes.
    """
    unet = ClassConditionalUNet2DModel(**config)
    if start.pretrained is not None:
        own = unet.state_dict()
        weights = start.pretrained.unet.state_dict()
        fitting = {key: value if value.shape == own[key].shape else own[key] for key, value in weights.items()}
        unet.load_state_dict(fitting)
    return unet


def unet_config(options: TrainOptions, dataset: PreparedImages, start: "Start | None" = None) -> dict[str, Any]:
    """All options of the network that the options ask for, or of what the run begins with where they are silent.

    Raises:
        ValueError: If there is an unknown one among them, or a pretrained network does not fit the dataset.
    """
    height, width = training_size(options, dataset)
    fitting = {
        "sample_size": height if height == width else (height, width),
        "in_channels": dataset.channels,
        "num_class_embeds": None if options.unconditional else dataset.num_classes,
    }
    name = options.model_config_name_or_path
    if start is not None and start.pretrained is not None:
        config = dict(start.pretrained.unet.config)
        _check_pretrained(options, config, fitting)
    elif name is None and start is not None and start.checkpoint is not None:
        config = dict(start.checkpoint.unet_config)
    else:
        name = name or DEFAULT_RECIPE
        config = load_model_config(name) | {"num_train_timesteps": options.num_train_timesteps}
    config |= {key: getattr(options, key) for key in NETWORK_OPTIONS if getattr(options, key) is not None} | fitting
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    parameters = inspect.signature(ClassConditionalUNet2DModel.__init__).parameters.items()
    defaults = {key: parameter.default for key, parameter in parameters if key != "self"}
    unknown = sorted(set(config) - set(defaults))
    if unknown:
        raise ValueError(f"{name}: the U-Net has no option {', '.join(unknown)}{perhaps(unknown[0], defaults)}")
    config = defaults | config
    config["layer_types"] = [LAYER_TYPE_ALIASES.get(layer, layer) for layer in config["layer_types"]]
    for layer in config["layer_types"]:
        if layer not in LAYER_TYPES:
            raise ValueError(
                f"layer_types names {layer!r}, but must be made of {', '.join(LAYER_TYPES)} (the original's names"
                f" {', '.join(LAYER_TYPE_ALIASES)} are taken too){perhaps(layer, (*LAYER_TYPES, *LAYER_TYPE_ALIASES))}"
            )
    return config


def _check_pretrained(options: TrainOptions, config: Mapping[str, Any], fitting: Mapping[str, Any]) -> None:
    name = options.pretrained_model_name_or_path
    if config["in_channels"] != fitting["in_channels"]:
        raise ValueError(
            f"{name} has in_channels {config['in_channels']}, but the images have {fitting['in_channels']}"
        )
    if options.unconditional and config["num_class_embeds"] is not None:
        raise ValueError(f"unconditional is set, but {name} has classes: leave it out")
    if not options.unconditional and config["num_class_embeds"] is None:
        raise ValueError(f"{name} has no classes: set unconditional")


def training_size(options: TrainOptions, dataset: PreparedImages) -> tuple[int, int]:
    """(height, width) in pixels of the images as the network sees them."""
    if options.resize_to_power_of_two is None:
        return dataset.image_size
    rounded = math.ceil if options.resize_to_power_of_two == "up" else math.floor
    height, width = (2 ** rounded(math.log2(side)) for side in dataset.image_size)
    return height, width


def build_scheduler(options: TrainOptions, start: "Start | None" = None) -> EtaDDIMScheduler:
    """The scheduler that holds the noise schedule of the training and that the pipeline samples with.

    Raises:
        ValueError: If the options name another schedule or prediction than the pretrained model has.
    """
    if start is not None and start.checkpoint is not None:
        return EtaDDIMScheduler.from_config(start.checkpoint.scheduler_config)
    if start is not None and start.pretrained is not None:
        scheduler = EtaDDIMScheduler.from_config(start.pretrained.scheduler.config, variance_type="learned_range")
        _check_schedule(options, scheduler)
        return scheduler
    common = {
        "num_train_timesteps": options.num_train_timesteps,
        "prediction_type": options.prediction_type,
        "variance_type": "learned_range",
    }
    if options.beta_schedule == "original_cosine":
        return EtaDDIMScheduler(**{**common, **original_cosine_options(cast(int, options.num_train_timesteps))})
    # Trailing steps begin at the last timestep, whose images are the noise that sampling begins with
    # (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.3). No clipping: a DDIM step whose image was
    # clipped and whose noise was not does not belong together, which guidance makes visible.
    return EtaDDIMScheduler(
        beta_schedule=options.beta_schedule, timestep_spacing="trailing", clip_sample=False, **common
    )


def _check_schedule(options: TrainOptions, scheduler: EtaDDIMScheduler) -> None:
    """Refuses options that ask for something else than the pretrained model's own schedule and prediction."""
    name = options.pretrained_model_name_or_path
    for key in ("prediction_type", "num_train_timesteps"):
        if getattr(options, key) != scheduler.config[key]:
            raise ValueError(f"{key} is {getattr(options, key)}, but {name} has {scheduler.config[key]}")
    if options.beta_schedule is not None:
        asked = build_scheduler(options).alphas_cumprod
        error = float((asked - scheduler.alphas_cumprod).abs().max())
        if error > 1e-6:
            raise ValueError(
                f"beta_schedule is {options.beta_schedule}, but {name} has another (alphas_cumprod differ by up to"
                f" {error:.2g}): leave it out"
            )


def build_objective(options: TrainOptions, scheduler: SchedulerMixin, device: torch.device) -> HybridLoss:
    """What the network is trained on."""
    kind = ImportanceSampledLoss if options.timestep_sampling == "importance" else HybridLoss
    return kind(scheduler, options.vlb_weight, device, options.snr_gamma)


def build_optimizer(
    options: TrainOptions, parameters: Iterable[torch.nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """AdamW, on the device of its parameters.

    Raises:
        ValueError: If 8-bit moments are asked for where they cannot be had.
    """
    arguments: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.optimizer == "adamw_8bit":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("optimizer is adamw_8bit, which needs bitsandbytes: pip install bitsandbytes")
        if device.type != "cuda":
            raise ValueError(f"optimizer is adamw_8bit, which needs CUDA, but the run is on {device.type}: take adamw")
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **arguments)
    return torch.optim.AdamW(parameters, fused=device.type in _FUSED_DEVICES, **arguments)


def build_pipeline(
    unet: ClassConditionalUNet2DModel, scheduler: SchedulerMixin, dataset: PreparedImages
) -> ClassConditionalPipeline:
    """The pipeline with the network as it is now and the names of the dataset's classes."""
    conditional = unet.config.num_class_embeds is not None
    return ClassConditionalPipeline(
        unet=unet,
        scheduler=type(scheduler).from_config(scheduler.config),
        id2label=dataset.id2label if conditional else None,
    )


def build_ema(options: TrainOptions, unet: ClassConditionalUNet2DModel) -> EMAModel | None:
    """The EMA of the network's weights, if it is asked for."""
    if not options.use_ema:
        return None
    return EMAModel(
        unet.parameters(),
        decay=options.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=options.ema_inv_gamma,
        power=options.ema_power,
        foreach=True,
    )


def build_lr_scheduler(
    options: TrainOptions, optimizer: torch.optim.Optimizer, step: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning-rate schedule of a run that has taken so many steps, not to be prepared by accelerate.

    Prepared, it would step once for every rank.
    """
    max_train_steps = cast(int, options.max_train_steps)  # make_plan has filled it in
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] = options.learning_rate
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=min(options.lr_warmup_steps, max_train_steps),
        num_training_steps=max_train_steps,
        last_epoch=step - 1,
    )
