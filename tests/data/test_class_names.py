import importlib.resources

from imagenet64_diffusion.data.class_names import imagenet64_id2label, imagenet64_names


def test_labels_follow_the_development_kit():
    names = imagenet64_names()
    text = (importlib.resources.files("imagenet64_diffusion.data") / "imagenet64_classes.tsv").read_text("utf-8")
    by_wnid = dict(line.split("\t") for line in text.splitlines())
    assert len(by_wnid) == len(set(names)) == 1000
    assert all(name == name.strip() and name for name in names)
    assert names[1:3] == ["English setter", "Siberian husky"]
    assert names[0] == by_wnid["n02119789"] == "kit fox, Vulpes macrotis"
    assert names[999] == by_wnid["n03255030"] == "dumbbell"
    assert by_wnid["n02123045"] == "tabby, tabby cat"
    assert [by_wnid[wnid] for wnid in ("n02012849", "n03126707")] == ["crane, crane (bird)", "crane, crane (machine)"]
    assert list(imagenet64_id2label().items()) == list(enumerate(names))
