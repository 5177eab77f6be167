"""A training run: accelerate runs it on one process or many, in one precision or another."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration, TorchDynamoPlugin, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from PIL import Image
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..models.unet_class_conditional import ClassConditionalUNet2DModel
from ..pipelines.model_card import write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..pipelines.publishing import push_folder
from ..utils.atomic_write import atomic_file, atomic_folder, only_writer, settle_folder
from ..utils.command_line import OtherRankError, StoppedBySignalError
from ..utils.distributed import on_main_process
from ..utils.memory import keep_freed_memory
from ..utils.nearest_names import perhaps
from .charts import draw_loss_chart
from .checkpoints import (
    Checkpoint,
    Progress,
    find_checkpoints,
    remove_old_checkpoints,
    save_checkpoint,
    set_aside,
)
from .components import build_optimizer, build_pipeline, build_scheduler, build_unet
from .dry_run import describe_run
from .interruption import StopRequest
from .loss import HybridLoss
from .metrics import MetricsFile, MetricsWindow, peak_memory_gib
from .options import TrainOptions
from .plan import Plan, make_plan
from .samples import draw_sample_grid
from .starting_point import CHECKPOINTS_NAME
from .step import OptimizerStep
from .timestep_sampling import TIMESTEP_SAMPLERS


CHART_NAME = "loss_chart.png"
# A run that was killed may take so long to go, and its place is wanted by the one that goes on.
_SECONDS_FOR_ANOTHER_RUN_TO_END = 20


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
        # the same weights in every process
        set_seed(options.seed)
        unet = build_unet(plan.unet_config, self.start)
        if options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.scheduler = build_scheduler(options, self.start)
        # before the optimizer, whose state lies where its parameters lie
        unet.to(self.device)
        optimizer = build_optimizer(options, unet.parameters(), self.device)
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
        num_train_timesteps = cast(int, options.num_train_timesteps)  # resolve_options has filled it in
        self.timestep_sampler = TIMESTEP_SAMPLERS[options.timestep_sampling](num_train_timesteps)
        self.metrics = MetricsWindow(accelerator, num_train_timesteps)
        if checkpoint is not None:
            self._take_up(checkpoint, unet, optimizer)
        self.lr_scheduler = self._make_lr_scheduler(optimizer)
        self.unet, self.optimizer = accelerator.prepare(unet, optimizer)
        if accelerator.scaler is not None and checkpoint is not None and checkpoint.progress.gradient_scaler:
            accelerator.scaler.load_state_dict(checkpoint.progress.gradient_scaler)
        self.take_step = OptimizerStep(
            options=options,
            accelerator=accelerator,
            dataset=self.dataset,
            unet=self.unet,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            ema=self.ema,
            timestep_sampler=self.timestep_sampler,
            loss=HybridLoss(self.scheduler, options.vlb_weight, self.device, options.snr_gamma),
        )
        self._last_grid: Image.Image | None = None
        # what has been copied would stay in memory for the whole run
        self.start.pretrained = None
        if checkpoint is not None:
            checkpoint.weights, checkpoint.averaged_weights, checkpoint.optimizer = {}, None, {}

    # ------------------------------------------------------------------ beginning and going on

    def _take_up(
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
        if checkpoint.timestep_sampler and self.options.timestep_sampling != "uniform":
            self.timestep_sampler.load_state_dict(checkpoint.timestep_sampler)
        if checkpoint.progress.metrics is not None:
            self.metrics.load_state(checkpoint.progress.metrics)

    def _make_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The course of the learning rate, at the step where the run is.

        It is not prepared by accelerate: prepared, it would step once for every process.
        """
        taken = self.global_step
        if self.start.checkpoint is not None and self.start.checkpoint.progress.lr_scheduler_step is not None:
            taken = self.start.checkpoint.progress.lr_scheduler_step
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] = self.options.learning_rate
        return get_scheduler(
            self.options.lr_scheduler,
            optimizer,
            num_warmup_steps=min(self.options.lr_warmup_steps, self.max_train_steps),
            num_training_steps=self.max_train_steps,
            last_epoch=taken - 1,
        )

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
        on_main_process(accelerator, self._make_room)
        self._start_trackers()
        with StopRequest(accelerator) as stop_request:
            self._take_steps(stop_request)
        self._draw_samples()
        model_dir = self.output_dir / "model"
        self._save_pipeline(model_dir)
        if accelerator.is_main_process:
            self._draw_chart()
        if options.push_to_hub:
            on_main_process(accelerator, lambda: self._push(model_dir))
        with self._reporting():
            accelerator.end_training()
        return model_dir

    def _make_room(self) -> None:
        """Readies the folder, and finds out now what would fail at the end."""
        if self.options.push_to_hub:
            create_repo(self._repo_id(), private=self.options.hub_private_repo or None, exist_ok=True)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for folder, _ in self.start.damaged:
            aside = set_aside(folder)
            self._print(f"{folder} is now {aside.name}")
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
        saved_step = -1
        self.unet.train()
        if self.global_step == self.max_train_steps:
            self._print(f"all {self.max_train_steps:,} steps have been taken already; drawing and saving the pipeline")
        with progress_bar, contextlib.closing(self.take_step.batches(self.images_seen)) as batches:
            if self.global_step:
                self._make_up_for()
            while self.global_step < self.max_train_steps:
                outcome = self.take_step(self.global_step, batches)
                self.global_step += 1
                self.images_seen += self.images_per_step
                self.metrics.add(self.global_step, **vars(outcome))
                progress_bar.update()
                is_last = self.global_step == self.max_train_steps
                if is_last or self.global_step % options.logging_steps == 0:
                    self._log(progress_bar)
                with self.metrics.paused():
                    # before the samples, which take longer than a job that is stopped is given
                    if options.checkpointing_steps and (
                        is_last or self.global_step % options.checkpointing_steps == 0
                    ):
                        self._save_checkpoint()
                        saved_step = self.global_step
                    signal_number = stop_request.agreed()
                    if signal_number:
                        self._stop(signal_number, saved_step)
                    if self._is_due(options.sample_steps) and not is_last:
                        self._draw_samples()
                    if self._is_due(options.pipeline_steps):
                        self._save_pipeline(self._pipeline_folder())

    def _make_up_for(self) -> None:
        """Draws and saves what the run did not come to, if it was stopped after its checkpoint and before these."""
        options = self.options
        if options.sample_steps and self.accelerator.is_main_process:
            file = self._grid_file(self.global_step // options.sample_steps * options.sample_steps)
            if file.is_file():
                with Image.open(file) as grid:
                    self._last_grid = grid.copy()
        has_grid, has_pipeline = on_main_process(
            self.accelerator, lambda: (self._grid_file(self.global_step).exists(), self._pipeline_folder().exists())
        )
        if self._is_due(options.sample_steps) and not has_grid and self.global_step < self.max_train_steps:
            self._draw_samples()
        if self._is_due(options.pipeline_steps) and not has_pipeline:
            self._save_pipeline(self._pipeline_folder())

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.global_step % every == 0

    def _stop(self, signal_number: int, saved_step: int) -> None:
        if saved_step != self.global_step:
            self._save_checkpoint()
        with self._reporting():
            self.accelerator.end_training()
        message = (
            f"stopped by {signal.Signals(signal_number).name} after step {self.global_step:,} of"
            f" {self.max_train_steps:,}; {self._checkpoint_folder()} keeps it: the same command goes on from there"
        )
        raise StoppedBySignalError(signal_number, message if self.accelerator.is_main_process else "")

    # ------------------------------------------------------------------ what is kept

    def _checkpoint_folder(self) -> Path:
        return self.output_dir / CHECKPOINTS_NAME / f"checkpoint-{self.global_step}"

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint, and only then removes those over the limit.

        The state is the same in every process, but for the sums of the log, which come together here; one writes.
        """
        options, accelerator = self.options, self.accelerator
        # weights that are not finite must not take the place of good ones
        if not self.metrics.is_empty():
            self._finite_means()
        if not all(torch.stack([weight.isfinite().all() for weight in self.unet.parameters()])):
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
                timestep_sampler=self.timestep_sampler.state_dict(),
            )
            if options.checkpoints_total_limit:
                remove_old_checkpoints(self._checkpoint_folder().parent, options.checkpoints_total_limit)
            if self.global_step < self.max_train_steps:
                self._draw_chart()

        on_main_process(accelerator, write)

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

    def _pipeline_folder(self) -> Path:
        return self.output_dir / "pipelines" / f"step_{self.global_step:07d}"

    def _sampling_pipeline(self) -> ClassConditionalPipeline:
        unet = self.accelerator.unwrap_model(self.unet, keep_torch_compile=False)
        pipeline = build_pipeline(unet, self.scheduler, self.dataset)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _save_pipeline(self, folder: Path) -> None:
        """Writes the pipeline with the averaged weights; the folder appears whole or not at all."""

        def write() -> None:
            pipeline, facts = self._sampling_pipeline(), self._training_facts()
            try:
                with self._averaged_weights(), atomic_folder(folder) as writing:
                    pipeline.save_pretrained(writing)
                    write_model_card(pipeline, writing, samples=self._last_grid, training_facts=facts)
            # safetensors has an error of its own for what the system refuses
            except (OSError, SafetensorError) as error:
                raise OSError(f"could not write {folder} ({error})") from error

        on_main_process(self.accelerator, write)

    def _push(self, model_dir: Path) -> None:
        commit = push_folder(
            self._sampling_pipeline(), model_dir, self._repo_id(), commit_message=f"Step {self.global_step:,}"
        )
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

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """A tracker that meets a full disk does not say where."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise OSError(f"could not report to {self.options.report_to} in {self.output_dir} ({reason})") from error

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

    def _log(self, progress_bar: tqdm) -> None:
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

    def _grid_file(self, step: int) -> Path:
        return self.output_dir / "sample_grids" / f"step_{step:07d}.png"

    def _draw_samples(self) -> None:
        """A grid from the averaged weights, always from the same noise, shared among the processes."""
        with self._averaged_weights():
            grid = draw_sample_grid(self._sampling_pipeline(), self.options, self.accelerator)
        self._last_grid = grid
        if grid is not None:
            with atomic_file(self._grid_file(self.global_step)) as writing:
                grid.save(writing)
            for tracker in self.accelerator.trackers:
                arrangement = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if tracker.name in ("tensorboard", "wandb"):
                    with self._reporting():
                        tracker.log_images({"samples": np.asarray(grid)[None]}, step=self.global_step, **arrangement)

    def _training_facts(self) -> dict[str, Any]:
        """What the model card says of the training."""
        options = self.options
        weighting = "" if options.snr_gamma is None else f", min-SNR weighting with gamma {options.snr_gamma:g}"
        return {
            "images": f"{len(self.dataset):,}, {self.dataset.fingerprint}",
            "began from": self.start.began_from or "random weights",
            "optimizer steps": f"{self.global_step:,}",
            "images per step": f"{self.images_per_step:,}",
            "epochs": f"{self.images_seen / len(self.dataset):.1f}",
            "optimizer": f"{options.optimizer}, learning rate {options.learning_rate:g}, {options.lr_scheduler}",
            "weights": f"moving average, decay up to {options.ema_max_decay}"
            if options.use_ema
            else "of the last step",
            "class drop-out": "no classes" if options.unconditional else options.class_dropout_prob,
            "timestep sampling": options.timestep_sampling + weighting,
            "precision": self.accelerator.mixed_precision,
            "seed": options.seed,
        }


def train(options: TrainOptions) -> Path | None:
    """Trains a network and saves it as a pipeline, or goes on with a training that was stopped.

    Args:
        options: What to do.

    Returns:
        The folder of the pipeline, ``output_dir/model``, which `ClassConditionalPipeline.from_pretrained` loads; None
        after a dry run.

    Raises:
        ValueError: If options, dataset and what the run begins from do not fit together.
        FloatingPointError: If the loss is no longer finite.
        OSError: If something cannot be written, or another run writes to the same folder.
        StoppedBySignalError: After SIGTERM or SIGINT, when a checkpoint has been written.
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
