"""The 1000 classes of ImageNet, in the order of ImageNet-64's labels and in that of most models.

The labels of ImageNet-64 follow the ILSVRC2012 development kit (label 1 is n02119789, kit fox; label 1000 is
n03255030, dumbbell), not the sorted synsets of most ImageNet models. Index i of them is label i + 1 of its files.
"""

import importlib.resources
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


NUM_CLASSES = 1000


def _classes() -> list[list[str]]:
    """WordNet id and name of each class, in the order of ImageNet-64."""
    text = (importlib.resources.files(__package__) / "imagenet64_classes.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()]


def imagenet64_names() -> list[str]:
    """The 1000 names of the classes, such as ``"tabby, tabby cat"``: the lemmas of each synset, no two equal."""
    return [name for _, name in _classes()]


def imagenet64_id2label() -> dict[int, str]:
    """The mapping that a pipeline stores: 0-based label -> name, for all 1000 classes in order."""
    return dict(enumerate(imagenet64_names()))


def imagenet_id2label() -> dict[int, str]:
    """The same in the order of the sorted WordNet ids, as torchvision and most models of ImageNet have it."""
    return dict(enumerate(name for _, name in sorted(_classes())))


_ORDERS = {"imagenet64": imagenet64_id2label, "imagenet": imagenet_id2label}


def class_names(id2label: Any, num_classes: int | None, usual: str = "imagenet64") -> dict[int, str] | None:
    """The name of each class of a network, as an option asks for them.

    Args:
        id2label: ``"imagenet64"``, ImageNet-64's own order, or ``"imagenet"``, that of the sorted WordNet ids, both
            where there are 1000 classes, else numbers; ``"auto"`` for the ``usual`` of them; ``"numbers"`` or None; a
            file of names, JSON or text, a name a line; or the names.
        num_classes: Number of classes, or None for a network without.
        usual: What ``"auto"`` stands for.

    Returns:
        0-based label -> name, or None for a network without classes.

    Raises:
        ValueError: If the file cannot be read, or there is not one name for each class.
    """
    if id2label == "auto":
        id2label = usual
    by_option = id2label in (None, "numbers", *_ORDERS)
    if num_classes is None:
        if not by_option:
            raise ValueError("id2label names classes, but the network has none: leave it out")
        return None
    if by_option:
        named = id2label in _ORDERS and num_classes == NUM_CLASSES
        return _ORDERS[id2label]() if named else {index: str(index) for index in range(num_classes)}
    if isinstance(id2label, (str, Path)):
        file, options = Path(id2label), "auto, imagenet64, imagenet, numbers"
        if not file.is_file():
            raise ValueError(f"id2label is {str(file)!r}, but must be {options} or a file of names")
        try:
            text = file.read_text(encoding="utf-8")
            id2label = json.loads(text) if file.suffix == ".json" else text.rstrip().splitlines()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"id2label: {file.name} cannot be read ({error})") from error
    if not isinstance(id2label, Mapping):
        id2label = dict(enumerate(id2label)) if isinstance(id2label, (list, tuple)) else {}
    names = {str(key): name for key, name in id2label.items()}
    labels: list[Any] = [names.get(str(index)) for index in range(num_classes)]
    if len(names) != num_classes or not all(isinstance(label, str) and label.strip() for label in labels):
        wanted = f"a name for each class of the network, 0 to {num_classes - 1}"
        raise ValueError(f"id2label must have {wanted}, and no other")
    return dict(enumerate(labels))
