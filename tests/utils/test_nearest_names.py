"""A name that is not known is answered with the nearest one that is, wherever names are refused."""

import datasets
import numpy as np
import pytest

from imagenet64_diffusion.conversion.original import build_empty_unet, check_params
from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.data.image_source import ImageDatasetSource
from imagenet64_diffusion.evaluation.options import ReferenceOptions, ScoreOptions, SweepOptions
from imagenet64_diffusion.evaluation.protocols import make_extractor
from imagenet64_diffusion.evaluation.sweeping import sampler_grid
from imagenet64_diffusion.pipelines.loading import load_pipeline, scheduler_class
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS
from imagenet64_diffusion.training.components import load_model_config, unet_config
from imagenet64_diffusion.training.loop import train
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.nearest_names import nearest_name, perhaps


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("resnt", "resnet"), ("RESNET", "resnet"), ("Convnext", "ConvNeXt"), ("zzz", None), ("", None), (3, None)],
)
def test_nearest_name(name, nearest):
    known = ["resnet", "ConvNeXt", "class_attention"]
    assert nearest_name(name, known) == nearest
    assert nearest_name(name, iter(known)) == nearest
    assert perhaps(name, known) == ("" if nearest is None else f"; perhaps {nearest}")


def test_nothing_is_known():
    assert nearest_name("resnet", []) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("UniPCMultistp", "UniPCMultistep"),
        ("unipcmultistepscheduler", "UniPCMultistep"),
        ("EtaDDMI", "EtaDDIM"),
        ("DPMSolverMultiStepScheduler", "DPMSolverMultistep"),
    ],
)
def test_schedulers(name, nearest):
    with pytest.raises(ValueError, match=f"there is no scheduler named '{name}': .*; perhaps {nearest}$"):
        scheduler_class(name)


def test_recipes_and_what_they_are_made_of(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"'rse_res', but .*; perhaps res_res$"):
        load_model_config("rse_res")
    options = TrainOptions(
        train_data_dir=str(prepared), model_config_name_or_path="demo", layer_types=["resnet,clsAtm"]
    )
    with pytest.raises(ValueError, match=r"layer_types names 'clsAtm', but must be made of .*; perhaps clsAtn$"):
        unet_config(options, PreparedImages(prepared))
    (tmp_path / "unet.json").write_text('{"stem_chanels": 8}')
    options = TrainOptions(train_data_dir=str(prepared), model_config_name_or_path=str(tmp_path / "unet.json"))
    with pytest.raises(ValueError, match=r"the U-Net has no option stem_chanels; perhaps stem_channels$"):
        unet_config(options, PreparedImages(prepared))


def test_trackers(prepared, tmp_path):
    options = TrainOptions(train_data_dir=str(prepared), output_dir=str(tmp_path / "run"), report_to="tensorbord")
    with pytest.raises(
        ValueError, match=r"report_to is 'tensorbord', but must be one of none, .*; perhaps tensorboard$"
    ):
        train(options)
    assert not (tmp_path / "run").exists()


def test_what_is_measured(tmp_path):
    with pytest.raises(ValueError, match=r"metrics names 'FDI', but must be .*; perhaps fid$"):
        ScoreOptions(reference="a", model="b", metrics=["FDI"])
    with pytest.raises(ValueError, match=r"protocol is 'dinov', but must be one of .*; perhaps dinov2$"):
        ReferenceOptions(output_dir="a", source="b", protocol="dinov")
    with pytest.raises(ValueError, match=r"extractor_dtype is 'float23', but must be one of .*; perhaps float32$"):
        ReferenceOptions(output_dir="a", source="b", extractor_dtype="float23")
    with pytest.raises(ValueError, match=r"there is no protocol 'pixel': .*; perhaps pixels$"):
        make_extractor("pixel")
    (tmp_path / "grid.yaml").write_text("- {guidence_scale: 2}")
    with pytest.raises(ValueError, match=r"names 'guidence_scale', but must be made of .*; perhaps guidance_scale$"):
        sampler_grid(SweepOptions(output_dir="a", reference="b", models=["c"], grid=str(tmp_path / "grid.yaml")))


def test_what_is_converted():
    with pytest.raises(ValueError, match=r"time_embedding is 'original_sin', but .*; perhaps original_sine$"):
        build_empty_unet(SMALL_PARAMS, "original_sin", "params.json")
    with pytest.raises(ValueError, match=r"beta_sched is 'cosin', but must be one of .*; perhaps cosine$"):
        check_params({**SMALL_PARAMS, "beta_sched": "cosin"}, "params.json")
    with pytest.raises(ValueError, match=r"blk_types is 'resn', but must be one of .*; perhaps res$"):
        check_params({**SMALL_PARAMS, "blk_types": ["resn"]}, "params.json")


def test_what_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"unknown arguments of from_pretrained: varient; perhaps variant$"):
        load_pipeline(DIGITS, varient="fp16")
    images = [np.zeros((4, 4), np.uint8)]
    datasets.DatasetDict(
        {
            "training": datasets.Dataset.from_dict(
                {"picture": images, "label": [0]},
                features=datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")}),
            )
        }
    ).save_to_disk(tmp_path / "images")
    with pytest.raises(ValueError, match=r"has the splits training; perhaps training$"):
        ImageDatasetSource("dataset", [str(tmp_path / "images")], "trainin").open(tmp_path)
    with pytest.raises(ValueError, match=r"--image_column pictrue: .*; perhaps picture$"):
        ImageDatasetSource("dataset", [str(tmp_path / "images")], "training", image_column="pictrue").open(tmp_path)
