"""What a training run is made of, and what may have changed between a checkpoint and the run that resumes it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.training.checkpoints import Checkpoint, Progress
from imagenet64_diffusion.training.components import (
    Start,
    build_optimizer,
    build_scheduler,
    training_size,
    unet_config,
)
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import Plan, check_changes, resolve_options


def make_options(**options):
    """Options of a run that begins from nothing."""
    return resolve_options(TrainOptions(**{"train_data_dir": ".", **options}), Start())


@pytest.fixture
def make_config(prepared):
    """The network for the prepared images, of the recipe demo but for some options."""
    demo = {"model_config_name_or_path": "demo"}
    return lambda **changes: unet_config(make_options(**demo | changes), PreparedImages(prepared), Start())


def test_the_dataset_says_size_channels_and_classes(make_config):
    config = make_config()
    assert (config["sample_size"], config["in_channels"], config["num_class_embeds"]) == (16, 1, 3)
    assert make_config(unconditional=True, layer_types=["resnet"])["num_class_embeds"] is None
    with pytest.raises(ValueError, match="needs classes, but num_class_embeds is None"):
        make_config(unconditional=True)


@pytest.mark.parametrize("content", ["{", "[1]", '{"widths": [1]}'])
def test_wrong_model_files(make_config, tmp_path, content):
    file = tmp_path / "unet.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file}.*{'widths' if 'widths' in content else 'JSON'}"):
        make_config(model_config_name_or_path=str(file))


def test_every_option_of_the_network(make_config):
    """Each replaces the recipe's entry; the original's names and its commas are taken too."""
    asked = {"stem_channels": 12, "block_out_channels": [8, 24], "layer_types": ["res,conv", "chnAtn"]}
    asked |= {"time_embed_dim": 20, "class_embed_dim": 28, "attention_patch_size": 4, "dropout": 0.25}
    asked |= {"time_embedding_type": "original_sine", "class_attention_type": "identity"}
    asked |= {"output_head_type": "original", "num_train_timesteps": 50}
    config = make_config(**asked)
    expected = asked | {"layer_types": ("resnet", "convnext", "channel_attention"), "block_out_channels": (8, 24)}
    assert {name: config[name] for name in asked} == expected


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear", "original_cosine"])
def test_schedules(beta_schedule):
    scheduler = build_scheduler(make_options(beta_schedule=beta_schedule, num_train_timesteps=500), Start())
    assert len(scheduler.alphas_cumprod) == 500
    assert (scheduler.alphas_cumprod.diff() <= 0).all()
    scheduler.set_timesteps(10)
    if beta_schedule == "original_cosine":
        assert scheduler.alphas_cumprod.max() == pytest.approx(0.999, abs=1e-9)
        assert scheduler.final_alpha_cumprod == pytest.approx(0.999, abs=1e-9)
    else:
        assert (scheduler.final_alpha_cumprod, scheduler.timesteps[0]) == (1.0, 499)


@pytest.mark.parametrize(("size", "up", "down"), [((64, 64), (64, 64), (64, 64)), ((28, 48), (32, 64), (16, 32))])
def test_sizes_of_powers_of_two(size, up, down):
    for asked, expected in ((None, size), ("up", up), ("down", down)):
        options = make_options(resize_to_power_of_two=asked)
        assert training_size(options, SimpleNamespace(image_size=size)) == expected


def test_the_fused_optimizer_is_adamw():
    """Against the formula of Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2) in float64."""
    options = {"learning_rate": 0.1, "adam_weight_decay": 0.3, "adam_epsilon": 1e-3, "adam_beta1": 0.8}
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer(make_options(**options), [weight], torch.device("cpu"))
    assert optimizer.param_groups[0]["fused"]
    expected = weight.detach().double()
    first = second = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 4):
        gradient = torch.tensor([0.5, 1.0 / step], dtype=torch.float64)
        weight.grad = gradient.float()
        optimizer.step()
        first, second = 0.8 * first + 0.2 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.8**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-3)
        expected = expected - 0.1 * (0.3 * expected + update)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=0)
    # an 8-bit optimizer on a CPU has to be refused
    with pytest.raises(ValueError, match="optimizer is adamw_8bit, which needs"):
        build_optimizer(make_options(optimizer="adamw_8bit"), [weight], torch.device("cpu"))


UNET = {"block_out_channels": [8, 16], "layer_types": ["resnet"], "dropout": 0.0, "num_class_embeds": 3}
PROGRESS = {"step": 50, "epoch": 4.0, "images_seen": 400, "num_processes": 1, "images_per_step": 8, "dataset": "a"}
BEFORE = {"max_train_steps": 100, "train_batch_size": 8, "beta_schedule": "linear"}


def check(unet=UNET, dataset="a", ranks=1, images_per_step=8, before=None, progress=PROGRESS, **changes):
    """Compares a run with the checkpoint of one that had none of its changes."""
    stored, asked = before or vars(make_options(**BEFORE)), make_options(**{**BEFORE, **changes})
    checkpoint = Checkpoint(Path("run/checkpoint-50"), Progress(**progress), stored, dict(UNET), {}, {}, None, {}, {})
    images = SimpleNamespace(fingerprint=dataset)
    plan = Plan(asked, images, Start(checkpoint), unet, ranks, images_per_step, 50, 400, asked.max_train_steps, [])
    return check_changes(checkpoint, plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "epsilon"}, "prediction_type is epsilon, but run/checkpoint-50 was trained with v_pred"),
        ({"num_train_timesteps": 10}, "num_train_timesteps is 10, but .* with 1000"),
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is scaled_linear, but .* with linear"),
        ({"unconditional": True}, "unconditional is True, but .* with False"),
        ({"optimizer": "adamw_8bit"}, "optimizer is adamw_8bit, but .* with adamw"),
        ({"resize_to_power_of_two": "up"}, "resize_to_power_of_two is up, but .* with None"),
    ],
)
def test_what_may_not_change(changes, message):
    with pytest.raises(ValueError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        # what Python has as tuples, JSON has as lists
        ({"unet": {**UNET, "block_out_channels": (8, 16), "_name_or_path": "x"}}, []),
        # of what a converted checkpoint does not know nothing is said
        ({"before": {"seed": 0}, "progress": {"step": 7, "epoch": 2}, "dataset": "any"}, []),
        ({"use_ema": False}, ["use_ema was True and is False"]),
        ({"timestep_sampling": "importance"}, ["timestep_sampling was uniform and is importance"]),
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
    assert sorted(check(**changes)) == sorted(sentences)
