"""imagenet64-prepare, as its users run it."""

import os
import pathlib
import signal
import subprocess
import sys
import zipfile

import datasets
import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion import prepare_imagenet64
from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.published_source import PublishedSource
from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, prepare
from imagenet64_diffusion.tests.commands.processes import run_command
from imagenet64_diffusion.tests.data.conftest import make_batches, write_zips
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, LoopbackHub, Repository


def main(arguments: list[str]) -> int:
    """The command, which gets the signal of the first argument once it has read a batch."""
    number, *arguments = arguments
    open_source = PublishedSource.open

    def interrupted(blocks):
        yield next(blocks)
        os.kill(os.getpid(), int(number))
        yield from blocks

    def open_interrupted(source, work_folder):
        stream = open_source(source, work_folder)
        stream.blocks = interrupted(stream.blocks)
        return stream

    PublishedSource.open = open_interrupted
    return prepare_imagenet64.main(arguments)


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[list[pathlib.Path], np.ndarray, np.ndarray]:
    """Two zips with ten batches at 8x8, and all of their images and labels."""
    batches = make_batches(num_images=101)
    pixels, labels = (np.concatenate([batch[item] for batch in batches]) for item in (0, 1))
    return write_zips(tmp_path_factory.mktemp("published"), batches), pixels.reshape(-1, 3, 8, 8), labels - 1


def run(*arguments) -> int:
    return prepare_imagenet64.main(list(map(str, arguments)))


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_published_zips(here, published, capsys):
    paths, pixels, labels = published
    arguments = ["--input", *paths, "--output_dir", "out"]
    first = run_command("prepare_imagenet64", *arguments, directory=here)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("reading 10 batches of ImageNet-64 (train) from ")
    assert "prepared out: 1,010 images, 1000 classes, 8x8 RGB, 0.2 MB in " in first.stdout
    assert "images/s" in first.stderr
    assert "warning" not in first.stderr
    batch = PreparedImages("out")[range(1010)]
    np.testing.assert_array_equal(batch["pixel_values"], pixels)
    np.testing.assert_array_equal(batch["class_labels"], labels)

    before = (here / "out").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert capsys.readouterr().out == "already prepared: 1,010 images, 1000 classes, 8x8 RGB, 0.2 MB in out\n"
    assert (here / "out").stat().st_mtime_ns == before
    assert run(*arguments, "--max_images", "10") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output_dir out holds other images, 1,010 images")
    assert error.count("\n") == 1
    assert names(here) == ["out"]


def test_killed_in_the_middle_and_run_again(here, published):
    paths, pixels, _ = published
    arguments = ["--output_dir", "out", "--input", paths[0]]
    for number, code, left in [
        (signal.SIGKILL, -signal.SIGKILL, [".out.lock", ".out.writing"]),
        (signal.SIGINT, 130, []),
    ]:
        stopped = run_command("tests.commands.test_prepare", number.value, *arguments, directory=here)
        assert (stopped.returncode, names(here)) == (code, left), stopped.stderr
    again = run_command("prepare_imagenet64", *arguments, directory=here)
    assert again.returncode == 0, again.stderr
    assert "warning: 5 of the 10 batches are missing: train_data_batch_6" in again.stderr
    assert names(here) == ["out"]
    np.testing.assert_array_equal(PreparedImages("out")[list(range(505))]["pixel_values"], pixels[:505])


def test_datasets_of_the_hub_and_local_ones(here):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [PIL.Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 100, 200)]
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1]}, features=features)
    for folder in ("local", "home"):
        (here / folder).mkdir()
    dataset.to_parquet(here / "local" / "train.parquet")
    content = (here / "local" / "train.parquet").read_bytes()
    # where the Hub and its cache are, its client asks once, when it is imported
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    program = """if True:
        import pathlib
        from imagenet64_diffusion.prepare_imagenet64 import main
        assert main(["--source", "dataset", "--output_dir", "copy", "--input", "local"]) == 0
        # what local files are made into is not kept
        assert not [path for path in pathlib.Path.home().rglob("*") if path.is_file()]
        assert main(["--source", "dataset", "--output_dir", "out", "--input", "mice/pictures"]) == 0
        assert main(["--source", "dataset", "--output_dir", "none", "--input", "mice/none"]) == 2
    """
    with LoopbackHub() as hub:
        hub.repositories["mice/pictures"] = Repository()
        hub.repositories["mice/pictures"].commit({"train.parquet": Blob(content)}, "Upload")
        environment |= {"HOME": str(here / "home"), "HF_ENDPOINT": hub.url}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: --input mice/none --split train: cannot be loaded (")
    for folder in ("copy", "out"):
        batch = PreparedImages(folder)[[0, 1, 2]]
        assert batch["class_labels"].tolist() == [0, 1, 1]
        assert batch["pixel_values"][:, 0].flatten(1).unique(dim=1).flatten().tolist() == [0, 100, 200]
    assert names(here) == ["copy", "home", "local", "out"]


def test_wrong_data_is_one_line_and_leaves_nothing(here, published, capsys):
    path = here / "Imagenet64_train_part1.zip"
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(published[0][0]) as good:
        archive.writestr("train_data_batch_1", good.read("train_data_batch_1"))
        archive.writestr("train_data_batch_2", b"cposix\nsystem\n(Vtouch marker\ntR.")
    assert run("--input", path, "--output_dir", "out") == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: {path} entry train_data_batch_2 cannot be read (wants posix.system")
    assert names(here) == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--input is missing"),
        ("--resolution 64", "--resolution is for --source imagefolder and dataset, not imagenet64"),
        ("--source mnist --input x", "--input is for --source imagenet64 and imagefolder and dataset and npz, not"),
        ("--source mnist --split test", "--split test: the digits have only the split train"),
    ],
)
def test_wrong_options(here, capsys, arguments, message):
    assert run(*arguments.split(), "--output_dir", "out") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_digits_from_python(tmp_path, capsys):
    options = PrepareOptions(output_dir=str(tmp_path / "out"), source="mnist")
    assert prepare(options) == tmp_path / "out"
    assert prepare(options) == tmp_path / "out"
    output = capsys.readouterr().out.splitlines()
    assert output[-1].startswith("already prepared: 5,000 images, 10 classes, 32x32 gray")
    record = PreparedImages(tmp_path / "out").preparation
    assert record.class_names == [str(digit) for digit in range(10)]
    assert record.images_per_class == [500] * 10
    batch = PreparedImages(tmp_path / "out")[range(5000)]
    pixels, labels = batch["pixel_values"][:, 0].numpy(), batch["class_labels"].numpy()
    assert pixels.max() == 255
    # the middle of a zero is empty, that of a one is inked
    middle = pixels[:, 14:18, 14:18]
    assert middle[labels == 0].mean() < 60 < middle[labels == 1].mean()
    # and the padding black
    pixels[:, 2:-2, 2:-2] = 0
    assert not pixels.any()
