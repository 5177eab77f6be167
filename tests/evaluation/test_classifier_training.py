"""The small classifier that one trains oneself."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from imagenet64_diffusion.data.dataset import PreparedImages, to_model_range
from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.classifier_training import train_classifier
from imagenet64_diffusion.evaluation.options import ClassifierOptions
from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, prepare
from imagenet64_diffusion.utils.file_digest import file_digest


def options(prepared, folder, **changes) -> ClassifierOptions:
    common = {"train_data_dir": str(prepared), "output_dir": str(folder), "epochs": 8, "batch_size": 16}
    return ClassifierOptions(**{**common, **changes})


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    return train_classifier(options(prepared, tmp_path_factory.mktemp("trained") / "classifier"))


def test_it_learns_what_it_has_not_seen(trained, prepared):
    """By loading it as anybody would, and with every tenth image of a class counted by hand."""
    images = PreparedImages(prepared)
    held_out = [index for label in range(3) for index in np.flatnonzero(images.labels() == label)[9::10]]
    network = AutoModelForImageClassification.from_pretrained(trained).eval()
    batch = images[held_out]
    with torch.no_grad():
        answers = network(pixel_values=to_model_range(batch["pixel_values"])).logits.argmax(dim=1)
    accuracy = (answers == batch["class_labels"]).float().mean()
    assert accuracy > 0.8
    assert network.config.id2label == {0: "dark", 1: "grey", 2: "light"}
    assert (network.config.image_size, network.config.num_channels) == ([16, 16], 1)
    card = (trained / "README.md").read_text()
    for words in (
        "# A small classifier of 96 images, 3 classes, 16x16 grayscale",
        f"{accuracy:.1%} of 9 held-out images",
        images.fingerprint,
        file_digest(trained / "model.safetensors"),
        "--epochs 8 --batch_size 16 --learning_rate 0.005 --seed 0",
    ):
        assert words in card


def test_one_seed_one_file(trained, prepared, tmp_path):
    torch.rand(1)
    before = torch.get_rng_state()
    again = train_classifier(options(prepared, tmp_path / "again"))
    assert torch.equal(torch.get_rng_state(), before)
    assert file_digest(again / "model.safetensors") == file_digest(trained / "model.safetensors")
    # and in the place of one that is there; 87 images in batches of 43 leave one, which cannot be normalised
    train_classifier(options(prepared, again, seed=1, epochs=1, batch_size=43))
    assert file_digest(again / "model.safetensors") != file_digest(trained / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]


def prepare_few(folder, count: int, classes: int):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (count, 16, 16, 1)).astype(np.uint8)
    folder.mkdir()
    np.savez(folder / "images.npz", images=images, labels=np.arange(count) % classes)
    return prepare(PrepareOptions(source="npz", input=[str(folder / "images.npz")], output_dir=str(folder / "data")))


def test_wrong_data_and_folders(prepared, tmp_path, capsys):
    one_class = prepare_few(tmp_path / "one", 20, 1)
    few = prepare_few(tmp_path / "few", 18, 2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep")
    for arguments, message in (
        (["--train_data_dir", one_class], "which has 1 classes of up to 20 images, but must have two"),
        (["--train_data_dir", few], "which has 2 classes of up to 9 images, but must have two, and one of 10 images"),
        (["--output_dir", tmp_path / "mine"], f"output_dir is {tmp_path / 'mine'}, which holds other files"),
        (["--batch_size", "1"], "batch_size is 1, but must be at least 2"),
        (["--learning_rate", "1e30"], "the loss is nan: give a smaller learning_rate than 1e+30"),
    ):
        command = ["classifier", "--train_data_dir", prepared, "--output_dir", tmp_path / "out", *arguments]
        assert main([str(word) for word in command]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert message in error[0]
        assert not (tmp_path / "out").exists()
    assert [path.read_text() for path in (tmp_path / "mine").iterdir()] == ["keep"]
