"""All random numbers of a training step, as a function of the seed, the step and the image's place in its batch."""

import numpy as np
import torch


# keeps these numbers apart from the order of the data, which comes from the same seed
_STREAM = 0x5EED


class StepRandomness:
    """The random numbers for the images at some places of the global batch of a step, each (images,)."""

    def __init__(self, seed: int, step: int, images: slice, global_batch_size: int, class_dropout_prob: float):
        rng = np.random.default_rng([_STREAM, seed, step])
        uniforms = rng.random((3, global_batch_size))[:, images]
        self.uniforms = uniforms[0]  # float64 in [0, 1), from which the noise levels are made
        self.drops_class, self.flips = uniforms[1] < class_dropout_prob, uniforms[2] < 0.5
        self.noise_seeds = rng.integers(2**62, size=global_batch_size)[images]

    def noise(self, image_shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Standard normal float32 noise, (images, *image_shape), made on the device."""
        noise = torch.empty(len(self.noise_seeds), *image_shape, device=device)
        generator = torch.Generator(device)
        for image, seed in zip(noise, self.noise_seeds.tolist(), strict=True):
            image.normal_(generator=generator.manual_seed(seed))
        return noise


def seed_network(seed: int, step: int, piece: int, rank: int) -> None:
    """Seeds torch's generators for the network's drop-out, which depends on how ranks and passes share a batch."""
    state = np.random.SeedSequence([_STREAM, seed, step, piece, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies to the device without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
