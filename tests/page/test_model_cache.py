"""The models of the page."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.page import model_cache
from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.page.model_cache import ModelCache, facts
from imagenet64_diffusion.tests.components import make_pipeline


def test_facts_of_the_digits_and_of_a_network_without_classes():
    models = ModelCache(AppOptions(device="cpu"))
    [name] = models.names
    line = facts(name, models.pipeline(name))
    assert line == "the digits of this package · 0.63 M parameters · 32x32 pixels, grey · 10 classes · on cpu"
    pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",), in_channels=3, sample_size=(16, 32))
    assert "· 32x16 pixels, RGB · no classes ·" in facts("mine", pipeline)


def test_each_is_loaded_once_and_only_so_many_stay_in_memory(tmp_path, tiny_model, monkeypatch):
    names, loaded = [str(shutil.copytree(tiny_model, tmp_path / name)) for name in "abc"], []
    load = model_cache.open_model
    monkeypatch.setattr(
        model_cache, "open_model", lambda name, *rest, **options: loaded.append(name) or load(name, *rest, **options)
    )
    models = ModelCache(AppOptions(model=names, max_loaded_models=2))
    with ThreadPoolExecutor(4) as people:
        list(people.map(models.pipeline, [names[0]] * 4))
    for name in (names[1], names[2], names[1], names[0]):
        models.pipeline(name)
    assert loaded == [*names, names[0]]


def test_a_request_has_the_networks_that_guide(tmp_path):
    pipeline = make_pipeline()
    ClassConditionalPipeline(**{**pipeline.components, "guidance_unet": pipeline.unet}).save_pretrained(tmp_path)
    models = ModelCache(AppOptions(model=[str(tmp_path)]))
    first, second = models.pipeline(str(tmp_path)), models.pipeline(str(tmp_path))
    assert first.guidance_unet is second.guidance_unet is not None
    assert first.scheduler is not second.scheduler


def test_another_folder_is_opened_where_that_is_allowed(models, tmp_path, tiny_model):
    copy = str(shutil.copytree(tiny_model, tmp_path / "secret"))
    for name in (copy, str(tiny_model.parent), str(tiny_model) + "/", "someone/model"):
        with pytest.raises(ValueError, match=f"^Model is '{name}', but this page has .*tiny only$"):
            models.pipeline(name)
    assert ModelCache(AppOptions(model=[str(tiny_model)], allow_any_model=True)).pipeline(copy).unet is not None
