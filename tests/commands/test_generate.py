"""imagenet64-generate, as its users run it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.generate_images import main
from imagenet64_diffusion.tests.commands.runs import run_script
from imagenet64_diffusion.tests.components import make_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def pixels(folder, name):
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_everything_it_writes(model, tmp_path):
    arguments = ["--model", model, "--class_labels", "all", "--num_images_per_label", 2, "--num_inference_steps", 5]
    finished = run_script("generate_images.py", *arguments, "--fps", 20, "--output_dir", "new/samples", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "6 images, the grid and the animation and manifest.json are in new/samples" in finished.stdout
    assert "5/5" in finished.stderr

    folder = tmp_path / "new" / "samples"
    assert names(folder) == [*(f"{i:05d}.png" for i in range(6)), "denoising.gif", "grid.png", "manifest.json"]
    assert pixels(folder, "00000.png").shape == (16, 16)
    with Image.open(folder / "denoising.gif") as animation:
        assert animation.n_frames == 5
        assert animation.info["duration"] == 50
        animation.seek(4)
        last = np.asarray(animation.convert("L")).astype(int)
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == last.shape[::-1]
        # a GIF has 256 colours, which are enough for greys
        assert np.abs(np.asarray(grid.convert("L")).astype(int) - last).max() <= 2

    manifest = json.loads((folder / "manifest.json").read_text())
    assert [image["class_label"] for image in manifest["images"]] == [0, 0, 1, 1, 2, 2]
    assert manifest["images"][2] == {"file": "00002.png", "class_label": 1, "class_name": "goldfish", "seed": 2}


def test_each_image_again_from_the_manifest(model, tmp_path):
    """By hand, with diffusers alone, one at a time."""
    arguments = [
        "--model",
        str(model),
        "--output_dir",
        str(tmp_path / "out"),
        "--class_labels",
        "goldfish",
        "2",
        "null",
    ]
    arguments += ["--eta", "0.5", "--guidance_scale", "2.5", "--guidance_interval", "0.2", "0.9", "--seed", "40"]
    assert main([*arguments, "--step_size", "200", "--num_images_per_label", "2", "--batch_size", "4"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["timesteps"] == [800, 600, 400, 200, 0]
    options = manifest["options"]
    pipeline = ClassConditionalPipeline.from_pretrained(manifest["model"])
    pipeline.set_progress_bar_config(disable=True)
    for image in manifest["images"]:
        again = pipeline(
            image["class_label"],
            timesteps=[int(timestep) for timestep in manifest["timesteps"]],
            eta=options["eta"],
            guidance_scale=options["guidance_scale"],
            guidance_interval=options["guidance_interval"],
            generator=torch.Generator().manual_seed(image["seed"]),
        ).images[0]
        assert np.abs(np.asarray(again).astype(int) - pixels(tmp_path / "out", image["file"])).max() <= 1
    assert [image["class_label"] for image in manifest["images"]] == [1, 1, 2, 2, None, None]


def test_batch_size_and_place_do_not_matter(model, tmp_path):
    common = ["--model", str(model), "--class_labels", "0", "1", "2", "0", "1", "2", "0", "1", "--eta", "1"]
    common += ["--num_inference_steps", "4"]
    for batch_size in ("1", "3", "8"):
        assert main([*common, "--batch_size", batch_size, "--output_dir", str(tmp_path / batch_size)]) == 0
    for number in range(8):
        name = f"{number:05d}.png"
        for other in ("1", "3"):
            assert np.abs(pixels(tmp_path / other, name) - pixels(tmp_path / "8", name)).max() <= 1
    # seed 5 is class 2, the sixth of those above
    assert (
        main([*common[:2], "--class_labels", "2", *common[-4:], "--seed", "5", "--output_dir", str(tmp_path / "a")])
        == 0
    )
    assert np.abs(pixels(tmp_path / "a", "00000.png") - pixels(tmp_path / "8", "00005.png")).max() <= 1


def test_random_classes_come_from_the_seed(model, tmp_path):
    chosen = []
    for seed in (1, 1, 2):
        arguments = ["--model", str(model), "--num_images", "20", "--seed", str(seed), "--num_inference_steps", "1"]
        assert main([*arguments, "--animation", "false", "--output_dir", str(tmp_path / "out")]) == 0
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        chosen.append([image["class_label"] for image in manifest["images"]])
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0]) == {0, 1, 2}
    assert "denoising.gif" not in names(tmp_path / "out")


@pytest.mark.parametrize("scheduler", ["DDIM", "DPMSolverMultistep", "LearnedVarianceDDPM", "HeunDiscreteScheduler"])
def test_schedulers(model, tmp_path, scheduler):
    arguments = ["--model", str(model), "--scheduler", scheduler, "--num_inference_steps", "3", "--num_images", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["scheduler"]["class"].startswith(scheduler)
    assert pixels(tmp_path / "out", "00000.png").std() > 1


def test_other_dtypes(model, tmp_path):
    for dtype in ("float32", "bfloat16"):
        arguments = ["--model", str(model), "--dtype", dtype, "--num_inference_steps", "3", "--num_images", "3"]
        assert main([*arguments, "--output_dir", str(tmp_path / dtype)]) == 0
    difference = pixels(tmp_path / "float32", "00000.png") - pixels(tmp_path / "bfloat16", "00000.png")
    assert 0 < np.abs(difference).mean() < 12


def test_writes_over_its_own_and_nothing_else(model, tmp_path):
    arguments = ["--model", str(model), "--num_inference_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--num_images", "5"]) == 0
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert main([*arguments, "--num_images", "2"]) == 0
    assert names(tmp_path / "out") == [
        "00000.png",
        "00001.png",
        "denoising.gif",
        "grid.png",
        "manifest.json",
        "mine.txt",
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("keep")
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert names(tmp_path / "other") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_labels", "tabbi"], "error: there is no class named 'tabbi'; did you mean 'tabby'"),
        (["--class_labels", "3"], "error: class label 3 is out of range: ids go from 0 to 2"),
        (["--class_labels", "-1"], "error: class label -1 is out of range"),
        (["--class_labels", "all", "1"], "error: class_labels names 'all' among others, but it must stand alone"),
        (["--scheduler", "Magic"], "error: there is no scheduler named 'Magic'"),
        (["--num_inference_steps", "0"], "error: num_inference_steps is 0, but must be at least 1"),
        (["--num_inference_steps", "5", "--step_size", "5"], "error: num_inference_steps and step_size both say"),
        (["--guidance_interval", "0.9", "0.1"], "error: guidance_interval is"),
        (["--fps", "0"], "error: fps is 0.0, but must be above 0"),
        (["--eta", "2"], "error: eta is 2.0"),
        (["--model", "nowhere/at/all"], "error: "),
    ],
)
def test_wrong_options(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--model", str(model), "--output_dir", "out", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_wrong_option_as_a_process(model, tmp_path):
    finished = run_script("generate_images.py", "--model", model, "--class_labels", "dog", cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: there is no class named 'dog'")
    assert "Traceback" not in finished.stderr
    assert names(tmp_path) == []
