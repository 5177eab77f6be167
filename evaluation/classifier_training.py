"""A small image classifier of transformers, trained on a prepared dataset: a feature space for images of one's own."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data.dataset import PreparedImages, to_model_range
from ..utils.atomic_write import atomic_folder, only_writer
from ..utils.file_digest import file_digest
from .options import ClassifierOptions


_NAMES = {"README.md", "config.json", "model.safetensors"}
_CARD = """# A small classifier of {summary}

A ResNet of transformers with {parameters:,} parameters, which reads {accuracy:.1%} of {held_out:,} held-out images
right. It was trained on the other images of the dataset with the fingerprint {fingerprint} by

    evaluate_models.py classifier --train_data_dir <prepared folder> --output_dir <this folder> \\
        {settings}

`evaluate_models.py --protocol classifier --weights <this folder>` evaluates with its last features and its
probabilities. Numbers compare only between evaluations with the same file: {digest}.
"""


def train_classifier(options: ClassifierOptions) -> Path:
    """Trains a small ResNet on nine tenths of each class, tries it on the last one, and returns its folder.

    It runs on the CPU, where one seed gives the same weights again on one machine with one number of threads.
    """
    folder = Path(options.output_dir)
    with only_writer(folder):
        if folder.exists() and not {file.name for file in folder.iterdir()} <= _NAMES:
            raise ValueError(f"output_dir is {folder}, which holds other files: name a new or an empty folder")
        dataset = PreparedImages(options.train_data_dir)
        labels = dataset.labels()
        each = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        held_out = np.concatenate([indices[9::10] for indices in each])
        if len(each) < 2 or not len(held_out):
            raise ValueError(
                f"train_data_dir is {dataset.folder}, which has {len(each)} classes of up to {max(map(len, each))}"
                " images, but must have two, and one of 10 images: the tenth is to try it on"
            )
        network = _train(dataset, np.setdiff1d(np.arange(len(dataset)), held_out), options).eval()
        right = 0
        with torch.no_grad():
            for indices in torch.from_numpy(held_out).split(options.batch_size):
                batch = dataset[indices.numpy()]
                answers = network(pixel_values=to_model_range(batch["pixel_values"])).logits.argmax(dim=1)
                right += int((answers == batch["class_labels"]).sum())
        accuracy = right / len(held_out)
        with atomic_folder(folder) as writing:
            network.save_pretrained(writing)
            names = ("epochs", "batch_size", "learning_rate", "seed")
            card = _CARD.format(
                summary=dataset.preparation.summary(),
                parameters=network.num_parameters(),
                accuracy=accuracy,
                held_out=len(held_out),
                fingerprint=dataset.fingerprint,
                settings=" ".join(f"--{name} {getattr(options, name)}" for name in names),
                digest=file_digest(writing / "model.safetensors"),
            )
            (writing / "README.md").write_text(card, encoding="utf-8")
    print(f"{folder}: {accuracy:.1%} of {len(held_out):,} held-out images right")
    return folder


def _train(dataset: PreparedImages, indices: np.ndarray, options: ClassifierOptions) -> Any:
    # transformers takes seconds to import, for which wrong options should not wait
    from transformers import ResNetConfig, ResNetForImageClassification

    small = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    label2id = {name: label for label, name in dataset.id2label.items()}
    # the size that the extractor brings other images to
    seen = {"num_channels": dataset.channels, "image_size": list(dataset.image_size)}
    config = ResNetConfig(**small, **seen, id2label=dataset.id2label, label2id=label2id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        network = ResNetForImageClassification(config).train()
    rng = np.random.default_rng(options.seed)
    # batch normalisation cannot work with one image, and the next time through the images it is another one
    starts = [start for start in range(0, len(indices), options.batch_size) if len(indices) - start > 1]
    steps = options.epochs * len(starts)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps)
    with tqdm(total=steps, desc="classifier", unit="step") as progress_bar:
        for _ in range(options.epochs):
            order = rng.permutation(indices)
            for start in starts:
                batch = dataset[order[start : start + options.batch_size]]
                # moved by up to two pixels, with the border repeated
                padded = F.pad(to_model_range(batch["pixel_values"]), (2,) * 4, mode="replicate")
                (x, y), (height, width) = rng.integers(0, 5, 2), dataset.image_size
                logits = network(pixel_values=padded[:, :, y : y + height, x : x + width]).logits
                loss = F.cross_entropy(logits, batch["class_labels"], label_smoothing=0.05)
                if not loss.isfinite():
                    rate = options.learning_rate
                    raise ValueError(f"the loss is {loss.item()}: give a smaller learning_rate than {rate:g}")
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress_bar.update()
                progress_bar.set_postfix({"loss": f"{loss.item():.3f}"}, refresh=False)
    return network
