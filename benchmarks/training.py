"""What the training loop costs beside the network: shares of its time, and its pace against a plain loop.

Two measurements on the demo's network and images. In the first, steps of a real run, with its log, TensorBoard, EMA
and order of data, are taken apart by timing the calls of their parts. In the second, stretches of such steps
alternate in the same process with stretches of a plain loop, which has the same network, loss, clipping, AdamW and EMA
and no accelerate, no log, and none of the bookkeeping that makes a run repeatable. Times of different
machines compare only as ratios. Prints tables and writes benchmarks/results/training-<processor>.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.training_utils import EMAModel
from report import add_options, choose_sizes, results_dir, write_result
from timing import Clock, alternate, ratios_to, seconds_of

from imagenet64_diffusion.data.dataset import PreparedImages, to_model_range
from imagenet64_diffusion.training.components import build_optimizer, image_batches
from imagenet64_diffusion.training.interruption import StopRequest
from imagenet64_diffusion.training.loop import Trainer
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.training.plan import make_plan
from imagenet64_diffusion.utils.command_line import parse_options


ROOT = Path(__file__).parents[1]
# What the network and its optimizer need; everything else is the loop's.
WORK = ("forward", "backward", "optimizer")


def make_trainer(data: Path, output_dir: Path, steps: int) -> Trainer:
    """The demo's training, with all that it usually writes."""
    arguments = ["--config", str(ROOT / "configs" / "training" / "demo.yaml"), "--max_train_steps", str(steps)]
    arguments += ["--train_data_dir", str(data), "--output_dir", str(output_dir), "--lr_scheduler", "constant"]
    options = parse_options(TrainOptions, "", arguments)
    accelerator = Accelerator(
        log_with=options.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(make_plan(options, accelerator), accelerator)
    trainer.unet.train()
    return trainer


def measure_shares(data: Path, folder: Path, steps: int, warmup: int) -> dict[str, float]:
    """Shares of the time of a real run's steps, and ``milliseconds per step``."""
    trainer = make_trainer(data, folder / "shares", steps + warmup)
    trainer._start_trackers()
    clock = Clock()
    clock.around(trainer.unet, "forward", "forward")
    trainer.objective = _Timed(trainer.objective, clock)
    clock.around(trainer.accelerator, "backward", "backward")
    clock.around(trainer.optimizer, "step", "optimizer")
    clock.around(trainer.optimizer, "zero_grad", "optimizer")
    clock.around(trainer.accelerator, "clip_grad_norm_", "clipping")
    clock.around(trainer.ema, "step", "EMA")
    clock.around(trainer, "_log", "log")

    # all but the warm-up is measured; the checkpoint and the samples at the end are not steps
    begin = [0.0]
    take_step = trainer.take_step

    def count(batches: Iterator[Any]) -> None:
        if trainer.global_step == warmup:
            clock.seconds.clear()
            begin[0] = time.perf_counter()
        take_step(batches)

    trainer.take_step = count
    end = [0.0]
    trainer._save_checkpoint = lambda: end.__setitem__(0, time.perf_counter())
    with StopRequest(trainer.accelerator) as stop_request:
        trainer._take_steps(stop_request)
    trainer.accelerator.end_training()
    total = end[0] - begin[0]
    shares = {part: seconds / total for part, seconds in clock.seconds.items()}
    shares["everything else"] = 1 - sum(shares.values())
    return {**shares, "milliseconds per step": 1000 * total / steps}


class _Timed:
    """An objective whose calls are timed as part of the forward pass."""

    def __init__(self, objective: HybridLoss, clock: Clock):
        self._objective, self._call = objective, objective.__call__
        clock.around(self, "_call", "forward")

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


def plain_steps(trainer: Trainer, images: PreparedImages) -> Callable[[], None]:
    """A step as a person would write it in twenty lines, on a network of its own."""
    options = trainer.options
    unet = type(trainer.unet)(**trainer.plan.unet_config).train()
    optimizer = build_optimizer(options, unet.parameters(), torch.device("cpu"))
    ema = EMAModel(unet.parameters(), decay=options.ema_max_decay, use_ema_warmup=True, power=0.75, foreach=True)
    loss = HybridLoss(trainer.scheduler, options.vlb_weight)
    count = options.train_batch_size

    def step() -> None:
        batch = images[torch.randint(len(images), (count,)).tolist()]
        clean = to_model_range(batch["pixel_values"])
        labels = batch["class_labels"].masked_fill(torch.rand(count) < 0.2, images.num_classes)
        timesteps = torch.randint(options.num_train_timesteps, (count,))
        noise = torch.randn_like(clean)
        noisy = loss.add_noise(clean, noise, timesteps)
        terms = loss(unet(noisy, timesteps, labels).sample, clean, noise, noisy, timesteps)
        terms.total.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), options.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def measure_pace(data: Path, folder: Path, rounds: int, stretch: int) -> dict[str, Any]:
    """Images per second of the plain loop and of ours, in turn, and the ratio of each pair of stretches."""
    trainer = make_trainer(data, folder / "pace", rounds * stretch + stretch)
    plain = plain_steps(trainer, trainer.dataset)
    trainer._start_trackers()

    class Silent:
        def set_postfix(self, *arguments: Any, **options: Any) -> None:
            pass

    with StopRequest(trainer.accelerator) as stop_request:
        batches = image_batches(trainer.options, trainer.dataset, trainer.accelerator, 0)

        def ours() -> None:
            trainer.take_step(batches)
            if trainer.global_step % trainer.options.logging_steps == 0:
                trainer._log(Silent())
            stop_request.agreed()

        def stretch_of(step: Callable[[], None]) -> Callable[[], float]:
            return lambda: seconds_of(lambda: [step() for _ in range(stretch)])

        seconds = alternate({"plain": stretch_of(plain), "ours": stretch_of(ours)}, rounds)
    trainer.accelerator.end_training()
    ratio = ratios_to("ours", seconds)["plain"]
    images = stretch * trainer.images_per_step
    return {
        **{f"{name}_images_per_second": images / statistics.median(values) for name, values in seconds.items()},
        "ratio": ratio["median"],
        "ratio_quartiles": ratio["quartiles"],
        "rounds": rounds,
        "steps_in_a_stretch": stretch,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "outputs" / "demo" / "data", help="the prepared digits")
    parser.add_argument("--steps", type=int, help="steps to take apart (default: 200)")
    parser.add_argument("--rounds", type=int, help="pairs of stretches (default: 12)")
    parser.add_argument("--stretch", type=int, help="steps in a stretch (default: 10)")
    add_options(parser)
    options = parser.parse_args()
    choose_sizes(options, steps=(200, 2), rounds=(12, 1), stretch=(10, 1))

    with tempfile.TemporaryDirectory() as name:
        shares = measure_shares(options.data, Path(name), options.steps, warmup=1 if options.small else 10)
        pace = measure_pace(options.data, Path(name), options.rounds, options.stretch)
    milliseconds = shares.pop("milliseconds per step")
    print(f"\n{options.steps} steps of the demo, {milliseconds:.0f} ms each")
    for part, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {part:16} {100 * share:6.2f} %")
    outside = 1 - sum(shares[part] for part in WORK)
    print(f"  outside forward, backward and AdamW: {100 * outside:.2f} %")
    low, high = pace["ratio_quartiles"]
    print(
        f"\npace: {pace['ours_images_per_second']:.0f} images/s, plain loop {pace['plain_images_per_second']:.0f};"
        f" ratio {pace['ratio']:.3f} (quartiles {low:.3f} to {high:.3f})"
    )
    figures = {
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "milliseconds_per_step": milliseconds,
        "shares": shares,
        "share_outside_forward_backward_optimizer": outside,
        "pace": pace,
    }
    write_result("training", figures, ("accelerate", "diffusers", "torch"), results_dir(options))


if __name__ == "__main__":
    main()
