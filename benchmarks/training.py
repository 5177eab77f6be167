"""What a step of the training loop costs beside the network: shares of its time, and its pace against a plain loop,
which has no accelerate and nothing that makes a run repeatable."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.training_utils import EMAModel
from performance_page import cell, publish
from report import DIGITS_DATA, ROOT, alternate, parse_options, ratios_to, seconds_of, spread, time_methods

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.data.dataset import to_model_range
from imagenet64_diffusion.training.components import build_optimizer, image_batches
from imagenet64_diffusion.training.loop import Trainer, make_plan
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions


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
)


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


def measure(trainer: Trainer, rounds: int, stretch: int) -> list[Any]:
    """Shares of the time of our steps, and the ratio of each pair of stretches, as blocks of the page."""
    step, parts = plain_step(trainer), time_methods(*PARTS)
    batches = image_batches(trainer.options, trainer.dataset, trainer.accelerator, 0)

    def ours() -> tuple[float, dict[str, float]]:
        parts.clear()
        return seconds_of(lambda: [trainer.take_step(batches) for _ in range(stretch)]), {**parts}

    found = alternate({"plain": lambda: seconds_of(lambda: [step() for _ in range(stretch)]), "ours": ours}, rounds)
    pairs = {"the training loop": [seconds for seconds, _ in found["ours"]], "a plain loop": found["plain"]}
    total = sum(pairs["the training loop"])
    shares = {part: 100 * sum(each[part] for _, each in found["ours"]) / total for *_, part in PARTS}
    shares = dict(sorted(shares.items(), key=lambda item: -item[1])) | {"everything else": 100 - sum(shares.values())}
    shares["outside forward, backward and AdamW"] = 100 - sum(shares[part] for part in WORK)
    images = stretch * trainer.images_per_step
    speeds = {name: spread(images / seconds for seconds in each) for name, each in pairs.items()}
    return [
        f"Parts of {rounds * stretch} steps of the demo's run, {cell(1000 * total / rounds / stretch)} ms each:",
        ("", {"share, %": shares}),
        "Beside a plain loop with the same network, loss, clipping, AdamW and EMA, in"
        f" {rounds} pairs of stretches of {stretch} steps:",
        ("", {"images/s": speeds, "relative time": ratios_to("the training loop", pairs)}),
    ]


def main() -> None:
    options = parse_options(
        __doc__, rounds=("pairs of stretches", 20, 1), stretch=("steps in a stretch", 10, 1), data=DIGITS_DATA
    )
    demo = yaml.safe_load((ROOT / "configs" / "training" / "demo.yaml").read_text(encoding="utf-8"))
    accelerator = Accelerator(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {**demo, "train_data_dir": str(options.data), "output_dir": folder}
        trainer = Trainer(make_plan(TrainOptions(**settings), accelerator), accelerator)
        publish("training", options, measure(trainer, options.rounds, options.stretch), ("accelerate",))


if __name__ == "__main__":
    main()
