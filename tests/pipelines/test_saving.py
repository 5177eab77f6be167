"""A saved pipeline: a folder that loads with this package and without it."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pipelines.loading import swap_scheduler
from imagenet64_diffusion.tests.components import generate_two, make_pipeline, make_unet
from imagenet64_diffusion.tests.hub.conftest import files_under
from imagenet64_diffusion.tests.hub.test_pushing import CODE_AND_WEIGHTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving") / "model"
    make_pipeline().save_pretrained(folder)
    return folder


def test_what_the_folder_holds(folder):
    assert files_under(folder) == CODE_AND_WEIGHTS
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_class_conditional", "ClassConditionalPipeline"]
    assert index["unet"] == ["unet_class_conditional", "ClassConditionalUNet2DModel"]
    assert index["id2label"] == {"0": "tabby, tabby cat", "1": "goldfish", "2": "crane"}


def test_components_of_ones_own(folder):
    unet, scheduler = make_unet(stem_channels=16), DDIMScheduler()
    assert DiffusionPipeline.from_pretrained(folder, unet=unet, trust_remote_code=True).unet is unet
    loaded = ClassConditionalPipeline.from_pretrained(folder, unet=unet, scheduler=scheduler)
    assert (type(loaded), loaded.unet, loaded.scheduler) == (ClassConditionalPipeline, unet, scheduler)


@pytest.mark.parametrize(
    ("name", "library"), [("DPMSolverMultistep", "diffusers"), ("LearnedVarianceDDPM", "scheduling_ddim_eta")]
)
def test_another_scheduler_inside(tmp_path, name, library):
    """Saving before or after the swap makes no difference."""
    make_pipeline().save_pretrained(tmp_path)
    pipelines = make_pipeline(), ClassConditionalPipeline.from_pretrained(tmp_path)
    for pipeline in pipelines:
        swap_scheduler(pipeline, name)
    expected, again = map(generate_two, pipelines)
    assert torch.equal(again, expected)
    pipelines[0].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [library, f"{name}Scheduler"]
    for loaded in (ClassConditionalPipeline, DiffusionPipeline):
        assert torch.equal(generate_two(loaded.from_pretrained(tmp_path, trust_remote_code=True)), expected)
