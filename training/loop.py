"""The training loop: accelerate runs it on one process or many, in one precision or another."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.dataset import PreparedImages, to_model_range
from ..data.sampling import GlobalBatchSampler
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..whole_files import replacing_folder
from .components import build_pipeline, build_scheduler, build_unet
from .loss import HybridLoss
from .options import TrainOptions
from .randomness import StepRandomness
from .samples import draw_sample_grid
from .timestep_sampling import TIMESTEP_SAMPLERS


class Trainer:
    """One training run. All its state is in attributes; `run` takes the steps.

    Args:
        options: What to do.

    Raises:
        ValueError: If options and dataset do not fit together.
    """

    def __init__(self, options: TrainOptions):
        self.options = options
        self.output_dir = Path(options.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with=None if options.report_to == "none" else options.report_to,
            project_config=ProjectConfiguration(project_dir=str(self.output_dir), logging_dir=str(self.output_dir)),
        )
        accelerator = self.accelerator
        self.device = accelerator.device

        self.dataset = PreparedImages(options.train_data_dir, in_memory=options.dataset_in_memory)
        self.micro_batch_size = options.train_batch_size * accelerator.num_processes
        self.global_batch_size = self.micro_batch_size * options.gradient_accumulation_steps
        self.max_train_steps = options.max_train_steps or max(
            1, round(options.num_train_epochs * len(self.dataset) / self.global_batch_size)
        )

        # the same weights in every process
        set_seed(options.seed)
        unet = build_unet(options, self.dataset)
        self.scheduler = build_scheduler(options)
        self.optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
        )
        # not prepared by accelerate: prepared, it would step once for every process
        self.lr_scheduler = get_scheduler(
            options.lr_scheduler,
            self.optimizer,
            num_warmup_steps=min(options.lr_warmup_steps, self.max_train_steps),
            num_training_steps=self.max_train_steps,
        )
        self.ema = None
        if options.use_ema:
            self.ema = EMAModel(
                unet.parameters(),
                decay=options.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=options.ema_inv_gamma,
                power=options.ema_power,
                foreach=True,
            )
            self.ema.to(self.device)
        self.unet, self.optimizer = accelerator.prepare(unet, self.optimizer)

        self.loss = HybridLoss(self.scheduler, options.vlb_weight, self.device)
        self.timestep_sampler = TIMESTEP_SAMPLERS[options.timestep_sampling](options.num_train_timesteps)
        self.global_step = 0

    # ------------------------------------------------------------------ the loop

    def run(self) -> Path:
        """Trains to the last step and saves the pipeline.

        Returns:
            The folder of the pipeline.
        """
        options, accelerator = self.options, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._say_what_is_trained()
        if options.report_to != "none":
            accelerator.init_trackers("train", config=self._tracker_config())

        batches = self._batches(self.global_step)
        progress_bar = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        window = _LogWindow(self.device)
        self.unet.train()
        while self.global_step < self.max_train_steps:
            window.add(*self._train_step(batches))
            self.global_step += 1
            progress_bar.update()
            is_last = self.global_step == self.max_train_steps
            if self.global_step % options.logging_steps == 0 or is_last:
                self._log(window, progress_bar)
                window = _LogWindow(self.device)
            if is_last or (options.sample_steps and self.global_step % options.sample_steps == 0):
                self._draw_samples()
                # time spent drawing is not time spent training
                window = _LogWindow(self.device)
        progress_bar.close()

        model_dir = self._save_pipeline()
        accelerator.end_training()
        return model_dir

    def _train_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step.

        Returns:
            The mean loss over this process's images, and the norm of the gradient before clipping, both on the device.
        """
        options, accelerator = self.options, self.accelerator
        mean_loss = torch.zeros((), device=self.device)
        gradient_norm = torch.zeros((), device=self.device)
        seen: list[tuple[np.ndarray, torch.Tensor]] = []
        for piece in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(self.unet):
                losses, timesteps, weights = self._losses(next(batches), piece)
                loss = (losses * weights).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients and options.max_grad_norm > 0:
                    gradient_norm = accelerator.clip_grad_norm_(self.unet.parameters(), options.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            mean_loss += loss.detach() / options.gradient_accumulation_steps
            seen.append((timesteps, losses.detach()))
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose gradients overflow
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self.unet.parameters())
        if options.timestep_sampling != "uniform":
            self._tell_timestep_sampler(seen)
        return mean_loss, torch.as_tensor(gradient_norm, device=self.device)

    def _losses(self, batch: dict[str, torch.Tensor], piece: int) -> tuple[torch.Tensor, np.ndarray, torch.Tensor]:
        """For each image of one piece of a batch, (images,): its loss, its timestep, and the weight of the loss."""
        options = self.options
        randomness = self._randomness(piece)
        timesteps, weights = self.timestep_sampler.sample(randomness.timestep_uniforms)

        images = to_model_range(batch["pixel_values"].to(self.device, non_blocking=True))
        if options.random_flip:
            images = torch.where(self._on_device(randomness.flips)[:, None, None, None], images.flip(-1), images)
        labels = None
        if not options.unconditional:
            labels = batch["class_labels"].to(self.device, non_blocking=True)
            labels = labels.masked_fill(self._on_device(randomness.drops_class), self.dataset.num_classes)
        noise = randomness.noise(tuple(images.shape[1:]), self.device)
        timesteps_on_device = self._on_device(timesteps)
        noisy_images = self.loss.add_noise(images, noise, timesteps_on_device)

        with self.accelerator.autocast():
            model_output = self.unet(noisy_images, timesteps_on_device, labels, return_dict=False)[0]
        terms = self.loss(model_output, images, noise, noisy_images, timesteps_on_device)
        return terms.total, timesteps, self._on_device(weights.astype(np.float32))

    def _randomness(self, piece: int) -> StepRandomness:
        start = piece * self.micro_batch_size + self.accelerator.process_index * self.options.train_batch_size
        return StepRandomness.draw(
            self.options.seed,
            self.global_step,
            slice(start, start + self.options.train_batch_size),
            self.global_batch_size,
            self.options.class_dropout_prob,
        )

    def _tell_timestep_sampler(self, seen: list[tuple[np.ndarray, torch.Tensor]]) -> None:
        """Every process learns the losses of all, in the order of the global batch, so that all draw alike."""
        for timesteps, losses in seen:
            all_timesteps = self.accelerator.gather(self._on_device(timesteps))
            all_losses = self.accelerator.gather(losses)
            self.timestep_sampler.update(all_timesteps.cpu().numpy(), all_losses.double().cpu().numpy())

    def _batches(self, start_step: int) -> Iterator[dict[str, torch.Tensor]]:
        """This process's batches from the given optimizer step on, without end."""
        options, accelerator = self.options, self.accelerator
        # not prepared by accelerate: the sampler gives each process its share
        sampler = GlobalBatchSampler(
            len(self.dataset),
            self.micro_batch_size,
            options.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start_step=start_step * options.gradient_accumulation_steps,
        )
        return iter(
            DataLoader(
                self.dataset,
                sampler=sampler,
                batch_size=None,
                num_workers=options.dataloader_num_workers,
                pin_memory=self.device.type == "cuda",
            )
        )

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    # ------------------------------------------------------------------ what is seen

    def _say_what_is_trained(self) -> None:
        unet = self.accelerator.unwrap_model(self.unet)
        height, width = self.dataset.image_size
        epochs = self.max_train_steps * self.global_batch_size / len(self.dataset)
        print(
            f"training {self.options.model_config_name_or_path}: {unet.num_parameters():,} parameters,"
            f" {len(self.dataset):,} images of {self.dataset.channels}x{height}x{width},"
            f" {unet.config.num_class_embeds or 'no'} classes, predicting {self.options.prediction_type}\n"
            f"{self.max_train_steps:,} steps of {self.global_batch_size} images ({epochs:.1f} epochs) on"
            f" {self.accelerator.num_processes} x {self.device.type}, precision {self.accelerator.mixed_precision}"
        )

    def _tracker_config(self) -> dict[str, Any]:
        # trackers take plain numbers and strings only
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in vars(self.options).items()
        }

    def _log(self, window: "_LogWindow", progress_bar: tqdm) -> None:
        loss, gradient_norm = self.accelerator.reduce(window.means(), reduction="mean").tolist()
        values = {
            "loss": loss,
            "gradient_norm": gradient_norm,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "images_per_second": window.steps * self.global_batch_size / window.seconds(),
        }
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.global_step}: a smaller learning_rate, or bf16 instead of fp16,"
                " may help"
            )
        self.accelerator.log(values, step=self.global_step)
        if self.accelerator.is_main_process:
            with (self.output_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.global_step, **values}) + "\n")
        progress_bar.set_postfix(
            {"loss": f"{loss:.4f}", "images/s": f"{values['images_per_second']:.0f}"}, refresh=False
        )

    def _sampling_pipeline(self) -> ClassConditionalPipeline:
        unet = self.accelerator.unwrap_model(self.unet, keep_torch_compile=False)
        pipeline = build_pipeline(unet, self.scheduler, self.dataset)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _draw_samples(self) -> None:
        """A grid from the averaged weights, always from the same noise, shared among the processes."""
        with self._averaged_weights():
            grid = draw_sample_grid(self._sampling_pipeline(), self.options, self.accelerator)
        if grid is not None:
            folder = self.output_dir / "sample_grids"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"step_{self.global_step:07d}.png")
            for tracker in self.accelerator.trackers:
                arrangement = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if tracker.name in ("tensorboard", "wandb"):
                    tracker.log_images({"samples": np.asarray(grid)[None]}, step=self.global_step, **arrangement)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Inside, the network has the averaged weights and is in evaluation mode."""
        parameters = list(self.unet.parameters())
        if self.ema is not None:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        self.unet.eval()
        try:
            yield
        finally:
            self.unet.train()
            if self.ema is not None:
                self.ema.restore(parameters)

    def _save_pipeline(self) -> Path:
        """Writes the pipeline with the averaged weights; the folder appears whole or not at all."""
        model_dir = self.output_dir / "model"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with self._averaged_weights(), replacing_folder(model_dir) as writing:
                self._sampling_pipeline().save_pretrained(writing)
        self.accelerator.wait_for_everyone()
        return model_dir


class _LogWindow:
    """Means since the last entry of the log, summed on the device so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self._sums = torch.zeros(2, device=device)
        self._begin = time.perf_counter()
        self.steps = 0

    def add(self, loss: torch.Tensor, gradient_norm: torch.Tensor) -> None:
        self._sums += torch.stack([loss, gradient_norm])
        self.steps += 1

    def means(self) -> torch.Tensor:
        """Loss and norm of the gradient, (2,)."""
        return self._sums / self.steps

    def seconds(self) -> float:
        return time.perf_counter() - self._begin


def train(options: TrainOptions) -> Path:
    """Trains a network and saves it as a pipeline.

    Args:
        options: What to do.

    Returns:
        The folder of the pipeline, ``output_dir/model``, which `ClassConditionalPipeline.from_pretrained` loads.

    Raises:
        ValueError: If options and dataset do not fit together.
        FloatingPointError: If the loss is no longer finite.
    """
    return Trainer(options).run()
