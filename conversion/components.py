"""What a converted pipeline is made of besides its weights: network, scheduler, class names, and what to call them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from ..configs import CONFIG_DIR
from ..data.class_names import NUM_CLASSES, imagenet64_id2label
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from ..utils.nearest_names import perhaps
from .errors import CheckpointError
from .original_weights import original_unet_config


TIME_EMBEDDINGS = ("original_sine", "original_alternating", "original_interleaved")


def build_empty_unet(params: Mapping[str, Any], time_embedding: str, params_name: str) -> ClassConditionalUNet2DModel:
    """The network without weights: its parameters take no memory, ``load_state_dict(assign=True)`` gives them some.

    Raises:
        CheckpointError: If there is no such network.
    """
    if time_embedding not in TIME_EMBEDDINGS:
        near = perhaps(time_embedding, TIME_EMBEDDINGS)
        raise CheckpointError(
            f"time_embedding is {time_embedding!r}, but must be one of {', '.join(TIME_EMBEDDINGS)}{near}"
        )
    try:
        # the tables of the time encoding are no parameters and are made as ever
        with init_empty_weights(include_buffers=False):
            return ClassConditionalUNet2DModel(**original_unet_config(params, time_embedding)).eval()
    except ValueError as error:
        raise CheckpointError(f"{params_name} describes no network: {error}") from error


def original_scheduler(params: Mapping[str, Any], finish_denoising: bool = False) -> EtaDDIMScheduler:
    """The original's sampler on its noise schedule; ``eta`` is sqrt(DDIM_scale).

    Args:
        params: The content of the ``model_params_*.json`` file.
        finish_denoising: Whether the last step ends at the predicted image. The original's cosine schedule ends at
            abar 0.999, which leaves noise of 0.03. Its linear schedule ends at the image in any case.
    """
    options = {"prediction_type": "epsilon", "variance_type": "learned_range"}
    if params["beta_sched"] != "linear":
        options |= original_cosine_options(params["T"]) | {"set_alpha_to_one": finish_denoising}
        return EtaDDIMScheduler(**options)
    return EtaDDIMScheduler(
        num_train_timesteps=params["T"],
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        set_alpha_to_one=True,
        max_beta=0.999,
        timestep_spacing="leading",
        clip_sample=False,
        **options,
    )


def beta_schedule_of(scheduler: Any) -> str | None:
    """Which of the original's schedules a scheduler has, "cosine" or "linear"; None for neither."""
    alphas_cumprod = torch.as_tensor(scheduler.alphas_cumprod, dtype=torch.float64)
    for name in ("cosine", "linear"):
        params = {"T": len(alphas_cumprod), "beta_sched": name}
        # stock schedulers hold float32
        if torch.allclose(original_scheduler(params).alphas_cumprod, alphas_cumprod, rtol=0, atol=1e-6):
            return name
    return None


def class_names(
    id2label: str | Path | Mapping[Any, str] | Sequence[str], num_classes: int | None
) -> tuple[dict[int, str] | None, str]:
    """The name of each class, and a word on where the names come from.

    Args:
        id2label: ``"imagenet64"``, ``"numbers"``, a file (a JSON list or object, or text with one name a line), or the
            names themselves. ``"imagenet64"`` has 1000 names; any other number of classes is numbered, and the word
            says so.
        num_classes: How many classes there are; None for a network without.

    Raises:
        CheckpointError: If the names cannot be read or do not fit.
    """
    by_option = isinstance(id2label, str) and id2label in ("imagenet64", "numbers")
    if num_classes is None:
        if not by_option:
            raise CheckpointError("id2label names classes, but the network has none: leave it out")
        return None, "none"
    if id2label == "imagenet64" and num_classes == NUM_CLASSES:
        return imagenet64_id2label(), f"{num_classes}, named as in ImageNet-64"
    if by_option:
        why = f", because ImageNet-64 has {NUM_CLASSES}" if id2label == "imagenet64" else ""
        return {index: str(index) for index in range(num_classes)}, f"{num_classes}, numbered{why}"
    if isinstance(id2label, (str, Path)):
        source = Path(id2label).name
        names = _read_names(Path(id2label))
    else:
        source, names = "id2label", id2label
    if isinstance(names, Mapping):
        by_key = {str(key): name for key, name in names.items()}
        if set(by_key) != {str(index) for index in range(num_classes)}:
            raise CheckpointError(f"{source} must name the classes 0 to {num_classes - 1}, each once, but does not")
        names = [by_key[str(index)] for index in range(num_classes)]
    if len(names) != num_classes:
        raise CheckpointError(f"{source} has {len(names)} names, but the network has {num_classes} classes")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise CheckpointError(f"{source}: the name of class {index} must be text, but is empty or something else")
    return dict(enumerate(names)), f"{num_classes}, named by {source}"


def _read_names(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"id2label is {str(file)!r}, but must be imagenet64, numbers or a file of names")
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"id2label: {file.name} cannot be read ({error})") from error
    if not isinstance(names, (list, dict)):
        raise CheckpointError(
            f"id2label: {file.name} holds a {type(names).__name__}, but must hold a list or an object"
        )
    return names


def recipe_of(unet: ClassConditionalUNet2DModel) -> str:
    """What the network is called: a recipe of this package, or its layers and widths."""
    config = unet.config
    widths = f"stem {config.stem_channels}, levels {', '.join(map(str, config.block_out_channels))}"
    same_layers = []
    for file in sorted(CONFIG_DIR.glob("*.json")):
        recipe = json.loads(file.read_text(encoding="utf-8"))
        if recipe["layer_types"] == list(config.layer_types):
            same_layers.append(file.stem)
            if [recipe["stem_channels"], *recipe["block_out_channels"]] == [
                config.stem_channels,
                *config.block_out_channels,
            ]:
                return f"recipe {file.stem} ({widths})"
    if same_layers:
        # the plainest name: res rather than res_large
        return f"layers of recipe {min(same_layers, key=len)} ({widths})"
    return f"layers {', '.join(config.layer_types)} ({widths})"
