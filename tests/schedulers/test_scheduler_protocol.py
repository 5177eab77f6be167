"""What every diffusers scheduler promises, and what ours promise besides."""

import inspect
import json
from typing import ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

from imagenet64_diffusion import EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.tests.components import seeded_one


SHAPE = (3, 2, 8, 8)


class SchedulerProtocol:
    scheduler_class: type
    # Arguments that make a step sample noise
    step_options: ClassVar[dict] = {}

    def make(self, **options):
        scheduler = self.scheduler_class(**{"num_train_timesteps": 100, **options})
        scheduler.set_timesteps(10)
        return scheduler

    def step(self, scheduler, output, timestep, sample, seed=0):
        return scheduler.step(output, timestep, sample, generator=seeded_one(seed), **self.step_options)

    def run(self, scheduler, seed=0):
        sample, generator = torch.randn(SHAPE, generator=seeded_one(1)), seeded_one(seed)
        for t in scheduler.timesteps:
            prediction = torch.sin(3 * scheduler.scale_model_input(sample, t))
            sample = scheduler.step(prediction, t, sample, generator=generator, **self.step_options).prev_sample
        return sample

    def test_has_what_pipelines_read(self):
        scheduler = self.scheduler_class()
        assert (scheduler.order, scheduler.init_noise_sigma, len(scheduler)) == (1, 1.0, 1000)
        assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
        assert {DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler} <= set(scheduler.compatibles)
        assert {"generator", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
        sample = torch.randn(SHAPE)
        assert scheduler.scale_model_input(sample, 3) is sample
        assert scheduler.accepts_learned_variance is True
        assert {*scheduler._compatibles, type(scheduler).__name__} >= {
            "LearnedVarianceDDPMScheduler",
            "EtaDDIMScheduler",
        }
        for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
            assert getattr(scheduler, name).dtype == torch.float64, name

    def test_config_round_trip(self, tmp_path):
        options = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
        options |= {"timestep_spacing": "trailing", "clip_sample_range": 2.0}
        first = self.make(**options)
        first.save_pretrained(tmp_path)
        second = self.scheduler_class.from_pretrained(tmp_path)
        assert json.loads(first.to_json_string()) == json.loads(second.to_json_string())
        assert all(second.config[name] == value for name, value in options.items())
        second.set_timesteps(10)
        assert torch.equal(self.run(first), self.run(second))
        third = self.scheduler_class.from_config(first.config, clip_sample=False)
        assert (third.config.clip_sample, third.config.clip_sample_range) == (False, 2.0)

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    def test_timesteps(self, spacing):
        scheduler = self.make(timestep_spacing=spacing)
        for steps in (1, 2, 7, 10, 64, 99, 100):
            scheduler.set_timesteps(steps)
            timesteps = scheduler.timesteps.tolist()
            assert scheduler.timesteps.dtype == torch.int64
            assert len(timesteps) == steps == scheduler.num_inference_steps
            assert timesteps == sorted(set(timesteps), reverse=True)
            assert 0 <= timesteps[-1] <= timesteps[0] < 100
        scheduler = self.make(steps_offset=1)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [76, 51, 26, 1]

    def test_one_seed_one_result(self):
        scheduler = self.make()
        first, second, other = self.run(scheduler), self.run(scheduler), self.run(scheduler, seed=1)
        assert torch.equal(first, second)
        assert not torch.allclose(first, other)

    def test_step_with_one_generator_an_image(self):
        scheduler, sample, prediction = self.make(), torch.randn(SHAPE), torch.randn(SHAPE)
        generators = [seeded_one(i) for i in range(3)]
        together = scheduler.step(prediction, 50, sample, generator=generators, **self.step_options).prev_sample
        for i in range(3):
            alone = self.step(scheduler, prediction[i : i + 1], 50, sample[i : i + 1], i).prev_sample
            assert torch.equal(alone, together[i : i + 1])

    def test_noise_and_velocity_of_a_batch(self):
        scheduler, clean, noise, timesteps = self.make(), torch.randn(SHAPE), torch.randn(SHAPE), [0, 50, 99]
        abar = scheduler.alphas_cumprod[timesteps].double().reshape(3, 1, 1, 1)
        signal, rate = abar.sqrt().float(), (1 - abar).sqrt().float()
        noisy = scheduler.add_noise(clean, noise, torch.tensor(timesteps))
        velocity = scheduler.get_velocity(clean, noise, torch.tensor(timesteps))
        torch.testing.assert_close(noisy, signal * clean + rate * noise, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(velocity, signal * noise - rate * clean, rtol=1e-5, atol=1e-6)

    def test_custom_timesteps_of_any_kind(self):
        scheduler = self.make()
        for timesteps in ([90, 3], (90, 3), torch.tensor([90, 3]), torch.tensor([90, 3]).numpy()):
            scheduler.set_timesteps(timesteps=timesteps)
            assert scheduler.timesteps.tolist() == [90, 3]
            assert scheduler.num_inference_steps == 2

    def test_step_remembers_nothing(self):
        scheduler, sample, prediction = self.make(), torch.randn(SHAPE), torch.randn(3, 4, 8, 8)
        scheduler.set_timesteps(timesteps=[90, 41, 40, 3])
        # 60 is not in the list: the step goes to 41 all the same
        forward = {t: self.step(scheduler, prediction, t, sample).prev_sample for t in (90, 60, 41, 40, 3)}
        for t in (40, 3, 41, 90, 60):
            assert torch.equal(self.step(scheduler, prediction, t, sample).prev_sample, forward[t])
        # Of the list a step uses the entry below its own timestep, and nothing else
        scheduler.set_timesteps(timesteps=[60, 41, 7])
        assert torch.equal(self.step(scheduler, prediction, 60, sample).prev_sample, forward[60])

    def test_timestep_of_any_kind(self):
        scheduler, sample, prediction = self.make(), torch.randn(SHAPE), torch.randn(SHAPE)
        fifty = torch.tensor(50)
        kinds = [50, fifty, fifty.reshape(1), fifty.to(torch.int32), fifty.numpy()]
        results = [self.step(scheduler, prediction, t, sample).prev_sample for t in kinds]
        assert all(torch.equal(result, results[0]) for result in results)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_shape_and_dtype_stay(self, dtype):
        """Half precision is computed in single."""
        scheduler, sample, prediction = self.make(), torch.randn(SHAPE).to(dtype), torch.randn(3, 4, 8, 8).to(dtype)
        result = self.step(scheduler, prediction, 50, sample)
        single = self.step(scheduler, prediction.float(), 50, sample.float())
        for name in ("prev_sample", "pred_original_sample"):
            assert (result[name].shape, result[name].dtype) == (SHAPE, dtype)
            if dtype != torch.float64:
                assert torch.equal(result[name], single[name].to(dtype))
        # one timestep does for a whole batch
        for function in (scheduler.add_noise, scheduler.get_velocity):
            noisy = function(sample, prediction[:, :2], torch.tensor(7))
            assert noisy.dtype == dtype
            assert torch.equal(noisy, function(sample, prediction[:, :2], torch.full((3,), 7)))

    def test_without_a_variance_the_smaller_is_taken(self):
        learned, fixed = (self.make(variance_type=name) for name in ("learned_range", "fixed_small"))
        sample, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
        assert torch.equal(*(self.step(each, prediction, 5, sample).prev_sample for each in (learned, fixed)))

    def test_betas_of_zero(self):
        scheduler = self.scheduler_class(num_train_timesteps=4, trained_betas=[0.0, 0.0, 0.1, 0.0])
        sample, output = torch.randn(SHAPE), torch.randn(3, 4, 8, 8)
        for t in range(4):
            assert self.step(scheduler, output, t, sample).prev_sample.isfinite().all()
        # At abar 1 the sample is clean, and x_t where x_t is what the model says of x_0
        clean = sample.clamp(-1, 1)
        torch.testing.assert_close(self.step(scheduler, output, 1, clean).prev_sample, clean)


class TestLearnedVarianceDDPM(SchedulerProtocol):
    scheduler_class = LearnedVarianceDDPMScheduler


class TestEtaDDIM(SchedulerProtocol):
    scheduler_class = EtaDDIMScheduler
    step_options: ClassVar[dict] = {"eta": 1.0}
