"""Small things under the names that the pages use: `outputs/demo/model`, `model_469e_600000s.pkl`, and so on.

A page is followed in a folder that looks like the root of the repository, but for `outputs`, which is its own. What a
command of the page reads and no earlier one has written is made by the table at the end.
"""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from imagenet64_diffusion.convert_checkpoints import main as convert
from imagenet64_diffusion.prepare_imagenet64 import main as prepare
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.conversion.originals import model_file, params_file, unpack_optimizer
from imagenet64_diffusion.tests.documents.pages import ROOT


# not those that commands of the pages write, or that are nobody's business
_NOT_LINKED = {"outputs", "build", "dist"}


def make_root(folder: Path) -> Path:
    """An empty copy of the root, in which the files of the package are links."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in _NOT_LINKED:
            (folder / entry.name).symlink_to(entry)
    return folder


def provide(name: str) -> None:
    """Makes what a name of the table stands for, below the current folder, unless something is there."""
    for known, make in STAND_INS.items():
        if name.rstrip("/") == known and not Path(known).exists():
            Path(known).parent.mkdir(parents=True, exist_ok=True)
            make(Path(known))


def _digits_model(folder: Path) -> None:
    shutil.copytree(DIGITS, folder)


def _tiny_pipelines(folder: Path) -> None:
    for step in (10, 20):
        make_pipeline(sample_size=16).save_pretrained(folder / f"step_{step:07d}")


def _published_zip(batches: range) -> Callable[[Path], None]:
    """Batches of 3 images of 16x16, the way ImageNet-64 is published."""

    def make(file: Path) -> None:
        rng = np.random.default_rng(batches.start)
        with zipfile.ZipFile(file, "w") as archive:
            for number in batches:
                pixels = rng.integers(0, 256, (3, 3 * 16 * 16), dtype=np.uint8)
                name = f"train_data_batch_{number}" if number else "val_data"
                archive.writestr(name, pickle.dumps({"data": pixels, "labels": [number + 1, 2, 1000]}, protocol=3))

    return make


def _images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]


def _class_folders(folder: Path) -> None:
    """Ten images of each of ten classes, as many as the original's checkpoint of the stand-ins has."""
    for index, image in enumerate(_images(100)):
        place = folder / f"class_{index % 10}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index}.png")


def _saved_dataset(folder: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": _images(12), "label": [index % 2 for index in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)


def _prepared_folders(resolution: int) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        provide("my_images")
        source = ["--source", "imagefolder", "--input", "my_images", "--resolution", str(resolution)]
        assert prepare([*source, "--output_dir", str(folder)]) == 0

    return make


def _prepared_imagenet64(folder: Path) -> None:
    zips = ["Imagenet64_train_part1.zip", "Imagenet64_train_part2.zip"]
    for name in zips:
        provide(name)
    assert prepare(["--input", *zips, "--output_dir", str(folder)]) == 0


def _arrays(file: Path) -> None:
    rng = np.random.default_rng(1)
    np.savez(file, images=rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8), labels=np.arange(6) % 2)


def _original(file: Path) -> None:
    """A checkpoint that the original program wrote, as if after 600,000 steps."""
    shutil.copy(model_file("res_res_atn"), file)
    params = json.loads(params_file("res_res_atn").read_text())
    written = {**params, "epoch": 469, "step": 600_000}
    file.with_name("model_params_469e_600000s.json").write_text(json.dumps(written))


def _optimizer(file: Path) -> None:
    unpack_optimizer("res_res_atn", file.parent).rename(file)


def _folder_of_originals(folder: Path) -> None:
    folder.mkdir()
    _original(folder / "model_469e_600000s.pkl")
    _optimizer(folder / "optim_469e_600000s.pkl")


def _converted_checkpoint(folder: Path) -> None:
    model, optimizer = Path("model_469e_600000s.pkl"), Path("optim_469e_600000s.pkl")
    provide(str(model))
    provide(str(optimizer))
    output_dir = folder.parents[1]
    folder.parent.rmdir()
    assert convert(["--checkpoint", str(model), "--optimizer", str(optimizer), "--output_dir", str(output_dir)]) == 0
    assert folder.is_dir()


STAND_INS: dict[str, Callable[[Path], None]] = {
    "outputs/demo/model": _digits_model,
    "outputs/res_res/model": _digits_model,
    "outputs/res_res/pipelines": _tiny_pipelines,
    "outputs/res_res_atn/pipelines": _tiny_pipelines,
    "outputs/res_res_atn/checkpoints/checkpoint-600000": _converted_checkpoint,
    "outputs/imagenet64": _prepared_imagenet64,
    "outputs/mine": _prepared_folders(16),
    "outputs/ten_classes": _prepared_folders(64),
    "Imagenet64_train_part1.zip": _published_zip(range(1, 6)),
    "Imagenet64_train_part2.zip": _published_zip(range(6, 11)),
    "Imagenet64_val.zip": _published_zip(range(0, 1)),
    "my_images": _class_folders,
    "your-name/your-images": _saved_dataset,
    "part1.npz": _arrays,
    "part2.npz": _arrays,
    "model_469e_600000s.pkl": _original,
    "optim_469e_600000s.pkl": _optimizer,
    "original_models": _folder_of_originals,
}
