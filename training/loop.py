"""A training run: accelerate runs it on one rank or many, in one precision or another."""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration, TorchDynamoPlugin, set_seed
from huggingface_hub import create_repo
from PIL import Image
from tqdm.auto import tqdm

from ..data.dataset import to_model_range
from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import push_folder, write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import atomic_file, atomic_folder, only_writer, settle_folder
from ..utils.command_line import OtherRankError, StoppedBySignalError
from ..utils.distributed import on_main_process
from ..utils.memory import keep_freed_memory
from ..utils.nearest_names import perhaps
from .checkpoints import (
    Checkpoint,
    Progress,
    find_checkpoints,
    names_what_failed,
    remove_old_checkpoints,
    save_checkpoint,
    set_aside,
)
from .components import (
    build_ema,
    build_lr_scheduler,
    build_objective,
    build_optimizer,
    build_pipeline,
    build_scheduler,
    build_unet,
    image_batches,
    training_size,
)
from .cost import describe_run
from .interruption import StopRequest
from .metrics import CHART_NAME, MetricsFile, MetricsWindow, draw_loss_chart, peak_memory_gib
from .options import TrainOptions
from .plan import CHECKPOINTS_NAME, Plan, make_plan
from .randomness import StepRandomness, seed_network, to_device
from .samples import ema_weights, sample_grid


# A run that was killed may take so long to go, and its place is wanted by the one that resumes.
_SECONDS_FOR_ANOTHER_RUN_TO_END = 20


class StepOutcome(NamedTuple):
    """What a step was like, for this rank's images; on the device.

    Attributes:
        loss: What was minimised, ().
        gradient_norm: Before clipping, over all ranks, (); None where fp16 skipped the update.
        losses: Unweighted loss of each image, (images,).
        timesteps: Timestep of each image, int64 (images,).
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor | None
    losses: torch.Tensor
    timesteps: torch.Tensor


class Trainer:
    """One training run. All its state is in attributes; `run` takes the steps.

    Args:
        plan: What to do.
        accelerator: On what.
    """

    def __init__(self, plan: Plan, accelerator: Accelerator):
        self.plan, self.options, self.dataset, self.start = plan, plan.options, plan.dataset, plan.start
        self.accelerator, self.device = accelerator, accelerator.device
        self.output_dir = Path(plan.options.output_dir)
        self.max_train_steps, self.images_per_step = plan.max_train_steps, plan.images_per_step
        self.global_step, self.images_seen = plan.first_step, plan.images_seen
        options, checkpoint = plan.options, plan.start.checkpoint

        if self.device.type == "cpu":
            keep_freed_memory()
        # the same weights on every rank
        set_seed(options.seed)
        unet = build_unet(plan.unet_config, self.start)
        if options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.scheduler = build_scheduler(options, self.start)
        self.objective = build_objective(options, self.scheduler, self.device)
        # before the optimizer, whose state lies where its parameters lie
        unet.to(self.device)
        optimizer = build_optimizer(options, unet.parameters(), self.device)
        self.ema = build_ema(options, unet)
        self.metrics = MetricsWindow(accelerator, self.objective.num_train_timesteps)
        schedule_step = self.global_step
        if checkpoint is not None:
            self._resume(checkpoint, unet, optimizer)
            if checkpoint.progress.lr_scheduler_step is not None:
                schedule_step = checkpoint.progress.lr_scheduler_step
        self.lr_scheduler = build_lr_scheduler(options, optimizer, schedule_step)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        self._parameters = list(self.unet.parameters())
        if accelerator.scaler is not None and checkpoint is not None and checkpoint.progress.gradient_scaler:
            accelerator.scaler.load_state_dict(checkpoint.progress.gradient_scaler)
        # what has been copied would stay in memory for the whole run
        self.start.pretrained = None
        if checkpoint is not None:
            checkpoint.weights, checkpoint.averaged_weights, checkpoint.optimizer = {}, None, {}

    def _resume(
        self, checkpoint: Checkpoint, unet: ClassConditionalUNet2DModel, optimizer: torch.optim.Optimizer
    ) -> None:
        """Puts the run where the checkpoint left it; learning rate and so on are those of the options."""
        unet.load_state_dict(checkpoint.weights)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
        if self.ema is not None:
            parameters, updates = checkpoint.averaged_weights or (list(unet.parameters()), 0)
            self.ema.shadow_params = [parameter.detach().clone().to(self.device) for parameter in parameters]
            self.ema.optimization_step = updates
        self.objective.load_state_dict(checkpoint.timestep_sampler)
        if checkpoint.progress.metrics is not None:
            self.metrics.load_state(checkpoint.progress.metrics)

    def run(self) -> Path:
        """Trains to the last step and saves the pipeline.

        Returns:
            The folder of the pipeline.

        Raises:
            FloatingPointError: If the loss is no longer finite.
            OSError: If something cannot be written, or another run writes to the same folder.
            StoppedBySignalError: After SIGTERM or SIGINT, when a checkpoint has been written.
        """
        options, accelerator = self.options, self.accelerator
        unet = accelerator.unwrap_model(self.unet, keep_torch_compile=False)
        self._print(*self.plan.summary(self.device.type, accelerator.mixed_precision, unet.num_parameters()))
        on_main_process(accelerator, self._prepare_folder)
        self._start_trackers()
        with StopRequest(accelerator) as stop_request:
            self._take_steps(stop_request)
        self._save_samples()
        model_dir = self.output_dir / "model"
        self._save_pipeline(model_dir)
        if accelerator.is_main_process:
            self._draw_chart()
        if options.push_to_hub:
            on_main_process(accelerator, lambda: self._push(model_dir))
        with self._reporting():
            accelerator.end_training()
        return model_dir

    def _prepare_folder(self) -> None:
        """Readies the folder, and finds out now what would fail at the end."""
        if self.options.push_to_hub:
            create_repo(self._repo_id(), private=self.options.hub_private_repo or None, exist_ok=True)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for folder, _ in self.start.damaged:
            self._print(f"{folder} is now {set_aside(folder).name}")
        MetricsFile(self.output_dir).forget_after(self.global_step)

    # ------------------------------------------------------------------ the loop

    def _take_steps(self, stop_request: StopRequest) -> None:
        options = self.options
        progress_bar = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="training",
            unit="step",
            # a file, such as a job's, gets a line now and then
            mininterval=0.1 if sys.stderr.isatty() else 10,
            disable=not self.accelerator.is_local_main_process,
        )
        self.unet.train()
        if self.global_step == self.max_train_steps:
            self._print(
                f"all {self.max_train_steps:,} steps have been taken already; generating samples and saving the"
                " pipeline"
            )
        images = image_batches(options, self.dataset, self.accelerator, self.images_seen)
        with progress_bar, contextlib.closing(images) as batches:
            if self.global_step:
                # what the run did not come to, if it was stopped after its checkpoint and before these
                self._save_due_outputs(only_missing=True)
            while self.global_step < self.max_train_steps:
                outcome = self.take_step(batches)
                self.metrics.add(self.global_step, **outcome._asdict())
                progress_bar.update()
                is_last = self.global_step == self.max_train_steps
                if is_last or self.global_step % options.logging_steps == 0:
                    self._log(progress_bar)
                with self.metrics.paused():
                    # before the samples, which take longer than a job that is stopped is given
                    saves = options.checkpointing_steps and (is_last or self._is_due(options.checkpointing_steps))
                    if saves:
                        self._save_checkpoint()
                    signal_number = stop_request.agreed()
                    if signal_number:
                        if not saves:
                            self._save_checkpoint()
                        self._stop(signal_number)
                    self._save_due_outputs()

    def take_step(self, batches: Iterator[dict[str, torch.Tensor]]) -> StepOutcome:
        """Takes one optimizer step: from the images of a batch to changed weights."""
        options, accelerator = self.options, self.accelerator
        passes: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        gradient_norm = None
        for piece in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(self.unet):
                first = (piece * accelerator.num_processes + accelerator.process_index) * options.train_batch_size
                images = slice(first, first + options.train_batch_size)
                randomness = StepRandomness.of_step(
                    options.seed, self.global_step, images, self.images_per_step, options.class_dropout_prob
                )
                levels, weights = self.objective.sample_noise_levels(randomness.uniforms)
                timesteps = to_device(levels, self.device)
                # before the seeding: a loader that begins takes a random number itself
                batch = next(batches)
                seed_network(options.seed, self.global_step, piece, accelerator.process_index)
                losses = self._losses(batch, randomness, timesteps)
                loss = (losses * to_device(weights.astype(np.float32), self.device)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(self._parameters, options.max_grad_norm or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
            passes.append((loss.detach(), losses.detach(), timesteps))
        # fp16 skips a step whose gradients overflow
        if accelerator.optimizer_step_was_skipped:
            gradient_norm = None
        else:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._parameters)
        if options.timestep_sampling != "uniform":
            # every rank learns the losses of all, in the order of the global batch, so that all sample alike
            for _, losses, timesteps in passes:
                everyone = accelerator.gather(timesteps), accelerator.gather(losses).double()
                self.objective.update(*(values.cpu().numpy() for values in everyone))
        self.global_step += 1
        self.images_seen += self.images_per_step
        all_losses, all_timesteps = (torch.cat([values[index] for values in passes]) for index in (1, 2))
        return StepOutcome(
            torch.stack([values[0] for values in passes]).mean(), gradient_norm, all_losses, all_timesteps
        )

    def _losses(
        self, batch: dict[str, torch.Tensor], randomness: StepRandomness, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The loss of each image of one pass, (images,)."""
        images = to_model_range(batch["pixel_values"].to(self.device, non_blocking=True))
        size = training_size(self.options, self.dataset)
        if size != self.dataset.image_size:
            images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        if self.options.random_flip:
            images = torch.where(
                to_device(randomness.flips, self.device)[:, None, None, None], images.flip(-1), images
            )
        labels = None
        if not self.options.unconditional:
            labels = batch["class_labels"].to(self.device, non_blocking=True)
            labels = labels.masked_fill(to_device(randomness.drops_class, self.device), self.dataset.num_classes)
        noise = randomness.noise(tuple(images.shape[1:]), self.device)
        noisy_images = self.objective.add_noise(images, noise, timesteps)
        with self.accelerator.autocast():
            model_output = self.unet(noisy_images, timesteps, labels, return_dict=False)[0]
        return self.objective(model_output, images, noise, noisy_images, timesteps).total

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.global_step % every == 0

    def _save_due_outputs(self, only_missing: bool = False) -> None:
        """The sample grid and the pipeline of this step."""
        grid_file, folder = self._grid_file(), self.output_dir / "pipelines" / f"step_{self.global_step:07d}"
        has_grid, has_pipeline = False, False
        if only_missing:
            has_grid, has_pipeline = on_main_process(self.accelerator, lambda: (grid_file.exists(), folder.exists()))
        if self._is_due(self.options.sample_steps) and not has_grid and self.global_step < self.max_train_steps:
            self._save_samples()
        if self._is_due(self.options.pipeline_steps) and not has_pipeline:
            self._save_pipeline(folder)

    def _stop(self, signal_number: int) -> None:
        with self._reporting():
            self.accelerator.end_training()
        message = (
            f"stopped by {signal.Signals(signal_number).name} after step {self.global_step:,} of"
            f" {self.max_train_steps:,}; {self._checkpoint_folder()} keeps it: the same command resumes from there"
        )
        raise StoppedBySignalError(signal_number, message if self.accelerator.is_main_process else "")

    # ------------------------------------------------------------------ what is kept

    def _checkpoint_folder(self) -> Path:
        return self.output_dir / CHECKPOINTS_NAME / f"checkpoint-{self.global_step}"

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint, and only then removes those over the limit.

        The state is the same on every rank, but for the sums of the log, which come together here; one writes.
        """
        options, accelerator = self.options, self.accelerator
        # weights that are not finite must not take the place of good ones
        self._finite_means()
        if not all(torch.stack([weight.isfinite().all() for weight in self._parameters])):
            raise self._not_finite(f"the weights are not finite after step {self.global_step}")
        metrics = self.metrics.state()

        def write() -> None:
            averaged = None
            if self.ema is not None:
                averaged = ([parameter.cpu() for parameter in self.ema.shadow_params], self.ema.optimization_step)
            progress = Progress(
                step=self.global_step,
                epoch=self.images_seen / len(self.dataset),
                images_seen=self.images_seen,
                num_processes=accelerator.num_processes,
                images_per_step=self.images_per_step,
                dataset=self.dataset.fingerprint,
                began_from=self.start.began_from,
                lr_scheduler_step=self.lr_scheduler.last_epoch,
                gradient_scaler=None if accelerator.scaler is None else accelerator.scaler.state_dict(),
                metrics=metrics,
            )
            save_checkpoint(
                self._checkpoint_folder(),
                unet=accelerator.unwrap_model(self.unet, keep_torch_compile=False),
                scheduler=self.scheduler,
                optimizer=self.optimizer.optimizer,
                progress=progress,
                options=vars(options),
                averaged_weights=averaged,
                timestep_sampler=self.objective.state_dict(),
            )
            if options.checkpoints_total_limit:
                remove_old_checkpoints(self._checkpoint_folder().parent, options.checkpoints_total_limit)
            if self.global_step < self.max_train_steps:
                self._draw_chart()

        on_main_process(accelerator, write)

    def _pipeline(self) -> ClassConditionalPipeline:
        unet = self.accelerator.unwrap_model(self.unet, keep_torch_compile=False)
        pipeline = build_pipeline(unet, self.scheduler, self.dataset)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _save_pipeline(self, folder: Path) -> None:
        """Writes the pipeline with the EMA weights and the newest sample grid, atomically."""

        def write() -> None:
            grids = (self.output_dir / "sample_grids").glob("step_*.png")
            newest = max((file for file in grids if file.name <= self._grid_file().name), default=None)
            samples = None if newest is None else Image.open(newest)
            facts = self.plan.facts(self.global_step, self.images_seen, self.accelerator.mixed_precision)
            with names_what_failed(folder), ema_weights(self.unet, self.ema), atomic_folder(folder) as writing:
                pipeline = self._pipeline()
                pipeline.save_pretrained(writing)
                write_model_card(pipeline, writing, samples=samples, training_facts=facts)

        on_main_process(self.accelerator, write)

    def _push(self, model_dir: Path) -> None:
        message = f"Step {self.global_step:,}"
        commit = push_folder(self._pipeline(), model_dir, self._repo_id(), commit_message=message)
        print(f"uploaded {model_dir}: {commit.commit_url}")

    def _repo_id(self) -> str:
        return self.options.hub_model_id or self.output_dir.resolve().name

    # ------------------------------------------------------------------ what is seen

    def _print(self, *lines: str) -> None:
        if self.accelerator.is_main_process:
            for line in lines:
                tqdm.write(line)

    def _start_trackers(self) -> None:
        if self.options.report_to == "none":
            return
        # trackers take plain numbers and strings only
        config = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in vars(self.options).items()
        }
        # what a killed run has written of the steps to come is not shown
        purged = {"tensorboard": {"purge_step": self.global_step + 1}}
        self.accelerator.init_trackers("train", config=config, init_kwargs=purged)

    def _reporting(self) -> contextlib.AbstractContextManager[None]:
        return names_what_failed(self.output_dir, f" for {self.options.report_to}")

    def _finite_means(self) -> dict[str, float | None]:
        try:
            return self.metrics.means()
        except FloatingPointError as error:
            raise self._not_finite(str(error)) from None

    def _not_finite(self, what: str) -> Exception:
        if not self.accelerator.is_main_process:
            return OtherRankError(what)
        found = find_checkpoints(self.output_dir / CHECKPOINTS_NAME)
        kept = f"{found[-1]} is from before" if found else "there is no checkpoint from before"
        return FloatingPointError(f"{what}; {kept}. A smaller learning_rate, or bf16 instead of fp16, may help")

    def _log(self, progress_bar: Any) -> None:
        values = {
            **self._finite_means(),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "epoch": self.images_seen / len(self.dataset),
            "images_per_second": self.metrics.steps_per_second() * self.images_per_step,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        self.metrics.clear()
        if self.accelerator.is_main_process:
            MetricsFile(self.output_dir).append({"step": self.global_step, **values})
        with self._reporting():
            known = {name: value for name, value in values.items() if value is not None}
            self.accelerator.log(known, self.global_step)
        progress_bar.set_postfix(
            {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.0f}"}, refresh=False
        )

    def _draw_chart(self) -> None:
        draw_loss_chart(MetricsFile(self.output_dir).path, self.output_dir / CHART_NAME, title=self.output_dir.name)

    def _grid_file(self) -> Path:
        return self.output_dir / "sample_grids" / f"step_{self.global_step:07d}.png"

    def _save_samples(self) -> None:
        """A grid from the EMA weights, always from the same noise, shared among the ranks."""
        with ema_weights(self.unet, self.ema):
            grid = sample_grid(self._pipeline(), self.options, self.accelerator)
        if grid is None:
            return
        with atomic_file(self._grid_file()) as writing:
            grid.save(writing)
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if tracker.name in ("tensorboard", "wandb"):
                with self._reporting():
                    tracker.log_images({"samples": np.asarray(grid)[None]}, step=self.global_step, **layout)


def train(options: TrainOptions) -> Path | None:
    """Trains a network and saves it as a pipeline, or resumes a training that was stopped.

    Returns:
        The folder of the pipeline, ``output_dir/model``, which `ClassConditionalPipeline.from_pretrained` loads; None
        after a dry run.

    Raises:
        ValueError: If options, dataset and what the run starts from do not fit together.
        FloatingPointError, OSError, StoppedBySignalError: As `Trainer.run` does.
    """
    trackers = ["none", *LoggerType.list()]
    if options.report_to not in trackers:
        raise ValueError(
            f"report_to is {options.report_to!r}, but must be one of {', '.join(trackers)}"
            f"{perhaps(options.report_to, trackers)}"
        )
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(project_dir=options.output_dir, logging_dir=options.output_dir),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if options.torch_compile else None,
    )
    if options.dry_run:
        plan = make_plan(options, accelerator)
        if accelerator.is_main_process:
            print(describe_run(plan, accelerator))
        return None
    with contextlib.ExitStack() as stack:

        def take_place() -> None:
            stack.enter_context(only_writer(options.output_dir, _SECONDS_FOR_ANOTHER_RUN_TO_END))
            # before looking for a checkpoint, which may be between its two names
            settle_folder(Path(options.output_dir) / CHECKPOINTS_NAME)

        on_main_process(accelerator, take_place)
        return Trainer(make_plan(options, accelerator), accelerator).run()
