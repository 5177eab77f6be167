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
from imagenet64_diffusion.training.cost import TrainingCost, _count_flops, cost_report, estimate_cost


LAYERS = ("resnet", "convnext", "class_attention", "self_attention", "channel_attention")
WIDER = {**TINY_UNET, "in_channels": 3, "stem_channels": 16, "block_out_channels": (32, 64), "layer_types": LAYERS}


def saved_bytes(unet, images, dtype=None):
    """What a real forward pass keeps, told by the address and the size of its memory."""
    own = {parameter.data_ptr() for parameter in unet.parameters()}
    saved, kept = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept.append(tensor)
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    samples = torch.zeros(images, unet.config.in_channels, 16, 16)
    labels = None if unet.config.num_class_embeds is None else torch.zeros(images, dtype=torch.long)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        unet(samples, torch.zeros(images, dtype=torch.long), labels)
    return sum(saved.values())


@pytest.mark.parametrize("options", [{}, WIDER, {"num_class_embeds": None, "layer_types": ("resnet",)}])
def test_parameters_and_what_depends_on_them(options):
    unet = make_unet(**options)
    cost = estimate_cost(unet.config)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert cost.parameters == parameters
    assert cost.weight_bytes == cost.ema_bytes == 4 * parameters
    assert cost.optimizer_bytes == 8 * parameters
    assert estimate_cost(unet.config, use_ema=False).ema_bytes == 0


@pytest.mark.parametrize("recipe", ["res_res", "res_res_atn"])
def test_the_published_figures_of_the_original(recipe):
    """105.8 and 118.9 GFLOP; 197.6 and 212.9 million parameters, of which some are without any effect.

    They are queries and keys of the class attention, two linear layers for each, which the original's program
    has and whose result it does not use; the faithful network leaves them out.
    """
    config = json.loads((CONFIG_DIR / "original" / f"{recipe}.json").read_text())
    gigaflops, millions = {"res_res": (105.8, 197.6), "res_res_atn": (118.9, 212.9)}[recipe]
    cost = estimate_cost(config)
    assert cost.forward_flops == pytest.approx(gigaflops * 1e9, rel=1e-3)
    # one attention on each of three ways down and up, two in the middle, one in each stack of the head
    widths = [256, 512, 1024, 1024, 1024, 512, 256, 128, 128, 6]
    unused = sum(2 * (512 * width + width) for width in widths)
    assert cost.parameters + unused == pytest.approx(millions * 1e6, rel=1e-3)


def test_flops_of_a_real_pass():
    unet = make_unet(**{**WIDER, "layer_types": ("resnet", "class_attention", "self_attention")}).train()
    with FlopCounterMode(display=False) as forward:
        output = unet(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with FlopCounterMode(display=False) as backward:
        output.sample.square().mean().backward()
    cost = estimate_cost(unet.config)
    assert cost.forward_flops == forward.get_total_flops()
    assert cost.training_flops == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize(
    ("layer", "multiplications"),
    [
        (nn.Conv2d(6, 10, 3, padding=1), 8 * 8 * 6 * 10 * 9),
        (nn.Conv2d(6, 10, 3, stride=2, padding=1), 4 * 4 * 6 * 10 * 9),
        (nn.Conv2d(6, 6, 7, padding=3, groups=6), 8 * 8 * 6 * 49),
        (nn.Conv2d(6, 10, 1, groups=2), 8 * 8 * 3 * 10),
        (nn.ConvTranspose2d(6, 10, 4, stride=2, padding=1), 8 * 8 * 6 * 10 * 16),
    ],
)
@pytest.mark.parametrize("input_learns", [True, False])
def test_flops_of_one_convolution(layer, multiplications, input_learns):
    """By hand: padding counts as pixels; the gradients of filters and of input cost the same again."""
    samples = torch.zeros(1, 6, 8, 8, requires_grad=input_learns)
    assert _count_flops(lambda: layer(samples)) == (2 * multiplications, 2 * multiplications * (2 + input_learns))


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_of_a_real_pass(gradient_checkpointing, precision, dtype, dropout):
    unet = make_unet(**WIDER, dropout=dropout).train()
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    kept = saved_bytes(unet, 4, dtype)
    cost = estimate_cost(unet.config, images=4, precision=precision, gradient_checkpointing=gradient_checkpointing)
    if gradient_checkpointing:
        # and what one layer computes again
        assert cost.activation_bytes > kept
    else:
        assert cost.activation_bytes == pytest.approx(kept, rel=0.02)


def test_recomputed_layer():
    """The head's layer is the widest one at full resolution: it keeps more than any other."""
    options = {**TINY_UNET, "stem_channels": 32, "block_out_channels": (8,), "layer_types": ("resnet",)}
    unet = make_unet(**options).train()
    layer = unet.head.stack.layers[0]
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    embedding = torch.zeros(4, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.zeros(4, 32, 16, 16, requires_grad=True), embedding, embedding)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    recomputed = sum(tensor.nbytes for address, tensor in kept.items() if address not in own)
    unet.enable_gradient_checkpointing()
    cost = estimate_cost(options, images=4, gradient_checkpointing=True)
    assert cost.activation_bytes == pytest.approx(saved_bytes(unet, 4) + recomputed, rel=0.03)


def test_what_saves_memory():
    plain = estimate_cost(TINY_UNET, images=8)
    half = estimate_cost(TINY_UNET, images=8, precision="bf16")
    state = torch.get_rng_state()
    checkpointed = estimate_cost(TINY_UNET, images=8, gradient_checkpointing=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert half.activation_bytes < 0.8 * plain.activation_bytes
    assert checkpointed.activation_bytes < 0.6 * plain.activation_bytes
    # a second forward pass of all but what lies between the layers
    assert checkpointed.forward_flops == plain.forward_flops
    assert plain.training_flops < checkpointed.training_flops < plain.training_flops + plain.forward_flops


def test_wrong_options():
    with pytest.raises(ValueError, match="precision is 'fp8', but must be one of no, fp16, bf16"):
        estimate_cost(TINY_UNET, precision="fp8")
    with pytest.raises(ValueError, match="layer_types names 'pooling'"):
        estimate_cost({**TINY_UNET, "layer_types": ("resnet", "pooling")})


def test_report():
    cost = TrainingCost(
        parameters=197_600_000,
        forward_flops=105_800_000_000,
        training_flops=317_400_000_000,
        weight_bytes=2**30,
        optimizer_bytes=2**31,
        ema_bytes=2**30,
        activation_bytes=20 * 2**30,
        images=64,
    )
    assert cost_report(cost, images_per_step=1024).splitlines() == [
        "parameters          197.60 M",
        "forward pass        105.80 GFLOP for 1 image",
        "training step       325.02 TFLOP for 1,024 image(s)",
        "memory of one rank, 64 image(s) at once",
        "  weights             1.00 GiB",
        "  EMA                 1.00 GiB",
        "  gradients           1.00 GiB",
        "  optimizer           2.00 GiB",
        "  activations        20.00 GiB",
        "  total              25.00 GiB",
    ]


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
    assert "FLOP for 32 image(s)" in said
    assert "16 image(s) at once" in said
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
