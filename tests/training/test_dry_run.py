"""What train --dry_run says."""

import re

import pytest

from imagenet64_diffusion.train_imagenet64 import main


OPTIONS = ("--model_config_name_or_path", "demo", "--train_batch_size", "16", "--gradient_accumulation_steps", "2")


def test_dry_run(tmp_path, prepared, monkeypatch, capfd):
    """96 images of 16x16: what is said is worked out by hand, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    arguments = [*OPTIONS, "--num_train_epochs", "10", "--layer_types", "res,chnAtn", "--snr_gamma", "5"]
    assert main(["--train_data_dir", str(prepared), "--dry_run", *arguments]) == 0
    said = capfd.readouterr().out
    assert "96 images of 1x16x16, 3 classes, predicting v_prediction" in said
    # 10 epochs of 3 steps of 32 images
    assert "30 steps of 32 images (10.0 epochs) on 1 x cpu, precision no" in said
    assert "to come: 30 steps, 10.0 epochs" in said
    for name, value in {
        "layer_types": "resnet channel_attention",
        "prediction_type": "v_prediction",
        "num_train_timesteps": "1000",
        "snr_gamma": "5.0",
        "max_train_steps": "30",
    }.items():
        assert re.search(rf"^  {name} +{re.escape(value)}$", said, re.MULTILINE), name
    parameters = re.search(r"random weights: ([\d,]+) parameters", said)[1]
    assert f"{int(parameters.replace(',', '')) / 1e3:.2f} k" in said
    assert "FLOP for 1 image" in said
    assert "FLOP for 32 images" in said
    assert "16 images at once" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer_types", "chnAtn"], "layer_types begins with 'channel_attention', which cannot change the width"),
        (["--block_out_channels", "8", "8", "8", "8", "8"], "16x16, which 5 levels cannot halve"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint is 'nowhere', but there is no such folder"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_what_could_not_be_trained(tmp_path, prepared, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "--pretrained_model_name_or_path" not in arguments:
        arguments = ["--model_config_name_or_path", "demo", *arguments]
    assert main(["--train_data_dir", str(prepared), "--dry_run", *arguments]) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
