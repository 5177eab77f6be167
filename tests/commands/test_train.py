"""imagenet64-train, as its users run it."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.train_imagenet64 import main
from imagenet64_diffusion.training.checkpoints import load_checkpoint


def test_from_data_to_pipeline(undisturbed):
    """What a run says, and what it leaves."""
    output_dir = undisturbed.output_dir
    said = (undisturbed.folder / "process_1.txt").read_text()
    assert "96 images of 1x16x16, 3 classes, predicting v_prediction" in said
    assert "20 steps of 10 images (2.1 epochs) on 1 x cpu, precision no" in said
    assert "images/s" in said
    names = ["checkpoints", "loss_chart.png", "metrics.jsonl", "model", "pipelines", "sample_grids", "train"]
    assert sorted(path.name for path in output_dir.iterdir()) == names
    assert undisturbed.checkpoint_names() == ["checkpoint-18", "checkpoint-20"]
    assert [path.name for path in (output_dir / "pipelines").iterdir()] == ["step_0000012"]
    assert list(output_dir.parent.glob(".*")) == []
    grids = [f"step_00000{step}.png" for step in ("06", "12", "18", "20")]
    assert sorted(path.name for path in (output_dir / "sample_grids").iterdir()) == grids
    with Image.open(output_dir / "sample_grids" / grids[-1]) as grid:
        assert grid.size[1] > 2 * 64
    assert list((output_dir / "train").glob("events.out.tfevents*"))

    entries = undisturbed.metrics()
    assert [entry["step"] for entry in entries] == [4, 8, 12, 16, 20]
    quarters = [f"loss_quarter_{number}" for number in range(1, 5)]
    names = ["step", "loss", *quarters, "gradient_norm", "lr", "epoch", "images_per_second", "peak_memory_gib"]
    assert list(entries[0]) == names
    assert [entry["epoch"] for entry in entries] == [pytest.approx(step * 10 / 96) for step in (4, 8, 12, 16, 20)]

    assert "| optimizer steps | 20 |" in (output_dir / "model" / "README.md").read_text()
    assert (output_dir / "model" / "samples.png").is_file()
    pipeline = ClassConditionalPipeline.from_pretrained(output_dir / "model")
    assert pipeline.config.id2label == {0: "dark", 1: "grey", 2: "light"}
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.sample_size == 16
    assert len(pipeline(["light", None], num_inference_steps=2).images) == 2

    checkpoint = load_checkpoint(undisturbed.checkpoints / "checkpoint-20")
    averaged, updates = checkpoint.averaged_weights
    assert updates == 20
    assert all(map(torch.equal, pipeline.unet.parameters(), averaged))
    assert (pipeline.unet.conv_in.weight != checkpoint.weights["conv_in.weight"]).any()


@pytest.mark.parametrize(
    "options",
    [
        "max_train_steps 4 prediction_type epsilon beta_schedule original_cosine mixed_precision bf16 use_ema false"
        " gradient_checkpointing true dataset_in_memory true timestep_sampling uniform max_grad_norm 0"
        " resize_to_power_of_two up",
        "num_train_epochs 0.4 prediction_type sample beta_schedule linear unconditional true layer_types resnet"
        " snr_gamma 5 num_train_timesteps 1000",
    ],
)
def test_options(new_run, options):
    words = options.split()
    changes = {"max_train_steps": None, **dict(zip(words[::2], words[1::2], strict=True))}
    run = new_run(**changes, sample_steps=0, pipeline_steps=0, checkpointing_steps=0)
    run.finish()
    weights = load_file(run.output_dir / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert run.metrics()[-1]["step"] == 4
    assert run.checkpoint_names() == []


def test_epochs_are_the_same_number_of_steps(new_run, capfd):
    """Sixteen images a step, 96 images: 1.25 epochs are 7.5 steps, so 8, from wherever the run resumes."""
    run = new_run(train_batch_size=8, lr_scheduler="constant", checkpointing_steps=3)
    changes = {"max_train_steps": None, "num_train_epochs": 1.25, "dry_run": "true"}
    for begins in ("random weights", f"step 3 of {run.checkpoints / 'checkpoint-3'}"):
        assert main(run.arguments(**changes)) == 0
        said = capfd.readouterr().out
        assert f"training from {begins}: " in said
        assert "8 steps of 16 images (1.3 epochs)" in said
        if begins == "random weights":
            run.finish(max_train_steps=3)
