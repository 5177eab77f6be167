"""Wrong input is named: the option, the value found, and what would be right."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from imagenet64_diffusion.schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from imagenet64_diffusion.schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler


SHAPE = (2, 3, 4, 4)
both = pytest.mark.parametrize("scheduler_class", [LearnedVarianceDDPMScheduler, EtaDDIMScheduler])


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "sigmoid"}, r"beta_schedule is 'sigmoid', but must be one of 'linear', 'scaled_linear'"),
        ({"prediction_type": "eps"}, r"prediction_type is 'eps', but must be one of 'epsilon', 'sample', 'v_pred"),
        ({"timestep_spacing": "even"}, r"timestep_spacing is 'even', but must be one of 'leading', 'trailing'"),
        ({"variance_type": "learned"}, r"variance_type is 'learned', but must be one of 'learned_range', 'fixed_sm"),
        ({"num_train_timesteps": 0}, r"num_train_timesteps is 0, but must be an integer of at least 1"),
        ({"num_train_timesteps": 10.5}, r"num_train_timesteps is 10.5, but must be an integer of at least 1"),
        ({"steps_offset": -1}, r"steps_offset is -1, but must be an integer of at least 0"),
        ({"clip_sample_range": 0.0}, r"clip_sample_range is 0.0, but must be greater than 0"),
        ({"max_beta": 0.0}, r"max_beta is 0.0, but must lie in \(0, 1\]"),
        ({"max_beta": 1.1}, r"max_beta is 1.1, but must lie in \(0, 1\]"),
        ({"beta_end": 1.0}, r"beta_end 1.0 give betas in \[0.0001, 1.0\], but must be in \[0, 1\)"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas has shape \(2,\) and num_train_timesteps is 1000"),
        ({"trained_betas": [0.1, 1.0], "num_train_timesteps": 2}, r"trained_betas give betas in \[0.1, 1.0\]"),
        ({"trained_betas": [-0.1, 0.5], "num_train_timesteps": 2}, r"trained_betas give betas in \[-0.1, 0.5\]"),
        ({"trained_betas": [float("nan")], "num_train_timesteps": 1}, r"trained_betas give betas in \[nan, nan\]"),
        ({"trained_betas": [0.999] * 1000}, r"trained_betas give alphas_cumprod that end at 0"),
    ],
)
def test_options(scheduler_class, options, message):
    with pytest.raises(ValueError, match=message):
        scheduler_class(**options)


@both
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"num_inference_steps is None and timesteps is None: give exactly one"),
        ({"num_inference_steps": 2, "timesteps": [1, 0]}, r"num_inference_steps is 2 and timesteps is \[1, 0\]"),
        ({"num_inference_steps": 1001}, r"num_inference_steps is 1001, but must be an integer in \[1, 1000\]"),
        ({"num_inference_steps": 0}, r"num_inference_steps is 0, but must be an integer in \[1, 1000\]"),
        ({"num_inference_steps": 7.5}, r"num_inference_steps is 7.5, but must be an integer in \[1, 1000\]"),
        ({"timesteps": []}, r"timesteps is \[\], but must be strictly descending"),
        ({"timesteps": [1000, 3]}, r"timesteps\[0\] is 1000, but must be an integer in \[0, 999\]"),
        ({"timesteps": [3, -1]}, r"timesteps\[1\] is -1, but must be an integer in \[0, 999\]"),
        ({"timesteps": [3, 2.5]}, r"timesteps\[1\] is 2.5, but must be an integer in \[0, 999\]"),
        ({"timesteps": [3, 3]}, r"timesteps is \[3, 3\], but must be strictly descending"),
        ({"timesteps": [3, 5]}, r"timesteps is \[3, 5\], but must be strictly descending"),
    ],
)
def test_timesteps(scheduler_class, arguments, message):
    scheduler = scheduler_class()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**arguments)
    # What was active stays active
    assert len(scheduler.timesteps) == 1000


@both
def test_offset_beyond_the_end(scheduler_class):
    with pytest.raises(ValueError, match=r"steps_offset is 1, so that the first timestep is 1000"):
        scheduler_class(steps_offset=1).set_timesteps(1000)


@both
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_output": torch.zeros(2, 9, 4, 4)}, r"model_output has shape \(2, 9, 4, 4\) .* must have 3 channels"),
        ({"model_output": torch.zeros(2, 1, 4, 4)}, r"model_output has shape \(2, 1, 4, 4\) .* or 6"),
        ({"model_output": torch.zeros(1, 3, 4, 4)}, r"model_output has shape \(1, 3, 4, 4\)"),
        ({"model_output": torch.zeros(2, 6, 4, 1)}, r"model_output has shape \(2, 6, 4, 1\)"),
        ({"timestep": 1000}, r"timestep is 1000, but must be an integer in \[0, 999\]"),
        ({"timestep": -1}, r"timestep is -1, but must be an integer in \[0, 999\]"),
        ({"timestep": 5.0}, r"timestep is 5.0, but must be an integer in \[0, 999\]"),
        ({"timestep": torch.tensor(5.0)}, r"timestep is a tensor of \(\) torch.float32"),
        ({"timestep": torch.tensor([5, 6])}, r"timestep is a tensor of \(2,\) torch.int64"),
        ({"generator": [torch.Generator()]}, r"generator is a list of 1, but must hold one for each image: 2"),
    ],
)
def test_step(scheduler_class, changes, message):
    scheduler = scheduler_class()
    options = {"eta": 0.5} if scheduler_class is EtaDDIMScheduler else {}
    arguments = {"model_output": torch.zeros(SHAPE), "timestep": 5, "sample": torch.zeros(SHAPE), **changes}
    with pytest.raises(ValueError, match=message):
        scheduler.step(**arguments, **options)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), None, "1", torch.tensor(0.5)])
def test_eta(eta):
    with pytest.raises(ValueError, match=r"eta is .*, but must be a number in \[0, 1\]"):
        EtaDDIMScheduler().step(torch.zeros(SHAPE), 5, torch.zeros(SHAPE), eta=eta)


def test_variance_noise():
    scheduler, zeros = EtaDDIMScheduler(), torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="generator and variance_noise are both given"):
        scheduler.step(zeros, 5, zeros, eta=1.0, variance_noise=zeros, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"variance_noise has shape \(2, 6, 4, 4\), not \(2, 3, 4, 4\)"):
        scheduler.step(zeros, 5, zeros, eta=1.0, variance_noise=torch.zeros(2, 6, 4, 4))


@both
@pytest.mark.parametrize("timesteps", [torch.tensor([1, 2, 3]), torch.tensor([0.5, 1.0])])
def test_timesteps_of_a_batch(scheduler_class, timesteps):
    scheduler, zeros = scheduler_class(), torch.zeros(SHAPE)
    for function in (scheduler.add_noise, scheduler.get_velocity):
        with pytest.raises(ValueError, match=r"timesteps is a tensor of .* one integer for each image: 2"):
            function(zeros, zeros, timesteps)


@both
@pytest.mark.parametrize("timestep", [-1, 1000, 2.5])
def test_previous_timestep(scheduler_class, timestep):
    with pytest.raises(ValueError, match=rf"timestep is {timestep}, but must be an integer in \[0, 999\]"):
        scheduler_class().previous_timestep(timestep)


@both
@pytest.mark.parametrize("stock", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("name", ["thresholding", "rescale_betas_zero_snr"])
def test_options_of_stock_that_are_not_here(scheduler_class, stock, name, tmp_path):
    theirs = stock(**{name: True})
    theirs.save_pretrained(tmp_path)
    message = rf"{name} is True, but {scheduler_class.__name__} does not have it: pass {name}=False"
    with pytest.raises(ValueError, match=message):
        scheduler_class.from_config(theirs.config)
    with pytest.raises(ValueError, match=message):
        scheduler_class.from_pretrained(tmp_path)
    for ours in (
        scheduler_class.from_config(theirs.config, **{name: False}),
        scheduler_class.from_pretrained(tmp_path, **{name: False}),
    ):
        # The option is gone for good: what is saved now can be loaded
        assert name not in ours.config
        ours.save_pretrained(tmp_path / "ours")
        scheduler_class.from_pretrained(tmp_path / "ours")
