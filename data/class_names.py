"""The 1000 classes of ImageNet, in the order of ImageNet-64's labels and in that of most models.

The labels of ImageNet-64 follow the ILSVRC2012 development kit (label 1 is n02119789, kit fox; label 1000 is
n03255030, dumbbell), not the sorted synsets of most ImageNet models. Index i of them is label i + 1 of its files.
"""

import importlib.resources


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
