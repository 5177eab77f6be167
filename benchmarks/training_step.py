"""A training step: our network, with and without gradient checkpointing, against a stock diffusers U-Net.

A step is forward, loss, backward and AdamW: the hybrid loss and fused AdamW for ours, the squared error of the noise
prediction and torch's default AdamW for the stock network of as many operations.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import networks
import torch
from diffusers import DDIMScheduler, UNet2DModel
from networks import OURS, STOCK
from performance_page import publish
from report import DEVICE, alternate_seconds, in_own_process, parse_options, resident_bytes, spread

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.training.components import build_optimizer
from imagenet64_diffusion.training.cost import estimate_cost
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.memory import keep_freed_memory


PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast"}
CHECKPOINTED = "ours, gradient checkpointing"
NAMES = (OURS, CHECKPOINTED, STOCK)


def make_step(
    name: str, config: dict[str, Any], stock: dict[str, Any], options: argparse.Namespace
) -> Callable[[str], None]:
    """A function that takes one step in a precision, on a network of its own; ``name`` is one of NAMES."""
    images, noise, timesteps, labels = networks.make_inputs(config, options.batch_size, options.device)
    if name == STOCK:
        unet = networks.make_unet(UNet2DModel, stock).to(options.device).train()
        scheduler = DDIMScheduler(**networks.COSINE)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4, weight_decay=0.01)
    else:
        unet = networks.make_unet(ClassConditionalUNet2DModel, config).to(options.device).train()
        scheduler = HybridLoss(networks.make_scheduler(config), device=options.device)
        settings = TrainOptions(train_data_dir=".", output_dir=".")
        optimizer = build_optimizer(settings, unet.parameters(), torch.device(options.device))
        if name == CHECKPOINTED:
            unet.enable_gradient_checkpointing()

    def step(precision: str) -> None:
        noisy = scheduler.add_noise(images, noise, timesteps)
        with torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=precision == "bf16"):
            output = unet(noisy, timesteps, labels).sample
        if name == STOCK:
            loss = torch.nn.functional.mse_loss(output.float(), noise)
        else:
            loss = scheduler(output, images, noise, noisy, timesteps).total.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_bytes(
    name: str, precision: str, config: dict[str, Any], stock: dict[str, Any], options: argparse.Namespace
) -> int:
    """Peak memory of two steps above what the process had before; in the second AdamW has its moments."""
    keep_freed_memory()
    on_gpu = options.device.startswith("cuda")
    before = 0 if on_gpu else resident_bytes("VmRSS")
    step = make_step(name, config, stock, options)
    for _ in range(2):
        step(precision)
    return torch.cuda.max_memory_allocated(options.device) if on_gpu else resident_bytes("VmHWM") - before


def measure_pace(config: dict[str, Any], stock: dict[str, Any], options: argparse.Namespace) -> list[tuple]:
    """For each precision images per second, ratios and shares of the ceiling, as columns, and what the ceiling is."""
    flops = {
        name: estimate_cost(config, gradient_checkpointing=name == CHECKPOINTED).training_flops for name in NAMES[:2]
    }
    flops[STOCK] = networks.network_flops(UNet2DModel, stock, backward=True)
    batches = {name: options.batch_size * count for name, count in flops.items()}
    steps = {name: make_step(name, config, stock, options) for name in NAMES}
    found = []
    for precision in options.precision:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        seconds = alternate_seconds({name: partial(step, precision) for name, step in steps.items()}, options.repeats)
        kernels = networks.kernels(config, options.device, dtype, options.batch_size, options.small)
        speeds = {name: spread(options.batch_size / each for each in values) for name, values in seconds.items()}
        columns, ceiling = networks.compare(seconds, batches, kernels, options.small)
        found.append(({"images/s": speeds, **columns}, ceiling))
    return found


def main() -> None:
    only_float32 = "default: both, or float32 alone where bfloat16 would be a hundred times slower"
    options = parse_options(
        __doc__,
        device=DEVICE,
        batch_size=("images of a step", 4, 2),
        repeats=("rounds of steps", 5, 1),
        config=("recipe", "res_res"),
        precision={"nargs": "+", "choices": list(PRECISIONS), "help": only_float32},
    )
    # CPUs without instructions for bfloat16 compute in it all the same
    has_bfloat16 = options.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    options.precision = options.precision or (list(PRECISIONS) if has_bfloat16 else ["no"])
    config = networks.recipe_config(options.config, options.small)
    flops = estimate_cost(config).forward_flops
    stock = networks.stock_config(config, flops)
    if options.device == "cpu":
        keep_freed_memory()
    # before the networks of the timing take their memory
    memory = [
        {
            name: in_own_process(peak_bytes, name, precision, config, stock, options) / 2**30
            for name in (NAMES[1:2] if options.small else NAMES)
        }
        for precision in options.precision
    ]
    blocks: list[Any] = [
        f"Steps of `{options.config}` with batches of {options.batch_size}: forward, loss, backward, AdamW."
        f" {options.repeats} rounds. Memory is the peak of two steps, with weights and moments."
    ]
    pace = measure_pace(config, stock, options)
    for precision, peaks, (columns, ceiling) in zip(options.precision, memory, pace, strict=True):
        blocks += [(PRECISIONS[precision], {**columns, "memory, GiB": peaks}), ceiling]
    publish(f"training_step-{options.config.replace('/', '_')}-batch{options.batch_size}", options, blocks)


if __name__ == "__main__":
    main()
