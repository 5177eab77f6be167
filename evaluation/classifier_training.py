"""A small image classifier of transformers, trained on a prepared dataset: a feature space for images of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.dataset import PreparedImages, to_model_range
from ..utils.atomic_write import atomic_folder, only_writer
from .options import ClassifierOptions
from .weights import file_digest


if TYPE_CHECKING:
    from transformers import ResNetForImageClassification

_HELD_OUT = 10  # every tenth image of a class
_SHIFT = 2  # pixels
_NAMES = ("README.md", "config.json", "model.safetensors")
_SETTINGS = ("epochs", "batch_size", "learning_rate", "seed")
_CARD = """# A small classifier of {summary}

A ResNet of transformers with {parameters:,} parameters, which reads {accuracy:.1%} of {held_out:,} held-out images
right. It was trained on the other images of the dataset with the fingerprint {fingerprint} by

    evaluate_models.py classifier --train_data_dir <prepared folder> --output_dir <this folder> \\
        {settings}

`evaluate_models.py --protocol classifier --weights <this folder>` evaluates with its last features and its
probabilities. Numbers compare only between evaluations with the same file: {digest}.
"""


@dataclass
class TrainedClassifier:
    """A classifier that has been written.

    Attributes:
        folder: Where to.
        accuracy: Share of the held-out images that it reads right, from 0 to 1.
        num_held_out: How many these are.
    """

    folder: Path
    accuracy: float
    num_held_out: int


def train_classifier(options: ClassifierOptions) -> TrainedClassifier:
    """Trains a small ResNet on nine tenths of each class and tries it on the last one.

    It runs on the CPU, where one seed gives the same weights again on one machine with one number of threads.

    Args:
        options: On what, and how long.

    Returns:
        Where it is, and how much of what it has not seen it reads right.

    Raises:
        ValueError: If there is nothing to tell apart, or nothing to try it on, or the folder holds other files.
        OSError: If the folder cannot be written.
    """
    folder = Path(options.output_dir)
    with only_writer(folder):
        if folder.exists() and not {file.name for file in folder.iterdir()} <= set(_NAMES):
            raise ValueError(f"output_dir is {folder}, which holds other files: name a new or an empty folder")
        dataset = PreparedImages(options.train_data_dir)
        training, held_out = _split(dataset.labels())
        if len(np.unique(dataset.labels())) < 2:
            raise ValueError(
                f"train_data_dir is {dataset.folder}, whose images are of one class: there is nothing to tell apart"
            )
        if not len(held_out):
            raise ValueError(
                f"train_data_dir is {dataset.folder}, where no class has {_HELD_OUT} images: none is left"
                " to try the classifier on"
            )
        network = _train(_make_network(dataset, options.seed), dataset, training, options)
        accuracy = _accuracy(network.eval(), dataset, held_out, options.batch_size)
        with atomic_folder(folder) as writing:
            network.save_pretrained(writing, safe_serialization=True)
            card = _CARD.format(
                summary=dataset.preparation.summary(),
                parameters=network.num_parameters(),
                accuracy=accuracy,
                held_out=len(held_out),
                fingerprint=dataset.fingerprint,
                settings=" ".join(f"--{name} {getattr(options, name)}" for name in _SETTINGS),
                digest=file_digest(writing / "model.safetensors"),
            )
            (writing / "README.md").write_text(card, encoding="utf-8")
    print(f"{folder}: {accuracy:.1%} of {len(held_out):,} held-out images right")
    return TrainedClassifier(folder, accuracy, len(held_out))


def _make_network(dataset: PreparedImages, seed: int) -> "ResNetForImageClassification":
    # transformers takes seconds to import, for which wrong options should not wait
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=dataset.channels,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dataset.id2label,
        label2id={name: label for label, name in dataset.id2label.items()},
        # the size that the extractor brings other images to
        image_size=list(dataset.image_size),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNetForImageClassification(config)


def _train(
    network: "ResNetForImageClassification", dataset: PreparedImages, indices: np.ndarray, options: ClassifierOptions
) -> "ResNetForImageClassification":
    rng = np.random.default_rng(options.seed)
    # batch normalisation cannot work with one image, and the next time through the images it is another one
    starts = [start for start in range(0, len(indices), options.batch_size) if len(indices) - start > 1]
    steps = options.epochs * len(starts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)
    network.train()
    with tqdm(total=steps, desc="classifier", unit="step") as progress_bar:
        for _ in range(options.epochs):
            order = rng.permutation(indices)
            for start in starts:
                batch = dataset[order[start : start + options.batch_size]]
                images = _shifted(to_model_range(batch["pixel_values"]), rng)
                logits = network(pixel_values=images).logits
                loss = torch.nn.functional.cross_entropy(logits, batch["class_labels"], label_smoothing=0.05)
                if not loss.isfinite():
                    raise ValueError(
                        f"the loss is {loss.item()}: give a smaller learning_rate than {options.learning_rate:g}"
                    )
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress_bar.update()
                progress_bar.set_postfix({"loss": f"{float(loss.detach()):.3f}"}, refresh=False)
    return network


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices for training and for trying, of every class in the same proportion."""
    number_in_class = np.empty_like(labels)
    for label in np.unique(labels):
        number_in_class[labels == label] = np.arange((labels == label).sum())
    is_held_out = number_in_class % _HELD_OUT == _HELD_OUT - 1
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def _shifted(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The images, each moved by up to two pixels, with its border repeated."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (_SHIFT,) * 4, mode="replicate")
    places = rng.integers(0, 2 * _SHIFT + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in zip(padded, places, strict=True)])


def _accuracy(network: torch.nn.Module, dataset: PreparedImages, indices: np.ndarray, batch_size: int) -> float:
    right = 0
    with torch.no_grad():
        for start in range(0, len(indices), batch_size):
            batch = dataset[indices[start : start + batch_size]]
            answers = network(pixel_values=to_model_range(batch["pixel_values"])).logits.argmax(dim=1)
            right += int((answers == batch["class_labels"]).sum())
    return right / len(indices)
