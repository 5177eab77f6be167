"""Wrong input is named: the option, the value found, and what would be right."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from imagenet64_diffusion import EDMHeunScheduler, EtaDDIMScheduler, LearnedVarianceDDPMScheduler


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
    with refuses("score_gradient has shape (2, 6, 4, 4), not (2, 3, 4, 4)"):
        LearnedVarianceDDPMScheduler().step(ZEROS, 5, ZEROS, score_gradient=torch.zeros(2, 6, 4, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_schedule": "even"}, "sigma_schedule is 'even', but must be one of ('karras', 'exponential')"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample', but must be one of ('epsilon', 'v_prediction')"),
        ({"final_sigmas_type": "0"}, "final_sigmas_type is '0', but must be one of ('zero', 'sigma_min')"),
        ({"sigma_min": 0.0}, "sigma_min is 0.0, but must be in (0, sigma_max], and sigma_max is 80.0"),
        ({"sigma_max": float("inf")}, "sigma_max is inf, but must be finite"),
        ({"sigma_data": 0.0}, "sigma_data is 0.0, but must be positive"),
        ({"rho": -1.0}, "rho is -1.0, but must be positive"),
        ({"S_churn": -1.0}, "S_churn is -1.0, but must be at least 0"),
        ({"S_min": 2.0, "S_max": 1.0}, "S_min is 2.0, but must be in [0, S_max], and S_max is 1.0"),
        ({"S_noise": float("nan")}, "S_noise is nan, but must be at least 0"),
    ],
)
def test_options_of_edm(options, message):
    with refuses(message):
        EDMHeunScheduler(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_inference_steps is None and sigmas is None: give one"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "num_inference_steps is 2 and sigmas is [1.0]: give one"),
        *(({"num_inference_steps": n}, f"num_inference_steps is {n}, but must be an integer >= 1") for n in (0, 2.5)),
        ({"sigmas": []}, "sigmas is [], but must be strictly descending and positive, at least one"),
        ({"sigmas": [2.0, 0.0]}, "sigmas is [2.0, 0.0], but must be strictly descending and positive"),
    ],
)
def test_noise_levels_of_edm(arguments, message):
    scheduler = EDMHeunScheduler(num_train_timesteps=10)
    with refuses(message):
        scheduler.set_timesteps(**arguments)
    assert len(scheduler.timesteps) == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_output": torch.zeros(2, 6, 4, 4)}, "model_output has shape (2, 6, 4, 4), not (2, 3, 4, 4)"),
        ({"churn_noise": torch.zeros(3, 4, 4)}, "churn_noise has shape (3, 4, 4), not (2, 3, 4, 4)"),
        ({"churn_noise": ZEROS, "generator": torch.Generator()}, "generator and churn_noise are both given"),
        ({"generator": [torch.Generator()]}, "generator is a list of 1, not one for each image: 2"),
        ({"timestep": torch.tensor(0.5)}, "timestep is 0.5, but must be one of scheduler.timesteps"),
        ({"timestep": EDMHeunScheduler().timesteps[1]}, "but must be one of scheduler.timesteps, where a step begins"),
    ],
)
def test_step_of_edm(changes, message):
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(3)
    with refuses(message):
        scheduler.step(**{"model_output": ZEROS, "timestep": scheduler.timesteps[0], "sample": ZEROS, **changes})


def test_order_of_the_steps_of_edm():
    scheduler = EDMHeunScheduler()
    scheduler.set_timesteps(2)
    with refuses("a run begins at index 1 of timesteps, but steps begin at even ones"):
        scheduler.step(ZEROS, scheduler.timesteps[1], ZEROS)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(ZEROS, t, ZEROS)
    with refuses("all 2 steps are done: call set_timesteps before the next run"):
        scheduler.scale_model_input(ZEROS, t)
    with refuses("timesteps is a tensor of (2,) torch.int64, but must hold log(sigma) / 4 for all or for each image"):
        scheduler.add_noise(ZEROS, ZEROS, torch.tensor([1, 2]))


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
