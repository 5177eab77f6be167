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
from .components import original_scheduler
from .converting import PARAMS_NAME, UNUSED_WEIGHTS_NAME
from .errors import CheckpointError
from .original_params import check_params, read_params
from .original_weights import build_empty_unet, map_to_original_weights, original_layout


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
    params = _params(pipeline, _check_form(pipeline, model), model)
    params = {**params, "epoch": _number("epoch", epoch, params), "step": _number("step", step, params)}

    weights = {name: tensor.float() for name, tensor in pipeline.unet.state_dict().items()}
    if params["c_dim"] is not None and bool(weights["class_embedding.weight"][-1].any()):
        raise CheckpointError(f"the null class of {model} is not zero, but the original has no place for it")
    state_dict = collections.OrderedDict(map_to_original_weights(weights, params, _unused(model, params)))

    name = f"{params['epoch']}e_{params['step']}s"
    files = Path(output_dir) / f"model_{name}.pkl", Path(output_dir) / f"model_params_{name}.json"
    with atomic_file(files[0]) as model_file, atomic_file(files[1]) as params_file:
        with model_file.open("wb") as opened:
            torch.save(state_dict, opened)
        params_file.write_text(json.dumps(params), encoding="utf-8")
    return files


def _check_form(pipeline: ClassConditionalPipeline, model: Path) -> str:
    """Refuses what the original's code does not compute; returns its name for the noise schedule."""
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
    prediction_type = pipeline.scheduler.config.get("prediction_type")
    if prediction_type != "epsilon":
        raise CheckpointError(
            f"{model} has prediction_type {prediction_type}, but the original's networks predict epsilon"
        )
    alphas_cumprod = torch.as_tensor(pipeline.scheduler.alphas_cumprod, dtype=torch.float64)
    for name in ("cosine", "linear"):
        theirs = original_scheduler({"T": len(alphas_cumprod), "beta_sched": name}).alphas_cumprod
        # stock schedulers hold float32
        if torch.allclose(theirs, alphas_cumprod, rtol=0, atol=1e-6):
            return name
    raise CheckpointError(f"{model} has another noise schedule than the original's cosine and linear ones")


def _params(pipeline: ClassConditionalPipeline, schedule: str, model: Path) -> dict[str, Any]:
    """The content of the JSON file: what the conversion kept, or what the network's options say."""
    params = check_params(_params_of(pipeline.unet.config) | {"beta_sched": schedule}, str(model))
    kept = model / PARAMS_NAME
    if not kept.is_file():
        return params
    stored = read_params(kept)
    for key, value in params.items():
        # a network without classes may have any number of them
        said = stored.get(key, value)
        if said != value and not (key == "num_classes" and params["c_dim"] is None):
            raise CheckpointError(f"{kept} says {key} {said}, but the pipeline has {value}: remove the file")
    return stored


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


def _unused(model: Path, params: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    file = model / UNUSED_WEIGHTS_NAME
    if not file.is_file():
        return {}
    try:
        unused = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error
    layout = original_layout(build_empty_unet(params))
    shapes = {name: shape for name, our_name, shape in layout if our_name is None}
    for name, tensor in unused.items():
        if tensor.shape != shapes.get(name):
            raise CheckpointError(f"{file} holds {name!r:.80}, which is no weight without effect of this network")
    return unused
