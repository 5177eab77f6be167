"""All random numbers of a training step, as a function of the seed, the step and the image's place in its batch.

So it does not matter how many processes share a batch, in how many pieces it is taken, or whether the run was stopped
and taken up again in between.
"""

from dataclasses import dataclass

import numpy as np
import torch


# keeps these draws apart from the order of the data, which comes from the same seed
_STREAM = 0x5EED


@dataclass
class StepRandomness:
    """The draws for some of the images of one step.

    Attributes:
        timestep_uniforms: float64 (images,) in [0, 1), from which the timesteps are made.
        drops_class: bool (images,), whether the class is replaced by the null class.
        flips: bool (images,), whether the image is mirrored.
        noise_seeds: int64 (images,), one seed for the noise of each image.
    """

    timestep_uniforms: np.ndarray
    drops_class: np.ndarray
    flips: np.ndarray
    noise_seeds: np.ndarray

    @classmethod
    def draw(
        cls, seed: int, step: int, images: slice, global_batch_size: int, class_dropout_prob: float
    ) -> "StepRandomness":
        """The draws for the images at some places of the global batch of a step.

        Args:
            seed: Seed of the run.
            step: Number of the optimizer step, from 0.
            images: Places in the global batch, which all processes and all accumulated pieces share.
            global_batch_size: Number of places.
            class_dropout_prob: Probability that the class is dropped.
        """
        rng = np.random.default_rng([_STREAM, seed, step])
        uniforms = rng.random((3, global_batch_size))
        seeds = rng.integers(2**62, size=global_batch_size)
        return cls(
            timestep_uniforms=uniforms[0, images],
            drops_class=uniforms[1, images] < class_dropout_prob,
            flips=uniforms[2, images] < 0.5,
            noise_seeds=seeds[images],
        )

    def noise(self, image_shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Standard normal float32 noise, (images, *image_shape), drawn on the device."""
        noise = torch.empty(len(self.noise_seeds), *image_shape, device=device)
        generator = torch.Generator(device)
        for image, seed in zip(noise, self.noise_seeds.tolist(), strict=True):
            image.normal_(generator=generator.manual_seed(seed))
        return noise


def seed_network(seed: int, step: int, piece: int, process: int) -> None:
    """Seeds torch's generators for what the network draws itself, which is drop-out.

    Those draws are not told apart by image. So with drop-out alone the result depends on how a batch is shared, but
    still not on where the run was stopped.
    """
    state = np.random.SeedSequence([_STREAM, seed, step, piece, process]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
