"""imagenet64-train, as its users run it."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.tests.commands.processes import run_command
from imagenet64_diffusion.tests.commands.runs import run_script
from imagenet64_diffusion.tests.commands.training_runs import TINY
from imagenet64_diffusion.train_imagenet64 import main
from imagenet64_diffusion.training.checkpoints import load_checkpoint


@pytest.fixture
def train(tmp_path, prepared):
    """Trains a tiny network in a process of its own, or several; gives the finished process and the output folder."""
    (tmp_path / "unet.json").write_text(json.dumps(TINY))

    def run(*arguments, name="out", processes=1):
        output_dir = tmp_path / name
        arguments = [
            *("--train_data_dir", prepared, "--output_dir", output_dir),
            *("--model_config_name_or_path", tmp_path / "unet.json", "--num_inference_steps", 2),
            *("--lr_warmup_steps", 0, "--logging_steps", 2, "--num_samples_per_class", 2),
            *arguments,
        ]
        if processes > 1:
            return run_script("train_imagenet64.py", *arguments, processes=processes), output_dir
        return run_command("train_imagenet64", *arguments), output_dir

    return run


def weights(output_dir):
    return load_file(output_dir / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def losses(output_dir):
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def test_from_data_to_pipeline(train):
    finished, output_dir = train("--max_train_steps", 6, "--train_batch_size", 8, "--sample_steps", 3)
    assert finished.returncode == 0, finished.stderr
    assert "96 images of 1x16x16, 3 classes, predicting v_prediction" in finished.stdout
    assert "images/s" in finished.stderr
    assert sorted(path.name for path in output_dir.iterdir()) == [
        "checkpoints",
        "loss_chart.png",
        "metrics.jsonl",
        "model",
        "sample_grids",
        "train",
    ]
    assert [path.name for path in (output_dir / "checkpoints").iterdir()] == ["checkpoint-6"]
    assert list(output_dir.parent.glob(".*")) == []
    assert [path.name for path in sorted((output_dir / "sample_grids").iterdir())] == [
        "step_0000003.png",
        "step_0000006.png",
    ]
    with Image.open(output_dir / "sample_grids" / "step_0000006.png") as grid:
        assert grid.size[0] > 2 * 64
    assert [path for path in (output_dir / "train").iterdir() if path.name.startswith("events.out.tfevents")]
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    quarters = [f"loss_quarter_{number}" for number in range(1, 5)]
    assert list(rows[0]) == [
        *("step", "loss", *quarters, "gradient_norm", "lr", "epoch", "images_per_second", "peak_memory_gib")
    ]
    assert [row["epoch"] for row in rows] == [pytest.approx(step * 8 / 96) for step in (2, 4, 6)]

    card = (output_dir / "model" / "README.md").read_text()
    assert "| optimizer steps | 6 |" in card
    assert (output_dir / "model" / "samples.png").is_file()
    pipeline = ClassConditionalPipeline.from_pretrained(output_dir / "model")
    assert pipeline.config.id2label == {0: "dark", 1: "grey", 2: "light"}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.sample_size == 16
    assert len(pipeline(["light", None], num_inference_steps=2).images) == 2


def test_learns(train):
    """The loss falls, and what is saved is the EMA of the weights, not the last ones."""
    options = ("--max_train_steps", 40, "--train_batch_size", 16, "--learning_rate", "3e-3", "--report_to", "none")
    finished, output_dir = train(*options)
    assert finished.returncode == 0, finished.stderr
    found = losses(output_dir)
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    finished, plain_dir = train(*options, "--use_ema", "false", name="plain")
    assert finished.returncode == 0, finished.stderr
    # the same options give the same losses
    assert losses(plain_dir) == found
    assert (weights(output_dir)["conv_in.weight"] != weights(plain_dir)["conv_in.weight"]).any()


@pytest.mark.parametrize(
    "options",
    [
        ("--timestep_sampling", "importance", "--num_train_timesteps", 4, "--num_inference_steps", 4),
        ("--prediction_type", "epsilon", "--beta_schedule", "original_cosine"),
        ("--prediction_type", "sample", "--beta_schedule", "linear", "--random_flip"),
        ("--mixed_precision", "bf16", "--gradient_checkpointing", "--dataset_in_memory"),
        ("--num_train_epochs", 0.4, "--gradient_accumulation_steps", 2, "--lr_scheduler", "cosine"),
        ("--dataloader_num_workers", 2, "--max_grad_norm", 0),
    ],
    ids=lambda options: options[0],
)
def test_options(train, options):
    steps = () if "--num_train_epochs" in options else ("--max_train_steps", 12)
    finished, output_dir = train("--train_batch_size", 8, "--report_to", "none", *steps, *options)
    assert finished.returncode == 0, finished.stderr
    assert all(torch.isfinite(weight).all() for weight in weights(output_dir).values())
    rows = (output_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["step"] == (2 if "--num_train_epochs" in options else 12)


def test_pieces_and_processes_do_not_matter(train):
    """A batch of 16 at once, in two pieces, or on two processes: the same weights to float32 rounding."""
    options = ("--max_train_steps", 10, "--learning_rate", "1e-3", "--adam_epsilon", "1e-4", "--report_to", "none")
    options += ("--lr_scheduler", "cosine")
    runs = {
        "whole": train("--train_batch_size", 16, *options, name="whole"),
        "pieces": train("--train_batch_size", 8, "--gradient_accumulation_steps", 2, *options, name="pieces"),
        "processes": train("--train_batch_size", 8, *options, name="processes", processes=2),
    }
    for finished, _ in runs.values():
        assert finished.returncode == 0, finished.stderr
    assert "10 steps of 16 images" in runs["processes"][0].stdout
    assert "on 2 x cpu" in runs["processes"][0].stdout

    logs, states = {}, {}
    for name, (_, output_dir) in runs.items():
        logs[name] = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        states[name] = load_checkpoint(output_dir / "checkpoints" / "checkpoint-10")
        assert states[name].progress.images_seen == 160
        assert states[name].averaged_weights[1] == 10
    for name in ("pieces", "processes"):
        for entry, expected in zip(logs[name], logs["whole"], strict=True):
            for key in ("step", "lr", "epoch"):
                assert entry[key] == expected[key]
            for key in ("loss", "gradient_norm"):
                assert entry[key] == pytest.approx(expected[key], rel=1e-4), name
        whole = dict(states["whole"].weights)
        for key, weight in states[name].weights.items():
            torch.testing.assert_close(weight, whole[key], atol=2e-5, rtol=1e-3, msg=f"{name}: {key}")
        averages = zip(states[name].averaged_weights[0], states["whole"].averaged_weights[0], strict=True)
        for weight, expected in averages:
            torch.testing.assert_close(weight, expected, atol=2e-5, rtol=1e-3)
        grids = [(runs[run][1] / "sample_grids" / "step_0000010.png") for run in (name, "whole")]
        assert Image.open(grids[0]).size == Image.open(grids[1]).size


def test_a_checkpoint_that_cannot_be_had(tmp_path, prepared, capfd):
    options = ["--train_data_dir", str(prepared), "--output_dir", str(tmp_path / "out")]
    assert main([*options, "--resume_from_checkpoint", str(tmp_path / "nowhere")]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message == (
        f"error: resume_from_checkpoint is '{tmp_path / 'nowhere'}', but there is no such folder: give a checkpoint,"
        " or latest, or never"
    )
    (tmp_path / "empty").mkdir()
    assert main([*options, "--resume_from_checkpoint", str(tmp_path / "empty")]) == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message == f"error: {tmp_path / 'empty'} is not a whole checkpoint: there is no training_state.json"
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_file_of_options(train, tmp_path):
    (tmp_path / "options.json").write_text(json.dumps({"max_train_steps": 3, "train_batch_size": 4}))
    finished, _ = train("--config", tmp_path / "options.json", "--train_batch_size", 2)
    assert finished.returncode == 0, finished.stderr
    assert "3 steps of 2 images" in finished.stdout
    (tmp_path / "options.yaml").write_text("max_train_steps: 3\nbatch: 4\n")
    finished, _ = train("--config", tmp_path / "options.yaml")
    assert finished.returncode == 2
    assert "names 'batch', which is not an option" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_data_dir", "nowhere"], "error: train_data_dir is nowhere, but there is no such folder"),
        (["--train_data_dir", "."], "error: .*prepare"),
        (["--learning_rate", "-1"], "error: learning_rate is -1.0, but must be above 0"),
        (["--model_config_name_or_path", "rse"], "error: model_config_name_or_path is 'rse'"),
    ],
)
def test_wrong_options(tmp_path, prepared, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["--train_data_dir", str(prepared), "--output_dir", "out", *arguments]) == 2
    last_line = capfd.readouterr().err.strip().splitlines()[-1]
    assert re.match(message, last_line), last_line
    assert list(tmp_path.iterdir()) == []
