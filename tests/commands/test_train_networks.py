"""imagenet64-train with each class of network and each objective: the guarantees of a run hold for all of them."""

import shutil

import pytest
import torch

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.tests.commands.training_runs import NETWORKS, QUIET, TrainingRun, assert_equal_runs
from imagenet64_diffusion.train_imagenet64 import main
from imagenet64_diffusion.training.checkpoints import load_checkpoint


SHORT = {**QUIET, "max_train_steps": 2, "train_batch_size": 4, "gradient_accumulation_steps": 2, "dropout": 0.1}
SHORT |= {"checkpointing_steps": 1, "logging_steps": 1, "learning_rate": 0.01, "lr_warmup_steps": 0}
SCHEDULERS = {"ddpm": "EtaDDIMScheduler", "edm": "EDMHeunScheduler"}


@pytest.mark.parametrize(
    ("network", "objective"), [("ours", "edm"), ("stock", "ddpm"), ("adm", "edm"), ("edm2", "edm"), ("edm2", "ddpm")]
)
def test_train_resume_and_generate(tmp_path, prepared, network, objective, capfd):
    run = TrainingRun(tmp_path / "run", prepared, {**SHORT, "objective": objective}, NETWORKS[network])
    assert main(run.arguments()) == 0
    assert "predicting " + ("v_prediction" if objective == "ddpm" else "as EDM does") in capfd.readouterr().out

    # what a kill after the first step leaves; the same command takes the second one again
    killed = TrainingRun(tmp_path / "killed", prepared, run.options)
    shutil.copytree(run.output_dir, killed.output_dir)
    for name in ("checkpoints/checkpoint-2", "model"):
        shutil.rmtree(killed.output_dir / name)
    assert main(killed.arguments()) == 0
    assert "training from step 1 of" in capfd.readouterr().out
    assert_equal_runs(killed, run)

    pipeline = ClassConditionalPipeline.from_pretrained(run.output_dir / "model")
    kinds = type(pipeline.unet).__name__, type(pipeline.scheduler).__name__
    assert kinds == (NETWORKS[network]["_class_name"], SCHEDULERS[objective])
    checkpoint = load_checkpoint(run.checkpoints / "checkpoint-2")
    assert all(map(torch.equal, pipeline.unet.parameters(), checkpoint.averaged_weights[0]))
    images = pipeline(["dark", 2], guidance_scale=2.0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 16, 16)
    assert images.isfinite().all()

    other = "edm" if objective == "ddpm" else "ddpm"
    message = run.refuse(capfd, objective=other)
    assert f"objective is {other}, but {run.checkpoints / 'checkpoint-2'} was trained with {objective}" in message


def test_fine_tuning_by_edms_loss(tmp_path, prepared, capfd):
    """Objective, noise levels and weights are the pipeline's; without a null class the grids are not guided."""
    options = {**SHORT, "objective": "edm", "sigma_data": 0.7, "class_dropout_prob": 0, "sample_steps": 1}
    run = TrainingRun(tmp_path / "run", prepared, options, NETWORKS["stock"])
    assert main(run.arguments()) == 0
    changes = {"learning_rate": 1e-12, "adam_weight_decay": 0, "class_dropout_prob": 0}
    changes |= {"dropout": None, "pretrained_model_name_or_path": run.output_dir / "model"}
    tuned = TrainingRun(tmp_path / "tuned", prepared, {**SHORT, **changes})
    assert main(tuned.arguments()) == 0
    assert "predicting as EDM does" in capfd.readouterr().out
    before, after = (ClassConditionalPipeline.from_pretrained(each.output_dir / "model") for each in (run, tuned))
    assert after.scheduler.config.sigma_data == 0.7
    assert (before.null_class, after.null_class, after.unet.config.num_class_embeds) == (None, None, 3)
    torch.testing.assert_close(after.unet.state_dict(), before.unet.state_dict(), rtol=0, atol=1e-9)


def test_dry_run(tmp_path, prepared, capfd):
    """With gradient checkpointing the same FLOPs forward, and fewer bytes."""
    run = TrainingRun(tmp_path / "run", prepared, {**SHORT, "objective": "edm"}, NETWORKS["edm2"])
    said = {}
    for checkpointing in (False, True):
        assert main([*run.arguments(gradient_checkpointing=checkpointing), "--dry_run"]) == 0
        lines = [line.split() for line in capfd.readouterr().out.splitlines()]
        said[checkpointing] = {words[0]: words[1:3] for words in lines if len(words) > 2}
    assert said[True]["forward"] == said[False]["forward"]
    assert float(said[True]["activations"][0]) < float(said[False]["activations"][0])
    assert not run.output_dir.exists()
