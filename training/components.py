"""A training run before it begins: what it starts from, what it is going to do, and the parts that it is made of."""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from ..configs import CONFIG_DIR
from ..data.dataset import GlobalBatchSampler, PreparedImages
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..utils.command_line import OtherRankError
from ..utils.distributed import on_every_process, on_main_process
from ..utils.nearest_names import perhaps
from .checkpoints import Checkpoint, DamagedCheckpointError, Progress, find_checkpoints, load_checkpoint
from .interruption import leave_stopping_to_parent
from .options import NETWORK_OPTIONS, TrainOptions, options_of


# What a run trains where neither the options nor the weights that it starts from say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
# With another value of these the weights and moments are for something else.
_FIXED = {*_DEFAULTS, "unconditional", "optimizer", "resize_to_power_of_two", "fingerprint"}
# What may differ from machine to machine.
_OF_A_MACHINE = {"train_data_dir", "dataset_in_memory", "dataloader_num_workers", "model_config_name_or_path"}
_OF_A_MACHINE |= {"output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"}
# With another value of these the run is still the same one.
_FREE = options_of("run", "checkpoints and logging", "samples", "Hub") - {"seed"} | _OF_A_MACHINE
_FREE |= {"gradient_accumulation_steps", "num_train_epochs", "gradient_checkpointing"}


@dataclass
class Start:
    """What a run starts from; by default random weights."""

    checkpoint: Checkpoint | None = None  # to resume
    pretrained: ClassConditionalPipeline | None = None  # to fine-tune
    began_from: str | None = None  # the checkpoint or pipeline that the whole run began from
    damaged: list[tuple[Path, str]] = field(default_factory=list)  # checkpoints that are not whole, and why


@dataclass
class Plan:
    """A run that has not begun."""

    options: TrainOptions  # with nothing left open that the start could say
    dataset: PreparedImages
    start: Start
    unet_config: dict[str, Any]
    num_processes: int  # ranks that share a batch
    images_per_step: int  # over all ranks and accumulated passes
    first_step: int  # optimizer steps that have been taken
    images_seen: int  # place in the endless order of images
    max_train_steps: int
    warnings: list[str]  # what the user should know, a sentence each

    def summary(self, device: str, precision: str, num_parameters: int) -> str:
        """What is trained on what."""
        height, width = training_size(self.options, self.dataset)
        epochs = self.max_train_steps * self.images_per_step / len(self.dataset)
        start = self.start.began_from or "random weights"
        if self.start.checkpoint is not None:
            start = f"step {self.first_step:,} of {self.start.checkpoint.folder}"
        images = f"{len(self.dataset):,} images of {self.dataset.channels}x{height}x{width}"
        network = f"{self.unet_config['num_class_embeds'] or 'no'} classes, predicting {self.options.prediction_type}"
        steps = f"{self.max_train_steps:,} steps of {self.images_per_step} images ({epochs:.1f} epochs)"
        lines = [f"training from {start}: {num_parameters:,} parameters, {images}, {network}"]
        lines += [f"{steps} on {self.num_processes} x {device}, precision {precision}"]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    def facts(self, step: int, images_seen: int, precision: str) -> dict[str, Any]:
        """What the model card says of the training up to a step."""
        options = self.options
        weighting = "" if options.snr_gamma is None else f", min-SNR weighting with gamma {options.snr_gamma:g}"
        return {
            "images": f"{len(self.dataset):,}, {self.dataset.fingerprint}",
            "began from": self.start.began_from or "random weights",
            "optimizer steps": f"{step:,}",
            "images per step": f"{self.images_per_step:,}",
            "epochs": f"{images_seen / len(self.dataset):.1f}",
            "optimizer": f"{options.optimizer}, learning rate {options.learning_rate:g}, {options.lr_scheduler}",
            "weights": f"EMA, decay up to {options.ema_max_decay}" if options.use_ema else "of the last step",
            "class drop-out": "no classes" if options.unconditional else options.class_dropout_prob,
            "timestep sampling": options.timestep_sampling + weighting,
            "precision": precision,
            "seed": options.seed,
        }


def make_plan(options: TrainOptions, accelerator: Accelerator) -> Plan:
    """Finds out what a run does, the same on every rank."""
    dataset = on_every_process(accelerator, lambda: PreparedImages(options.train_data_dir, options.dataset_in_memory))
    # each machine has a command line and images of its own
    own = {name: value for name, value in vars(options).items() if name not in _OF_A_MACHINE}
    first, *others = gather_object([own | {"the images' fingerprint": dataset.fingerprint}])
    for rank, other in enumerate(others, start=1):
        for key, value in other.items():
            if value != first[key]:
                message = f"{key} is {first[key]}, but rank {rank} has {value}: all machines must have the same"
                raise ValueError(message) if accelerator.is_main_process else OtherRankError(message)
    # only the main process needs to have a checkpoint
    start = on_main_process(accelerator, lambda: _find_checkpoint(options))
    name = options.pretrained_model_name_or_path
    if start.checkpoint is None and name is not None:
        # one rank of each machine downloads what is not in its cache
        start.pretrained = on_every_process(
            accelerator, lambda: load_pipeline(name, dtype=torch.float32), in_turn=True
        )
        start.began_from = name
    options = resolve_options(options, start)
    images_per_step = options.train_batch_size * accelerator.num_processes * options.gradient_accumulation_steps

    progress = Progress(step=0, epoch=0) if start.checkpoint is None else start.checkpoint.progress
    # a converted checkpoint knows its epoch alone
    images_seen = round(progress.epoch * len(dataset)) if progress.images_seen is None else progress.images_seen
    max_train_steps = options.max_train_steps
    if max_train_steps is None:
        # exactly, and halves up, so that it is the same number from wherever the run resumes
        steps_to_come = (Fraction(options.num_train_epochs) * len(dataset) - images_seen) / images_per_step
        max_train_steps = max(1, progress.step + math.floor(steps_to_come + Fraction(1, 2)))

    plan = Plan(
        options=dataclasses.replace(options, max_train_steps=max_train_steps),
        dataset=dataset,
        start=start,
        unet_config=unet_config(options, dataset, start),
        num_processes=accelerator.num_processes,
        images_per_step=images_per_step,
        first_step=progress.step,
        images_seen=images_seen,
        max_train_steps=max_train_steps,
        warnings=[f"{reason}; the one before it is used" for _, reason in start.damaged],
    )
    if start.checkpoint is not None:
        changes = check_changes(start.checkpoint, plan)
        plan.warnings += [f"the run goes on otherwise than it would have: {change}" for change in changes]
    elif start.pretrained is not None:
        before, now = start.pretrained.config.id2label or {}, dataset.id2label
        if before and len(before) != len(now):
            counts = f"{len(before)} classes and the images have {len(now)}"
            plan.warnings.append(f"the pretrained model has {counts}: the class embedding begins anew")
        elif changed := [label for label in before if before[label] != now.get(label)]:
            names = f"{before[changed[0]]!r} for the pretrained model and {now.get(changed[0])!r} for the images"
            plan.warnings.append(f"class {changed[0]} is {names}: the class embedding is kept by number")
    return plan


def resolve_options(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with what the start says where they are silent."""
    known: dict[str, Any] = dict(_DEFAULTS)
    if start.checkpoint is not None:
        known |= {name: value for name, value in start.checkpoint.options.items() if name in known}
    elif start.pretrained is not None:
        config = start.pretrained.scheduler.config
        # the noise schedule is the pipeline's own, whatever it is called
        known = {name: config[name] for name in ("prediction_type", "num_train_timesteps")}
    silent = {name: value for name, value in known.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **silent)


def check_changes(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """What has changed since the checkpoint was written; ValueError if it would be a training of something else."""
    folder, progress = checkpoint.folder, checkpoint.progress
    known = {"fingerprint": progress.dataset, "images_per_step": progress.images_per_step}
    known["ranks"] = progress.num_processes
    before = checkpoint.options | checkpoint.unet_config
    before |= {name: value for name, value in known.items() if value is not None}
    now = vars(plan.options) | plan.unet_config | {"images_per_step": plan.images_per_step}
    now |= {"fingerprint": plan.dataset.fingerprint, "ranks": plan.num_processes}
    # JSON turns tuples into lists
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    changed = [name for name in now if name in before and before[name] != now[name]]
    for name in changed:
        if name in _FIXED or (name in plan.unet_config and name != "dropout"):
            raise ValueError(f"{name} is {now[name]}, but {folder} was trained with {before[name]}")
    if progress.step > plan.max_train_steps:
        raise ValueError(f"max_train_steps is {plan.max_train_steps:,}, but {folder} has {progress.step:,} already")
    # the rate of the others does not depend on the end
    free = _FREE if now["lr_scheduler"] in ("linear", "cosine") else _FREE | {"max_train_steps"}
    return [f"{name} was {before[name]} and is {now[name]}" for name in changed if name not in free]


def _find_checkpoint(options: TrainOptions) -> Start:
    """The checkpoint to resume, if there is one."""
    wanted, own_folder = options.resume_from_checkpoint, Path(options.output_dir) / "checkpoints"
    own = find_checkpoints(own_folder)
    is_own = Path(wanted).resolve().parent == own_folder.resolve()
    if wanted == "never" or (wanted != "latest" and (is_own or not own)):
        step, start = -1, Start()
        if wanted != "never":
            if not Path(wanted).is_dir():
                raise ValueError(f"resume_from_checkpoint is {wanted!r}, but there is no such folder")
            checkpoint = load_checkpoint(wanted)
            step = checkpoint.progress.step
            start = Start(checkpoint, began_from=checkpoint.progress.began_from if own else wanted)
        # going back must not mix two runs in one folder, nor remove what one of them has
        if own and int(own[-1].name.removeprefix("checkpoint-")) > step:
            raise ValueError(f"resume_from_checkpoint is {wanted}, but {own[-1]} is there already: move it away")
        return start

    damaged = []
    for folder in reversed(own):
        try:
            checkpoint = load_checkpoint(folder)
        except DamagedCheckpointError as error:
            damaged.append((folder, str(error)))
            continue
        began_from = checkpoint.progress.began_from
        asked = options.pretrained_model_name_or_path if wanted == "latest" else wanted
        if asked not in (None, began_from):
            other = f"{own_folder} has checkpoints of a run that began from {began_from or 'random weights'}"
            raise ValueError(f"{other}, not from {asked}: give another output_dir")
        return Start(checkpoint, began_from=began_from, damaged=damaged)
    if damaged:
        raise ValueError(f"none of the checkpoints in {own_folder} is whole ({damaged[0][1]}): move them away")
    return Start()


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
    height, width = dataset.image_size
    return 2 ** rounded(math.log2(height)), 2 ** rounded(math.log2(width))


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
    """Holds the noise schedule."""
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
