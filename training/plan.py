"""What a run starts from and what it is going to do, found out before anything is built or written."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.dataset import PreparedImages
from ..pipelines.loading import load_pipeline
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.command_line import OtherRankError
from ..utils.distributed import on_every_process, on_main_process
from .checkpoints import Checkpoint, DamagedCheckpointError, find_checkpoints, load_checkpoint
from .components import training_size, unet_config
from .options import TrainOptions


CHECKPOINTS_NAME = "checkpoints"

# What a run trains where neither the options nor the weights that it starts from say it.
_DEFAULTS = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
# With another value of these the weights and moments are for something else.
_FIXED = (*_DEFAULTS, "unconditional", "optimizer", "resize_to_power_of_two")
# With another value of these the run is still the same one, or the difference is told by itself.
_FREE = {
    *("train_data_dir", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path", "dry_run"),
    *("model_config_name_or_path", "stem_channels", "block_out_channels", "layer_types", "time_embed_dim"),
    *("class_embed_dim", "attention_patch_size", "dropout", "time_embedding_type", "class_attention_type"),
    *("output_head_type", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "num_train_epochs"),
    *("dataset_in_memory", "dataloader_num_workers", "gradient_checkpointing", "checkpointing_steps"),
    *("checkpoints_total_limit", "pipeline_steps", "report_to", "logging_steps", "sample_steps", "guidance_scale"),
    *("num_sample_classes", "num_samples_per_class", "num_inference_steps"),
    *("push_to_hub", "hub_model_id", "hub_private_repo"),
}
# What may differ from machine to machine.
_OF_A_MACHINE = {
    *("train_data_dir", "output_dir", "resume_from_checkpoint", "pretrained_model_name_or_path"),
    *("model_config_name_or_path", "dataset_in_memory", "dataloader_num_workers"),
}


@dataclass
class Start:
    """What a run starts from.

    Attributes:
        checkpoint: A state to resume, or None.
        pretrained: A pipeline to fine-tune, or None.
        began_from: What the whole run began from, for the record: a checkpoint's folder, a pipeline, or None.
        damaged: Checkpoints that were passed over because they are not whole, and why.
    """

    checkpoint: Checkpoint | None = None
    pretrained: ClassConditionalPipeline | None = None
    began_from: str | None = None
    damaged: list[tuple[Path, str]] = field(default_factory=list)


@dataclass
class Plan:
    """A run that has not begun.

    Attributes:
        options: With nothing left open that the start could say.
        dataset: The images.
        start: What the run starts from.
        unet_config: Options of the network.
        num_processes: Ranks that share a batch.
        images_per_step: Images of an optimizer step over all ranks and accumulated passes.
        first_step: Optimizer steps that have been taken.
        images_seen: Place in the endless order of images.
        max_train_steps: The step at which the run ends.
        warnings: What the user should know, a sentence each.
    """

    options: TrainOptions
    dataset: PreparedImages
    start: Start
    unet_config: dict[str, Any]
    num_processes: int
    images_per_step: int
    first_step: int
    images_seen: int
    max_train_steps: int
    warnings: list[str]

    def summary(self, device: str, precision: str, num_parameters: int) -> list[str]:
        """What is trained on what, in a few lines."""
        height, width = training_size(self.options, self.dataset)
        epochs = self.max_train_steps * self.images_per_step / len(self.dataset)
        start = f"from {self.start.began_from or 'random weights'}"
        if self.start.checkpoint is not None:
            start = f"from step {self.first_step:,} of {self.start.checkpoint.folder}"
        return [
            f"training {start}: {num_parameters:,} parameters,"
            f" {len(self.dataset):,} images of {self.dataset.channels}x{height}x{width},"
            f" {self.unet_config['num_class_embeds'] or 'no'} classes, predicting {self.options.prediction_type}",
            f"{self.max_train_steps:,} steps of {self.images_per_step} images ({epochs:.1f} epochs) on"
            f" {self.num_processes} x {device}, precision {precision}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]

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
    """Finds out what a run with these options does.

    Raises:
        ValueError: If options, dataset and what the run starts from do not fit together.
        OSError: If something cannot be read.
    """
    dataset = on_every_process(
        accelerator, lambda: PreparedImages(options.train_data_dir, in_memory=options.dataset_in_memory)
    )
    _require_one_run(options, dataset, accelerator)
    start = find_start(options, accelerator)
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
        plan.warnings += _changed_classes(start.pretrained.config.id2label, dataset)
    return plan


def find_start(options: TrainOptions, accelerator: Accelerator) -> Start:
    """Finds what the run starts from, the same on every rank; only the main process needs to have a checkpoint.

    Raises:
        ValueError: If the checkpoint that was asked for cannot be resumed, or none of those of the run is whole.
    """
    start = on_main_process(accelerator, lambda: _find_checkpoint(options))
    name = options.pretrained_model_name_or_path
    if start.checkpoint is None and name is not None:
        start.began_from = name
        # one rank of each machine downloads what is not in its cache
        start.pretrained = on_every_process(
            accelerator, lambda: load_pipeline(name, dtype=torch.float32), in_turn=True
        )
    return start


def resolve_options(options: TrainOptions, start: Start) -> TrainOptions:
    """The options with what the start says where they are silent."""
    known: dict[str, Any] = dict(_DEFAULTS)
    if start.checkpoint is not None:
        known |= {name: start.checkpoint.options[name] for name in known if name in start.checkpoint.options}
    elif start.pretrained is not None:
        config = start.pretrained.scheduler.config
        known |= {name: config[name] for name in ("prediction_type", "num_train_timesteps")}
        # the schedule is the pipeline's own, whatever it is called
        known["beta_schedule"] = None
    silent = {name: value for name, value in known.items() if getattr(options, name) is None}
    return dataclasses.replace(options, **silent)


def check_changes(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Compares a run with the checkpoint that it resumes.

    Returns:
        A sentence for each change with which the run is sound, but not what it would have been without.

    Raises:
        ValueError: If it would not be a training of the same thing.
    """
    folder, progress, before = checkpoint.folder, checkpoint.progress, checkpoint.options
    now = vars(plan.options)
    for name in _FIXED:
        if name in before and before[name] != now[name]:
            raise ValueError(f"{name} is {now[name]}, but {folder} was trained with {before[name]}")
    for name in sorted(set(plan.unet_config) | set(checkpoint.unet_config)):
        asked, stored = _comparable(plan.unet_config.get(name)), _comparable(checkpoint.unet_config.get(name))
        if asked != stored and name != "dropout" and not name.startswith("_"):
            raise ValueError(f"the network has {name} {asked}, but that of {folder} has {stored}")
    fingerprint = plan.dataset.fingerprint
    if progress.dataset not in (None, fingerprint):
        raise ValueError(
            f"train_data_dir holds other images than {folder} was trained on (fingerprint {fingerprint}, not"
            f" {progress.dataset}): to start from its weights, give pretrained_model_name_or_path a pipeline of them"
        )
    if progress.step > plan.max_train_steps:
        raise ValueError(
            f"max_train_steps is {plan.max_train_steps:,}, but {folder} has {progress.step:,}: give a larger number,"
            " or another output_dir"
        )

    told = {name: value for name, value in now.items() if name not in _FREE}
    told["dropout"] = plan.unet_config.get("dropout")
    before = before | {"dropout": checkpoint.unet_config.get("dropout")}
    changes = [
        f"{name} was {before[name]} and is {value}"
        for name, value in told.items()
        if name in before and before[name] != value
    ]
    if now["lr_scheduler"] in ("linear", "cosine") and before.get("lr_scheduler") == now["lr_scheduler"]:
        ends = before.get("max_train_steps")
        if ends not in (None, plan.max_train_steps):
            changes.append(f"the learning-rate schedule ended at step {ends:,} and ends at {plan.max_train_steps:,}")
    if progress.images_per_step not in (None, plan.images_per_step):
        changes.append(f"a step had {progress.images_per_step} images and has {plan.images_per_step}")
    elif progress.num_processes is not None:
        shared = (progress.num_processes, before.get("train_batch_size"))
        if shared != (plan.num_processes, now["train_batch_size"]):
            changes.append(
                f"a step of {plan.images_per_step} images was shared by {shared[0]} ranks in pieces of {shared[1]} and"
                f" is by {plan.num_processes} in pieces of {now['train_batch_size']} (the same images and noise; sums"
                " are rounded otherwise)"
            )
    return changes


def _comparable(value: Any) -> Any:
    """JSON turns tuples into lists."""
    return list(value) if isinstance(value, tuple) else value


def _find_checkpoint(options: TrainOptions) -> Start:
    """The checkpoint to resume, if there is one."""
    wanted = options.resume_from_checkpoint
    own_folder = Path(options.output_dir) / CHECKPOINTS_NAME
    own = find_checkpoints(own_folder)
    if wanted == "never":
        _require_no_later(own, -1, "resume_from_checkpoint is never")
        return Start()
    if wanted != "latest" and (Path(wanted).resolve().parent == own_folder.resolve() or not own):
        if not Path(wanted).is_dir():
            raise ValueError(
                f"resume_from_checkpoint is {wanted!r}, but there is no such folder: give a checkpoint, or latest, or"
                " never"
            )
        checkpoint = load_checkpoint(wanted)
        _require_no_later(own, checkpoint.progress.step, f"resume_from_checkpoint is {wanted}")
        return Start(checkpoint, began_from=checkpoint.progress.began_from if own else wanted)

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
            raise ValueError(
                f"{own_folder} has checkpoints of a run that began from {began_from or 'random weights'}, not from"
                f" {asked}: give another output_dir"
            )
        return Start(checkpoint, began_from=began_from, damaged=damaged)
    if damaged:
        raise ValueError(
            f"none of the checkpoints in {own_folder} is whole ({damaged[0][1]}): move them away to start anew"
        )
    return Start()


def _require_no_later(own: list[Path], step: int, reason: str) -> None:
    """Going back must not mix two runs in one folder, nor remove what one of them has."""
    later = [folder for folder in own if int(folder.name.removeprefix("checkpoint-")) > step]
    if later:
        raise ValueError(
            f"{reason}, but {later[-1]} is there already: move the later checkpoints away, or give another output_dir"
        )


def _require_one_run(options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator) -> None:
    """Each machine has a command line and images of its own, which must say and be the same."""
    own = {name: value for name, value in vars(options).items() if name not in _OF_A_MACHINE}
    first, *others = gather_object([own | {"the images' fingerprint": dataset.fingerprint}])
    for rank, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                message = f"{name} is {first[name]}, but rank {rank} has {value}: all machines must have the same"
                raise ValueError(message) if accelerator.is_main_process else OtherRankError(message)


def _changed_classes(id2label: Mapping[int, str] | None, dataset: PreparedImages) -> list[str]:
    names = {int(label): name for label, name in (id2label or {}).items()}
    if names and len(names) != dataset.num_classes:
        return [
            f"the pretrained model has {len(names)} classes and the images have {dataset.num_classes}: the class"
            " embedding begins anew"
        ]
    for label, name in dataset.id2label.items():
        if names and names.get(label) != name:
            return [
                f"class {label} is {names.get(label)!r} for the pretrained model and {name!r} for the images: the"
                " class embedding is kept by number"
            ]
    return []
