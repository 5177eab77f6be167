"""What a run of imagenet64-train may begin from: a pipeline to fine-tune, or a converted checkpoint."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from imagenet64_diffusion.convert_checkpoints import main as convert
from imagenet64_diffusion.tests.commands.runs import prepare_noise
from imagenet64_diffusion.tests.commands.training_runs import QUIET, TrainingRun
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS, small_weights, write_small
from imagenet64_diffusion.training.checkpoints import load_checkpoint


LEARNT = {**QUIET, "max_train_steps": 60, "train_batch_size": 16, "learning_rate": 5e-3, "lr_warmup_steps": 0}
LEARNT |= {"beta_schedule": "linear", "num_train_timesteps": 50, "prediction_type": "epsilon"}
LEARNT |= {"logging_steps": 1, "use_ema": False}
# so small a rate leaves the weights as they are
TUNED = {**QUIET, "max_train_steps": 1, "train_batch_size": 64, "logging_steps": 1, "lr_warmup_steps": 0}
TUNED |= {"learning_rate": 1e-12, "adam_weight_decay": 0}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory, prepared) -> TrainingRun:
    """A run that has learnt something."""
    run = TrainingRun(tmp_path_factory.mktemp("learnt"), prepared, LEARNT)
    run.finish()
    return run


@pytest.fixture
def tuned(tmp_path, prepared, learnt) -> TrainingRun:
    """A run that is to begin with the pipeline of the one that has learnt."""
    return TrainingRun(
        tmp_path / "tuned", prepared, {"pretrained_model_name_or_path": learnt.output_dir / "model", **TUNED}
    )


def unet_weights(run):
    return load_file(run.output_dir / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def with_classes(prepared, folder, names):
    """A copy of the images whose record has other names of classes."""
    shutil.copytree(prepared, folder)
    record = json.loads((folder / "preparation.json").read_text())
    (folder / "preparation.json").write_text(json.dumps({**record, "class_names": names}))
    return folder


def test_fine_tuning_begins_with_the_weights(tuned, learnt):
    """Weights, schedule and prediction are the pipeline's, and the first loss is one of a model that has learnt."""
    run, said = tuned, tuned.finish()
    assert f"training from {learnt.output_dir / 'model'}: " in said
    assert "predicting epsilon" in said
    before = unet_weights(learnt)
    for name, weight in unet_weights(run).items():
        torch.testing.assert_close(weight, before[name], atol=1e-9, rtol=0)
    losses = [entry["loss"] for entry in learnt.metrics()]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert run.metrics()[0]["loss"] < 0.5 * losses[0]
    assert run.metrics()[0]["loss"] == pytest.approx(sum(losses[-20:]) / 20, rel=0.25)
    config, expected = (one.output_dir / "model/scheduler/scheduler_config.json" for one in (run, learnt))
    assert config.read_bytes() == expected.read_bytes()
    # the same command resumes it, and says from what the whole began
    assert "training from step 1 of" in run.finish()
    progress = load_checkpoint(run.checkpoints / "checkpoint-1").progress
    assert progress.began_from == str(learnt.output_dir / "model")


def test_fine_tuning_with_other_classes(tuned, learnt, prepared, tmp_path):
    """A table of another size begins anew, all else is kept."""
    data = with_classes(prepared, tmp_path / "data", ["dark", "grey", "light", "none"])
    said = tuned.finish(train_data_dir=data)
    assert "has 3 classes and the images have 4: the class embedding begins anew" in said
    before, after = unet_weights(learnt), unet_weights(tuned)
    different = [name for name, weight in after.items() if weight.shape != before[name].shape]
    assert different == [name for name in after if "class" in name and "embed" in name and "weight" in name]
    for name in set(after) - set(different):
        torch.testing.assert_close(after[name], before[name], atol=1e-9, rtol=0)
    data = with_classes(prepared, tmp_path / "renamed", ["dark", "gray", "light"])
    output = tuned.finish(train_data_dir=data, output_dir=tmp_path / "other", dry_run=True)
    assert "class 1 is 'grey' for the pretrained model and 'gray' for the images" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_data_dir": "coloured"}, "has in_channels 1, but the images have 3"),
        ({"unconditional": True}, "unconditional is True, but .* has classes"),
        ({"prediction_type": "sample"}, "prediction_type is sample, but .* has epsilon"),
        ({"num_train_timesteps": 60}, "num_train_timesteps is 60, but .* has 50"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule is squaredcos_cap_v2, but .* has another"),
    ],
)
def test_fine_tuning_that_does_not_fit(tuned, tmp_path, capsys, changes, message):
    if changes.get("train_data_dir"):
        changes = {"train_data_dir": prepare_noise(tmp_path, size=16, channels=3)}
    last_line = tuned.refuse(capsys, **changes)
    assert last_line.startswith("error: ")
    assert re.search(message, last_line), last_line


def test_a_converted_checkpoint(tmp_path):
    """The original's weights and moments are resumed, and then the run's own; and the original's files come back."""
    write_small(tmp_path / "small")
    shapes = [tensor.shape for tensor in small_weights().values()]
    state = {
        index: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.full(shape, 100.0)}
        for index, shape in enumerate(shapes)
    }
    group = {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-4, "weight_decay": 0.01, "amsgrad": False}
    group["params"] = list(range(len(shapes)))
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "small" / "optim_1e_7s.pkl")
    assert convert(["--checkpoint", str(tmp_path / "small"), "--output_dir", str(tmp_path / "ours")]) == 0
    start = tmp_path / "ours" / "1e_7s" / "checkpoints" / "checkpoint-7"

    options = {**TUNED, "resume_from_checkpoint": start, "max_train_steps": 9, "train_batch_size": 4}
    options |= {"use_ema": False, "lr_scheduler": "constant", "model_config_name_or_path": None}
    run = TrainingRun(tmp_path / "run", prepare_noise(tmp_path, size=64, channels=1), options)
    said = run.finish()
    for words in (f"training from step 7 of {start}", "predicting epsilon", "learning_rate was 0.0003 and is 1e-12"):
        assert words in said
    assert [entry["step"] for entry in run.metrics()] == [8, 9]
    # its one epoch of our 12 images, then two steps of four
    checkpoint, original = load_checkpoint(run.checkpoints / "checkpoint-9"), load_checkpoint(start)
    assert checkpoint.progress.images_seen == 12 + 8
    for name, weight in checkpoint.weights.items():
        torch.testing.assert_close(weight, original.weights[name], atol=1e-9, rtol=0)
    for index, state in checkpoint.optimizer["state"].items():
        assert state["step"] == 9
        # a clipped gradient adds at most a thousandth in each of two steps
        before = original.optimizer["state"][index]["exp_avg_sq"]
        torch.testing.assert_close(state["exp_avg_sq"], 0.999**2 * before, atol=2.1e-3, rtol=1e-6)
        assert before.max() == 100
    assert "from step 9 of" in run.finish()

    back = ["--checkpoint", str(run.output_dir / "model"), "--output_dir", str(tmp_path / "back")]
    assert convert(["--to_original", *back, "--epoch", "2", "--step", "9"]) == 0
    params = json.loads((tmp_path / "back" / "model_params_2e_9s.json").read_text())
    assert params == {**SMALL_PARAMS, "epoch": 2, "step": 9}
    weights = torch.load(tmp_path / "back" / "model_2e_9s.pkl", weights_only=True)
    torch.testing.assert_close(weights, small_weights(), atol=1e-8, rtol=0)
