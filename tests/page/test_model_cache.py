"""The models of the page."""

import shutil

import pytest

from imagenet64_diffusion.page.model_cache import ModelCache, facts
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.components import make_pipeline


def test_without_a_name_it_has_the_digits():
    models = ModelCache([])
    assert models.names == (str(DIGITS),)
    line = facts(str(DIGITS), models.pipeline(str(DIGITS)))
    assert line.startswith("the digits of this package · ")
    assert " · 32x32 pixels, grey · 10 classes · on cpu" in line


def test_a_lent_pipeline_shares_the_network_alone(models):
    first, second = (models.pipeline(models.names[0]) for _ in range(2))
    assert first.unet is second.unet
    assert first.scheduler is not second.scheduler
    first.scheduler.set_timesteps(3)
    assert len(second.scheduler.timesteps) == len(models.pipeline(models.names[0]).scheduler.timesteps) == 1000


def test_another_folder_is_not_opened(models, tmp_path, tiny_model):
    copy = shutil.copytree(tiny_model, tmp_path / "secret")
    for name in (str(copy), str(tiny_model.parent), str(tiny_model) + "/", "someone/model"):
        with pytest.raises(ValueError, match=f"^Model is '{name}', but this page has .*tiny only$"):
            models.pipeline(name)


def test_another_folder_is_opened_where_that_is_allowed(tmp_path, tiny_model):
    copy = shutil.copytree(tiny_model, tmp_path / "mine")
    models = ModelCache([str(tiny_model)], takes_any=True)
    assert models.pipeline(str(copy)).unet is not models.pipeline(str(tiny_model)).unet


@pytest.mark.parametrize("name", ["no/where", "/no/where/at/all", "no such model"])
def test_a_model_that_is_not_there(name, tiny_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=f"^{name} is not a folder, and cannot be"):
        ModelCache([str(tiny_model)], takes_any=True).pipeline(name)


def test_a_folder_of_something_else(tmp_path, tiny_model):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="holds no pipeline"):
        ModelCache([str(tiny_model)], takes_any=True).pipeline(str(tmp_path / "other"))


def test_only_so_many_stay_in_memory(tmp_path, tiny_model):
    names = [str(shutil.copytree(tiny_model, tmp_path / name)) for name in "abc"]
    models = ModelCache(names, max_loaded=2)
    first, second, _ = (models.pipeline(name).unet for name in names)
    assert models.pipeline(names[1]).unet is second
    assert models.pipeline(names[0]).unet is not first


def test_facts_of_a_network_without_classes():
    pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",), in_channels=3, sample_size=(16, 32))
    assert "· 32x16 pixels, RGB · no classes ·" in facts("mine", pipeline)
