"""imagenet64-generate, as its users run it."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.generate_images import main
from imagenet64_diffusion.tests.commands.processes import (
    CommandProcess,
    distributed,
    free_port,
    run_command,
    snapshot,
    wait_until,
)
from imagenet64_diffusion.tests.components import make_pipeline


def run(*arguments, code=0):
    assert main([str(argument) for argument in arguments]) == code


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


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_everything_it_writes(model, tmp_path):
    arguments = ["--model", model, "--class_labels", "all", "--num_images_per_label", 2, "--num_inference_steps", 5]
    finished = run_command(
        "generate_images", *arguments, "--fps", 20, "--output_dir", "new/samples", directory=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    assert "6 images, grid.png, denoising.gif and manifest.json are in new/samples" in finished.stdout
    assert "5/5" in finished.stderr

    folder = tmp_path / "new" / "samples"
    assert names(folder) == [*(f"{i:05d}.png" for i in range(6)), "denoising.gif", "grid.png", "manifest.json"]
    assert pixels(folder, "00000.png").shape == (16, 16)
    with Image.open(folder / "denoising.gif") as animation:
        assert (animation.n_frames, animation.info["duration"]) == (5, 50)
        animation.seek(4)
        last = np.asarray(animation.convert("L")).astype(int)
    with Image.open(folder / "grid.png") as grid:
        # a GIF has 256 colours, which are enough for greys
        assert np.abs(np.asarray(grid.convert("L")).astype(int) - last).max() <= 2

    images = manifest_of(folder)["images"]
    assert [image["class_label"] for image in images] == [0, 0, 1, 1, 2, 2]
    assert images[2] == {"file": "00002.png", "class_label": 1, "class_name": "goldfish", "seed": 2}


def test_each_image_again_from_the_manifest(model, tmp_path):
    """By hand, with diffusers alone, one at a time."""
    arguments = ["--model", model, "--class_labels", "goldfish", 2, "null", "--num_images_per_label", 2, "--seed", 40]
    arguments += ["--eta", 0.5, "--guidance_scale", 2.5, "--guidance_interval", 0.2, 0.9, "--step_size", 200]
    run(*arguments, "--batch_size", 4, "--output_dir", tmp_path)
    manifest = manifest_of(tmp_path)
    assert manifest["timesteps"] == [800, 600, 400, 200, 0]
    assert [image["class_label"] for image in manifest["images"]] == [1, 1, 2, 2, None, None]
    pipeline = ClassConditionalPipeline.from_pretrained(manifest["model"])
    pipeline.set_progress_bar_config(disable=True)
    options = {name: manifest["options"][name] for name in ("eta", "guidance_scale", "guidance_interval")}
    options["timesteps"] = list(map(int, manifest["timesteps"]))
    for image in manifest["images"]:
        generator = torch.Generator().manual_seed(image["seed"])
        again = pipeline(image["class_label"], generator=generator, **options).images[0]
        assert np.abs(np.asarray(again).astype(int) - pixels(tmp_path, image["file"])).max() <= 1


def test_random_classes_come_from_the_seed(model, tmp_path):
    chosen = []
    for seed in (1, 1, 2):
        arguments = ["--num_images", 20, "--seed", seed, "--num_inference_steps", 1, "--animation", "false"]
        arguments += ["--scheduler", "HeunDiscrete", "--dtype", "bfloat16"]
        run("--model", model, *arguments, "--output_dir", tmp_path / "out")
        chosen.append([image["class_label"] for image in manifest_of(tmp_path / "out")["images"]])
    assert chosen[0] == chosen[1] != chosen[2]
    assert set(chosen[0]) == {0, 1, 2}
    assert "denoising.gif" not in names(tmp_path / "out")
    assert manifest_of(tmp_path / "out")["scheduler"]["class"] == "HeunDiscreteScheduler"
    assert pixels(tmp_path / "out", "00000.png").std() > 1


def test_writes_over_its_own_and_nothing_else(model, tmp_path):
    arguments = ["--model", model, "--num_inference_steps", 1]
    run(*arguments, "--num_images", 5, "--output_dir", tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("keep")
    run(*arguments, "--num_images", 2, "--output_dir", tmp_path / "out")
    written = ["00000.png", "00001.png", "denoising.gif", "grid.png", "manifest.json"]
    assert names(tmp_path / "out") == [*written, "mine.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("keep")
    run(*arguments, "--output_dir", tmp_path / "other", code=2)
    assert names(tmp_path / "other") == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class_labels", "tabbi"], "error: there is no class named 'tabbi'; did you mean 'tabby'"),
        (["--class_labels", "all", "1"], "error: class_labels names 'all' among others, but it must stand alone"),
        (["--scheduler", "Magic"], "error: there is no scheduler named 'Magic'"),
        (["--num_inference_steps", "0"], "error: num_inference_steps is 0, but must be at least 1"),
        (["--num_inference_steps", "5", "--step_size", "5"], "error: num_inference_steps and step_size both say"),
        (["--fps", "0"], "error: fps is 0.0, but must be in (0, 100]"),
        (["--model", "nowhere/at/all"], "error: "),
    ],
)
def test_wrong_options(model, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run("--model", model, "--output_dir", "out", *arguments, code=2)
    assert message in capsys.readouterr().err
    # a run that fails before its first image leaves nothing
    assert names(tmp_path) == []


# 9 images in batches of 2
MANY = ["--class_labels", "all", "--num_images_per_label", "3", "--batch_size", "2", "--num_inference_steps", "6"]
MANY += ["--clip_sample", "true", "--eta", "1"]


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """The files of a run that nothing happens to; the folder has the same relative name everywhere."""
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        run("--model", model, *MANY, "--output_dir", "out")
    # the timesteps are those of the scheduler that clips, not of the model's own
    assert len(manifest_of(folder)["timesteps"]) == 6
    return folder


def start(model, folder, *arguments, log="log", **options):
    words = ["--model", model, *MANY, *arguments, "--output_dir", "out"]
    return CommandProcess(words, folder / log, directory=folder, program="generate_images", **options)


def resume_and_compare(model, folder, undisturbed, monkeypatch):
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("0*.png")}
    monkeypatch.chdir(folder.parent)
    run("--model", model, *MANY, "--output_dir", "out")
    assert snapshot(folder) == snapshot(undisturbed)
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert [name for name in names(folder.parent) if name != "log"] == ["out"]


def test_killed_again_and_again(model, undisturbed, tmp_path, monkeypatch):
    """The same command resumes: files that are there stay, and in the end all are those of an undisturbed run."""
    for last in ("00000.png", "00003.png", "00008.png", "grid.png"):
        process = start(model, tmp_path)
        wait_until((tmp_path / "out" / last).exists, process)
        process.send(signal.SIGKILL)
        process.end()
    resume_and_compare(model, tmp_path / "out", undisturbed, monkeypatch)


@pytest.mark.parametrize("leftover", ["frames", ".writing.00002.png", "manifest.json", "other batches"])
def test_what_a_kill_may_leave(model, undisturbed, tmp_path, monkeypatch, leftover):
    """Moments that are too short to be met."""
    folder = tmp_path / "out"
    if leftover == "manifest.json":  # killed while this was written
        folder.mkdir()
        (folder / ".writing.manifest.json").write_text("{")
    else:
        shutil.copytree(undisturbed, folder)
        (folder / "manifest.json").write_text(json.dumps(manifest_of(folder) | {"unfinished": True}))
        for name in (*(f"{number:05d}.png" for number in range(2, 9)), "grid.png", "denoising.gif"):
            (folder / name).unlink()
        (folder / ".frames").mkdir()  # an image whose way from noise is lost
        if leftover == "other batches":  # of the same command with another batch_size
            np.save(folder / ".frames" / "00000+3.npy", np.zeros(3))
        elif leftover != "frames":
            (folder / leftover).write_bytes(b"half")
    resume_and_compare(model, folder, undisturbed, monkeypatch)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)]
)
def test_stopped_by_a_signal(model, undisturbed, tmp_path, monkeypatch, capsys, number, code):
    process = start(model, tmp_path)
    wait_until((tmp_path / "out" / "00001.png").exists, process)
    process.send(number)
    assert process.end() == code
    assert f"stopped by {number.name}; the images in out stay: the same command resumes" in process.output()
    assert "Traceback" not in process.output()
    # another run does not take the place of one that has begun, and says what differs
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path / "out")
    run("--model", model, *MANY, "--guidance_scale", 2, "--output_dir", "out", code=2)
    said = capsys.readouterr().err
    assert "error: output_dir is out, which holds an unfinished run with guidance_scale 5.0 instead of 2" in said
    assert snapshot(tmp_path / "out") == before
    resume_and_compare(model, tmp_path / "out", undisturbed, monkeypatch)


def test_a_finished_run_is_not_generated_again_unless_the_model_has_changed(model, tmp_path, monkeypatch):
    copy = shutil.copytree(model, tmp_path / "model")
    arguments = ["--model", copy, "--num_images", 2, "--num_inference_steps", 2, "--output_dir", tmp_path / "out"]
    run(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(ClassConditionalPipeline, "__call__", None)
        run(*arguments)
    before = pixels(tmp_path / "out", "00000.png")
    make_pipeline(time_embed_dim=8).save_pretrained(copy)
    run(*arguments)
    assert (pixels(tmp_path / "out", "00000.png") != before).any()


def start_two(model, folder):
    port = free_port()
    environments = [distributed(rank, 2, port) for rank in range(2)]
    return [start(model, folder, log=f"log{rank}", environment=each) for rank, each in enumerate(environments)]


def test_two_ranks_do_what_one_does(model, undisturbed, tmp_path):
    ranks = start_two(model, tmp_path)
    assert [process.end() for process in ranks] == [0, 0], [process.output() for process in ranks]
    assert "".join(process.output() for process in ranks).count("9 images") == 1
    assert snapshot(tmp_path / "out") == snapshot(undisturbed)


def test_a_rank_that_fails_stops_the_other(model, tmp_path):
    """The second of two cannot write its first image; the first begins no further batch."""
    (tmp_path / "out" / ".writing.00002.png").mkdir(parents=True)
    ranks = start_two(model, tmp_path)
    assert all(process.end() != 0 for process in ranks)
    said = "".join(process.output() for process in ranks)
    assert said.count("error: ") == 1
    assert "process 1 of 2" in said
    assert not (tmp_path / "out" / "00004.png").exists()


def test_one_writer_at_a_time(model, tmp_path, monkeypatch, capsys):
    process = start(model, tmp_path, "--num_inference_steps", 900)
    wait_until((tmp_path / "out" / "manifest.json").exists, process)
    monkeypatch.chdir(tmp_path)
    run("--model", model, *MANY, "--num_inference_steps", 900, "--output_dir", "out", code=2)
    assert "another process is writing to it now" in capsys.readouterr().err
    process.send(signal.SIGKILL)
    process.end()
