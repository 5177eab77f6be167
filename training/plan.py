"""A training run before it begins: what it starts from and what it is going to do."""

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.dataset import PreparedImages
from ..pipelines.loading import load_pipeline
from ..pipelines.noise_kinds import known_kind
from ..utils.command_line import OtherRankError
from ..utils.distributed import on_every_process, on_main_process
from .checkpoints import Checkpoint, DamagedCheckpointError, Progress, find_checkpoints, load_checkpoint
from .components import NETWORKS, OBJECTIVES, Start, starting_config, training_size, unet_config
from .options import TrainOptions, options_of


# What a run trains where neither the options nor the weights that it starts from say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
_DEFAULTS |= {"objective": "ddpm", "sigma_data": 0.5, "p_mean": -1.2, "p_std": 1.2}
# The same for networks with an uncertainty: EDM2's presets for ImageNet-64 (Karras et al. 2024, arXiv 2312.02696).
_DEFAULTS_WITH_UNCERTAINTY = {"objective": "edm", "p_mean": -0.8, "p_std": 1.6}
# With another value of these the weights and moments are for something else.
_FIXED = {*_DEFAULTS} - {"p_mean", "p_std"} | {"unconditional", "optimizer", "resize_to_power_of_two", "fingerprint"}
# What may differ from machine to machine.
_OF_A_MACHINE = {"train_data_dir", "dataset_in_memory", "dataloader_num_workers", "model_config_name_or_path"}
_OF_A_MACHINE |= {"output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"}
# With another value of these the run is still the same one.
_FREE = options_of("run", "checkpoints and logging", "samples", "Hub") - {"seed"} | _OF_A_MACHINE
_FREE |= {"gradient_accumulation_steps", "num_train_epochs", "gradient_checkpointing"}


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

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels, as the network sees them."""
        return training_size(self.options, self.dataset)

    def summary(self, device: str, precision: str, num_parameters: int) -> str:
        """What is trained on what."""
        height, width = self.image_size
        epochs = self.max_train_steps * self.images_per_step / len(self.dataset)
        start = self.start.began_from or "random weights"
        if self.start.checkpoint is not None:
            start = f"step {self.first_step:,} of {self.start.checkpoint.folder}"
        images = f"{len(self.dataset):,} images of {self.dataset.channels}x{height}x{width}"
        classes = "no" if self.options.unconditional else self.dataset.num_classes
        # of the objectives one alone can have several targets
        network = f"{classes} classes, predicting {self.options.prediction_type or 'as EDM does'}"
        steps = f"{self.max_train_steps:,} steps of {self.images_per_step} images ({epochs:.1f} epochs)"
        lines = [f"training from {start}: {num_parameters:,} parameters, {images}, {network}"]
        lines += [f"{steps} on {self.num_processes} x {device}, precision {precision}"]
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])

    def facts(self, step: int, images_seen: int, precision: str) -> dict[str, Any]:
        """What the model card says of the training up to a step."""
        options = self.options
        own = {name: getattr(options, name) for name in sorted(options_of(f"objective {options.objective}"))}
        return {
            "images": f"{len(self.dataset):,}, {self.dataset.fingerprint}",
            "began from": self.start.began_from or "random weights",
            "optimizer steps": f"{step:,}",
            "images per step": f"{self.images_per_step:,}",
            "epochs": f"{images_seen / len(self.dataset):.1f}",
            "optimizer": f"{options.optimizer}, learning rate {options.learning_rate:g}, {options.lr_scheduler}",
            "weights": f"EMA, decay up to {options.ema_max_decay}" if options.use_ema else "of the last step",
            "class drop-out": "no classes" if options.unconditional else options.class_dropout_prob,
            "objective": options.objective,
            **{name.replace("_", " "): value for name, value in own.items() if value is not None},
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
        for part in ("guidance_unet", "classifier"):
            if getattr(start.pretrained, part) is not None:
                plan.warnings.append(f"the {part} of the pretrained model is left out of the trained one")
        before, now = start.pretrained.config.id2label or {}, dataset.id2label
        if before and len(before) != len(now):
            counts = f"{len(before)} classes and the images have {len(now)}"
            plan.warnings.append(f"the pretrained model has {counts}: the class embedding begins anew")
        elif changed := [label for label in before if before[label] != now.get(label)]:
            names = f"{before[changed[0]]!r} for the pretrained model and {now.get(changed[0])!r} for the images"
            plan.warnings.append(f"class {changed[0]} is {names}: the class embedding is kept by number")
    return plan


def resolve_options(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with what the start says where they are silent; those of another objective stay None."""
    known: dict[str, Any] = dict(_DEFAULTS)
    if hasattr(NETWORKS[starting_config(options, start)["_class_name"]], "log_variance"):
        known |= _DEFAULTS_WITH_UNCERTAINTY
    if start.checkpoint is not None:
        # the only objective of earlier versions
        before = {"objective": "ddpm", **start.checkpoint.options}
        known |= {name: value for name, value in before.items() if name in known}
    elif start.pretrained is not None:
        name, scheduler = options.pretrained_model_name_or_path, start.pretrained.scheduler
        trained_by = {known_kind(parts.scheduler_class): objective for objective, parts in OBJECTIVES.items()}
        known["objective"] = trained_by.get(start.pretrained.noise_kind)
        # the noise schedule is the pipeline's own, whatever it is called
        known["beta_schedule"] = None
        stored = ("prediction_type", "num_train_timesteps", "sigma_data")
        known |= {name: scheduler.config[name] for name in stored if name in scheduler.config}
        if known["objective"] is None:
            raise ValueError(f"{name} has a {type(scheduler).__name__}, whose noise none of the objectives has")
        if options.objective not in (None, known["objective"]):
            raise ValueError(f"objective is {options.objective}, but {name} was trained with {known['objective']}")
    objective = options.objective or known["objective"]
    defaults = {item.name: item.default for item in dataclasses.fields(options)}
    for other in OBJECTIVES.keys() - {objective}:
        for name in sorted(options_of(f"objective {other}")):
            known.pop(name, None)
            if (value := getattr(options, name)) != defaults[name]:
                raise ValueError(f"{name} is {value}, but objective {objective} has no such option: {other} has it")
    silent = {name: value for name, value in known.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **silent)


def check_changes(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """What has changed since the checkpoint was written; ValueError if it would be a training of something else."""
    folder, progress = checkpoint.folder, checkpoint.progress
    known = {"fingerprint": progress.dataset, "images_per_step": progress.images_per_step}
    known["ranks"] = progress.num_processes
    before = {"objective": "ddpm", **checkpoint.options, **checkpoint.unet_config}
    before |= {name: value for name, value in known.items() if value is not None}
    now = vars(plan.options) | plan.unet_config | {"images_per_step": plan.images_per_step}
    now |= {"fingerprint": plan.dataset.fingerprint, "ranks": plan.num_processes}
    # JSON turns tuples into lists
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    changed = [name for name in now if name in before and before[name] != now[name]]
    for name in changed:
        if name in _FIXED or (name in plan.unet_config and name not in ("dropout", "null_class")):
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
