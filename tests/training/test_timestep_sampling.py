"""Uniform and importance sampling of timesteps."""

import numpy as np
import pytest

from imagenet64_diffusion.training.timestep_sampling import (
    TIMESTEP_SAMPLERS,
    LossSecondMomentSampler,
    UniformTimestepSampler,
)


class TimestepSamplerContract:
    name: str

    def make(self, **options):
        return TIMESTEP_SAMPLERS[self.name](20, **options)

    def warmed_up(self):
        """A sampler that has seen losses which rise with the timestep."""
        sampler = self.make()
        for _ in range(10):
            sampler.update(np.arange(20), np.arange(1.0, 21.0))
        return sampler

    def test_ranges(self):
        for sampler in (self.make(), self.warmed_up()):
            edges = np.array([0.0, 0.5, np.nextafter(1.0, 0.0)])
            timesteps, weights = sampler.sample(edges)
            assert timesteps.dtype == np.int64
            assert timesteps[0] == 0
            assert timesteps[-1] == 19
            assert weights.shape == (3,)
            assert (weights > 0).all()

    def test_weighted_mean_is_unbiased(self):
        """The mean of weight times value over draws is the plain mean over all timesteps."""
        values = np.square(np.arange(20.0))
        for sampler in (self.make(), self.warmed_up()):
            timesteps, weights = sampler.sample((np.arange(200_000) + 0.5) / 200_000)
            assert np.mean(weights * values[timesteps]) == pytest.approx(values.mean(), rel=1e-3)

    def test_goes_on_from_its_state(self):
        sampler = self.warmed_up()
        other = self.make()
        other.load_state_dict(sampler.state_dict())
        for one in (sampler, other):
            one.update(np.array([3, 3, 19]), np.array([50.0, 1.0, 2.0]))
        uniforms = np.random.default_rng(0).random(1000)
        for mine, its in zip(sampler.sample(uniforms), other.sample(uniforms), strict=True):
            np.testing.assert_array_equal(mine, its)


class TestUniform(TimestepSamplerContract):
    name = "uniform"

    def test_all_alike(self):
        timesteps, weights = self.warmed_up().sample((np.arange(2000) + 0.5) / 2000)
        np.testing.assert_array_equal(np.bincount(timesteps), np.full(20, 100))
        np.testing.assert_array_equal(weights, np.ones(2000))


class TestImportance(TimestepSamplerContract):
    name = "importance"

    def test_uniform_until_all_histories_are_full(self):
        sampler = self.make(history_length=2)
        sampler.update(np.repeat(np.arange(20), 2)[:-1], np.arange(39.0))
        np.testing.assert_array_equal(sampler.probabilities(), np.full(20, 1 / 20))
        sampler.update(np.array([19]), np.array([100.0]))
        assert sampler.probabilities()[19] > sampler.probabilities()[0]

    def test_formula(self):
        """p_t ~ sqrt(mean of the last ten squared losses), mixed with a uniform share of 0.001."""
        rng = np.random.default_rng(0)
        sampler = self.make()
        losses = rng.random((14, 20))
        for row in losses:
            sampler.update(np.arange(20), row)
        moments = np.sqrt(np.mean(losses[-10:] ** 2, axis=0))
        expected = 0.999 * moments / moments.sum() + 0.001 / 20
        np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-12)
        timesteps, weights = sampler.sample((np.arange(100_000) + 0.5) / 100_000)
        np.testing.assert_allclose(np.bincount(timesteps) / 100_000, expected, atol=2e-5)
        np.testing.assert_allclose(weights, 1 / (20 * expected[timesteps]))

    def test_no_loss_anywhere(self):
        sampler = self.make()
        for _ in range(10):
            sampler.update(np.arange(20), np.zeros(20))
        np.testing.assert_array_equal(sampler.probabilities(), np.full(20, 1 / 20))

    def test_state_of_another_length(self):
        with pytest.raises(ValueError, match=r"has shape \(20, 10\), but must have \(30, 10\)"):
            LossSecondMomentSampler(30).load_state_dict(self.make().state_dict())


def test_names():
    assert {"uniform": UniformTimestepSampler, "importance": LossSecondMomentSampler} == TIMESTEP_SAMPLERS
