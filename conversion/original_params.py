"""The JSON file beside an original checkpoint, which says what network its weights belong to."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.unet_class_conditional import LAYER_TYPE_ALIASES
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
    "c_dim": (1, 65_536),
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
_BETA_SCHEDULES = ("cosine", "linear")
_KNOWN = (*_RANGES, "blk_types", "beta_sched")


def read_params(file: str | Path) -> dict[str, Any]:
    """Reads and checks a ``model_params_*.json`` file.

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
    """The parameters, if their types and ranges are right; the network's constructor sees whether they fit together.

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

    def require(fits: bool, key: str, wanted: str) -> None:
        if not fits:
            raise CheckpointError(f"{name}: {key} is {reprlib.repr(params[key])}, but must be {wanted}")

    # the original writes null for num_classes too where there are no classes
    without_classes = params["c_dim"] in (None, -1)
    for key in [key for key in _RANGES if key in params]:
        low, high = _RANGES[key]
        absent = without_classes and (key == "c_dim" or (key == "num_classes" and params[key] is None))
        # True and False are ints to Python
        fits = absent or (type(params[key]) is int and low <= params[key] <= high)
        require(fits, key, f"a whole number in [{low}, {high}]{', or null for no classes' * (key == 'c_dim')}")
    layers, schedule = params["blk_types"], params["beta_sched"]
    require(type(layers) is list and 0 < len(layers) <= _MOST_LAYERS, "blk_types", f"a list of 1 to {_MOST_LAYERS}")
    for layer in layers:
        known = type(layer) is str and layer in LAYER_TYPE_ALIASES
        names = f"{', '.join(LAYER_TYPE_ALIASES)}, not {reprlib.repr(layer)}{perhaps(layer, LAYER_TYPE_ALIASES)}"
        require(known, "blk_types", f"made of {names}")
    near = perhaps(schedule, _BETA_SCHEDULES)
    require(schedule in _BETA_SCHEDULES, "beta_sched", f"one of {', '.join(_BETA_SCHEDULES)}{near}")
    widest = params["embCh"] * 2 ** (params["chMult"] * params["num_blocks"])
    if widest > _LARGEST_WIDTH:
        raise CheckpointError(f"{name} makes {widest:,} channels, but there must be at most {_LARGEST_WIDTH:,}")
    return {**params, "c_dim": None if without_classes else params["c_dim"]}


def unknown_params(params: Mapping[str, Any]) -> list[str]:
    """Entries that the original's files do not have; they are kept and not looked at."""
    return [key for key in params if key not in _KNOWN]
