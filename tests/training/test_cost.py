"""What training is said to cost, against real networks and counts by hand, and what --dry_run says of it."""

import json
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.tests.components import TINY_UNET, make_unet
from imagenet64_diffusion.train_imagenet64 import main
from imagenet64_diffusion.training.cost import count_flops, estimate_cost


def saved_bytes(module, *inputs, dtype=None):
    """What a real forward pass keeps, told by the address and the size of its memory."""
    own, kept = {parameter.data_ptr() for parameter in module.parameters()}, []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
        module(*inputs)
    saved = {storage.data_ptr(): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in kept)}
    return sum(size for address, size in saved.items() if address not in own)


def batch_of(unet, images):
    numbers = torch.zeros(images, dtype=torch.long)
    return torch.zeros(images, unet.config.in_channels, 16, 16), numbers, numbers


def test_the_published_figures_of_the_original():
    """The faithful network leaves out queries and keys of the class attention, whose result the original discards."""
    cost = estimate_cost(json.loads((CONFIG_DIR / "original" / "res_res_atn.json").read_text()))
    assert cost.forward_flops == pytest.approx(118.9e9, rel=1e-3)
    # one attention on each of three ways down and up, two in the middle, one in each stack of the head
    widths = [256, 512, 1024, 1024, 1024, 512, 256, 128, 128, 6]
    unused = sum(2 * (512 * width + width) for width in widths)
    assert cost.parameters + unused == pytest.approx(212.9e6, rel=1e-3)


@pytest.mark.parametrize(
    ("precision", "dtype", "layer"), [("no", None, "resnet"), ("bf16", torch.bfloat16, "convnext")]
)
def test_a_real_pass(precision, dtype, layer):
    layers = (layer, "class_attention", "self_attention", "channel_attention")
    sizes = {"in_channels": 3, "stem_channels": 16, "block_out_channels": (32, 64)}
    unet = make_unet(**sizes, layer_types=layers, dropout=0.1).train()
    cost = estimate_cost(unet.config, images=4, precision=precision)
    assert cost.parameters == sum(parameter.numel() for parameter in unet.parameters())
    assert cost.activation_bytes == pytest.approx(saved_bytes(unet, *batch_of(unet, 4), dtype=dtype), rel=0.02)
    if layer == "resnet":
        with FlopCounterMode(display=False) as counter:
            output = unet(*batch_of(unet, 1))
            assert cost.forward_flops == counter.get_total_flops()
            output.sample.square().mean().backward()
        assert cost.training_flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "multiplications"),
    [
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), 4 * 4 * 6 * 10 * 9),
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), 8 * 8 * 6 * 49),
        (nn.ConvTranspose2d(6, 10, 4, stride=2, padding=1), 8 * 8 * 6 * 10 * 16),
    ],
)
@pytest.mark.parametrize("input_learns", [True, False])
def test_flops_of_one_convolution(layer, multiplications, input_learns):
    """By hand: padding counts as pixels; the gradients of filters and of input cost the same again."""
    samples = torch.zeros(1, 6, 8, 8, requires_grad=input_learns)
    assert count_flops(lambda: layer(samples)) == (2 * multiplications, 2 * multiplications * (2 + input_learns))


def test_gradient_checkpointing():
    """It keeps what lies between the layers, and for a while what the widest layer computes again, here the head's."""
    options = {**TINY_UNET, "stem_channels": 32, "block_out_channels": (8,), "layer_types": ("resnet",)}
    unet = make_unet(**options).train()
    features, embedding = torch.zeros(4, 32, 16, 16, requires_grad=True), torch.zeros(4, 16, requires_grad=True)
    recomputed = saved_bytes(unet.head.stack.layers[0], features, embedding, embedding)
    unet.enable_gradient_checkpointing()
    state = torch.get_rng_state()
    plain, cost = (estimate_cost(options, images=4, gradient_checkpointing=value) for value in (False, True))
    assert torch.equal(torch.get_rng_state(), state)
    assert cost.activation_bytes == pytest.approx(saved_bytes(unet, *batch_of(unet, 4)) + recomputed, rel=0.03)
    assert cost.activation_bytes < 0.7 * plain.activation_bytes
    # a second forward pass of all but what lies between the layers
    assert cost.forward_flops == plain.forward_flops
    assert plain.training_flops < cost.training_flops < plain.training_flops + plain.forward_flops


def test_dry_run(tmp_path, prepared, monkeypatch, capfd):
    """96 images of 16x16: what is said is worked out by hand, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("train_batch_size: 16\ngradient_accumulation_steps: 3\nsnr_gamma: 5\n")
    arguments = ["--config", "options.yaml", "--gradient_accumulation_steps", "2", "--num_train_epochs", "10"]
    arguments += ["--model_config_name_or_path", "demo", "--layer_types", "res,chnAtn", "--dry_run"]
    assert main(["--train_data_dir", str(prepared), *arguments]) == 0
    said = capfd.readouterr().out
    assert "96 images of 1x16x16, 3 classes, predicting v_prediction" in said
    # 10 epochs of 3 steps of 32 images
    assert "30 steps of 32 images (10.0 epochs) on 1 x cpu, precision no" in said
    assert "to come: 30 steps, 10.0 epochs" in said
    for line in ("layer_types resnet channel_attention", "prediction_type v_prediction", "snr_gamma 5.0"):
        assert re.search(rf"^  {line.replace(' ', ' +', 1)}$", said, re.MULTILINE), line
    parameters = int(re.search(r"random weights: ([\d,]+) parameters", said)[1].replace(",", ""))
    cost = dict(re.findall(r"^  +([a-zA-Z]+(?: [a-z]+)?) +([\d.]+ (?:k|MiB|M|G))", said, re.MULTILINE))
    assert cost["parameters"] == f"{parameters / 1e3:.2f} k"
    assert cost["weights"] == cost["EMA"] == cost["gradients"] == f"{4 * parameters / 2**20:.2f} MiB"
    assert cost["optimizer"] == f"{8 * parameters / 2**20:.2f} MiB"
    parts = [float(cost[name].split()[0]) for name in ("weights", "EMA", "gradients", "optimizer", "activations")]
    assert float(cost["total"].split()[0]) == pytest.approx(sum(parts), abs=0.03)
    assert "FLOP for 32 image(s)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_data_dir", "nowhere"], "train_data_dir is nowhere, but there is no such folder"),
        (["--train_data_dir", "."], "prepare"),
        (["--learning_rate", "-1"], "learning_rate is -1.0, but must be above 0"),
        (["--layer_types", "resnet", "pooling"], "layer_types names 'pooling'"),
        (["--stem_channels", "8", "--pretrained_model_name_or_path", "x"], "brings its own network"),
        (["--model_config_name_or_path", "rse"], "model_config_name_or_path is 'rse'"),
        (["--layer_types", "chnAtn"], "layer_types begins with 'channel_attention', which cannot change the width"),
        (["--block_out_channels", "8", "8", "8", "8", "8"], "16x16, which 5 levels cannot halve"),
        (["--resume_from_checkpoint", "nowhere"], "resume_from_checkpoint is 'nowhere', but there is no such folder"),
        (["--resume_from_checkpoint", "."], ". is not a whole checkpoint: no readable training_state.json"),
        (["--pretrained_model_name_or_path", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry_run"], []], ids=["dry run", "training"])
def test_what_could_not_be_trained(tmp_path, prepared, monkeypatch, capfd, arguments, message, dry):
    """One sentence says what is wrong, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    if "--pretrained_model_name_or_path" not in arguments:
        arguments = ["--model_config_name_or_path", "demo", *arguments]
    assert main(["--train_data_dir", str(prepared), "--output_dir", "out", *dry, *arguments]) == 2
    last_line = capfd.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
    assert list(tmp_path.iterdir()) == []
