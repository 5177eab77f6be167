"""What a training run is made of, built from its options and its dataset."""

import inspect
import json
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..configs import CONFIG_DIR
from ..data.dataset import PreparedImages
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from .checkpoints import Checkpoint
from .options import TrainOptions


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
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}, but must hold an object of U-Net options")
    return config


def build_unet(
    options: TrainOptions, dataset: PreparedImages, checkpoint: Checkpoint | None = None
) -> ClassConditionalUNet2DModel:
    """The network that the options name, or that of a checkpoint, for the images and classes of the dataset.

    Raises:
        ValueError: If the network has unknown options, or a checkpoint's does not fit the dataset.
    """
    height, width = dataset.image_size
    fitting = {
        "in_channels": dataset.channels,
        "num_class_embeds": None if options.unconditional else dataset.num_classes,
        "num_train_timesteps": options.num_train_timesteps,
    }
    if checkpoint is None:
        config = load_model_config(options.model_config_name_or_path) | fitting
    else:
        config = checkpoint.unet_config
        for name, value in fitting.items():
            if config[name] != value:
                raise ValueError(f"{checkpoint.folder} has {name} {config[name]}, but data and options have {value}")
    config["sample_size"] = height if height == width else (height, width)
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(config) - set(inspect.signature(ClassConditionalUNet2DModel.__init__).parameters))
    if unknown:
        raise ValueError(f"{options.model_config_name_or_path}: the U-Net has no option {', '.join(unknown)}")
    unet = ClassConditionalUNet2DModel(**config)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def build_scheduler(options: TrainOptions) -> SchedulerMixin:
    """The scheduler that holds the noise schedule of the training and that the pipeline samples with."""
    common = {
        "num_train_timesteps": options.num_train_timesteps,
        "prediction_type": options.prediction_type,
        "variance_type": "learned_range",
    }
    if options.beta_schedule == "original_cosine":
        return EtaDDIMScheduler(**{**common, **original_cosine_options(options.num_train_timesteps)})
    # Trailing steps begin at the last timestep, whose images are the noise that sampling begins with
    # (Lin et al. 2023, https://arxiv.org/abs/2305.08891, section 3.3). No clipping: a DDIM step whose image was
    # clipped and whose noise was not does not belong together, which guidance makes visible.
    return EtaDDIMScheduler(
        beta_schedule=options.beta_schedule, timestep_spacing="trailing", clip_sample=False, **common
    )


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
