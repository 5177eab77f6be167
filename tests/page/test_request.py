"""Forms, good and bad, before anything is sampled."""

import pytest

from imagenet64_diffusion.page.request import TWO_SCALES, TWO_SCHEDULERS, read_form
from imagenet64_diffusion.tests.page.forms import form


def test_a_good_form(models):
    """Whole numbers may come as floats."""
    changes = {"num_inference_steps": 4.0, "seed": 7.0, "guidance_begin": 0.2, "guidance_end": 0.9, "eta": 0.5}
    filled = form(models, class_labels=["2", "null", "tabby cat"], **changes)
    [request] = read_form(filled, models)
    assert request.class_ids == [2, 2, None, None, 0, 0]
    options = request.options
    assert (options.seed, options.num_inference_steps, options.guidance_scale) == (7, 4, 2.5)
    assert isinstance(options.seed, int)
    assert (options.guidance_interval, options.eta, options.scheduler) == ([0.2, 0.9], 0.5, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_labels": []}, "Classes is empty: choose at least one class"),
        ({"class_labels": ["tabbi"]}, "there is no class named 'tabbi'; did you mean 'tabby'"),
        ({"num_images_per_label": 0}, "Images per class is 0, but must be a whole number from 1 to 12"),
        ({"num_images_per_label": 5}, "This is 15 images, but a request may ask for 12"),
        ({"class_labels": ["0"] * 13, "num_images_per_label": 1}, "This is 13 images"),
        ({"num_inference_steps": 51}, "Steps is 51, but must be a whole number from 1 to 50"),
        ({"num_inference_steps": None}, "Steps is empty"),
        ({"seed": 1.5}, "Seed is 1.5, but must be a whole number"),
        ({"seed": 2**32}, "Seed is 4294967296, but"),
        ({"guidance_scale": float("nan")}, "Guidance scale is nan, but must be a number from 0 to 100"),
        ({"guidance_begin": 0.6, "guidance_end": 0.5}, "guidance_interval is (0.6, 0.5), but must be two"),
        ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "Scheduler is 'FlowMatchEulerDiscreteScheduler', which"),
        ({"scheduler": ["DDIMScheduler"]}, "Scheduler is ['DDIMScheduler'], which this model does not have"),
        ({"compare": "three"}, "Compare is 'three', but must be nothing, two schedulers or two guidance scales"),
        ({"compare": TWO_SCALES, "other_guidance_scale": None}, "Other guidance scale is empty"),
        ({"model": ""}, "Model is empty: choose one"),
        # 6 images, 50 steps, two branches
        ({"num_inference_steps": 50}, "This takes 600 evaluations of the network, but a request may take 400"),
        ({"num_inference_steps": 40, "guidance_scale": 1, "scheduler": "HeunDiscreteScheduler"}, "This takes 480"),
        ({"num_inference_steps": 20, "compare": TWO_SCALES}, "This takes 480 evaluations"),
    ],
)
def test_a_bad_form(models, changes, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        read_form(form(models, **changes), models)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_what_is_just_allowed(models):
    """400 evaluations, and 12 images."""
    assert read_form(form(models, class_labels=["0", "1"], num_inference_steps=50), models)
    assert read_form(form(models, class_labels=["all"], num_images_per_label=4, guidance_scale=1), models)


def test_two_schedulers_or_guidance_scales_with_the_same_noise(models):
    left, right = read_form(form(models, compare=TWO_SCHEDULERS, eta=0.5), models)
    assert (left.title, right.title) == ("EtaDDIMScheduler of the model", "DPMSolverMultistepScheduler")
    assert type(right.pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert left.options.seed == right.options.seed == 7
    # which DPMSolverMultistep does not have
    assert (left.options.eta, right.options.eta) == (0.5, 0.0)
    left, right = read_form(form(models, compare=TWO_SCALES), models)
    assert (left.options.guidance_scale, right.options.guidance_scale) == (2.5, 4.0)
    assert (left.title, right.title) == ("guidance 2.5", "guidance 4")
