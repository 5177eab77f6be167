"""The programs of examples/ do what they say."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoModelForImageClassification

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import seeded


ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Runs a program of examples/ in an empty folder and gives what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object) -> str:
        file = ROOT / "examples" / f"{name}.py"
        assert len(file.read_text(encoding="utf-8").splitlines()) < 60
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(file), run_name="__main__")
        return capsys.readouterr().out

    return run


def rows_of_digits(file: Path) -> np.ndarray:
    """The digits of a grid of ten columns, (rows, 10, 32, 32), -1 to 1; captions stand left of the rows."""
    sheet = np.asarray(Image.open(file).convert("L"), dtype=np.float32)
    # cells of 64x64 pixels, enlarged by two without interpolation, and a gap of 2
    cells = sheet[2:, -660:]
    rows = len(cells) // 66
    return cells[: rows * 66].reshape(rows, 66, 10, 66).transpose(0, 2, 1, 3)[:, :, :64:2, :64:2] / 127.5 - 1


@pytest.fixture(scope="module")
def number_of_right_digits():
    """How many of the digits 0 to 9 a classifier reads that is right on 98.8 % of real ones."""
    classifier = AutoModelForImageClassification.from_pretrained(ROOT / "evaluation" / "digits_classifier").eval()

    def count(digits: np.ndarray) -> int:
        with torch.no_grad():
            read = classifier(torch.from_numpy(digits.copy())[:, None]).logits.argmax(dim=1)
        return (read == torch.arange(10)).sum()

    return count


def test_swap_scheduler(tmp_path, run_example, number_of_right_digits):
    schedulers = ["--schedulers", "UniPCMultistep", "DPMSolverMultistep", "--num_reference_steps", 25]
    said = run_example("swap_scheduler", *schedulers, "--output", "grid.png")
    assert "3 schedulers are in grid.png" in said
    rows = rows_of_digits(tmp_path / "grid.png")
    assert min(map(number_of_right_digits, rows)) >= 9
    for other in rows[1:]:
        # another way to the same image: not the same pixels, but the same digits
        assert 0 < np.abs(other - rows[0]).mean() < 0.2
    assert (rows[1] != rows[2]).any()


def test_callback_guidance(tmp_path, run_example, number_of_right_digits):
    arguments = ["--guidance_scale", "3", "--num_inference_steps", "12", "--output", "grid.png"]
    said = run_example("callback_guidance", *arguments)
    assert "guidance scale, after the first and the last step: 5 and 1" in said
    first, last = map(float, re.search(r"noise in the images, .*: ([\d.]+) and ([\d.]+)", said).groups())
    assert last < 0.05 < 0.3 < first
    constant, falling = rows_of_digits(tmp_path / "grid.png")
    assert number_of_right_digits(falling) >= 9
    # that the scale of the callback is the one that is used
    pipeline = ClassConditionalPipeline.from_pretrained(DIGITS)
    options = {"num_inference_steps": 12, "generator": seeded(*range(10)), "output_type": "np"}
    strongest = pipeline(list(range(10)), guidance_scale=5, **options).images[..., 0] * 2 - 1
    assert min(np.abs(falling - strongest).mean(), np.abs(falling - constant).mean()) > 1e-3


def test_custom_training_loop(tmp_path, prepared, run_example, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    # an Accelerator stays for the whole process
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--output_dir", "model", "--num_train_epochs", "5", "--train_batch_size", "16"]
    said = run_example("custom_training_loop", "--train_data_dir", prepared, *arguments)
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 5
    assert np.mean(losses[-2:]) < 0.7 * losses[0]
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.labels == {"dark": 0, "grey": 1, "light": 2}
    options = {"guidance_scale": 1, "num_inference_steps": 10, "generator": seeded(*range(8)), "output_type": "pt"}
    dark, light = pipeline(["dark", "light"], num_images_per_label=4, **options).images.split(4)
    # the classes differ in brightness by 160 of 255
    assert light.mean() - dark.mean() > 0.3
