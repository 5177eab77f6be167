"""What may have changed between a checkpoint and the run that resumes it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from imagenet64_diffusion.training.checkpoints import Checkpoint, Progress
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import Plan, Start, check_changes


UNET = {"block_out_channels": [8, 16], "layer_types": ["resnet"], "dropout": 0.0, "num_class_embeds": 3}
RESOLVED = {
    "prediction_type": "v_prediction",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "max_train_steps": 100,
    "train_batch_size": 8,
}


@pytest.fixture
def check(tmp_path):
    """Compares a run with the checkpoint of one that had none of its changes."""

    def make(unet=UNET, dataset="sha256:a", num_processes=1, images_per_step=8, before=None, progress=None, **changes):
        options = {"train_data_dir": str(tmp_path), **RESOLVED}
        stored = vars(TrainOptions(**options)) if before is None else before
        known = {"step": 50, "epoch": 4.0, "images_seen": 400, "num_processes": 1, "images_per_step": 8}
        checkpoint = Checkpoint(
            folder=Path("run/checkpoint-50"),
            progress=Progress(**(progress or {**known, "dataset": "sha256:a"})),
            options=stored,
            unet_config=dict(UNET),
            scheduler_config={},
            weights=dict[str, torch.Tensor](),
            averaged_weights=None,
            optimizer={},
            timestep_sampler=dict[str, np.ndarray](),
        )
        asked = TrainOptions(**{**options, **changes})
        plan = Plan(
            options=asked,
            dataset=SimpleNamespace(fingerprint=dataset),
            start=Start(checkpoint),
            unet_config=unet,
            num_processes=num_processes,
            images_per_step=images_per_step,
            first_step=checkpoint.progress.step,
            images_seen=400,
            max_train_steps=asked.max_train_steps,
            warnings=[],
        )
        return check_changes(checkpoint, plan)

    return make


def test_nothing_has_changed(check):
    assert check() == []
    # what Python has as tuples, JSON has as lists
    assert check(unet={**UNET, "block_out_channels": (8, 16), "_name_or_path": "x"}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon, but run/checkpoint-50 was trained with v_pred"),
        ({"num_train_timesteps": 10}, "num_train_timesteps is 10, but run/checkpoint-50 was trained with 1000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is scaled_linear, but .* with linear"),
        ({"unconditional": True}, "unconditional is True, but .* with False"),
        ({"optimizer": "adamw_8bit"}, "optimizer is adamw_8bit, but .* with adamw"),
        ({"resize_to_power_of_two": "up"}, "resize_to_power_of_two is up, but .* with None"),
        ({"unet": {**UNET, "layer_types": ["convnext"]}}, "the network has layer_types .'convnext'., but that of"),
        ({"unet": {**UNET, "class_embed_dim": 8}}, "the network has class_embed_dim 8, but that of .* has None"),
        ({"dataset": "sha256:b"}, "train_data_dir holds other images than .* .fingerprint sha256:b, not sha256:a."),
        ({"max_train_steps": 49}, "max_train_steps is 49, but run/checkpoint-50 has 50: give a larger number"),
    ],
)
def test_what_is_refused(check, changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.0003 and is 0.001"),
        ({"use_ema": False}, "use_ema was True and is False"),
        ({"snr_gamma": 5.0}, "snr_gamma was None and is 5.0"),
        ({"timestep_sampling": "importance"}, "timestep_sampling was uniform and is importance"),
        ({"mixed_precision": "bf16"}, "mixed_precision was None and is bf16"),
        # from an option or from the file of the network
        ({"unet": {**UNET, "dropout": 0.2}}, "dropout was 0.0 and is 0.2"),
        ({"images_per_step": 16, "train_batch_size": 16}, "a step had 8 images and has 16"),
        (
            {"num_processes": 2, "train_batch_size": 4},
            "a step of 8 images was shared by 1 ranks in pieces of 8 and is by 2 in pieces of 4 (the same images"
            " and noise; sums are rounded otherwise)",
        ),
    ],
)
def test_what_is_told(check, changes, sentence):
    assert check(**changes) == [sentence]


def test_the_learning_rate_schedule(check, tmp_path):
    """A longer run is the same one where the rate stays, and another one where it falls towards the end."""
    assert check(max_train_steps=200) == []
    before = {**vars(TrainOptions(train_data_dir=str(tmp_path), **RESOLVED)), "lr_scheduler": "cosine"}
    assert check(before=before, lr_scheduler="cosine") == []
    assert check(before=before, lr_scheduler="cosine", max_train_steps=200) == [
        "the learning-rate schedule ended at step 100 and ends at 200"
    ]


def test_what_a_converted_checkpoint_does_not_know(check):
    """Nothing is said of it."""
    assert check(before={"prediction_type": "v_prediction"}, progress={"step": 7, "epoch": 2}, dataset="any") == []
