"""Random numbers belong to an image's place in a step, not to whoever draws them."""

import numpy as np
import torch

from imagenet64_diffusion.training.randomness import StepRandomness


def draw(images=slice(0, 64), seed=0, step=3, probability=0.25):
    return StepRandomness.draw(seed, step, images, 64, probability)


def test_pieces_make_the_whole():
    whole = draw()
    pieces = [draw(slice(start, start + 16)) for start in range(0, 64, 16)]
    for name in ("timestep_uniforms", "drops_class", "flips", "noise_seeds"):
        together = np.concatenate([getattr(piece, name) for piece in pieces])
        np.testing.assert_array_equal(together, getattr(whole, name))
    device = torch.device("cpu")
    noise = torch.cat([piece.noise((1, 4, 4), device) for piece in pieces])
    assert torch.equal(noise, whole.noise((1, 4, 4), device))


def test_another_seed_or_step_is_other_noise():
    noise = draw().noise((1, 8, 8), torch.device("cpu"))
    for other in (draw(seed=1), draw(step=4)):
        assert (other.noise((1, 8, 8), torch.device("cpu")) != noise).all()
        assert (other.timestep_uniforms != draw().timestep_uniforms).all()


def test_distributions():
    draws = [StepRandomness.draw(0, step, slice(0, 1000), 1000, 0.25) for step in range(20)]
    uniforms = np.concatenate([each.timestep_uniforms for each in draws])
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.01
    assert abs(np.mean([each.drops_class.mean() for each in draws]) - 0.25) < 0.02
    assert abs(np.mean([each.flips.mean() for each in draws]) - 0.5) < 0.02
    noise = draws[0].noise((1, 16, 16), torch.device("cpu"))
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    # no image has the noise of another
    assert len({tuple(row) for row in noise.flatten(1)[:, :4].tolist()}) == 1000


def test_the_extremes_of_dropping():
    assert not draw(probability=0.0).drops_class.any()
    assert draw(probability=1.0).drops_class.all()
