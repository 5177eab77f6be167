"""The training loop: accelerate runs it on one process or many, in one precision or another."""

import contextlib
import json
import math
import shutil
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
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data.dataset import PreparedImages, to_model_range
from ..data.sampling import GlobalBatchSampler
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..whole_files import replacing_file, replacing_folder
from .checkpoints import Checkpoint, find_checkpoints, load_checkpoint, save_checkpoint
from .components import build_pipeline, build_scheduler, build_unet
from .loss import HybridLoss
from .options import TrainOptions
from .randomness import StepRandomness
from .samples import draw_sample_grid
from .timestep_sampling import TIMESTEP_SAMPLERS


METRICS_NAME = "metrics.jsonl"


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

        checkpoint = self._find_checkpoint()
        # the same weights in every process
        set_seed(options.seed)
        unet = build_unet(options, self.dataset, checkpoint)
        self.scheduler = build_scheduler(options)
        self.optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            eps=options.adam_epsilon,
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
        self.timestep_sampler = TIMESTEP_SAMPLERS[options.timestep_sampling](options.num_train_timesteps)
        self.global_step = 0
        self._last_grid: Image.Image | None = None
        if checkpoint is not None:
            self._take_up(checkpoint, unet)
        self.lr_scheduler = self._make_lr_scheduler()
        self.unet, self.optimizer = accelerator.prepare(unet, self.optimizer)
        self.loss = HybridLoss(self.scheduler, options.vlb_weight, self.device)

    def _make_lr_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
        """The course of the learning rate, at the step where the run is.

        It is not prepared by accelerate: prepared, it would step once for every process.
        """
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"] = self.options.learning_rate
        return get_scheduler(
            self.options.lr_scheduler,
            self.optimizer,
            num_warmup_steps=min(self.options.lr_warmup_steps, self.max_train_steps),
            num_training_steps=self.max_train_steps,
            last_epoch=self.global_step - 1,
        )

    # ------------------------------------------------------------------ the loop

    def run(self) -> Path:
        """Trains to the last step and saves the pipeline.

        Returns:
            The folder of the pipeline.
        """
        options, accelerator = self.options, self.accelerator
        if accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._forget_later_metrics()
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
            with window.paused():
                if is_last or (options.sample_steps and self.global_step % options.sample_steps == 0):
                    self._draw_samples()
                if options.checkpointing_steps and self.global_step % options.checkpointing_steps == 0:
                    self._save_checkpoint()
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

    # ------------------------------------------------------------------ stopping and going on

    def _find_checkpoint(self) -> Checkpoint | None:
        wanted = self.options.resume_from_checkpoint
        if wanted is None:
            return None
        if wanted == "latest":
            found = find_checkpoints(self.output_dir / "checkpoints")
            if not found:
                raise ValueError(
                    "resume_from_checkpoint is latest, but there is no checkpoint in"
                    f" {self.output_dir / 'checkpoints'}"
                )
            wanted = found[-1]
        checkpoint = load_checkpoint(wanted)
        for name in ("prediction_type", "num_train_timesteps", "beta_schedule"):
            stored = checkpoint.options.get(name)
            if stored is not None and stored != getattr(self.options, name):
                raise ValueError(
                    f"{name} is {getattr(self.options, name)}, but {wanted} was trained with {name} {stored}"
                )
        return checkpoint

    def _take_up(self, checkpoint: Checkpoint, unet: ClassConditionalUNet2DModel) -> None:
        """Puts the run where the checkpoint left it; learning rate and so on are those of the options."""
        unet.load_state_dict(checkpoint.weights)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
        if self.ema is not None:
            parameters, updates = checkpoint.averaged_weights or (list(unet.parameters()), 0)
            self.ema.shadow_params = [parameter.detach().clone().to(self.device) for parameter in parameters]
            self.ema.optimization_step = updates
        if checkpoint.timestep_sampler:
            self.timestep_sampler.load_state_dict(checkpoint.timestep_sampler)
        self.global_step = checkpoint.step

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint, and only then removes those over the limit."""
        options, accelerator = self.options, self.accelerator
        if accelerator.is_main_process:
            folder = self.output_dir / "checkpoints"
            averaged = None
            if self.ema is not None:
                averaged = ([parameter.cpu() for parameter in self.ema.shadow_params], self.ema.optimization_step)
            save_checkpoint(
                folder / f"checkpoint-{self.global_step}",
                unet=accelerator.unwrap_model(self.unet, keep_torch_compile=False),
                optimizer=self.optimizer.optimizer,
                step=self.global_step,
                epoch=self.global_step * self.global_batch_size / len(self.dataset),
                options=vars(options),
                averaged_weights=averaged,
                timestep_sampler=self.timestep_sampler.state_dict(),
            )
            if options.checkpoints_total_limit is not None:
                for old in find_checkpoints(folder)[: -options.checkpoints_total_limit]:
                    shutil.rmtree(old)
        accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ what is seen

    def _forget_later_metrics(self) -> None:
        """Takes out of the log what an earlier run wrote of the steps that are to come."""
        file = self.output_dir / METRICS_NAME
        if file.is_file():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.global_step]
            with replacing_file(file) as writing:
                writing.write_text("".join(kept), encoding="utf-8")

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
            with (self.output_dir / METRICS_NAME).open("a", encoding="utf-8") as file:
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
        self._last_grid = grid
        if grid is not None:
            folder = self.output_dir / "sample_grids"
            folder.mkdir(exist_ok=True)
            grid.save(folder / f"step_{self.global_step:07d}.png")
            for tracker in self.accelerator.trackers:
                arrangement = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if tracker.name in ("tensorboard", "wandb"):
                    tracker.log_images({"samples": np.asarray(grid)[None]}, step=self.global_step, **arrangement)

    def _training_facts(self) -> dict[str, Any]:
        """What the model card says of the training."""
        options = self.options
        return {
            "images": f"{len(self.dataset):,}, {self.dataset.fingerprint}",
            "optimizer steps": f"{self.global_step:,}",
            "images per step": f"{self.global_batch_size:,}",
            "epochs": f"{self.global_step * self.global_batch_size / len(self.dataset):.1f}",
            "optimizer": f"AdamW, learning rate {options.learning_rate:g}, {options.lr_scheduler}",
            "weights": f"moving average, decay up to {options.ema_max_decay}"
            if options.use_ema
            else "of the last step",
            "class drop-out": "no classes" if options.unconditional else options.class_dropout_prob,
            "timestep sampling": options.timestep_sampling,
            "precision": self.accelerator.mixed_precision,
            "seed": options.seed,
        }

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
                pipeline = self._sampling_pipeline()
                pipeline.save_pretrained(writing)
                write_model_card(pipeline, writing, samples=self._last_grid, training_facts=self._training_facts())
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not time spent training."""
        begin = time.perf_counter()
        yield
        self._begin += time.perf_counter() - begin


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
