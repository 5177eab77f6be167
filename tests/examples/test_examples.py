"""The programs of examples/ do what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

from imagenet64_diffusion import ClassConditionalPipeline


ROOT = Path(__file__).parents[2]
CLASSIFIER = ROOT / "evaluation" / "digits_classifier"
# the gap between images of a grid, and the side of a digit in it, in pixels
GAP, SIDE = 2, 64


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs a program of examples/ in an empty folder and gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def rows_of_digits(file: Path) -> np.ndarray:
    """The digits of a grid of ten columns, (rows, 10, 32, 32), -1 to 1; captions stand left of the rows."""
    sheet = np.asarray(Image.open(file).convert("L"), dtype=np.float32)
    cells = sheet[GAP:, -10 * (SIDE + GAP) :]
    rows = len(cells) // (SIDE + GAP)
    cells = cells[: rows * (SIDE + GAP)].reshape(rows, SIDE + GAP, 10, SIDE + GAP).transpose(0, 2, 1, 3)
    # enlarged by two without interpolation
    return cells[:, :, :SIDE:2, :SIDE:2] / 127.5 - 1


@pytest.fixture(scope="module")
def read_digits():
    """Reads digits by a classifier that is right on 98.8 % of real ones."""
    classifier = AutoModelForImageClassification.from_pretrained(CLASSIFIER).eval()

    def read(digits: np.ndarray) -> list[int]:
        with torch.no_grad():
            return classifier(torch.from_numpy(digits.copy())[:, None]).logits.argmax(dim=1).tolist()

    return read


def test_rows_of_digits(tmp_path, read_digits):
    """The cells of a grid are found where they are, and their contents read."""
    from imagenet64_diffusion.pipelines.image_grid import image_grid

    rng = np.random.default_rng(0)
    digits = rng.integers(0, 256, (2, 10, 32, 32), dtype=np.uint8)
    images = [Image.fromarray(digit) for digit in digits.reshape(20, 32, 32)]
    image_grid(images, ["first"] * 10 + ["second row"] * 10, columns=10).save(tmp_path / "grid.png")
    np.testing.assert_allclose(rows_of_digits(tmp_path / "grid.png"), digits / np.float32(127.5) - 1, atol=1e-6)


def test_swap_scheduler(tmp_path, run_example, read_digits):
    schedulers = ["UniPCMultistep", "DPMSolverMultistep"]
    arguments = ["--schedulers", *schedulers, "--num_reference_steps", 25, "--output", "grid.png"]
    said = run_example("swap_scheduler.py", *arguments)
    assert "3 schedulers are in grid.png" in said
    own, *others = rows_of_digits(tmp_path / "grid.png")
    expected = list(range(10))
    assert sum(a == b for a, b in zip(read_digits(own), expected, strict=True)) >= 9
    for other in others:
        # another way to the same image: not the same pixels, but the same digits
        assert 0 < np.abs(other - own).mean() < 0.2
        assert sum(a == b for a, b in zip(read_digits(other), expected, strict=True)) >= 9
    assert (others[0] != others[1]).any()


def test_callback_guidance(tmp_path, run_example, read_digits):
    arguments = ["--guidance_scale", "3", "--num_inference_steps", "12", "--output", "grid.png"]
    said = run_example("callback_guidance.py", *arguments)
    assert "guidance scale, after the first and the last step: 5 and 1" in said
    first, last = map(float, re.search(r"noise in the images, .*: ([\d.]+) and ([\d.]+)", said).groups())
    assert last < 0.05 < 0.3 < first
    constant, falling = rows_of_digits(tmp_path / "grid.png")
    assert sum(a == b for a, b in zip(read_digits(falling), range(10), strict=True)) >= 9
    # that the scale of the callback is the one that is used
    pipeline = ClassConditionalPipeline.from_pretrained(ROOT / "pretrained" / "digits")
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(10)]
    images = pipeline(list(range(10)), guidance_scale=5, num_inference_steps=12, generator=generator).images
    strongest = np.stack([np.asarray(image, dtype=np.float32) / 127.5 - 1 for image in images])
    assert np.abs(falling - strongest).mean() > 1e-3
    assert np.abs(falling - constant).mean() > 1e-3


def test_custom_training_loop(tmp_path, prepared):
    # a process of its own, since an Accelerator stays for the whole process
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    arguments = ["--train_data_dir", prepared, "--output_dir", "model", "--num_train_epochs", "8"]
    finished = subprocess.run(
        [sys.executable, ROOT / "examples" / "custom_training_loop.py", *arguments, "--train_batch_size", "16"],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 200},
    )
    assert finished.returncode == 0, finished.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", finished.stdout)]
    assert len(losses) == 8
    assert np.mean(losses[-3:]) < 0.6 * losses[0]
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels == {"dark": 0, "grey": 1, "light": 2}
    images = pipeline(
        ["dark", "light"], num_images_per_label=8, guidance_scale=1, num_inference_steps=20, output_type="pt"
    ).images
    # the classes differ in brightness by 160 of 255
    assert images[8:].mean() - images[:8].mean() > 0.3


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.py")), ids=lambda file: file.stem)
def test_is_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 60
