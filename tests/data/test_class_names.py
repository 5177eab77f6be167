import importlib.resources

from imagenet64_diffusion.data.class_names import imagenet64_id2label, imagenet64_names


def test_labels_follow_the_development_kit():
    names = imagenet64_names()
    first = ["kit fox, Vulpes macrotis", "English setter", "Siberian husky"]
    assert [*names[:3], names[999]] == [*first, "dumbbell"]
    assert len(set(names)) == 1000
    assert all(name == name.strip() and name for name in names)
    text = (importlib.resources.files("imagenet64_diffusion.data") / "imagenet64_classes.tsv").read_text("utf-8")
    by_wnid = dict(line.split("\t") for line in text.splitlines())
    assert len(by_wnid) == 1000
    assert [by_wnid[wnid] for wnid in ("n02119789", "n03255030", "n02123045")] == [
        names[0],
        names[999],
        "tabby, tabby cat",
    ]
    assert [by_wnid[wnid] for wnid in ("n02012849", "n03126707")] == ["crane, crane (bird)", "crane, crane (machine)"]


def test_id2label_is_in_order_and_a_copy():
    id2label = imagenet64_id2label()
    assert list(id2label.items()) == list(enumerate(imagenet64_names()))
    id2label[0] = "changed"
    assert imagenet64_id2label()[0] == "kit fox, Vulpes macrotis"
