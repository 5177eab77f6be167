"""Options of a training run and what is built from them."""

import json

import pytest
import torch

from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.training.components import build_pipeline, build_scheduler, build_unet, load_model_config
from imagenet64_diffusion.training.options import TrainOptions


@pytest.fixture
def make_options(prepared):
    return lambda **options: TrainOptions(train_data_dir=str(prepared), **options)


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
    ],
)
def test_values_out_of_range(make_options, name, value, message):
    with pytest.raises(ValueError, match=message):
        make_options(**{name: value})


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match=r"there is no such folder: make it with prepare_imagenet64\.py"):
        TrainOptions(train_data_dir=str(tmp_path / "none"))


def test_the_dataset_says_size_channels_and_classes(make_options, prepared):
    unet = build_unet(make_options(model_config_name_or_path="demo"), PreparedImages(prepared))
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.num_class_embeds) == (16, 1, 3)


def test_unconditional(make_options, tmp_path, prepared):
    file = tmp_path / "unet.json"
    file.write_text(json.dumps({"layer_types": ["resnet"], "stem_channels": 8, "block_out_channels": [8]}))
    options = make_options(model_config_name_or_path=str(file), unconditional=True)
    dataset = PreparedImages(prepared)
    unet = build_unet(options, dataset)
    assert unet.config.num_class_embeds is None
    assert build_pipeline(unet, build_scheduler(options), dataset).config.id2label is None
    with pytest.raises(ValueError, match="needs classes, but num_class_embeds is None"):
        build_unet(make_options(model_config_name_or_path="demo", unconditional=True), dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a list, but must hold an object"),
        ('{"widths": [1]}', "the U-Net has no option widths"),
    ],
)
def test_wrong_model_files(make_options, tmp_path, prepared, content, message):
    file = tmp_path / "unet.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        build_unet(make_options(model_config_name_or_path=str(file)), PreparedImages(prepared))


def test_unknown_recipe():
    with pytest.raises(
        ValueError, match=r"'rse', but must be a JSON file or one of demo, original/res, .*res_res_atn"
    ):
        load_model_config("rse")


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear", "original_cosine"])
def test_schedules(make_options, beta_schedule):
    scheduler = build_scheduler(make_options(beta_schedule=beta_schedule, num_train_timesteps=500))
    assert len(scheduler.alphas_cumprod) == 500
    if beta_schedule == "original_cosine":
        assert scheduler.alphas_cumprod.max() == pytest.approx(0.999, abs=1e-9)
        assert scheduler.final_alpha_cumprod == pytest.approx(0.999, abs=1e-9)
    else:
        assert scheduler.final_alpha_cumprod == 1.0
    assert (scheduler.alphas_cumprod.diff() <= 0).all()
    scheduler.set_timesteps(10)
    if beta_schedule != "original_cosine":
        assert scheduler.timesteps[0] == 499
    assert torch.is_tensor(scheduler.timesteps)
