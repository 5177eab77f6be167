"""Networks of several classes: what the images, the options and the start of a run make of their configs."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from imagenet64_diffusion import ADMUNet2DModel, ClassConditionalPipeline, EDM2UNet2DModel, EDMHeunScheduler
from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.tests.commands.training_runs import NETWORKS
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.training.checkpoints import Checkpoint, Progress
from imagenet64_diffusion.training.components import (
    Start,
    build_scheduler,
    build_unet,
    load_model_config,
    unet_config,
)
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import resolve_options


@pytest.fixture
def configure(prepared, tmp_path):
    """Resolves options, and gives them with the network for the prepared images, which are grey and of 3 classes."""

    def make(network=None, start=None, **options):
        start = start or Start()
        if network is not None:
            (tmp_path / "unet.json").write_text(json.dumps(network))
            options["model_config_name_or_path"] = str(tmp_path / "unet.json")
        options = resolve_options(TrainOptions(train_data_dir=".", **options), start)
        return options, unet_config(options, PreparedImages(prepared), start)

    return make


def make_stock_pipeline(num_class_embeds):
    options = {**NETWORKS["stock"], "in_channels": 1, "out_channels": 1, "sample_size": 16}
    unet = UNet2DModel(**{key: value for key, value in options.items() if not key.startswith("_")} | num_class_embeds)
    return ClassConditionalPipeline(unet, EDMHeunScheduler(sigma_data=0.7), {0: "dark", 1: "grey", 2: "light"})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_images_say_size_channels_and_classes(configure, name, dropout):
    _, config = configure(NETWORKS[name], class_dropout_prob=dropout)
    unet = build_unet(config, Start())
    assert type(unet).__name__ == NETWORKS[name]["_class_name"] == config["_class_name"]
    assert (config["sample_size"], config["in_channels"]) == (16, 1)
    # the stock network's last embedding is the null class
    assert config["num_class_embeds"] == (4 if name == "stock" and dropout else 3)
    assert config.get("null_class", dropout > 0) == (dropout > 0)
    pipeline = ClassConditionalPipeline(unet, EDMHeunScheduler(), {0: "dark", 1: "grey", 2: "light"})
    null_class = 3 if dropout or name == "ours" else None
    assert (pipeline.num_classes, pipeline.null_class) == (3, null_class)
    output = unet(torch.zeros(1, 1, 16, 16), torch.zeros(1), torch.tensor([null_class or 0])).sample
    assert output.shape == (1, 2 if name == "ours" else 1, 16, 16)


def test_a_learned_variance_stays(configure):
    """Of colours in a file, of grey here."""
    options, config = configure({**NETWORKS["stock"], "out_channels": 6})
    assert config["out_channels"] == 2
    for learns, variance_type in ((True, "learned_range"), (False, "fixed_small")):
        assert build_scheduler(options, Start(), learns).config.variance_type == variance_type


def test_every_recipe_and_a_folder(tmp_path):
    assert load_model_config("edm2_xs")["_class_name"] == "EDM2UNet2DModel"
    assert load_model_config("res")["_class_name"] == "ClassConditionalUNet2DModel"
    make_stock_pipeline({"num_class_embeds": 3}).unet.save_pretrained(tmp_path)
    assert load_model_config(str(tmp_path))["_class_name"] == "UNet2DModel"


@pytest.mark.parametrize(
    ("network", "options", "expected"),
    [
        ("ours", {}, ("ddpm", "v_prediction", None, None, None)),
        ("stock", {"objective": "edm"}, ("edm", None, -1.2, 1.2, 0.5)),
        ("edm2", {"p_std": 2.0, "sigma_data": 0.7}, ("edm", None, -0.8, 2.0, 0.7)),
        ("edm2", {"objective": "ddpm"}, ("ddpm", "v_prediction", None, None, None)),
    ],
)
def test_defaults(configure, network, options, expected):
    """EDM2's networks have their paper's, and an objective has no options of another."""
    found, _ = configure(NETWORKS[network], **options)
    assert (found.objective, found.prediction_type, found.p_mean, found.p_std, found.sigma_data) == expected


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({"_class_name": "ADMClassifierModel"}, {}, "is of a ADMClassifierModel, but must be of one of ClassCond"),
        (NETWORKS["stock"], {"stem_channels": 8}, "unet.json: .*'stem_channels'"),
        (NETWORKS["stock"], {"objective": "edm", "snr_gamma": 5.0}, "snr_gamma is 5.0, but objective edm has no such"),
        (NETWORKS["ours"], {"p_mean": 0.0}, "p_mean is 0.0, but objective ddpm has no such option: edm has it"),
        (
            {**NETWORKS["ours"], "time_embedding_type": "original_sine"},
            {"objective": "edm"},
            "time_embedding_type of .*unet.json is original_sine, but objective edm needs another: sinusoidal",
        ),
        ({**NETWORKS["stock"], "time_embedding_type": "fourier"}, {}, "is fourier, but objective ddpm needs another"),
        ({**NETWORKS["edm2"], "channel_mult": [1] * 6}, {}, "16x16, which 5 halvings do not divide"),
    ],
)
def test_what_does_not_fit(configure, network, options, message):
    with pytest.raises(ValueError, match=message):
        configure(network, **options)


def test_fine_tuning_a_stock_network(configure):
    """It goes on with its scheduler's objective; a null class that it has stays, and one that it has not is told."""
    start = Start(pretrained=make_stock_pipeline({"num_class_embeds": 4}))
    options, config = configure(start=start, pretrained_model_name_or_path="tuned")
    assert (options.objective, options.sigma_data, config["num_class_embeds"]) == ("edm", 0.7, 4)
    assert configure(start=start, class_dropout_prob=0.0)[1]["num_class_embeds"] == 4
    assert build_scheduler(options, start).config == start.pretrained.scheduler.config
    weights = build_unet(config, start).state_dict()
    assert all(map(torch.equal, weights.values(), start.pretrained.unet.state_dict().values()))
    for changes, message in (
        ({"objective": "ddpm"}, "objective is ddpm, but tuned was trained with edm"),
        ({"sigma_data": 0.5}, "sigma_data is 0.5, but tuned has 0.7"),
    ):
        with pytest.raises(ValueError, match=message):
            build_scheduler(configure(start=start, pretrained_model_name_or_path="tuned", **changes)[0], start)

    start = Start(pretrained=make_stock_pipeline({"num_class_embeds": 3}))
    assert configure(start=start, class_dropout_prob=0.0)[1]["num_class_embeds"] == 3
    told = "class_dropout_prob is 0.2, but .* 3 embeddings, .*: set class_dropout_prob to 0, or .*num_class_embeds 4"
    with pytest.raises(ValueError, match=told):
        configure(start=start)
    assert configure(start=Start(pretrained=make_pipeline()))[0].objective == "ddpm"


def test_a_checkpoint_says_what_is_trained(configure, tmp_path):
    """Those of earlier versions name neither objective nor class, of which there was one then."""

    def resume(stored, config, **options):
        checkpoint = Checkpoint(tmp_path, Progress(step=1, epoch=1), stored, config, {}, {}, None, {}, {})
        return configure(start=Start(checkpoint), **options)

    options, config = resume({"prediction_type": "epsilon"}, {"block_out_channels": [8], "layer_types": ["resnet"]})
    assert (options.objective, options.prediction_type) == ("ddpm", "epsilon")
    assert config["_class_name"] == "ClassConditionalUNet2DModel"
    stored = {"objective": "edm", "p_mean": 0.1, "p_std": 0.2, "sigma_data": 0.3, "prediction_type": None}
    options, config = resume(stored, NETWORKS["edm2"])
    assert (options.objective, options.p_mean, options.p_std, options.sigma_data) == ("edm", 0.1, 0.2, 0.3)
    assert config["_class_name"] == EDM2UNet2DModel.__name__ != ADMUNet2DModel.__name__
