"""What a run starts from and what it is going to do, found out before anything is built or written."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.dataset import PreparedImages
from ..pipelines.loading import load_pipeline
from ..utils.command_line import OtherRankError
from ..utils.distributed import on_every_process, on_main_process
from .checkpoints import Checkpoint, DamagedCheckpointError, find_checkpoints, load_checkpoint
from .components import Start, training_size, unet_config
from .options import TrainOptions, options_of


CHECKPOINTS_NAME = "checkpoints"

# What a run trains where neither the options nor the weights that it starts from say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
# With another value of these the weights and moments are for something else.
_FIXED = {*_DEFAULTS, "unconditional", "optimizer", "resize_to_power_of_two", "fingerprint"}
# With another value of these the run is still the same one.
_FREE = options_of("run", "checkpoints and logging", "samples", "Hub") - {"seed"} | {
    *("train_data_dir", "dataset_in_memory", "dataloader_num_workers", "model_config_name_or_path"),
    *("gradient_accumulation_steps", "num_train_epochs", "gradient_checkpointing"),
}
# What may differ from machine to machine.
_OF_A_MACHINE = {
    *("train_data_dir", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"),
    *("model_config_name_or_path", "dataset_in_memory", "dataloader_num_workers"),
}


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
        """What is trained on what, in a few lines."""
        height, width = training_size(self.options, self.dataset)
        epochs = self.max_train_steps * self.images_per_step / len(self.dataset)
        start = self.start.began_from or "random weights"
        if self.start.checkpoint is not None:
            start = f"step {self.first_step:,} of {self.start.checkpoint.folder}"
        lines = [
            f"training from {start}: {num_parameters:,} parameters,"
            f" {len(self.dataset):,} images of {self.dataset.channels}x{height}x{width},"
            f" {self.unet_config['num_class_embeds'] or 'no'} classes, predicting {self.options.prediction_type}",
            f"{self.max_train_steps:,} steps of {self.images_per_step} images ({epochs:.1f} epochs) on"
            f" {self.num_processes} x {device}, precision {precision}",
        ]
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
    """Finds out what a run does, the same on every rank; ValueError if options, images and start do not fit."""
    dataset = on_every_process(
        accelerator, lambda: PreparedImages(options.train_data_dir, in_memory=options.dataset_in_memory)
    )
    _require_one_run(options, dataset, accelerator)
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

    first_step = images_seen = 0
    if start.checkpoint is not None:
        progress = start.checkpoint.progress
        first_step = progress.step
        # a converted checkpoint knows its epoch alone
        images_seen = round(progress.epoch * len(dataset)) if progress.images_seen is None else progress.images_seen
    max_train_steps = options.max_train_steps
    if max_train_steps is None:
        # exactly, and halves up, so that it is the same number from wherever the run resumes
        steps_to_come = (Fraction(options.num_train_epochs) * len(dataset) - images_seen) / images_per_step
        max_train_steps = max(1, first_step + math.floor(steps_to_come + Fraction(1, 2)))

    plan = Plan(
        options=dataclasses.replace(options, max_train_steps=max_train_steps),
        dataset=dataset,
        start=start,
        unet_config=unet_config(options, dataset, start),
        num_processes=accelerator.num_processes,
        images_per_step=images_per_step,
        first_step=first_step,
        images_seen=images_seen,
        max_train_steps=max_train_steps,
        warnings=[f"{reason}; the one before it is used" for _, reason in start.damaged],
    )
    if start.checkpoint is not None:
        changes = check_changes(start.checkpoint, plan)
        plan.warnings += [f"the run goes on otherwise than it would have: {change}" for change in changes]
    elif start.pretrained is not None:
        plan.warnings += _changed_classes(start.pretrained.config.id2label or {}, dataset)
    return plan


def resolve_options(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with what the start says where they are silent."""
    known: dict[str, Any] = dict(_DEFAULTS)
    if start.checkpoint is not None:
        known |= {name: start.checkpoint.options[name] for name in known if name in start.checkpoint.options}
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
    known = {name: value for name, value in known.items() if value is not None}
    before = checkpoint.options | checkpoint.unet_config | known
    now = vars(plan.options) | plan.unet_config
    now |= {"fingerprint": plan.dataset.fingerprint, "images_per_step": plan.images_per_step}
    if progress.num_processes is not None:
        before, now = before | {"ranks": progress.num_processes}, now | {"ranks": plan.num_processes}
    # JSON turns tuples into lists
    now = {name: list(value) if isinstance(value, tuple) else value for name, value in now.items()}
    changed = [name for name in now if name in before and before[name] != now[name]]
    for name in changed:
        if name in _FIXED or (name in plan.unet_config and name != "dropout"):
            raise ValueError(f"{name} is {now[name]}, but {folder} was trained with {before[name]}")
    if progress.step > plan.max_train_steps:
        taken = f"max_train_steps is {plan.max_train_steps:,}, but {folder} has {progress.step:,}"
        raise ValueError(f"{taken}: give a larger number, or another output_dir")
    # the rate of the others does not depend on the end
    free = _FREE if now["lr_scheduler"] in ("linear", "cosine") else _FREE | {"max_train_steps"}
    return [f"{name} was {before[name]} and is {now[name]}" for name in changed if name not in free]


def _find_checkpoint(options: TrainOptions) -> Start:
    """The checkpoint to resume, if there is one."""
    wanted, own_folder = options.resume_from_checkpoint, Path(options.output_dir) / CHECKPOINTS_NAME
    own = find_checkpoints(own_folder)
    start = Start() if wanted == "never" else None
    if wanted not in ("never", "latest") and (not own or Path(wanted).resolve().parent == own_folder.resolve()):
        if not Path(wanted).is_dir():
            missing = f"resume_from_checkpoint is {wanted!r}, but there is no such folder"
            raise ValueError(f"{missing}: give a checkpoint, or latest, or never")
        checkpoint = load_checkpoint(wanted)
        start = Start(checkpoint, began_from=checkpoint.progress.began_from if own else wanted)
    if start is not None:
        # going back must not mix two runs in one folder, nor remove what one of them has
        step = -1 if start.checkpoint is None else start.checkpoint.progress.step
        if own and int(own[-1].name.removeprefix("checkpoint-")) > step:
            later = f"resume_from_checkpoint is {wanted}, but {own[-1]} is there already"
            raise ValueError(f"{later}: move the later checkpoints away, or give another output_dir")
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
        reason = f"none of the checkpoints in {own_folder} is whole ({damaged[0][1]})"
        raise ValueError(f"{reason}: move them away to start anew")
    return Start()


def _require_one_run(options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator) -> None:
    """Each machine has a command line and images of its own, which must say and be the same."""
    own = {name: value for name, value in vars(options).items() if name not in _OF_A_MACHINE}
    first, *others = gather_object([own | {"the images' fingerprint": dataset.fingerprint}])
    for rank, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                message = f"{name} is {first[name]}, but rank {rank} has {value}: all machines must have the same"
                raise ValueError(message) if accelerator.is_main_process else OtherRankError(message)


def _changed_classes(id2label: Mapping[int, str], dataset: PreparedImages) -> list[str]:
    """What to say of a pretrained model with other classes than the images."""
    if id2label and len(id2label) != dataset.num_classes:
        counts = f"has {len(id2label)} classes and the images have {dataset.num_classes}"
        return [f"the pretrained model {counts}: the class embedding begins anew"]
    for label, name in id2label.items():
        if name != dataset.id2label.get(int(label)):
            names = f"{name!r} for the pretrained model and {dataset.id2label.get(int(label))!r} for the images"
            return [f"class {label} is {names}: the class embedding is kept by number"]
    return []
