"""A training run: accelerate runs it on one rank or many, in one precision or another."""

import contextlib
import json
import math
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import LoggerType, ProjectConfiguration, TorchDynamoPlugin, gather_object, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from huggingface_hub import create_repo
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ..data.dataset import to_model_range
from ..pipelines.generation import sample_images
from ..pipelines.generation_options import Sampler
from ..pipelines.image_grid import image_grid, to_image
from ..pipelines.model_card import push_folder, write_model_card
from ..pipelines.pipeline_class_conditional import ClassConditionalPipeline
from ..utils.atomic_write import atomic_file, atomic_folder, only_writer, settle_folder
from ..utils.command_line import OtherRankError, StoppedBySignalError
from ..utils.devices import keep_freed_memory
from ..utils.distributed import on_main_process
from ..utils.nearest_names import perhaps
from ..utils.progress import progress_bar
from .checkpoints import Progress, find_checkpoints, remove_old_checkpoints, save_checkpoint, write_errors
from .components import OBJECTIVES, build_optimizer, build_scheduler, build_unet, image_batches, predicts_variance
from .cost import describe_run
from .interruption import StopRequest
from .metrics import METRICS_NAME, MetricsWindow, draw_loss_chart, remove_entries_after
from .objectives import TrainedNetwork
from .options import TrainOptions
from .plan import Plan, make_plan
from .randomness import StepRandomness, seed_network, to_device


class Trainer:
    """One training run. All its state is in attributes; `run` takes the steps."""

    def __init__(self, plan: Plan, accelerator: Accelerator):
        self.plan, self.options, self.dataset = plan, plan.options, plan.dataset
        self.accelerator, self.device = accelerator, accelerator.device
        self.output_dir = Path(plan.options.output_dir)
        self.checkpoints, self.grids = self.output_dir / "checkpoints", self.output_dir / "sample_grids"
        self.repo_id = plan.options.hub_model_id or self.output_dir.resolve().name
        self.max_train_steps, self.images_per_step = plan.max_train_steps, plan.images_per_step
        self.global_step, self.images_seen = plan.first_step, plan.images_seen
        options, checkpoint = plan.options, plan.start.checkpoint

        if self.device.type == "cpu":
            keep_freed_memory()
        # the same weights on every rank
        set_seed(options.seed)
        self.unet = unet = build_unet(plan.unet_config, plan.start)
        if options.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        # before the optimizer, whose state lies where its parameters lie
        unet.to(self.device).train()
        self._parameters = list(unet.parameters())
        optimizer = build_optimizer(options, self._parameters, self.device)
        self.scheduler = build_scheduler(options, plan.start, predicts_variance(plan.unet_config))
        self.objective = OBJECTIVES[options.objective].loss(options, self.scheduler, self.device)
        self.metrics = MetricsWindow(accelerator, self.objective)
        self.ema = None
        if options.use_ema:
            warmup = {"use_ema_warmup": True, "inv_gamma": options.ema_inv_gamma, "power": options.ema_power}
            self.ema = EMAModel(self._parameters, decay=options.ema_max_decay, foreach=True, **warmup)
        schedule_step = self.global_step
        if checkpoint is not None:
            progress = checkpoint.progress
            # learning rate and so on are those of the options
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": checkpoint.optimizer["state"], "param_groups": groups})
            if self.ema is not None and checkpoint.averaged_weights is not None:
                parameters, self.ema.optimization_step = checkpoint.averaged_weights
                self.ema.shadow_params = [parameter.to(self.device, copy=True) for parameter in parameters]
            self.objective.load_state_dict(checkpoint.timestep_sampler)
            if progress.metrics is not None:
                self.metrics.load_state(progress.metrics)
            if progress.lr_scheduler_step is not None:
                schedule_step = progress.lr_scheduler_step
            if accelerator.scaler is not None and progress.gradient_scaler:
                accelerator.scaler.load_state_dict(progress.gradient_scaler)
            # what has been copied would stay in memory for the whole run
            checkpoint.weights, checkpoint.averaged_weights, checkpoint.optimizer = {}, None, {}
        plan.start.pretrained = None
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"] = options.learning_rate
        # not prepared by accelerate, which would step it once for every rank
        steps = {"num_warmup_steps": min(options.lr_warmup_steps, self.max_train_steps)}
        steps |= {"num_training_steps": self.max_train_steps, "last_epoch": schedule_step - 1}
        self.lr_scheduler = get_scheduler(options.lr_scheduler, optimizer, **steps)
        self.network, self.optimizer = accelerator.prepare(TrainedNetwork(unet), optimizer)

    def run(self) -> Path:
        """Trains to the last step and saves the pipeline; returns its folder."""
        accelerator, model_dir = self.accelerator, self.output_dir / "model"
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        accelerator.print(self.plan.summary(self.device.type, accelerator.mixed_precision, num_parameters), flush=True)
        on_main_process(accelerator, self._prepare_folder)
        # trackers take plain numbers and strings only
        plain = (bool, int, float, str)
        config = {key: value if isinstance(value, plain) else str(value) for key, value in vars(self.options).items()}
        # what a killed run has written of the steps to come is not shown
        purged = {"tensorboard": {"purge_step": self.global_step + 1}}
        accelerator.init_trackers("train", config=config, init_kwargs=purged)
        try:
            with StopRequest(accelerator) as stop_request:
                stopped_by = self._take_steps(stop_request)
        except FloatingPointError as error:
            if not accelerator.is_main_process:
                raise OtherRankError(str(error)) from None
            newest = next(reversed(find_checkpoints(self.checkpoints)), "no checkpoint")
            advice = "A smaller learning_rate, or bf16 instead of fp16, may help"
            raise FloatingPointError(f"{error}; {newest} is from before. {advice}") from None
        if not stopped_by:
            self._save_samples()
            self._save_pipeline(model_dir)
            on_main_process(accelerator, lambda: self._finish(model_dir))
        with self._reporting():
            accelerator.end_training()
        if stopped_by:
            message = f"stopped by {signal.Signals(stopped_by).name} after step {self.global_step:,} of"
            message += f" {self.max_train_steps:,}: the same command resumes from {self._checkpoint()}"
            raise StoppedBySignalError(stopped_by, message if accelerator.is_main_process else "")
        return model_dir

    def _prepare_folder(self) -> None:
        """Readies the folder, and finds out now what would fail at the end."""
        if self.options.push_to_hub:
            create_repo(self.repo_id, private=self.options.hub_private_repo or None, exist_ok=True)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        for folder, _ in self.plan.start.damaged:
            place, number = folder.with_name(f"damaged-{folder.name}"), 1
            while place.exists():
                number += 1
                place = folder.with_name(f"damaged-{number}-{folder.name}")
            folder.rename(place)
            print(f"{folder} is now {place.name}", flush=True)
        remove_entries_after(self.output_dir, self.global_step)

    def _take_steps(self, stop_request: StopRequest) -> int:
        """Takes the steps to the last one, or until a signal stops the run; returns its number, or 0."""
        options = self.options
        shown = {"desc": "training", "unit": "step", "disable": not self.accelerator.is_local_main_process}
        bar = progress_bar(total=self.max_train_steps, initial=self.global_step, **shown)
        images = image_batches(options, self.dataset, self.accelerator, self.images_seen)
        with bar, contextlib.closing(images) as batches:
            if self.global_step:
                # a run may have been stopped after its checkpoint and before these
                self._save_due_outputs()
            while self.global_step < self.max_train_steps:
                self.take_step(batches)
                bar.update()
                is_last = self.global_step == self.max_train_steps
                if is_last or self._is_due(options.logging_steps):
                    self._log(bar)
                with self.metrics.paused():
                    # before the samples, which take longer than a job that is stopped is given
                    saves = options.checkpointing_steps and (is_last or self._is_due(options.checkpointing_steps))
                    if saves:
                        self._save_checkpoint()
                    if signal_number := stop_request.agreed():
                        if not saves:
                            self._save_checkpoint()
                        return signal_number
                    self._save_due_outputs()
        return 0

    def take_step(self, batches: Iterator[dict[str, Tensor]]) -> None:
        """Takes one optimizer step: from the images of a batch to changed weights."""
        options, accelerator = self.options, self.accelerator
        passes: list[tuple[Tensor, Tensor, Tensor]] = []
        gradient_norm = None
        for piece in range(options.gradient_accumulation_steps):
            with accelerator.accumulate(self.network):
                first = (piece * accelerator.num_processes + accelerator.process_index) * options.train_batch_size
                images = slice(first, first + options.train_batch_size)
                randomness = StepRandomness(
                    options.seed, self.global_step, images, self.images_per_step, options.class_dropout_prob
                )
                sampled, weights = self.objective.sample_noise_levels(randomness.uniforms)
                levels = to_device(sampled, self.device)
                # before the seeding: a loader that begins takes a random number itself
                batch = next(batches)
                seed_network(options.seed, self.global_step, piece, accelerator.process_index)
                losses = self._losses(batch, randomness, levels)
                loss = (losses * to_device(weights.astype(np.float32), self.device)).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(self._parameters, options.max_grad_norm or math.inf)
                self.optimizer.step()
                self.optimizer.zero_grad()
            passes.append((loss.detach(), losses.detach(), levels))
        # fp16 skips a step whose gradients overflow
        if accelerator.optimizer_step_was_skipped:
            gradient_norm = None
        else:
            self.lr_scheduler.step()
            if self.ema is not None:
                self.ema.step(self._parameters)
        if options.timestep_sampling != "uniform":
            # every rank learns the losses of all, in the order of the global batch, so that all sample alike
            for _, losses, levels in passes:
                everyone = accelerator.gather(levels), accelerator.gather(losses).double()
                self.objective.update(*(values.cpu().numpy() for values in everyone))
        self.global_step += 1
        self.images_seen += self.images_per_step
        means, *of_images = zip(*passes, strict=True)
        self.metrics.add(self.global_step, torch.stack(means).mean(), gradient_norm, *map(torch.cat, of_images))

    def _losses(self, batch: dict[str, Tensor], randomness: StepRandomness, levels: Tensor) -> Tensor:
        """The loss of each image of one pass, (images,)."""
        images = to_model_range(batch["pixel_values"].to(self.device, non_blocking=True))
        if self.plan.image_size != self.dataset.image_size:
            images = F.interpolate(images, self.plan.image_size, mode="bilinear", antialias=True)
        if self.options.random_flip:
            flips = to_device(randomness.flips, self.device)[:, None, None, None]
            images = torch.where(flips, images.flip(-1), images)
        labels = None
        if not self.options.unconditional:
            labels = batch["class_labels"].to(self.device, non_blocking=True)
            labels = labels.masked_fill(to_device(randomness.drops_class, self.device), self.dataset.num_classes)
        noise = randomness.noise(tuple(images.shape[1:]), self.device)
        noisy_images = self.objective.add_noise(images, noise, levels)
        with self.accelerator.autocast():
            model_output, log_variance = self.network(*self.objective.model_inputs(noisy_images, levels), labels)
        return self.objective(model_output, images, noise, noisy_images, levels, log_variance).total

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.global_step % every == 0

    def _save_due_outputs(self) -> None:
        """The sample grid and the pipeline of this step."""
        if self._is_due(self.options.sample_steps) and self.global_step < self.max_train_steps:
            self._save_samples()
        if self._is_due(self.options.pipeline_steps):
            self._save_pipeline(self.output_dir / "pipelines" / self._step_name())

    def _step_name(self) -> str:
        return f"step_{self.global_step:07d}"

    def _checkpoint(self) -> Path:
        return self.checkpoints / f"checkpoint-{self.global_step}"

    def _save_checkpoint(self) -> None:
        """Writes a checkpoint on the main process, and only then removes those over the limit."""
        options, accelerator = self.options, self.accelerator
        # weights that are not finite must not take the place of good ones
        self.metrics.means()
        if not all(torch.stack([weight.isfinite().all() for weight in self._parameters])):
            raise FloatingPointError(f"the weights are not finite after step {self.global_step}")
        progress = Progress(
            step=self.global_step,
            epoch=self.images_seen / len(self.dataset),
            images_seen=self.images_seen,
            num_processes=accelerator.num_processes,
            images_per_step=self.images_per_step,
            dataset=self.dataset.fingerprint,
            began_from=self.plan.start.began_from,
            lr_scheduler_step=self.lr_scheduler.last_epoch,
            gradient_scaler=None if accelerator.scaler is None else accelerator.scaler.state_dict(),
            metrics=self.metrics.state(),
        )

        def write() -> None:
            ema = self.ema
            averaged = ema and ([weight.cpu() for weight in ema.shadow_params], ema.optimization_step)
            save_checkpoint(
                self._checkpoint(),
                unet=self.unet,
                scheduler=self.scheduler,
                optimizer=self.optimizer.optimizer,
                progress=progress,
                options=vars(options),
                averaged_weights=averaged,
                timestep_sampler=self.objective.state_dict(),
            )
            if options.checkpoints_total_limit:
                remove_old_checkpoints(self.checkpoints, options.checkpoints_total_limit)
            if self.global_step < self.max_train_steps:
                draw_loss_chart(self.output_dir)

        on_main_process(accelerator, write)

    def _pipeline(self) -> ClassConditionalPipeline:
        id2label = None if self.options.unconditional else self.dataset.id2label
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        pipeline = ClassConditionalPipeline(self.unet, scheduler, id2label)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _save_pipeline(self, folder: Path) -> None:
        """Writes the pipeline with the EMA weights and the newest sample grid, atomically."""

        def write() -> None:
            grids = sorted(file for file in self.grids.glob("step_*.png") if file.stem <= self._step_name())
            samples = Image.open(grids[-1]) if grids else None
            facts = self.plan.facts(self.global_step, self.images_seen, self.accelerator.mixed_precision)
            with write_errors(folder), ema_weights(self.unet, self.ema), atomic_folder(folder) as writing:
                pipeline = self._pipeline()
                pipeline.save_pretrained(writing)
                write_model_card(pipeline, writing, samples=samples, training_facts=facts)

        on_main_process(self.accelerator, write)

    def _finish(self, model_dir: Path) -> None:
        draw_loss_chart(self.output_dir)
        if self.options.push_to_hub:
            message = f"Step {self.global_step:,}"
            url = push_folder(self._pipeline(), model_dir, self.repo_id, commit_message=message).commit_url
            print(f"uploaded {model_dir}: {url}")

    def _reporting(self) -> contextlib.AbstractContextManager[None]:
        return write_errors(self.output_dir, f" for {self.options.report_to}")

    def _log(self, bar: tqdm) -> None:
        # on a GPU the memory of tensors, else of the whole process
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        values = {
            **self.metrics.means(),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "epoch": self.images_seen / len(self.dataset),
            "images_per_second": self.metrics.steps_per_second() * self.images_per_step,
            "peak_memory_gib": memory / 2**30,
        }
        self.metrics.clear()
        if self.accelerator.is_main_process:
            file = self.output_dir / METRICS_NAME
            with write_errors(file), file.open("a", encoding="utf-8") as log:
                log.write(json.dumps({"step": self.global_step, **values}) + "\n")
        with self._reporting():
            known = {name: value for name, value in values.items() if value is not None}
            self.accelerator.log(known, self.global_step)
        shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{values['images_per_second']:.0f}"}
        bar.set_postfix(shown, refresh=False)

    def _save_samples(self) -> None:
        """A grid from the EMA weights, always from the same noise, shared among the ranks."""
        options, accelerator = self.options, self.accelerator
        num_classes = None if options.unconditional else self.dataset.num_classes
        count = min(options.num_sample_classes, num_classes or options.num_sample_classes)
        classes = [None if num_classes is None else index * num_classes // count for index in range(count)]
        labels = [label for label in classes for _ in range(options.num_samples_per_class)]
        mine = np.array_split(np.arange(len(labels)), accelerator.num_processes)[accelerator.process_index].tolist()
        images: list[Image.Image] = []
        with ema_weights(self.unet, self.ema), accelerator.autocast():
            pipeline = self._pipeline()
            steps = min(options.num_inference_steps, self.scheduler.config.num_train_timesteps)
            guidance_scale = 1.0 if pipeline.null_class is None else options.guidance_scale
            sampler = Sampler(num_inference_steps=steps, guidance_scale=guidance_scale)
            for start in range(0, len(mine), options.train_batch_size):
                batch = mine[start : start + options.train_batch_size]
                own = [labels[index] for index in batch]
                generated = sample_images(pipeline, sampler, own, options.seed + batch[0], output_type="np")
                # the first three channels, or one
                pixels = (generated[..., : 3 if generated.shape[-1] >= 3 else 1] * 255).round().astype("uint8")
                images.extend(map(to_image, pixels))
        images = gather_object(images)
        if not accelerator.is_main_process:
            return
        captions = ["" if label is None else self.dataset.id2label[label] for label in labels]
        grid = image_grid(images, captions, columns=options.num_samples_per_class)
        with atomic_file(self.grids / f"{self._step_name()}.png") as writing:
            grid.save(writing)
        for tracker in accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                with self._reporting():
                    tracker.log_images({"samples": np.asarray(grid)[None]}, step=self.global_step, **layout)


@contextlib.contextmanager
def ema_weights(unet: torch.nn.Module, ema: EMAModel | None) -> Iterator[None]:
    """Inside, the network has the EMA weights, if there are any, and evaluates."""
    parameters = list(unet.parameters())
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    unet.eval()
    yield
    unet.train()
    if ema is not None:
        ema.restore(parameters)


def train(options: TrainOptions) -> Path | None:
    """What `train_imagenet64.train` calls."""
    trackers = ["none", *LoggerType.list()]
    if options.report_to not in trackers:
        known = f"{', '.join(trackers)}{perhaps(options.report_to, trackers)}"
        raise ValueError(f"report_to is {options.report_to!r}, but must be one of {known}")
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_config=ProjectConfiguration(project_dir=options.output_dir, logging_dir=options.output_dir),
        dynamo_plugin=TorchDynamoPlugin(backend="inductor") if options.torch_compile else None,
    )
    if options.dry_run:
        accelerator.print(describe_run(make_plan(options, accelerator), accelerator))
        return None
    with contextlib.ExitStack() as stack:

        def take_place() -> None:
            # a run that was killed may take so long to go, and its place is wanted by the one that resumes
            stack.enter_context(only_writer(options.output_dir, waiting_seconds=20))
            # before looking for a checkpoint, which may be between its two names
            settle_folder(Path(options.output_dir) / "checkpoints")

        on_main_process(accelerator, take_place)
        return Trainer(make_plan(options, accelerator), accelerator).run()
