"""The 1000 classes of ImageNet-64, in the order of its labels.

The labels follow the ILSVRC2012 development kit (label 1 is n02119789, kit fox; label 1000 is n03255030, dumbbell),
not the sorted synsets of most ImageNet models. Index i here is label i + 1 of the published files.
"""

import importlib.resources


NUM_CLASSES = 1000


def imagenet64_names() -> list[str]:
    """The 1000 names of the classes, such as ``"tabby, tabby cat"``: the lemmas of each synset, no two equal."""
    text = (importlib.resources.files(__package__) / "imagenet64_classes.tsv").read_text(encoding="utf-8")
    # WordNet id, name
    return [line.split("\t")[1] for line in text.splitlines()]


def imagenet64_id2label() -> dict[int, str]:
    """The mapping that a pipeline stores: 0-based label -> name, for all 1000 classes in order."""
    return dict(enumerate(imagenet64_names()))
