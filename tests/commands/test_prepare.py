"""imagenet64-prepare, as its users run it."""

import functools
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
import zipfile

import datasets
import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.prepare_imagenet64 import PrepareOptions, main, prepare


ROOT = pathlib.Path(__file__).parents[2]


def run(folder: pathlib.Path, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), **process_options(folder), **options)


def command(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "prepare_imagenet64.py"), *map(str, arguments)]


def process_options(folder: pathlib.Path) -> dict:
    home = folder / "home"
    home.mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": 100}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[list[pathlib.Path], np.ndarray, np.ndarray]:
    """Two zips with ten batches at 8x8, and all of their images and labels."""
    folder = tmp_path_factory.mktemp("published")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (1010, 192), dtype=np.uint8)
    labels = generator.permutation(np.arange(1010) % 1000 + 1)
    paths = [folder / "Imagenet64_train_part1.zip", folder / "Imagenet64_train_part2.zip"]
    for part, path in enumerate(paths):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for index in range(5 * part, 5 * part + 5):
                rows = slice(101 * index, 101 * index + 101)
                content = {"data": pixels[rows], "labels": labels[rows].tolist(), "mean": pixels.mean(0)}
                archive.writestr(f"train_data_batch_{index + 1}", pickle.dumps(content, 3))
    return paths, pixels.reshape(-1, 3, 8, 8), labels - 1


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_published_zips(tmp_path, published, monkeypatch, capsys):
    paths, pixels, labels = published
    arguments = ["--input", *paths, "--output_dir", "out"]
    first = run(tmp_path, *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("reading 10 batches of ImageNet-64 (train) from ")
    assert "prepared out: 1,010 images, 1000 classes, 8x8 RGB, 0.2 MB in " in first.stdout
    assert "images/s" in first.stderr
    assert "warning" not in first.stderr
    images = PreparedImages(tmp_path / "out")
    batch = images[list(range(len(images)))]
    np.testing.assert_array_equal(batch["pixel_values"], pixels)
    np.testing.assert_array_equal(batch["class_labels"], labels)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}

    monkeypatch.chdir(tmp_path)
    assert main([*map(str, arguments)]) == 0
    assert capsys.readouterr().out == "already prepared: 1,010 images, 1000 classes, 8x8 RGB, 0.2 MB in out\n"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == files

    assert main([*map(str, arguments), "--max_images", "10"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --output_dir out holds other images, 1,010 images")
    assert "--overwrite" in error
    assert error.count("\n") == 1
    assert names(tmp_path) == ["home", "out"]
    # nothing in ~/.cache
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


def test_killed_in_the_middle_and_run_again(tmp_path, published):
    paths, pixels, _ = published
    # a fifo is a batch that never arrives: the run is caught while it waits
    inputs = tmp_path / "in"
    inputs.mkdir()
    with zipfile.ZipFile(paths[0]) as archive:
        for index in range(1, 6):
            (inputs / f"train_data_batch_{index}").write_bytes(archive.read(f"train_data_batch_{index}"))
    last = (inputs / "train_data_batch_5").read_bytes()
    (inputs / "train_data_batch_5").unlink()
    os.mkfifo(inputs / "train_data_batch_5")
    arguments = ["--output_dir", "out", "--input", *(inputs / f"train_data_batch_{index}" for index in range(1, 6))]
    for number, code, left in [
        (signal.SIGKILL, -signal.SIGKILL, [".out.lock", ".out.writing", "home", "in"]),
        (signal.SIGINT, 130, ["home", "in"]),
    ]:
        scratch = tmp_path / ".out.writing" / "scratch"
        left_before = set(scratch.glob("batch-*"))
        environment = process_options(tmp_path)["env"]
        process = subprocess.Popen(
            command(*arguments),
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a shell that runs the tests in the background makes its children deaf to Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while not set(scratch.glob("batch-*")) - left_before:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # time enough to come to the batch that never arrives
        time.sleep(0.5)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
        assert names(tmp_path) == left
    (inputs / "train_data_batch_5").unlink()
    (inputs / "train_data_batch_5").write_bytes(last)
    again = run(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert "warning: 5 of the 10 batches are missing: train_data_batch_6" in again.stderr
    assert names(tmp_path) == ["home", "in", "out"]
    images = PreparedImages(tmp_path / "out")
    np.testing.assert_array_equal(images[list(range(505))]["pixel_values"], pixels[:505])


def test_class_folders_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        PIL.Image.new("RGB", (100, 50), "red").save(tmp_path / "images" / label / "one.jpg")
    arguments = ["--source", "imagefolder", "--input", "images", "--output_dir", "out", "--resolution", "16"]
    assert main(arguments) == 0
    assert PreparedImages(tmp_path / "out").id2label == {0: "cat", 1: "dog"}
    assert names(tmp_path) == ["images", "out"]


def test_npz_files_of_four_channels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (90, 8, 12, 4), dtype=np.uint8)
    labels = generator.permutation(np.arange(90) % 3)
    class_names = np.array(["cytoplasm", "membrane", "nucleus"])
    (tmp_path / "in").mkdir()
    for part, rows in ((2, slice(20)), (10, slice(20, 90))):
        path = tmp_path / "in" / f"part{part}.npz"
        np.savez_compressed(path, images=pixels[rows], labels=labels[rows], class_names=class_names)
    arguments = ["--source", "npz", "--input", "in", "--output_dir", "out"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert output.startswith("reading 2 .npz files: in/part2.npz, in/part10.npz\n")
    assert "prepared out: 90 images, 3 classes, 12x8 4-channel, 0.0 MB in " in output
    images = PreparedImages(tmp_path / "out")
    assert images.class_names == class_names.tolist()
    batch = images[list(range(90))]
    np.testing.assert_array_equal(batch["pixel_values"], np.moveaxis(pixels, -1, 1))
    np.testing.assert_array_equal(batch["class_labels"], labels)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("already prepared: 90 images, 3 classes, 12x8 4-channel")

    # another pixel in a file of the same name
    pixels[50, 3, 3, 3] ^= 1
    np.savez_compressed(path, images=pixels[20:], labels=labels[20:], class_names=class_names)
    assert main(arguments) == 2
    assert "error: --output_dir out holds other images" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    assert main([*arguments, "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: in/part10.npz cannot be read")
    assert error.count("\n") == 1
    assert names(tmp_path) == ["in", "out"]
    assert len(PreparedImages(tmp_path / "out")) == 90


class HubStandIn(http.server.BaseHTTPRequestHandler):
    """Answers what the Hub answers for a dataset called mice/pictures, and that there is no other."""

    protocol_version = "HTTP/1.1"
    commit = "0" * 40

    def __init__(self, files: dict[str, bytes], *arguments) -> None:
        self.files = files
        super().__init__(*arguments)

    def do_GET(self) -> None:
        path = urllib.parse.urlparse(self.path).path
        repository, _, name = path.partition(f"/resolve/{self.commit}/")
        if repository == "/datasets/mice/pictures" and name in self.files:
            digest = hashlib.sha256(self.files[name]).hexdigest()
            self.answer(200, self.files[name], {"ETag": f'"{digest}"'})
        elif path.startswith("/datasets/mice/pictures/resolve/"):
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path == f"/api/datasets/mice/pictures/tree/{self.commit}/data":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path == f"/api/datasets/mice/pictures/tree/{self.commit}":
            entries = [{"type": "directory", "path": "data", "oid": self.commit}]
            self.answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/datasets/mice/pictures"):
            repository = {"id": "mice/pictures", "sha": self.commit, "tags": []}
            repository["siblings"] = [{"rfilename": name} for name in self.files]
            self.answer(200, json.dumps(repository).encode(), {"Content-Type": "application/json"})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        """Keeps the requests out of the output of the tests."""


def test_a_dataset_of_the_hub(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    pictures = [PIL.Image.new("RGB", (64, 64), (shade, 0, 0)) for shade in (0, 100, 200)]
    dataset = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1, 1]}, features=features)
    dataset.to_parquet(tmp_path / "train.parquet")
    files = {"data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes()}
    (tmp_path / "train.parquet").unlink()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(HubStandIn, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = process_options(tmp_path)
    options["env"] |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    arguments = command("--source", "dataset", "--output_dir", "out", "--input")
    try:
        result = subprocess.run([*arguments, "mice/pictures"], **options)
        missing = subprocess.run([*arguments, "mice/none", "--overwrite"], **options)
    finally:
        server.shutdown()
        server.server_close()
    assert result.returncode == 0, result.stderr
    batch = PreparedImages(tmp_path / "out")[[0, 1, 2]]
    assert batch["class_labels"].tolist() == [0, 1, 1]
    assert batch["pixel_values"][:, 0].flatten(1).unique(dim=1).flatten().tolist() == [0, 100, 200]
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("error: --input mice/none --split train: cannot be loaded (")
    assert names(tmp_path) == ["home", "out"]


@pytest.mark.parametrize("content", ["html", "truncated zip", "malicious", "labels"])
def test_wrong_data_is_one_line_and_leaves_nothing(tmp_path, published, capsys, content):
    paths, _, _ = published
    path = tmp_path / "Imagenet64_train_part1.zip"
    marker = tmp_path / "marker"
    whole = paths[0].read_bytes()
    if content == "html":
        path.write_bytes(b"<!DOCTYPE html><html>moved</html>")
    elif content == "truncated zip":
        path.write_bytes(whole[:-1000])
    else:
        evil = b"cposix\nsystem\n(V" + f"touch {marker}".encode() + b"\ntR."
        wrong = pickle.dumps({"data": np.zeros((2, 192), np.uint8), "labels": [1, 1001]})
        with zipfile.ZipFile(path, "w") as archive:
            with zipfile.ZipFile(paths[0]) as good:
                archive.writestr("train_data_batch_1", good.read("train_data_batch_1"))
            archive.writestr("train_data_batch_2", evil if content == "malicious" else wrong)
    message = {
        "html": f"error: {path} cannot be read",
        "truncated zip": f"error: {path} cannot be read",
        "malicious": f"error: {path} entry train_data_batch_2 cannot be read (wants posix.system",
        "labels": f'error: {path} entry train_data_batch_2 "labels" has the label 1001 for image 1, but labels',
    }[content]
    assert main(["--input", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1
    assert error[0].startswith(message)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --input is missing"),
        (["--input", "nowhere.zip"], "error: --input nowhere.zip: no such file"),
        (["--resolution", "64"], "error: --resolution is for --source imagefolder and dataset, not imagenet64"),
        (["--source", "mnist", "--color_mode", "rgb"], "error: --color_mode is for"),
        (["--source", "mnist", "--input", "x"], "error: --input x: --source mnist takes none"),
        (["--source", "mnist", "--split", "test"], "error: --split test: the digits have only"),
        (["--source", "mnist", "--max_images", "0"], "error: max_images is 0, but must be at least 1"),
        (["--source", "npz"], "error: --input is missing: give the .npz files"),
        (["--source", "npz", "--input", "nowhere.npz"], "error: --input nowhere.npz: no such file"),
        (["--source", "npz", "--input", "x", "--split", "test"], "error: --split test: .npz files have only"),
        (["--source", "npz", "--resolution", "64"], "error: --resolution is for --source imagefolder and dataset"),
        (["--source", "imagefolder"], "error: --input has 0 values"),
        (
            ["--source", "imagefolder", "--input", "x", "--label_column", "y"],
            "error: --image_column and --label_column",
        ),
        (["--source", "dataset"], "error: --input has 0 values"),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_are_refused_by_the_parser(tmp_path, capsys):
    for arguments in (["--source", "cifar", "--output_dir", "x"], ["--source", "mnist"], ["--output_dir", "x", "--y"]):
        assert main(arguments) == 2
    assert "unrecognized arguments: --y" in capsys.readouterr().err


def test_from_python(tmp_path, capsys):
    options = PrepareOptions(output_dir=str(tmp_path / "out"), source="mnist", max_images=20)
    assert prepare(options) == tmp_path / "out"
    assert len(datasets.load_from_disk(str(tmp_path / "out"))) == 20
    assert prepare(options) == tmp_path / "out"
    assert capsys.readouterr().out.splitlines()[-1].startswith("already prepared: 20 images")
    options.max_images = 30
    options.overwrite = True
    prepare(options)
    assert len(PreparedImages(tmp_path / "out")) == 30
