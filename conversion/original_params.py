"""The JSON file beside an original checkpoint, which says what network its weights belong to."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.unet_class_conditional import LAYER_TYPE_ALIASES, LAYER_TYPES
from ..utils.nearest_names import perhaps
from .errors import CheckpointError


# Whole numbers and their range. The bounds are far beyond any network of this kind; they keep a wrong file from asking
# for tables and loops without end.
_RANGES = {
    "inCh": (1, 64),
    "embCh": (1, 16_384),
    "chMult": (0, 4),
    "num_blocks": (1, 6),
    "T": (1, 10_000),
    "t_dim": (1, 65_536),
    "num_classes": (1, 1_000_000),
    "atn_resolution": (1, 65_536),
    "epoch": (0, 10**12),
    "step": (0, 10**12),
}
_LARGEST_WIDTH = 65_536
_MOST_LAYERS = 64
_LARGEST_FILE = 1 << 20
# Older files lack the first, and the other two say nothing of the network.
_OPTIONAL = ("atn_resolution", "epoch", "step")
# their classes say more than nn.Module does
_LAYER_TYPES: Mapping[str, Any] = LAYER_TYPES
_BETA_SCHEDULES = ("cosine", "linear")
_KNOWN = (*_RANGES, "blk_types", "beta_sched", "c_dim")


def read_params(file: str | Path) -> dict[str, Any]:
    """Reads and checks a ``model_params_*.json`` file.

    Args:
        file: The file.

    Returns:
        Its content as it stands, with a ``c_dim`` of none written as None.

    Raises:
        CheckpointError: If it is no such file, or a value is missing, of the wrong type or out of range.
    """
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"params is {file}, but there is no such file")
    if file.stat().st_size > _LARGEST_FILE:
        raise CheckpointError(
            f"{file.name} has {file.stat().st_size:,} bytes, but the JSON of a checkpoint has a few hundred: the model"
            " and its parameters may be mistaken for each other"
        )
    try:
        params = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} is not JSON ({error}): give the model_params_*.json file") from error
    return check_params(params, file.name)


def check_params(params: Any, name: str) -> dict[str, Any]:
    """The parameters, if they describe a network.

    Args:
        params: What the JSON file holds.
        name: What errors call it.

    Raises:
        CheckpointError: If a value is missing, of the wrong type or out of range.
    """
    if not isinstance(params, dict):
        raise CheckpointError(f"{name} holds a {type(params).__name__}, but must hold an object of parameters")
    missing = [key for key in _KNOWN if key not in params and key not in _OPTIONAL]
    if missing:
        raise CheckpointError(f"{name} lacks {', '.join(missing)}: it is not the JSON of an original checkpoint")
    for key, (low, high) in _RANGES.items():
        if key in params and not _is_whole(params[key], low, high):
            raise CheckpointError(
                f"{name}: {key} is {_shown(params[key])}, but must be a whole number in [{low}, {high}]"
            )
    layers = params["blk_types"]
    if not isinstance(layers, list) or not 1 <= len(layers) <= _MOST_LAYERS:
        raise CheckpointError(
            f"{name}: blk_types is {_shown(layers)}, but must be a list of 1 to {_MOST_LAYERS} names"
        )
    unknown = [layer for layer in layers if not isinstance(layer, str) or layer not in LAYER_TYPE_ALIASES]
    if unknown:
        raise CheckpointError(
            f"{name}: blk_types names {_shown(unknown[0])}, but must be made of {', '.join(LAYER_TYPE_ALIASES)}"
            f"{perhaps(unknown[0], LAYER_TYPE_ALIASES)}"
        )
    if not _LAYER_TYPES[LAYER_TYPE_ALIASES[layers[0]]].changes_width:
        raise CheckpointError(f"{name}: blk_types begins with {layers[0]}, but must begin with res or conv")
    if params["beta_sched"] not in _BETA_SCHEDULES:
        raise CheckpointError(
            f"{name}: beta_sched is {_shown(params['beta_sched'])}, but must be one of {', '.join(_BETA_SCHEDULES)}"
            f"{perhaps(params['beta_sched'], _BETA_SCHEDULES)}"
        )
    class_dim = params["c_dim"]
    if class_dim is not None and class_dim != -1 and not _is_whole(class_dim, 1, 65_536):
        raise CheckpointError(
            f"{name}: c_dim is {_shown(class_dim)}, but must be a whole number in [1, 65536], or null for no classes"
        )
    needy = [layer for layer in layers if _LAYER_TYPES[LAYER_TYPE_ALIASES[layer]].needs_classes]
    if needy and class_dim in (None, -1):
        raise CheckpointError(
            f"{name}: c_dim is {_shown(class_dim)}, but blk_types names {needy[0]}, which needs classes"
        )
    widest = params["embCh"] * 2 ** (params["chMult"] * params["num_blocks"])
    if widest > _LARGEST_WIDTH:
        raise CheckpointError(
            f"{name}: embCh {params['embCh']}, chMult {params['chMult']} and num_blocks {params['num_blocks']} make"
            f" {widest:,} channels, but there must be at most {_LARGEST_WIDTH:,}"
        )
    return {**params, "c_dim": None if class_dim == -1 else class_dim}


def unknown_params(params: Mapping[str, Any]) -> list[str]:
    """Entries that the original's files do not have; they are kept and not looked at."""
    return [key for key in params if key not in _KNOWN]


def _is_whole(value: Any, low: int, high: int) -> bool:
    # True and False are ints to Python
    return type(value) is int and low <= value <= high


def _shown(value: Any) -> str:
    """A value as errors show it, cut where it is long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value)
    except ValueError:  # a number of more digits than Python will print
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
