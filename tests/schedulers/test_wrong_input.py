"""Wrong input is named: the option, the value found, and what would be right."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from imagenet64_diffusion import EtaDDIMScheduler, LearnedVarianceDDPMScheduler


ZEROS = torch.zeros(2, 3, 4, 4)
both = pytest.mark.parametrize("scheduler_class", [LearnedVarianceDDPMScheduler, EtaDDIMScheduler])


def refuses(message: str):
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', but must be one of ('linear', 'scaled_linear'"),
        ({"prediction_type": "eps"}, "prediction_type is 'eps', but must be one of ('epsilon', 'sample', 'v_pred"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even', but must be one of ('leading', 'trailing'"),
        ({"variance_type": "learned"}, "variance_type is 'learned', but must be one of ('learned_range', 'fixed_sm"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0, but must be an integer of at least 1"),
        ({"steps_offset": -1}, "steps_offset is -1, but must be an integer of at least 0"),
        ({"clip_sample_range": 0.0}, "clip_sample_range is 0.0, but must lie in (0, inf]"),
        ({"max_beta": 1.1}, "max_beta is 1.1, but must lie in (0, 1]"),
        ({"beta_end": 1.0}, "beta_end 1.0 give betas in [0.0001, 1.0], not in [0, 1)"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has shape (2,) and num_train_timesteps is 1000"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, "trained_betas give betas in [0.1, 1.0]"),
        ({"trained_betas": [float("nan")], "num_train_timesteps": 1}, "trained_betas give betas in [nan, nan]"),
        ({"trained_betas": [0.999] * 1000}, "trained_betas give alphas_cumprod that end at 0"),
    ],
)
def test_options(options, message):
    with refuses(message):
        EtaDDIMScheduler(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps is None and timesteps is None: give one"),
        ({"num_inference_steps": 1001}, "num_inference_steps is 1001, but must be an integer in [1, 1000]"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, but must be an integer in [1, 1000]"),
        ({"timesteps": []}, "timesteps is [], but must be strictly descending"),
        ({"timesteps": [3, -1]}, "timesteps[1] is -1, but must be an integer in [0, 999]"),
        ({"timesteps": [3, 2.5]}, "timesteps[1] is 2.5, but must be an integer in [0, 999]"),
        ({"timesteps": [3, 3]}, "timesteps is [3, 3], but must be strictly descending"),
        ({"num_inference_steps": 1000}, "steps_offset is 1: the first timestep is 1000"),
    ],
)
def test_timesteps(arguments, message):
    scheduler = LearnedVarianceDDPMScheduler(steps_offset=1)
    with refuses(message):
        scheduler.set_timesteps(**arguments)
    # What was active stays active
    assert len(scheduler.timesteps) == 1000


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_output": torch.zeros(2, 9, 4, 4)}, "model_output has shape (2, 9, 4, 4) for a sample of (2,"),
        ({"model_output": torch.zeros(2, 1, 4, 4)}, "not 3 channels (prediction) or 6"),
        ({"model_output": torch.zeros(2, 6, 4, 1)}, "model_output has shape (2, 6, 4, 1)"),
        ({"timestep": 1000}, "timestep is 1000, but must be an integer in [0, 999]"),
        ({"timestep": torch.tensor(5.0)}, "timestep is a tensor of () torch.float32"),
        ({"timestep": torch.tensor([5, 6])}, "timestep is a tensor of (2,) torch.int64"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1, not one for each image: 2"),
    ],
)
def test_step(scheduler_class, changes, message):
    eta = {"eta": 0.5} if scheduler_class is EtaDDIMScheduler else {}
    with refuses(message):
        scheduler_class().step(**{"model_output": ZEROS, "timestep": 5, "sample": ZEROS, **changes}, **eta)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"eta": eta}, "eta is ") for eta in (-0.1, 1.1, float("nan"), None, "1", torch.tensor(0.5))),
        ({"variance_noise": ZEROS, "generator": torch.Generator()}, "generator and variance_noise are both given"),
        ({"variance_noise": torch.zeros(2, 6, 4, 4)}, "variance_noise has shape (2, 6, 4, 4), not (2, 3, 4, 4)"),
    ],
)
def test_step_of_ddim(arguments, message):
    with refuses(message):
        EtaDDIMScheduler().step(ZEROS, 5, ZEROS, **arguments)


@pytest.mark.parametrize("timesteps", [torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0])])
def test_timesteps_of_a_batch(timesteps):
    for function in (EtaDDIMScheduler().add_noise, EtaDDIMScheduler().get_velocity):
        with pytest.raises(ValueError, match=r"timesteps is a tensor of .* one integer for each image: 2"):
            function(ZEROS, ZEROS, timesteps)


@both
@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", ["thresholding", "rescale_betas_zero_snr"])
def test_options_of_stock_that_are_not_here(scheduler_class, stock, name, tmp_path):
    theirs = stock(**{name: True})
    theirs.save_pretrained(tmp_path)
    for load, stored in ((scheduler_class.from_config, theirs.config), (scheduler_class.from_pretrained, tmp_path)):
        with refuses(f"{name} is True, but {scheduler_class.__name__} does not have it: pass {name}=False"):
            load(stored)
        ours = load(stored, **{name: False})
        # The option is gone for good: what is saved now can be loaded
        assert name not in ours.config
        ours.save_pretrained(tmp_path / "ours")
        scheduler_class.from_pretrained(tmp_path / "ours")
