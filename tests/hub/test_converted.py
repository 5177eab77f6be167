"""A converted checkpoint goes to the Hub in the same call."""

import torch

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.convert_checkpoints import main
from imagenet64_diffusion.tests.conversion.originals import small_weights, write_small


def convert(tmp_path, *arguments) -> int:
    model, _ = write_small(tmp_path / "small")
    options = ["--output_dir", str(tmp_path / "out"), "--push_to_hub", "me/converted"]
    return main(["--checkpoint", str(model), *options, *arguments])


def test_converted_and_uploaded(logged_in, tmp_path, capsys):
    assert convert(tmp_path, "--dtype", "float16", "--variant", "fp16") == 0
    assert "uploaded   me/converted" in capsys.readouterr().out
    files = logged_in.repositories["me/converted"].files
    assert {"unet/diffusion_pytorch_model.fp16.safetensors", "original_params.json"} <= set(files)
    card = files["README.md"].content.decode()
    assert "the original program's cosine" in card
    assert "license: mit" in card

    pipeline = ClassConditionalPipeline.from_pretrained("me/converted", variant="fp16", dtype=torch.float16)
    assert torch.equal(pipeline.unet.conv_in.weight, small_weights()["unet.inConv.weight"].half())
    assert pipeline.config.guide_variance is True


def test_a_refused_upload_leaves_the_folder(online, tmp_path, capsys):
    assert convert(tmp_path) == 2
    assert "error: " in capsys.readouterr().err
    assert "me/converted" not in online.repositories
    assert ClassConditionalPipeline.from_pretrained(tmp_path / "out").unet.config.in_channels == 1
