"""What a converted pipeline has besides its network: the scheduler and the names of its classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..data.class_names import NUM_CLASSES, imagenet64_id2label
from ..schedulers.original_schedule import original_cosine_options
from ..schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from .errors import CheckpointError


def original_scheduler(params: Mapping[str, Any], finish_denoising: bool = False) -> EtaDDIMScheduler:
    """The original's sampler on its noise schedule; ``eta`` is sqrt(DDIM_scale).

    Args:
        params: The content of the ``model_params_*.json`` file.
        finish_denoising: Whether the last step ends at the predicted image. The original's cosine schedule ends at
            abar 0.999, which leaves noise of 0.03. Its linear schedule ends at the image in any case.
    """
    options = original_cosine_options(params["T"]) | {"set_alpha_to_one": finish_denoising}
    if params["beta_sched"] == "linear":
        options |= {"trained_betas": None, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        options |= {"set_alpha_to_one": True}
    return EtaDDIMScheduler(prediction_type="epsilon", variance_type="learned_range", **options)


def class_names(
    id2label: str | Path | Mapping[Any, str] | Sequence[str] | None, num_classes: int | None
) -> tuple[dict[int, str] | None, str]:
    """The name of each class, and a word on where the names come from.

    Args:
        id2label: ``"imagenet64"``, ``"numbers"`` or None, a file (a JSON list or object, or text with one name a
            line), or the names themselves. ``"imagenet64"`` has 1000 names; any other number of classes is
            numbered, and the word says so.
        num_classes: How many classes there are; None for a network without.

    Raises:
        CheckpointError: If the names cannot be read or do not fit.
    """
    by_option = id2label in (None, "numbers", "imagenet64")
    if num_classes is None:
        if not by_option:
            raise CheckpointError("id2label names classes, but the network has none: leave it out")
        return None, "none"
    if id2label == "imagenet64" and num_classes == NUM_CLASSES:
        return imagenet64_id2label(), f"{num_classes}, named as in ImageNet-64"
    if by_option:
        why = f", because ImageNet-64 has {NUM_CLASSES}" if id2label == "imagenet64" else ""
        return {index: str(index) for index in range(num_classes)}, f"{num_classes}, numbered{why}"
    source, names = "id2label", cast(Any, id2label)
    if isinstance(id2label, (str, Path)):
        source, names = Path(id2label).name, _read_names(Path(id2label))
    by_key = {str(key): name for key, name in (names.items() if isinstance(names, Mapping) else enumerate(names))}
    labels: dict[int, Any] = {index: by_key.get(str(index)) for index in range(num_classes)}
    if len(by_key) != num_classes or None in labels.values():
        raise CheckpointError(
            f"{source} has {len(by_key)} names, but must name each of the network's classes, 0 to {num_classes - 1}"
        )
    for index, name in labels.items():
        if not isinstance(name, str) or not name.strip():
            raise CheckpointError(f"{source}: the name of class {index} must be text, but is {name!r:.80}")
    return labels, f"{num_classes}, named by {source}"


def _read_names(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(f"id2label is {str(file)!r}, but must be imagenet64, numbers or a file of names")
    try:
        text = file.read_text(encoding="utf-8")
        names = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"id2label: {file.name} cannot be read ({error})") from error
    if not isinstance(names, (list, dict)):
        raise CheckpointError(f"id2label: {file.name} holds a {type(names).__name__}, but must hold names")
    return names
