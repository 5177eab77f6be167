"""What a conversion has read and writes, whatever program the checkpoint is of."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..data.class_names import NUM_CLASSES, imagenet64_id2label, imagenet_id2label
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from .pickle_reader import CheckpointError, require


class Program(NamedTuple):
    """A program whose checkpoints are converted, the licence of its weights, and how it samples where published."""

    name: str
    license: str
    class_order: str
    sampler: str | None = None


_NVIDIAS = "cc-by-nc-sa-4.0"
PROGRAMS = {
    # the original program's licence is for its weights too
    "original": Program("the original program", "mit", "imagenet64"),
    "adm": Program("ADM (guided-diffusion)", "mit", "imagenet", "250 steps, classifier_scale 1.0"),
    "edm": Program("EDM", _NVIDIAS, "imagenet", "256 steps, S_churn 40, S_min 0.05, S_max 50, S_noise 1.003"),
    "edm2": Program("EDM2", _NVIDIAS, "imagenet", "32 steps without churn"),
}


@dataclass
class Source:
    """A pipeline of a checkpoint's weights, and what there is to say of it."""

    pipeline: ClassConditionalPipeline
    num_weights: int
    report: dict[str, str]
    card_facts: dict[str, Any]
    # writes to the folder what the pipeline does not hold, before its weights get their dtype
    write_more: Callable[[Path], None] = field(default=lambda folder: None)


_ORDERS = {"imagenet64": imagenet64_id2label, "imagenet": imagenet_id2label}


def class_names(id2label: Any, num_classes: int | None, usual: str = "imagenet64") -> dict[int, str] | None:
    """The name of each class, if there are any; ``id2label`` is that of `convert_checkpoint`, ``usual`` its auto."""
    if isinstance(id2label, str) and id2label == "auto":
        id2label = usual
    by_option = id2label is None or (isinstance(id2label, str) and id2label in ("numbers", *_ORDERS))
    if num_classes is None:
        require(by_option, "id2label names classes, but the network has none: leave it out")
        return None
    if by_option:
        named = id2label in _ORDERS and num_classes == NUM_CLASSES
        return _ORDERS[id2label]() if named else {index: str(index) for index in range(num_classes)}
    if isinstance(id2label, (str, Path)):
        file = Path(id2label)
        require(
            file.is_file(),
            f"id2label is {str(file)!r}, but must be auto, imagenet64, imagenet, numbers or a file of names",
        )
        try:
            text = file.read_text(encoding="utf-8")
            id2label = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"id2label: {file.name} cannot be read ({error})") from error
    if not isinstance(id2label, Mapping):
        id2label = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else {}
    names = {str(key): name for key, name in id2label.items()}
    labels: list[Any] = [names.get(str(index)) for index in range(num_classes)]
    fits = len(names) == num_classes and all(isinstance(label, str) and label.strip() for label in labels)
    require(fits, f"id2label must have a name for each class of the network, 0 to {num_classes - 1}, and no other")
    return dict(enumerate(labels))
