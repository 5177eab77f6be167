"""From a pipeline folder back to the files that the original program loads."""

import collections
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..models.unet_class_conditional import LAYER_TYPE_ALIASES
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import atomic_file
from .components import beta_schedule_of
from .converting import PARAMS_NAME, UNUSED_WEIGHTS_NAME
from .errors import CheckpointError
from .original_params import check_params, read_params
from .original_weights import (
    map_to_original_weights,
    original_unet_config,
    original_weight_name,
    original_weight_shapes,
)


def write_original(
    model: str | Path,
    output_dir: str | Path,
    epoch: int | None = None,
    step: int | None = None,
    variant: str | None = None,
) -> tuple[Path, Path]:
    """Writes ``model_{epoch}e_{step}s.pkl`` and ``model_params_{epoch}e_{step}s.json`` for a pipeline.

    A converted checkpoint comes back bit for bit. The weights that have no effect on the original's output are those
    that the conversion kept, or zeros for a network that was trained here.

    Args:
        model: Pipeline folder whose network has the original's form.
        output_dir: Gets the two files.
        epoch: Epochs trained; by default what the original's JSON said.
        step: Optimizer steps trained; likewise.
        variant: Which of several files of weights, such as ``"fp16"``.

    Returns:
        The two files.

    Raises:
        CheckpointError: If the original has no such network.
    """
    model = Path(model)
    if not model.is_dir():
        raise CheckpointError(f"checkpoint is {model}, but must be a pipeline folder for to_original")
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(model, variant=variant)
    except SafetensorError as error:
        raise CheckpointError(f"the weights in {model} cannot be read ({error})") from error
    _check_form(pipeline, model)
    params = _params(pipeline, model)
    params = {**params, "epoch": _number("epoch", epoch, params), "step": _number("step", step, params)}

    weights = {name: tensor.float() for name, tensor in pipeline.unet.state_dict().items()}
    if params["c_dim"] is not None and bool(weights["class_embedding.weight"][-1].any()):
        raise CheckpointError(f"the null class of {model} is not zero, but the original has no place for it")
    shapes = original_weight_shapes(params)
    state_dict = collections.OrderedDict(map_to_original_weights(weights, params, _unused(model, params, shapes)))

    name = f"{params['epoch']}e_{params['step']}s"
    files = Path(output_dir) / f"model_{name}.pkl", Path(output_dir) / f"model_params_{name}.json"
    with atomic_file(files[0]) as model_file, atomic_file(files[1]) as params_file:
        with model_file.open("wb") as opened:
            torch.save(state_dict, opened)
        params_file.write_text(json.dumps(params), encoding="utf-8")
    return files


def _check_form(pipeline: ClassConditionalPipeline, model: Path) -> None:
    """Refuses what the original's code does not compute."""
    config = pipeline.unet.config
    wanted = {
        "time_embedding_type": (config.time_embedding_type.startswith("original_"), "one of the original's"),
        "output_head_type": (config.output_head_type == "original", "original"),
        "class_attention_type": (
            config.class_attention_type == "identity" or "class_attention" not in config.layer_types,
            "identity",
        ),
    }
    for name, (fits, value) in wanted.items():
        if not fits:
            raise CheckpointError(
                f"{model} has {name} {config[name]}, which the original program cannot compute; it must be {value}:"
                " only networks of configs/original go back"
            )
    scheduler = pipeline.scheduler
    prediction_type = scheduler.config.get("prediction_type")
    if prediction_type != "epsilon":
        raise CheckpointError(
            f"{model} has prediction_type {prediction_type}, but the original's networks predict epsilon"
        )
    if beta_schedule_of(scheduler) is None:
        raise CheckpointError(f"{model} has another noise schedule than the original's cosine and linear ones")


def _params(pipeline: ClassConditionalPipeline, model: Path) -> dict[str, Any]:
    """The content of the JSON file: what the conversion kept, or what the network's options say."""
    config, schedule = pipeline.unet.config, beta_schedule_of(pipeline.scheduler)
    kept = model / PARAMS_NAME
    if kept.is_file():
        params = read_params(kept)
        options = original_unet_config(params, config.time_embedding_type)
        for name, value in options.items():
            if name == "sample_size":  # the original's networks take any
                continue
            found = tuple(config[name]) if isinstance(value, tuple) else config[name]
            if found != value:
                raise CheckpointError(f"{kept} says {name} {value}, but the network has {found}: remove the file")
    else:
        params = check_params(_params_of(config) | {"beta_sched": schedule}, str(model))
    if params["beta_sched"] != schedule:
        raise CheckpointError(f"{kept} says beta_sched {params['beta_sched']}, but the scheduler's is {schedule}")
    return params


def _params_of(config: Mapping[str, Any]) -> dict[str, Any]:
    stem, widths = config["stem_channels"], list(config["block_out_channels"])
    exponent = (widths[0] // stem).bit_length() - 1 if widths[0] >= stem else 0
    if widths != [stem * 2 ** (exponent * level) for level in range(1, len(widths) + 1)]:
        raise CheckpointError(
            f"stem_channels {stem} and block_out_channels {widths} are not the original's, whose every level is wider"
            " than the one before by the same power of two"
        )
    names = {ours: original for original, ours in LAYER_TYPE_ALIASES.items()}
    has_classes = config["num_class_embeds"] is not None
    return {
        "inCh": config["in_channels"],
        "embCh": stem,
        "chMult": exponent,
        "num_blocks": len(widths),
        "blk_types": [names[layer] for layer in config["layer_types"]],
        "T": config["num_train_timesteps"],
        "t_dim": config["time_embed_dim"],
        "c_dim": config["class_embed_dim"] if has_classes else None,
        # the original wants a number even where there are no classes
        "num_classes": config["num_class_embeds"] if has_classes else 1,
        "atn_resolution": config["attention_patch_size"],
    }


def _number(name: str, given: int | None, params: Mapping[str, Any]) -> int:
    number = params.get(name) if given is None else given
    if number is None:
        raise CheckpointError(f"{name} is not given, and there is no {PARAMS_NAME} that says it: give it")
    if number < 0:
        raise CheckpointError(f"{name} is {number}, but must be at least 0")
    return number


def _unused(model: Path, params: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    file = model / UNUSED_WEIGHTS_NAME
    if not file.is_file():
        return {}
    try:
        unused = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    for name, tensor in unused.items():
        if name not in shapes or original_weight_name(name, params) is not None or tensor.shape != shapes[name]:
            raise CheckpointError(f"{file} holds {name!r:.80}, which is no weight without effect of this network")
    return unused
