"""What every diffusers scheduler promises, run over ours and over the stock ones that they stand in for.

The stock schedulers are the reference of the tests themselves: a test that they fail would ask too much.
"""

import inspect
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

from imagenet64_diffusion.schedulers.scheduling_ddim_eta import EtaDDIMScheduler
from imagenet64_diffusion.schedulers.scheduling_ddpm_learned import LearnedVarianceDDPMScheduler


SHAPE = (3, 2, 8, 8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class SchedulerProtocol:
    scheduler_class: type
    # Arguments that make a step draw noise
    step_options: dict = {}  # noqa: RUF012
    takes_custom_timesteps = True

    def make(self, **options):
        return self.scheduler_class(**{"num_train_timesteps": 100, **options})

    def run(self, scheduler, steps=10, seed=0, dtype=torch.float32, **options):
        scheduler.set_timesteps(steps)
        sample = torch.randn(SHAPE, generator=seeded(1), dtype=dtype)
        generator = seeded(seed)
        for t in scheduler.timesteps:
            prediction = torch.sin(3 * scheduler.scale_model_input(sample, t))
            sample = scheduler.step(
                prediction, t, sample, generator=generator, **{**self.step_options, **options}
            ).prev_sample
        return sample

    def test_has_what_pipelines_read(self):
        scheduler = self.make()
        assert scheduler.order == 1
        assert scheduler.init_noise_sigma == 1.0
        assert len(scheduler) == 100
        assert {DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler} <= set(scheduler.compatibles)
        takes_a_list = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
        assert takes_a_list == self.takes_custom_timesteps
        assert {"generator", "return_dict"} <= set(inspect.signature(scheduler.step).parameters)
        sample = torch.randn(SHAPE)
        assert scheduler.scale_model_input(sample, 3) is sample

    def test_full_schedule_before_set_timesteps(self):
        assert self.make().timesteps.tolist() == list(range(99, -1, -1))

    def test_config_round_trip(self, tmp_path):
        options = {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample_range": 2.0,
        }
        first = self.make(**options)
        first.save_pretrained(tmp_path)
        second = self.scheduler_class.from_pretrained(tmp_path)
        assert json.loads(first.to_json_string()) == json.loads(second.to_json_string())
        assert all(second.config[name] == value for name, value in options.items())
        torch.testing.assert_close(self.run(first), self.run(second), rtol=0, atol=0)
        third = self.scheduler_class.from_config(first.config, clip_sample=False)
        assert third.config.clip_sample is False
        assert third.config.clip_sample_range == 2.0

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    @pytest.mark.parametrize("steps", [1, 2, 7, 10, 64, 99, 100])
    def test_timesteps(self, spacing, steps):
        scheduler = self.make(timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
        timesteps = scheduler.timesteps.tolist()
        assert scheduler.timesteps.dtype == torch.int64
        assert len(timesteps) == steps == scheduler.num_inference_steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert timesteps[0] < 100
        assert timesteps[-1] >= 0

    def test_leading_spacing_takes_an_offset(self):
        scheduler = self.make(steps_offset=1)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.tolist() == [76, 51, 26, 1]

    def test_custom_timesteps(self):
        if not self.takes_custom_timesteps:
            pytest.skip("not offered by this scheduler")
        scheduler = self.make()
        scheduler.set_timesteps(timesteps=[90, 41, 40, 3])
        assert scheduler.timesteps.tolist() == [90, 41, 40, 3]
        for t, previous in zip([90, 41, 40, 3], [41, 40, 3, -1], strict=True):
            assert int(scheduler.previous_timestep(t)) == previous

    def test_step_keeps_shape_and_dtype(self):
        scheduler = self.make()
        scheduler.set_timesteps(10)
        for dtype in (torch.float32, torch.float64):
            sample = torch.randn(SHAPE, dtype=dtype)
            out = scheduler.step(torch.randn(SHAPE, dtype=dtype), 50, sample, **self.step_options)
            for tensor in (out.prev_sample, out.pred_original_sample):
                assert tensor.shape == SHAPE
                assert tensor.dtype == dtype

    def test_one_seed_one_result(self):
        scheduler = self.make()
        first, second, other = self.run(scheduler), self.run(scheduler), self.run(scheduler, seed=1)
        assert torch.equal(first, second)
        assert not torch.allclose(first, other)

    def test_step_with_one_generator_an_image(self):
        scheduler = self.make()
        scheduler.set_timesteps(10)
        sample, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
        together = scheduler.step(
            prediction, 50, sample, generator=[seeded(i) for i in range(3)], **self.step_options
        ).prev_sample
        for i in range(3):
            alone = scheduler.step(
                prediction[i : i + 1], 50, sample[i : i + 1], generator=seeded(i), **self.step_options
            ).prev_sample
            assert torch.equal(alone, together[i : i + 1])

    @pytest.mark.parametrize("limit", [0.5, 1.0])
    def test_clipping_bounds_the_output(self, limit):
        scheduler = self.make(clip_sample_range=limit)
        scheduler.set_timesteps(10)
        out = scheduler.step(10 * torch.randn(SHAPE), 0, torch.randn(SHAPE), **self.step_options)
        assert out.pred_original_sample.abs().max() == limit
        # The last step ends at the predicted clean sample
        torch.testing.assert_close(out.prev_sample, out.pred_original_sample, rtol=0, atol=1e-6)

    def test_add_noise_to_a_batch(self):
        scheduler = self.make()
        clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        noisy = scheduler.add_noise(clean, noise, torch.tensor([0, 50, 99]))
        assert noisy.dtype == clean.dtype
        for row, t in enumerate([0, 50, 99]):
            abar = float(scheduler.alphas_cumprod[t])
            expected = abar**0.5 * clean[row] + (1 - abar) ** 0.5 * noise[row]
            torch.testing.assert_close(noisy[row], expected, rtol=1e-5, atol=1e-6)

    def test_velocity_of_a_batch(self):
        scheduler = self.make()
        clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        velocity = scheduler.get_velocity(clean, noise, torch.tensor([0, 50, 99]))
        for row, t in enumerate([0, 50, 99]):
            abar = float(scheduler.alphas_cumprod[t])
            expected = abar**0.5 * noise[row] - (1 - abar) ** 0.5 * clean[row]
            torch.testing.assert_close(velocity[row], expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
    def test_a_perfect_model_recovers_the_image(self, prediction_type):
        scheduler = self.make(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2")
        scheduler.set_timesteps(20)
        clean = torch.rand(SHAPE, generator=seeded(2)) * 1.8 - 0.9
        sample = torch.randn(SHAPE, generator=seeded(3))
        for t in scheduler.timesteps:
            abar = scheduler.alphas_cumprod[t].float()
            noise = (sample - abar.sqrt() * clean) / (1 - abar).sqrt()
            target = {"epsilon": noise, "sample": clean}.get(prediction_type)
            if target is None:
                target = scheduler.get_velocity(clean, noise, t.reshape(1).expand(3))
            sample = scheduler.step(target, t, sample, **self.step_options).prev_sample
        torch.testing.assert_close(sample, clean, rtol=0, atol=1e-4)


class OurProtocol(SchedulerProtocol):
    def test_class_says_that_it_takes_a_variance(self):
        assert self.scheduler_class.accepts_learned_variance is True
        assert {"LearnedVarianceDDPMScheduler", "EtaDDIMScheduler"} <= {
            *self.scheduler_class._compatibles,
            self.scheduler_class.__name__,
        }

    def test_tables_are_double_precision(self):
        scheduler = self.make()
        for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
            assert getattr(scheduler, name).dtype == torch.float64, name

    def test_custom_timesteps_of_any_kind(self):
        scheduler = self.make()
        for timesteps in ((90, 3), torch.tensor([90, 3]), torch.tensor([90, 3]).numpy()):
            scheduler.set_timesteps(timesteps=timesteps)
            assert scheduler.timesteps.tolist() == [90, 3]
            assert scheduler.num_inference_steps == 2

    def test_previous_timestep_is_the_largest_below(self):
        scheduler = self.make()
        assert [scheduler.previous_timestep(t) for t in (99, 1, 0)] == [98, 0, -1]
        scheduler.set_timesteps(timesteps=[90, 41, 40, 3])
        expected = {99: 90, 90: 41, 89: 41, 42: 41, 41: 40, 40: 3, 39: 3, 4: 3, 3: -1, 0: -1}
        assert {t: scheduler.previous_timestep(t) for t in expected} == expected

    def test_step_remembers_nothing(self):
        scheduler = self.make()
        scheduler.set_timesteps(timesteps=[90, 41, 40, 3])
        sample, prediction = torch.randn(SHAPE), torch.randn(3, 4, 8, 8)

        def step(t):
            return scheduler.step(prediction, t, sample, generator=seeded(), **self.step_options).prev_sample

        # 60 is not in the list: the step goes to 41 all the same
        forward = {t: step(t) for t in (90, 60, 41, 40, 3)}
        for t in (40, 3, 41, 90, 60):
            assert torch.equal(step(t), forward[t])
        # Of the list a step uses the entry below its own timestep, and nothing else
        scheduler.set_timesteps(timesteps=[60, 41, 7])
        assert torch.equal(step(60), forward[60])

    def test_timestep_of_any_kind(self):
        scheduler = self.make()
        scheduler.set_timesteps(10)
        sample, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
        kinds = [
            50,
            torch.tensor(50),
            torch.tensor([50]),
            torch.tensor(50, dtype=torch.int32),
            torch.tensor(50).numpy(),
        ]
        results = [scheduler.step(prediction, t, sample, generator=seeded(), **self.step_options) for t in kinds]
        assert all(torch.equal(result.prev_sample, results[0].prev_sample) for result in results)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_computed_in_single(self, dtype):
        scheduler = self.make()
        scheduler.set_timesteps(10)
        sample, prediction = torch.randn(SHAPE).to(dtype), torch.randn(3, 4, 8, 8).to(dtype)
        half = scheduler.step(prediction, 50, sample, generator=seeded(), **self.step_options)
        single = scheduler.step(prediction.float(), 50, sample.float(), generator=seeded(), **self.step_options)
        assert half.prev_sample.dtype == half.pred_original_sample.dtype == dtype
        assert torch.equal(half.prev_sample, single.prev_sample.to(dtype))
        assert torch.equal(half.pred_original_sample, single.pred_original_sample.to(dtype))
        assert scheduler.add_noise(sample, sample, torch.tensor([1, 2, 3])).dtype == dtype
        assert scheduler.get_velocity(sample, sample, torch.tensor([1, 2, 3])).dtype == dtype

    def test_one_timestep_for_a_whole_batch(self):
        scheduler = self.make()
        clean, noise = torch.randn(SHAPE), torch.randn(SHAPE)
        for function in (scheduler.add_noise, scheduler.get_velocity):
            assert torch.equal(function(clean, noise, torch.tensor(7)), function(clean, noise, torch.full((3,), 7)))

    @pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
    def test_fixed_variance_ignores_the_second_half(self, variance_type):
        scheduler = self.make(variance_type=variance_type)
        sample, output = torch.randn(SHAPE), torch.randn(3, 4, 8, 8)
        whole = scheduler.step(output, 50, sample, generator=seeded(), **self.step_options).prev_sample
        half = scheduler.step(output[:, :2], 50, sample, generator=seeded(), **self.step_options).prev_sample
        assert torch.equal(whole, half)

    def test_learned_variance_lies_between_the_fixed_ones(self):
        sample, prediction = torch.randn(SHAPE), torch.randn(SHAPE)
        schedulers = {name: self.make(variance_type=name) for name in ("learned_range", "fixed_small", "fixed_large")}

        def step(name, interpolation=None):
            output = prediction
            if interpolation is not None:
                output = torch.cat([prediction, torch.full(SHAPE, interpolation)], dim=1)
            return schedulers[name].step(output, 5, sample, generator=seeded(), **self.step_options).prev_sample

        torch.testing.assert_close(step("learned_range", -1.0), step("fixed_small"))
        torch.testing.assert_close(step("learned_range", 1.0), step("fixed_large"))
        # Without a second half there is nothing learned
        assert torch.equal(step("learned_range"), step("fixed_small"))
        assert not torch.allclose(step("fixed_large"), step("fixed_small"))

    def test_noise_at_the_last_step_only_short_of_a_clean_sample(self):
        sample, output = torch.randn(SHAPE), torch.randn(3, 4, 8, 8)
        for clean_end, noisy in ((True, False), (False, True)):
            scheduler = self.make(set_alpha_to_one=clean_end, beta_start=1e-2)
            scheduler.set_timesteps(timesteps=[90, 50])
            first = scheduler.step(output, 50, sample, generator=seeded(0), **self.step_options).prev_sample
            second = scheduler.step(output, 50, sample, generator=seeded(1), **self.step_options).prev_sample
            assert torch.equal(first, second) is not noisy

    def test_betas_of_zero(self):
        scheduler = self.make(num_train_timesteps=4, trained_betas=[0.0, 0.0, 0.1, 0.0])
        sample, output = torch.randn(SHAPE), torch.randn(3, 4, 8, 8)
        for t in range(4):
            out = scheduler.step(output, t, sample, **self.step_options)
            assert out.prev_sample.isfinite().all()
        # At abar 1 the sample is clean, and x_t where x_t is what the model says of x_0
        clean = sample.clamp(-1, 1)
        torch.testing.assert_close(scheduler.step(output, 1, clean, **self.step_options).prev_sample, clean)


class TestStockDDPM(SchedulerProtocol):
    scheduler_class = DDPMScheduler


class TestStockDDIM(SchedulerProtocol):
    scheduler_class = DDIMScheduler
    step_options = {"eta": 1.0}  # noqa: RUF012
    takes_custom_timesteps = False


class TestLearnedVarianceDDPM(OurProtocol):
    scheduler_class = LearnedVarianceDDPMScheduler


class TestEtaDDIM(OurProtocol):
    scheduler_class = EtaDDIMScheduler
    step_options = {"eta": 1.0}  # noqa: RUF012
