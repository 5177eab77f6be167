"""Options of a training run and what is built from them."""

import pytest
import torch

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.training.components import (
    Start,
    build_optimizer,
    build_scheduler,
    build_unet,
    training_size,
    unet_config,
)
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import resolve_options


@pytest.fixture
def make_options(prepared):
    """Options of a run that begins from nothing."""
    return lambda **options: resolve_options(TrainOptions(train_data_dir=str(prepared), **options), Start())


def make_unet(options, prepared):
    return build_unet(unet_config(options, PreparedImages(prepared)), Start())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_batch_size", 0, "train_batch_size is 0, but must be at least 1"),
        ("seed", -1, "seed is -1, but must be at least 0"),
        ("learning_rate", 0.0, "learning_rate is 0.0, but must be above 0"),
        ("class_dropout_prob", 1.5, r"class_dropout_prob is 1.5, but must be in \[0, 1\]"),
        ("adam_beta2", 1.0, r"adam_beta2 is 1.0, but must be in \[0, 1\)"),
        ("max_train_steps", 0, "max_train_steps is 0, but must be at least 1"),
        ("vlb_weight", -0.1, "vlb_weight is -0.1, but must be at least 0"),
        ("snr_gamma", 0.0, "snr_gamma is 0.0, but must be above 0"),
        ("checkpointing_steps", -1, "checkpointing_steps is -1, but must be at least 0"),
    ],
)
def test_values_out_of_range(make_options, name, value, message):
    with pytest.raises(ValueError, match=message):
        make_options(**{name: value})


def test_the_dataset_says_size_channels_and_classes(make_options, prepared):
    config = make_unet(make_options(model_config_name_or_path="demo"), prepared).config
    assert (config.sample_size, config.in_channels, config.num_class_embeds) == (16, 1, 3)
    options = make_options(model_config_name_or_path="demo", unconditional=True, layer_types=["resnet"])
    assert make_unet(options, prepared).config.num_class_embeds is None
    with pytest.raises(ValueError, match="needs classes, but num_class_embeds is None"):
        make_unet(make_options(model_config_name_or_path="demo", unconditional=True), prepared)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, but must hold an object"),
        ('{"widths": [1]}', "the U-Net has no option widths"),
    ],
)
def test_wrong_model_files(make_options, tmp_path, prepared, content, message):
    (tmp_path / "unet.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        make_unet(make_options(model_config_name_or_path=str(tmp_path / "unet.json")), prepared)


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear", "original_cosine"])
def test_schedules(make_options, beta_schedule):
    scheduler = build_scheduler(make_options(beta_schedule=beta_schedule, num_train_timesteps=500))
    assert len(scheduler.alphas_cumprod) == 500
    assert (scheduler.alphas_cumprod.diff() <= 0).all()
    scheduler.set_timesteps(10)
    if beta_schedule == "original_cosine":
        assert scheduler.alphas_cumprod.max() == pytest.approx(0.999, abs=1e-9)
        assert scheduler.final_alpha_cumprod == pytest.approx(0.999, abs=1e-9)
    else:
        assert (scheduler.final_alpha_cumprod, scheduler.timesteps[0]) == (1.0, 499)


def test_every_option_of_the_network(make_options, prepared):
    """Each replaces the recipe's entry; the original's names and its commas are taken too."""
    asked = {
        "stem_channels": 12,
        "block_out_channels": [8, 24],
        "layer_types": ["res,conv", "chnAtn"],
        "time_embed_dim": 20,
        "class_embed_dim": 28,
        "attention_patch_size": 4,
        "dropout": 0.25,
        "time_embedding_type": "original_sine",
        "class_attention_type": "identity",
        "output_head_type": "original",
    }
    options = make_options(model_config_name_or_path="demo", num_train_timesteps=50, **asked)
    config = make_unet(options, prepared).config
    expected = asked | {"layer_types": ("resnet", "convnext", "channel_attention"), "block_out_channels": (8, 24)}
    assert {name: config[name] for name in asked} == expected
    assert config.num_train_timesteps == 50


def test_a_network_of_its_own_leaves_no_room_for_options(make_options):
    with pytest.raises(ValueError, match="stem_channels is 8, but pretrained_model_name_or_path brings its own"):
        make_options(pretrained_model_name_or_path="somewhere", stem_channels=8)


@pytest.mark.parametrize(
    ("image_size", "up", "down"), [((64, 64), (64, 64), (64, 64)), ((28, 48), (32, 64), (16, 32))]
)
def test_sizes_of_powers_of_two(make_options, prepared, image_size, up, down):
    dataset = PreparedImages(prepared)
    dataset.image_size = image_size
    assert training_size(make_options(), dataset) == image_size
    assert training_size(make_options(resize_to_power_of_two="up"), dataset) == up
    assert training_size(make_options(resize_to_power_of_two="down"), dataset) == down


def test_optimizers(make_options):
    network = torch.nn.Linear(2, 2)
    cpu = torch.device("cpu")
    optimizer = build_optimizer(make_options(learning_rate=0.5, adam_beta1=0.3), network.parameters(), cpu)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["fused"]) == (0.5, (0.3, 0.999), True)
    # wherever it is, an 8-bit optimizer on a CPU has to be refused
    with pytest.raises(ValueError, match="optimizer is adamw_8bit, which needs"):
        build_optimizer(make_options(optimizer="adamw_8bit"), network.parameters(), cpu)


def test_the_fused_optimizer_is_adamw(make_options):
    """Against the formula of Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2) in float64."""
    options = make_options(learning_rate=0.1, adam_weight_decay=0.3, adam_epsilon=1e-3)
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = build_optimizer(options, [weight], torch.device("cpu"))
    expected = weight.detach().double()
    first = second = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 4):
        gradient = torch.tensor([0.5, 1.0 / step], dtype=torch.float64)
        weight.grad = gradient.float()
        optimizer.step()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-3)
        expected = expected - 0.1 * (0.3 * expected + update)
    torch.testing.assert_close(weight.detach().double(), expected, atol=1e-6, rtol=0)
