"""What may have changed between a checkpoint and the run that resumes it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from imagenet64_diffusion.training.checkpoints import Checkpoint, Progress
from imagenet64_diffusion.training.components import Start
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import Plan, check_changes


UNET = {"block_out_channels": [8, 16], "layer_types": ["resnet"], "dropout": 0.0, "num_class_embeds": 3}
RESOLVED = {"prediction_type": "v_prediction", "num_train_timesteps": 1000, "beta_schedule": "linear"}
RESOLVED |= {"max_train_steps": 100, "train_batch_size": 8, "train_data_dir": "."}
PROGRESS = {"step": 50, "epoch": 4.0, "images_seen": 400, "num_processes": 1, "images_per_step": 8, "dataset": "a"}


def check(unet=UNET, dataset="a", ranks=1, images_per_step=8, before=None, progress=PROGRESS, **changes):
    """Compares a run with the checkpoint of one that had none of its changes."""
    stored = before or vars(TrainOptions(**RESOLVED))
    checkpoint = Checkpoint(
        folder=Path("run/checkpoint-50"),
        progress=Progress(**progress),
        options=stored,
        unet_config=dict(UNET),
        scheduler_config={},
        weights={},
        averaged_weights=None,
        optimizer={},
        timestep_sampler={},
    )
    asked = TrainOptions(**{**RESOLVED, **changes})
    images = SimpleNamespace(fingerprint=dataset)
    plan = Plan(asked, images, Start(checkpoint), unet, ranks, images_per_step, 50, 400, asked.max_train_steps, [])
    return check_changes(checkpoint, plan)


def test_nothing_has_changed():
    assert check() == []
    # what Python has as tuples, JSON has as lists
    assert check(unet={**UNET, "block_out_channels": (8, 16), "_name_or_path": "x"}) == []
    # of what a converted checkpoint does not know nothing is said
    assert check(before={"prediction_type": "v_prediction"}, progress={"step": 7, "epoch": 2}, dataset="any") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon, but run/checkpoint-50 was trained with v_pred"),
        ({"num_train_timesteps": 10}, "num_train_timesteps is 10, but run/checkpoint-50 was trained with 1000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is scaled_linear, but .* with linear"),
        ({"unconditional": True}, "unconditional is True, but .* with False"),
        ({"optimizer": "adamw_8bit"}, "optimizer is adamw_8bit, but .* with adamw"),
        ({"resize_to_power_of_two": "up"}, "resize_to_power_of_two is up, but .* with None"),
        ({"unet": {**UNET, "layer_types": ["convnext"]}}, "layer_types is .'convnext'., but .* with .'resnet'."),
        ({"dataset": "b"}, "fingerprint is b, but .* was trained with a"),
        ({"max_train_steps": 49}, "max_train_steps is 49, but run/checkpoint-50 has 50: give a larger number"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"seed": 1}, ["seed was 0 and is 1"]),
        ({"learning_rate": 1e-3}, ["learning_rate was 0.0003 and is 0.001"]),
        ({"use_ema": False}, ["use_ema was True and is False"]),
        ({"snr_gamma": 5.0}, ["snr_gamma was None and is 5.0"]),
        ({"timestep_sampling": "importance"}, ["timestep_sampling was uniform and is importance"]),
        ({"mixed_precision": "bf16"}, ["mixed_precision was None and is bf16"]),
        # from an option or from the file of the network
        ({"unet": {**UNET, "dropout": 0.2}}, ["dropout was 0.0 and is 0.2"]),
        ({"images_per_step": 16, "ranks": 2}, ["images_per_step was 8 and is 16", "ranks was 1 and is 2"]),
        ({"train_batch_size": 4, "gradient_accumulation_steps": 2}, ["train_batch_size was 8 and is 4"]),
        ({"output_dir": "x", "sample_steps": 9, "logging_steps": 9, "num_train_epochs": 9.0}, []),
        # a longer run is the same one where the rate stays, and another one where it falls towards the end
        ({"max_train_steps": 200}, []),
        (
            {"max_train_steps": 200, "lr_scheduler": "cosine"},
            ["max_train_steps was 100 and is 200", "lr_scheduler was constant_with_warmup and is cosine"],
        ),
    ],
)
def test_what_is_told(changes, sentences):
    assert check(**changes) == sentences
