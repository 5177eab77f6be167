"""Small files and folders under the names that the pages use, for what no earlier command of a page has written."""

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.prepare_imagenet64 import main as prepare
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import FIXTURES, make_pipeline
from imagenet64_diffusion.tests.conversion.originals import model_file, params_file, unpack_optimizer
from imagenet64_diffusion.tests.documents.pages import ROOT


MODEL, OPTIMIZER = Path("model_469e_600000s.pkl"), Path("optim_469e_600000s.pkl")
# what others have published -> a tiny network of theirs
PEERS = {
    "64x64_diffusion.pt": "adm/diffusion.pt",
    "64x64_classifier.pt": "adm/classifier.pt",
    "edm-imagenet-64x64-cond-adm.pkl": "edm/net.pkl",
    "edm2-img64-s-1073741-0.075.pkl": "edm2/net.pkl",
    "edm2-img64-s-1073741-0.045.pkl": "edm2/net.pkl",
    "edm2-img64-xs-0134217-0.110.pkl": "edm2/gnet.pkl",
}
ZIPS = ("Imagenet64_train_part1.zip", "Imagenet64_train_part2.zip")


def make_root(folder: Path) -> Path:
    """An empty copy of the root, in which the files of the package are links."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("outputs", "build", "dist"):
            (folder / entry.name).symlink_to(entry)
    return folder


def provide(name: str) -> None:
    """Makes what a name of the table stands for, below the current folder, unless something is there."""
    path = Path(name)
    make = STAND_INS.get(str(path))
    if make is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)


def _digits(folder: Path) -> None:
    ClassConditionalPipeline.from_pretrained(DIGITS).save_pretrained(folder)


def _pipelines(folder: Path) -> None:
    for step in (10, 20):
        make_pipeline(sample_size=16).save_pretrained(folder / f"step_{step:07d}")


def _published_zip(file: Path, batches: range) -> None:
    """Batches of 3 images of 16x16, as ImageNet-64 is published."""
    rng = np.random.default_rng(batches.start)
    with zipfile.ZipFile(file, "w") as archive:
        for number in batches:
            pixels = rng.integers(0, 256, (3, 3 * 16 * 16), dtype=np.uint8)
            name = f"train_data_batch_{number}" if number else "val_data"
            archive.writestr(name, pickle.dumps({"data": pixels, "labels": [number + 1, 2, 1000]}, protocol=3))


def _images(count: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 20, 24, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


def _class_folders(folder: Path) -> None:
    for index, image in enumerate(_images(20)):
        place = folder / f"class_{index % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{index}.png")


def _saved_dataset(folder: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": _images(12), "label": [index % 2 for index in range(12)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)


def _prepared(folder: Path, *words: str, inputs: tuple[str, ...] = ("my_images",)) -> None:
    for name in inputs:
        provide(name)
    assert prepare([*words, "--input", *inputs, "--output_dir", str(folder)]) == 0


def _arrays(file: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    np.savez(file, images=pixels, labels=np.arange(6) % 2)


def _statistics(file: Path) -> None:
    """Statistics of a standard normal distribution, as EDM and EDM2 store them."""
    moments = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    if file.suffix == ".npz":
        np.savez(file, **moments)
    else:
        file.write_bytes(pickle.dumps({"fid": moments}))


def _original(file: Path) -> None:
    """A checkpoint of the original program, as if after 600,000 steps."""
    shutil.copy(model_file("res_res_atn"), file)
    params = json.loads(params_file("res_res_atn").read_text()) | {"epoch": 469, "step": 600_000}
    file.with_name("model_params_469e_600000s.json").write_text(json.dumps(params))


def _optimizer(file: Path) -> None:
    unpack_optimizer("res_res_atn", file.parent).rename(file)


def _originals(folder: Path) -> None:
    folder.mkdir()
    _original(folder / MODEL)
    _optimizer(folder / OPTIMIZER)


STAND_INS: dict[str, Callable[[Path], object]] = {
    "outputs/demo/model": _digits,
    "outputs/res_res/model": _digits,
    "outputs/res_res/pipelines": _pipelines,
    "outputs/res_res_atn/pipelines": _pipelines,
    "outputs/imagenet64": lambda folder: _prepared(folder, inputs=ZIPS),
    "outputs/mine": lambda folder: _prepared(folder, "--source", "imagefolder", "--resolution", "16"),
    ZIPS[0]: partial(_published_zip, batches=range(1, 6)),
    ZIPS[1]: partial(_published_zip, batches=range(6, 11)),
    "Imagenet64_val.zip": partial(_published_zip, batches=range(1)),
    "my_images": _class_folders,
    "your-name/your-images": _saved_dataset,
    "part1.npz": _arrays,
    "part2.npz": _arrays,
    "VIRTUAL_imagenet64_labeled.npz": _statistics,
    "imagenet-64x64.npz": _statistics,
    "img64.pkl": _statistics,
    str(MODEL): _original,
    str(OPTIMIZER): _optimizer,
    "original_models": _originals,
    **{name: partial(shutil.copy, FIXTURES / "peers" / file) for name, file in PEERS.items()},
}
