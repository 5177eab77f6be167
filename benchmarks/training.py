"""What the training loop costs beside the network: shares of its time, and its pace against a plain loop.

Runs train_imagenet64.py on the demo's network and images and times the calls of the parts of its steps. Every few
steps alternate with as many of a plain loop, which has the same network, loss, clipping, AdamW and EMA, but no
accelerate, no log and none of what makes a run repeatable. Writes benchmarks/results/training-<processor>.json.
"""

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from performance_page import publish
from report import DIGITS_DATA, Clock, call_command, parse_options, ratios_to, seconds_of, timer

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.data.dataset import to_model_range
from imagenet64_diffusion.training.components import build_optimizer
from imagenet64_diffusion.training.loop import Trainer
from imagenet64_diffusion.training.objectives import HybridLoss


# what the network and its optimizer need; everything else is the loop's
WORK = ("forward", "backward", "optimizer")
PARTS = (
    (ClassConditionalUNet2DModel, "forward", "forward"),
    (HybridLoss, "__call__", "forward"),
    (Accelerator, "backward", "backward"),
    (AcceleratedOptimizer, "step", "optimizer"),
    (AcceleratedOptimizer, "zero_grad", "optimizer"),
    (Accelerator, "clip_grad_norm_", "clipping"),
    (EMAModel, "step", "EMA"),
    (Accelerator, "log", "log"),
)


def train(data: Path, steps: int, before_step: Callable[[Trainer], None]) -> None:
    """The demo's training in a temporary folder; ``before_step`` is called before each of its steps."""
    take_step = Trainer.take_step

    def observed(trainer: Trainer, *arguments: Any) -> Any:
        before_step(trainer)
        return take_step(trainer, *arguments)

    few_samples = ("--num_sample_classes", 1, "--num_samples_per_class", 1, "--num_inference_steps", 1)
    with tempfile.TemporaryDirectory() as folder, patch.object(Trainer, "take_step", observed):
        paths = ("--train_data_dir", data, "--output_dir", folder)
        schedule = ("--max_train_steps", steps, "--lr_scheduler", "constant")
        call_command("train_imagenet64", "--config", "demo", *paths, *schedule, *few_samples)


def plain_step(trainer: Trainer) -> Callable[[], None]:
    """A step as a person would write it in twenty lines, on a network of its own."""
    options, images = trainer.options, trainer.dataset
    unet = ClassConditionalUNet2DModel(**trainer.plan.unet_config).train()
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
        loss(unet(noisy, timesteps, labels).sample, clean, noise, noisy, timesteps).total.mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), options.max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())

    return step


def measure(data: Path, rounds: int, stretch: int) -> dict[str, Any]:
    """Shares of the time of our steps, and the ratio of each pair of stretches, as JSON values."""
    clock = Clock()
    for part in PARTS:
        clock.around(*part)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    parts: dict[str, float] = defaultdict(float)
    state: dict[str, Any] = {}

    def before_step(trainer: Trainer) -> None:
        if trainer.global_step % stretch:
            return
        if state:
            seconds["ours"].append(timer() - state["begin"])
            # the first pair warms up
            for part, value in clock.seconds.items() if len(seconds["ours"]) > 1 else ():
                parts[part] += value
        else:
            state.update(step=plain_step(trainer), images=stretch * trainer.images_per_step)
        seconds["plain"].append(seconds_of(lambda: [state["step"]() for _ in range(stretch)]))
        clock.seconds.clear()
        state["begin"] = timer()

    train(data, (rounds + 1) * stretch + 1, before_step)
    pairs = {"plain": seconds["plain"][1:-1], "ours": seconds["ours"][1:]}
    total, ratio = sum(pairs["ours"]), ratios_to("ours", pairs)["plain"]
    shares = {part: value / total for part, value in parts.items()}
    speeds = {f"{name}_images_per_second": state["images"] / statistics.median(each) for name, each in pairs.items()}
    return {
        "steps": rounds * stretch,
        "milliseconds_per_step": 1000 * total / rounds / stretch,
        "shares": {**shares, "everything else": 1 - sum(shares.values())},
        "share_outside_forward_backward_optimizer": 1 - sum(shares[part] for part in WORK),
        "pace": {
            **speeds,
            "ratio": ratio["median"],
            "ratio_quartiles": ratio["quartiles"],
            "rounds": rounds,
            "steps_in_a_stretch": stretch,
        },
    }


def main() -> None:
    """The command line."""
    options = parse_options(
        __doc__,
        rounds=(20, 1, "pairs of stretches"),
        stretch=(10, 1, "steps in a stretch"),
        data={"type": Path, "default": DIGITS_DATA, "help": "the prepared digits"},
    )
    publish("training", measure(options.data, options.rounds, options.stretch), options, ["accelerate"])


if __name__ == "__main__":
    main()
