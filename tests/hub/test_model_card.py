"""The model card."""

import json
import re

import pytest
from diffusers import DDIMScheduler
from huggingface_hub import EvalResult, ModelCard

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler
from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.pipelines.model_card import (
    UNKNOWN_REPO_ID,
    create_model_card,
    recipe_name,
    write_model_card,
)
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas
from imagenet64_diffusion.tests.components import make_pipeline, make_unet


RECIPES = sorted(path.relative_to(CONFIG_DIR).with_suffix("").as_posix() for path in CONFIG_DIR.rglob("*.json"))
RECIPES = [recipe for recipe in RECIPES if not recipe.startswith("training/")]


def facts(card: ModelCard) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows if len(row) == 2}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_recognised(recipe):
    config = json.loads((CONFIG_DIR / f"{recipe}.json").read_text())
    of_the_data = {"sample_size": 48, "in_channels": 1, "num_class_embeds": 7}
    assert recipe_name(config | of_the_data) == recipe
    assert recipe_name(config | {"stem_channels": 12}) is None
    if recipe.startswith("original/"):
        assert recipe_name(config | {"time_embedding_type": "original_sine"}) == recipe
        assert recipe_name(config | {"time_embedding_type": "sinusoidal"}) is None


def test_facts_come_from_the_pipeline():
    pipeline = make_pipeline()
    card = create_model_card(pipeline, repo_id="me/tiny")
    assert card.text.strip().startswith("# tiny\n\nGenerates 16x16 grey images of 3 classes")
    told = facts(card)
    assert told["recipe"] == "its own"
    assert told["layers at every resolution"] == "resnet, class attention, channel attention"
    assert told["parameters"] == f"{pipeline.unet.num_parameters():,}"
    assert told["classes"] == "3 (tabby, tabby cat; goldfish; crane), and the null class"
    assert told["timesteps"] == "1,000"
    assert told["the network predicts"].startswith("the velocity")
    assert told["noise schedule"] == "cosine (`squaredcos_cap_v2`)"
    assert told["stored scheduler"] == "`EtaDDIMScheduler`"
    assert "`guidance_scale=5.0`" in told["defaults of a call"]
    assert "Training" not in card.text
    assert "samples.png" not in card.text
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert {"class-conditional", "classifier-free-guidance", "ddpm", "ddim", "pixel-space"} <= set(data["tags"])
    assert "datasets" not in data


@pytest.mark.parametrize(
    ("scheduler", "schedule", "predicts"),
    [
        (
            EtaDDIMScheduler(trained_betas=original_cosine_betas(1000)),
            "the original program's cosine, stored as `trained_betas`",
            "the noise",
        ),
        (
            EtaDDIMScheduler(trained_betas=[0.01] * 1000, prediction_type="sample"),
            "stored as `trained_betas`",
            "the im",
        ),
        (DDIMScheduler(beta_end=0.03), "`linear`, beta from 0.0001 to 0.03", "the noise"),
    ],
)
def test_schedules(scheduler, schedule, predicts):
    told = facts(create_model_card(ClassConditionalPipeline(make_unet(), scheduler)))
    assert told["noise schedule"] == schedule
    assert told["the network predicts"].startswith(predicts)
    assert told["classes"] == "3 without names, and the null class"


@pytest.mark.parametrize(
    "scheduler",
    [
        EtaDDIMScheduler(trained_betas=original_cosine_betas(1000), set_alpha_to_one=False),
        EtaDDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        DDIMScheduler(),
    ],
)
def test_the_scheduler_that_the_card_takes_fits(scheduler, caplog):
    pipeline = ClassConditionalPipeline(make_unet(), scheduler, {0: "tabby", 1: "goldfish", 2: "crane"})
    blocks = re.findall(r"```python\n(.*?)```", create_model_card(pipeline).text, re.DOTALL)
    code = next(block for block in blocks if "UniPC" in block)
    scope = {"pipeline": pipeline}
    exec(code, scope)
    assert len(scope["images"]) == 3
    assert not caplog.records


def test_without_classes():
    pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet", "channel_attention"))
    card = create_model_card(pipeline)
    assert "classes" not in facts(card)
    assert "guidance_scale" not in card.text
    assert UNKNOWN_REPO_ID in card.text
    assert "class-conditional" not in card.data.tags


def test_names_that_do_not_stand_for_one_class():
    pipeline = make_pipeline()
    names = {0: "crane, bird", 1: 'the "big" one', 2: "crane, machine"}
    card = create_model_card(ClassConditionalPipeline(pipeline.unet, pipeline.scheduler, names))
    assert r'[0, "the \"big\" one", None],  # class ids' in card.text


def test_what_was_trained_and_evaluated(tmp_path):
    result = EvalResult(
        task_type="unconditional-image-generation",
        dataset_type="imagenet-1k",
        dataset_name="ImageNet 64x64",
        metric_type="fid",
        metric_name="FID",
        metric_value=12.5,
        metric_args={"images": 50000, "guidance": 1.0, "steps": 100, "mode": "legacy_tensorflow"},
    )
    file = write_model_card(
        make_pipeline(),
        tmp_path / "new",
        repo_id="me/tiny",
        training_facts={"steps": "600,000", "batch | accumulation": "1,024 |\n8"},
        eval_results=[result],
        datasets=["some/images"],
        license="mit",
    )
    card = ModelCard.load(file)
    assert "| steps | 600,000 |\n| batch \\| accumulation | 1,024 \\| 8 |" in card.text
    assert (
        "| FID | 12.5 | ImageNet 64x64 | images 50000, guidance 1.0, steps 100, mode legacy_tensorflow |" in card.text
    )
    assert card.data.eval_results == [result]
    assert card.data.license == "mit"
    assert card.data.datasets == ["some/images"]
    assert card.data.metrics == ["fid"]
