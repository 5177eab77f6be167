"""The model card."""

import json
import re

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import EvalResult, ModelCard

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.pipelines.model_card import UNKNOWN_REPO_ID, create_model_card, recipe_name, write_model_card
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas
from imagenet64_diffusion.tests.components import make_pipeline, make_unet


RECIPES = sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.json"))


def facts(card: ModelCard) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if not recipe.startswith("training/")])
def test_recipes_are_recognised(recipe):
    config = json.loads((CONFIG_DIR / f"{recipe}.json").read_text())
    assert recipe_name(config | {"sample_size": 48, "in_channels": 1, "num_class_embeds": 7}) == recipe
    assert recipe_name(config | {"stem_channels": 12, "model_channels": 12}) is None
    if recipe.startswith("original/"):
        assert recipe_name(config | {"time_embedding_type": "original_sine"}) == recipe
        assert recipe_name(config | {"time_embedding_type": "sinusoidal"}) is None


def test_facts_come_from_the_pipeline():
    pipeline = make_pipeline()
    card = create_model_card(pipeline, repo_id="me/tiny")
    assert card.text.strip().startswith("# tiny\n\nGenerates 16x16 grey images of 3 classes")
    told = facts(card)
    assert told.pop("defaults of a call").startswith("`num_inference_steps=100`, `eta=0.0`, `guidance_scale=5.0`")
    assert told == {
        "network": "`ClassConditionalUNet2DModel`",
        "recipe": "its own",
        "layers at every resolution": "resnet, class attention, channel attention",
        "widths": "8 at the stem, then 8, 16",
        "parameters": f"{pipeline.unet.num_parameters():,}",
        "images": "16x16 grey",
        "classes": "3 (tabby, tabby cat; goldfish; crane), and the null class",
        "class attention": "channel",
        "time embedding": "sinusoidal",
        "timesteps": "1,000",
        "the network predicts": "the velocity (`v_prediction`), and the variance between its bounds (`learned_range`)",
        "noise schedule": "cosine (`squaredcos_cap_v2`)",
        "stored scheduler": "`EtaDDIMScheduler`",
        "guidance of the variance": "no",
    }
    assert "Training" not in card.text
    assert "samples.png" not in card.text
    data = card.data.to_dict()
    assert (data["license"], data["pipeline_tag"]) == ("apache-2.0", "unconditional-image-generation")
    assert {"class-conditional", "classifier-free-guidance", "ddpm", "ddim", "pixel-space"} <= set(data["tags"])
    assert "datasets" not in data


ORIGINAL = {"trained_betas": original_cosine_betas(1000), "set_alpha_to_one": False}
FLAT = {"trained_betas": [0.01] * 1000, "prediction_type": "sample"}


@pytest.mark.parametrize(
    ("scheduler", "schedule", "predicts"),
    [
        (EtaDDIMScheduler(**ORIGINAL), "the original program's cosine, stored as `trained_betas`", "the noise"),
        (EtaDDIMScheduler(**FLAT), "stored as `trained_betas`", "the image"),
        (DDIMScheduler(beta_end=0.03), "`linear`, beta from 0.0001 to 0.03", "the noise"),
    ],
)
def test_schedules(scheduler, schedule, predicts, caplog):
    pipeline = ClassConditionalPipeline(make_unet(), scheduler)
    card = create_model_card(pipeline)
    told = facts(card)
    assert told["noise schedule"] == schedule
    assert told["the network predicts"].startswith(predicts)
    assert told["classes"] == "3 without names, and the null class"
    # the scheduler that the card takes fits
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(next(block for block in blocks if "UniPC" in block), scope := {"pipeline": pipeline})
    assert len(scope["images"]) == 3
    assert not caplog.records


def test_without_classes_and_with_names_of_several():
    card = create_model_card(make_pipeline(num_class_embeds=None, layer_types=("resnet", "channel_attention")))
    assert "classes" not in facts(card)
    assert "guidance_scale" not in card.text
    assert UNKNOWN_REPO_ID in card.text
    assert "class-conditional" not in card.data.tags
    names = {0: "crane, bird", 1: 'the "big" one', 2: "crane, machine"}
    card = create_model_card(ClassConditionalPipeline(make_unet(), EtaDDIMScheduler(), names))
    assert r'[0, "the \"big\" one", None],  # class ids' in card.text


def test_what_was_trained_and_evaluated(tmp_path):
    data = {"dataset_type": "imagenet-1k", "dataset_name": "ImageNet 64x64"}
    metric = {"metric_type": "fid", "metric_name": "FID", "metric_value": 12.5}
    metric["metric_args"] = {"images": 50000, "guidance": 1.0, "steps": 100}
    result = EvalResult(task_type="unconditional-image-generation", **data, **metric)
    training = {"steps": "600,000", "batch | accumulation": "1,024 |\n8"}
    options = {"training_facts": training, "eval_results": [result], "datasets": ["some/images"], "license": "mit"}
    card = ModelCard.load(write_model_card(make_pipeline(), tmp_path / "new", repo_id="me/tiny", **options))
    assert "| steps | 600,000 |\n| batch \\| accumulation | 1,024 \\| 8 |" in card.text
    assert "| FID | 12.5 | ImageNet 64x64 | images 50000, guidance 1.0, steps 100 |" in card.text
    assert card.data.eval_results == [result]
    assert (card.data.license, card.data.datasets, card.data.metrics) == ("mit", ["some/images"], ["fid"])
