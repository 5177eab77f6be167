"""One optimizer step: from the images of a batch to changed weights."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader

from ..data.dataset import PreparedImages, to_model_range
from ..data.sampling import GlobalBatchSampler
from .components import training_size
from .interruption import leave_stopping_to_parent
from .loss import HybridLoss
from .options import TrainOptions
from .randomness import StepRandomness, seed_network
from .timestep_sampling import UniformTimestepSampler


@dataclass
class StepOutcome:
    """What a step was like, for this process's images; on the device.

    Attributes:
        loss: What was minimised, ().
        gradient_norm: Before clipping, over all processes, (); None where fp16 skipped the update.
        losses: Unweighted loss of each image, (images,).
        timesteps: Timestep of each image, int64 (images,).
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor | None
    losses: torch.Tensor
    timesteps: torch.Tensor


class OptimizerStep:
    """Takes optimizer steps. What it changes belongs to whoever made it.

    Args:
        options: Of the run.
        accelerator: Runs the parts that differ between one process and many.
        dataset: The images.
        unet: The network, prepared by accelerate.
        optimizer: Its optimizer, prepared by accelerate.
        lr_scheduler: The course of the learning rate, not prepared by accelerate.
        ema: The moving average of the weights, or None.
        timestep_sampler: Draws timesteps.
        loss: What is minimised.
    """

    def __init__(
        self,
        *,
        options: TrainOptions,
        accelerator: Accelerator,
        dataset: PreparedImages,
        unet: torch.nn.Module,
        optimizer: AcceleratedOptimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema: EMAModel | None,
        timestep_sampler: UniformTimestepSampler,
        loss: HybridLoss,
    ):
        self.options = options
        self.accelerator = accelerator
        self.device = accelerator.device
        self.dataset = dataset
        self.unet = unet
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.ema = ema
        self.timestep_sampler = timestep_sampler
        self.loss = loss
        self.micro_batch_size = options.train_batch_size * accelerator.num_processes
        self.global_batch_size = self.micro_batch_size * options.gradient_accumulation_steps
        self._parameters = list(unet.parameters())
        size = training_size(options, dataset)
        self._resized_to = None if size == dataset.image_size else size

    def batches(self, first_image: int) -> Generator[dict[str, torch.Tensor], None, None]:
        """This process's pieces of batches, from a place in the endless order of images on, without end.

        A generator, whose ``close`` ends the processes that read images: they must not outlive a run that stops.
        """
        # not prepared by accelerate: the sampler gives each process its share
        sampler = GlobalBatchSampler(
            len(self.dataset),
            self.micro_batch_size,
            self.options.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            first_image=first_image,
        )
        yield from DataLoader(
            self.dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.options.dataloader_num_workers,
            worker_init_fn=leave_stopping_to_parent,
            pin_memory=self.device.type == "cuda",
        )

    def __call__(self, step: int, batches: Iterator[dict[str, torch.Tensor]]) -> StepOutcome:
        """Takes one step.

        Args:
            step: Its number, from 0: how many have been taken.
            batches: From `batches`.
        """
        options, accelerator = self.options, self.accelerator
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        drawn: list[np.ndarray] = []
        gradient_norm = None
        for piece in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(self.unet):
                randomness = self._randomness(step, piece)
                timesteps, weights = self.timestep_sampler.sample(randomness.timestep_uniforms)
                timesteps_on_device = self._on_device(timesteps)
                # before the seeding: a loader that begins draws a number itself
                batch = next(batches)
                seed_network(options.seed, step, piece, accelerator.process_index)
                losses = self._losses(batch, randomness, timesteps_on_device)
                loss = (losses * self._on_device(weights.astype(np.float32))).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            drawn.append(timesteps)
            pieces.append((loss.detach(), losses.detach(), timesteps_on_device))
        # fp16 skips a step whose gradients overflow
        skipped = accelerator.optimizer_step_was_skipped
        if not skipped:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._parameters)
        if options.timestep_sampling != "uniform":
            self._tell_timestep_sampler([losses for _, losses, _ in pieces], drawn)
        loss, losses, timesteps_on_device = pieces[0]
        if len(pieces) > 1:
            loss = torch.stack([loss for loss, _, _ in pieces]).mean()
            losses = torch.cat([losses for _, losses, _ in pieces])
            timesteps_on_device = torch.cat([timesteps for _, _, timesteps in pieces])
        return StepOutcome(loss, None if skipped else gradient_norm, losses, timesteps_on_device)

    def _randomness(self, step: int, piece: int) -> StepRandomness:
        start = piece * self.micro_batch_size + self.accelerator.process_index * self.options.train_batch_size
        return StepRandomness.draw(
            self.options.seed,
            step,
            slice(start, start + self.options.train_batch_size),
            self.global_batch_size,
            self.options.class_dropout_prob,
        )

    def _losses(
        self, batch: dict[str, torch.Tensor], randomness: StepRandomness, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each image of one piece of a batch, (images,)."""
        options = self.options
        images = to_model_range(batch["pixel_values"].to(self.device, non_blocking=True))
        if self._resized_to is not None:
            images = torch.nn.functional.interpolate(images, self._resized_to, mode="bilinear", antialias=True)
        if options.random_flip:
            images = torch.where(self._on_device(randomness.flips)[:, None, None, None], images.flip(-1), images)
        labels = None
        if not options.unconditional:
            labels = batch["class_labels"].to(self.device, non_blocking=True)
            labels = labels.masked_fill(self._on_device(randomness.drops_class), self.dataset.num_classes)
        noise = randomness.noise(tuple(images.shape[1:]), self.device)
        noisy_images = self.loss.add_noise(images, noise, timesteps)
        with self.accelerator.autocast():
            model_output = self.unet(noisy_images, timesteps, labels, return_dict=False)[0]
        return self.loss(model_output, images, noise, noisy_images, timesteps).total

    def _clip_gradients(self) -> torch.Tensor:
        """Clips the gradients to the largest norm that the options allow, and returns the norm that they had."""
        self.accelerator.unscale_gradients()
        # in one call over all tensors, which accelerate's own does not do on CPUs
        foreach = True if self.device.type in ("cpu", "cuda") else None
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=foreach)
        if self.options.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._with_gradient(), self.options.max_grad_norm, norm, foreach)
        return norm

    def _with_gradient(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.grad is not None]

    def _tell_timestep_sampler(self, losses: list[torch.Tensor], timesteps: list[np.ndarray]) -> None:
        """Every process learns the losses of all, in the order of the global batch, so that all draw alike."""
        for piece_losses, piece_timesteps in zip(losses, timesteps, strict=True):
            all_timesteps = self.accelerator.gather(self._on_device(piece_timesteps))
            all_losses = self.accelerator.gather(piece_losses)
            self.timestep_sampler.update(all_timesteps.cpu().numpy(), all_losses.double().cpu().numpy())

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)
