from imagenet64_diffusion.data.class_names import imagenet64_id2label, imagenet64_names, imagenet64_wnids


def test_labels_follow_the_development_kit():
    wnids, names = imagenet64_wnids(), imagenet64_names()
    assert [wnids[0], wnids[1], wnids[2], wnids[999]] == ["n02119789", "n02100735", "n02110185", "n03255030"]
    assert [names[0], names[1], names[2], names[999]] == [
        "kit fox, Vulpes macrotis",
        "English setter",
        "Siberian husky",
        "dumbbell",
    ]
    assert names[wnids.index("n02123045")] == "tabby, tabby cat"


def test_every_class_has_its_own_id_and_name():
    assert len(set(imagenet64_wnids())) == len(set(imagenet64_names())) == 1000
    names = dict(zip(imagenet64_wnids(), imagenet64_names(), strict=True))
    assert names["n02012849"] == "crane, crane (bird)"
    assert names["n03126707"] == "crane, crane (machine)"
    assert all(name == name.strip() and name for name in names.values())


def test_id2label_is_in_order_and_a_copy():
    id2label = imagenet64_id2label()
    assert list(id2label) == list(range(1000))
    assert list(id2label.values()) == imagenet64_names()
    id2label[0] = "changed"
    assert imagenet64_id2label()[0] == "kit fox, Vulpes macrotis"
