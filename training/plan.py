"""What a run is going to do, found out before anything is built or written."""

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..data.dataset import PreparedImages
from ..utils.command_line import OtherRankError
from ..utils.distributed import on_every_process
from .components import training_size, unet_config
from .options import TrainOptions
from .resuming import check_changes
from .starting_point import StartingPoint, find_starting_point, resolve_options


# What may be another on each machine.
_OF_A_MACHINE = (
    "train_data_dir",
    "output_dir",
    "resume_from_checkpoint",
    "pretrained_model_name_or_path",
    "model_config_name_or_path",
    "dataset_in_memory",
    "dataloader_num_workers",
)


@dataclass
class Plan:
    """A run that has not begun.

    Attributes:
        options: With nothing left open that what the run begins from could say.
        dataset: The images.
        start: What the run begins from.
        unet_config: Options of the network.
        num_processes: Processes that share a batch.
        images_per_step: Images of an optimizer step over all processes and accumulated pieces.
        first_step: Optimizer steps that have been taken.
        images_seen: Place in the endless order of images.
        max_train_steps: The step at which the run ends.
        warnings: What the user should know, a sentence each.
    """

    options: TrainOptions
    dataset: PreparedImages
    start: StartingPoint
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
        return [
            f"training {self._beginning()}: {num_parameters:,} parameters,"
            f" {len(self.dataset):,} images of {self.dataset.channels}x{height}x{width},"
            f" {self.unet_config['num_class_embeds'] or 'no'} classes, predicting {self.options.prediction_type}",
            f"{self.max_train_steps:,} steps of {self.images_per_step} images ({epochs:.1f} epochs) on"
            f" {self.num_processes} x {device}, precision {precision}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]

    def _beginning(self) -> str:
        if self.start.checkpoint is not None:
            return f"from step {self.first_step:,} of {self.start.checkpoint.folder}"
        return f"from {self.start.began_from or 'random weights'}"


def make_plan(options: TrainOptions, accelerator: Accelerator) -> Plan:
    """Finds out what a run with these options does.

    Raises:
        ValueError: If options, dataset and what the run begins from do not fit together.
        OSError: If something cannot be read.
    """
    dataset = on_every_process(
        accelerator, lambda: PreparedImages(options.train_data_dir, in_memory=options.dataset_in_memory)
    )
    _require_one_run(options, dataset, accelerator)
    start = find_starting_point(options, accelerator)
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
        # exactly, and halves up, so that it is the same number from wherever the run goes on
        steps_to_come = (Fraction(options.num_train_epochs) * len(dataset) - images_seen) / images_per_step
        max_train_steps = max(1, first_step + math.floor(steps_to_come + Fraction(1, 2)))

    config = unet_config(options, dataset, start)
    warnings = [f"{reason}; the one before it is used" for _, reason in start.damaged]
    if start.checkpoint is not None:
        changes = check_changes(
            start.checkpoint,
            options,
            unet_config=config,
            dataset=dataset.fingerprint,
            num_processes=accelerator.num_processes,
            images_per_step=images_per_step,
            max_train_steps=max_train_steps,
        )
        warnings += [f"the run goes on otherwise than it would have: {change}" for change in changes]
    elif start.pretrained is not None:
        warnings += _changed_classes(start.pretrained.config.id2label, dataset)
    return Plan(
        # so that going on needs no pretrained model: the checkpoint has all
        options=dataclasses.replace(options, max_train_steps=max_train_steps),
        dataset=dataset,
        start=start,
        unet_config=config,
        num_processes=accelerator.num_processes,
        images_per_step=images_per_step,
        first_step=first_step,
        images_seen=images_seen,
        max_train_steps=max_train_steps,
        warnings=warnings,
    )


def _require_one_run(options: TrainOptions, dataset: PreparedImages, accelerator: Accelerator) -> None:
    """Each machine has a command line and images of its own, which must say and be the same."""
    if accelerator.num_processes == 1:
        return
    own = {name: value for name, value in vars(options).items() if name not in _OF_A_MACHINE}
    first, *others = gather_object([own | {"the images' fingerprint": dataset.fingerprint}])
    for number, other in enumerate(others, start=1):
        for name, value in other.items():
            if value != first[name]:
                message = f"{name} is {first[name]}, but process {number} has {value}: all machines must have the same"
                raise ValueError(message) if accelerator.is_main_process else OtherRankError(message)


def _changed_classes(id2label: dict[int, str] | None, dataset: PreparedImages) -> list[str]:
    if not id2label:
        return []
    names = {int(label): name for label, name in id2label.items()}
    if len(names) != dataset.num_classes:
        return [
            f"the pretrained model has {len(names)} classes and the images have {dataset.num_classes}: the class"
            " embedding begins anew"
        ]
    for label, name in dataset.id2label.items():
        if names.get(label) != name:
            return [
                f"class {label} is {names.get(label)!r} for the pretrained model and {name!r} for the images: the"
                " class embedding is kept by number"
            ]
    return []
