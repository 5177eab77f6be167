"""What may have changed between a checkpoint and the run that goes on from it."""

from collections.abc import Mapping
from typing import Any

from ..models.unet_class_conditional import LAYER_TYPE_ALIASES
from .checkpoints import Checkpoint
from .options import NETWORK_OPTIONS, TrainOptions


# With another value of these the weights and moments are for something else.
_FIXED = (
    "prediction_type",
    "num_train_timesteps",
    "beta_schedule",
    "unconditional",
    "optimizer",
    "resize_to_power_of_two",
)
# These may change, but the steps to come are not those that the run would have taken.
_STEERING = (
    "seed",
    "class_dropout_prob",
    "vlb_weight",
    "snr_gamma",
    "timestep_sampling",
    "random_flip",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "use_ema",
    "ema_max_decay",
    "ema_inv_gamma",
    "ema_power",
    "mixed_precision",
    "torch_compile",
)


def check_changes(
    checkpoint: Checkpoint,
    options: TrainOptions,
    *,
    unet_config: Mapping[str, Any],
    dataset: str,
    num_processes: int,
    images_per_step: int,
    max_train_steps: int,
) -> list[str]:
    """Compares a run with the checkpoint from which it goes on.

    Args:
        checkpoint: The checkpoint.
        options: Options of the run that goes on.
        unet_config: The network that they ask for.
        dataset: Fingerprint of its images.
        num_processes: How many processes share a batch.
        images_per_step: Images of an optimizer step over all of them.
        max_train_steps: The step at which it ends.

    Returns:
        A sentence for each change with which the run is sound, but not what it would have been without.

    Raises:
        ValueError: If it would not be a training of the same thing.
    """
    folder, progress, before = checkpoint.folder, checkpoint.progress, checkpoint.options
    for name in _FIXED:
        if name in before and before[name] != getattr(options, name):
            raise ValueError(f"{name} is {getattr(options, name)}, but {folder} was trained with {before[name]}")
    for name in sorted(set(unet_config) | set(checkpoint.unet_config)):
        asked, stored = _comparable(unet_config.get(name)), _comparable(checkpoint.unet_config.get(name))
        if asked != stored and name != "dropout" and not name.startswith("_"):
            raise ValueError(f"the network has {name} {asked}, but that of {folder} has {stored}")
    if progress.dataset is not None and progress.dataset != dataset:
        raise ValueError(
            f"train_data_dir holds other images than {folder} was trained on (fingerprint {dataset}, not"
            f" {progress.dataset}): to begin with its weights, save them as a pipeline and give"
            " pretrained_model_name_or_path"
        )
    if progress.step > max_train_steps:
        raise ValueError(
            f"max_train_steps is {max_train_steps:,}, but {folder} has {progress.step:,}: give a larger number, or"
            " another output_dir"
        )

    changes = [
        f"{name} was {before[name]} and is {getattr(options, name)}"
        for name in _STEERING
        if name in before and before[name] != getattr(options, name)
    ]
    dropouts = [config.get("dropout") for config in (checkpoint.unet_config, unet_config)]
    if dropouts[0] != dropouts[1]:
        changes.append(f"dropout was {dropouts[0]} and is {dropouts[1]}")
    if options.lr_scheduler in ("linear", "cosine") and before.get("lr_scheduler") == options.lr_scheduler:
        ends = before.get("max_train_steps")
        if ends is not None and ends != max_train_steps:
            changes.append(f"the learning rate's course ended at step {ends:,} and ends at {max_train_steps:,}")
    if progress.images_per_step is not None and progress.images_per_step != images_per_step:
        changes.append(f"a step had {progress.images_per_step} images and has {images_per_step}")
    elif progress.num_processes is not None and (
        progress.num_processes != num_processes or before.get("train_batch_size") != options.train_batch_size
    ):
        changes.append(
            f"a step of {images_per_step} images was shared by {progress.num_processes} processes in pieces of"
            f" {before.get('train_batch_size')} and is by {num_processes} in pieces of {options.train_batch_size}"
            " (the same images and noise; sums are rounded otherwise)"
        )
    return changes


def requested_network(options: TrainOptions) -> dict[str, Any]:
    """The entries of the network's config that the options name one by one."""
    named = {name: getattr(options, name) for name in NETWORK_OPTIONS}
    if options.layer_types is not None:
        named["layer_types"] = [LAYER_TYPE_ALIASES.get(name, name) for name in options.layer_types]
    return {name: value for name, value in named.items() if value is not None}


def _comparable(value: Any) -> Any:
    """JSON turns tuples into lists."""
    return list(value) if isinstance(value, tuple) else value
