"""A training step: our network, with and without gradient checkpointing, against a stock diffusers U-Net.

All run in one process, in turn, each with its own weights and AdamW. A step is forward, loss, backward and AdamW: the
hybrid loss and fused AdamW for ours, the error of the noise prediction and torch's default AdamW for the stock network
of as many operations. In float32 and, where the device has instructions for it, bfloat16 autocast. Peak memory is
that of a process of its own. Ratios compare between machines, times do not. Writes
benchmarks/results/training_step-<recipe>-batch<size>-<processor>.json.
"""

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ceilings import Ceilings
from networks import make_scheduler, make_unet, recipe_config
from report import add_options, choose_sizes, results_dir, write_result
from sampling import STOCK, count_branch_flops, recipe_convolutions
from stock_unet import count_stock_flops, make_stock_scheduler, make_stock_unet, matching_config
from timing import alternate, ratios_to, rounded, seconds_of, spread, words_of

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.training.components import build_optimizer
from imagenet64_diffusion.training.cost import estimate_cost
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.memory import keep_freed_memory


OURS, CHECKPOINTED = "ours", "ours, gradient checkpointing"
NAMES = (OURS, CHECKPOINTED, STOCK)
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast"}


class Batch:
    """A batch of noise in the place of images, the same for all.

    Args:
        config: Options of our network.
        size: Images.
        device: Where.
    """

    def __init__(self, config: dict[str, Any], size: int, device: str):
        generator = torch.Generator().manual_seed(0)
        shape = (size, config["in_channels"], config["sample_size"], config["sample_size"])
        self.images = torch.rand(shape, generator=generator).mul(2).sub(1).to(device)
        self.noise = torch.randn(shape, generator=generator).to(device)
        self.timesteps = torch.randint(1000, (size,), generator=generator).to(device)
        self.labels = (torch.arange(size) % config["num_class_embeds"]).to(device)


def make_step(
    name: str, config: dict[str, Any], stock_config: dict[str, Any], batch: Batch, device: str
) -> Callable[[str], None]:
    """What takes one step in the precision that it is told, on a network of its own.

    Args:
        name: One of NAMES.
        config: Options of our network.
        stock_config: Options of diffusers' network.
        batch: What it learns.
        device: Where.
    """
    if name == STOCK:
        unet = make_stock_unet(stock_config).to(device).train()
        scheduler = make_stock_scheduler()
    else:
        unet = make_unet(config).to(device).train()
        hybrid_loss = HybridLoss(make_scheduler(config), device=device)
    if name != STOCK:
        settings = TrainOptions(train_data_dir="", output_dir="")
        optimizer = build_optimizer(settings, unet.parameters(), torch.device(device))
    else:
        optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-4, weight_decay=0.01)
    if name == CHECKPOINTED:
        unet.enable_gradient_checkpointing()

    def loss(precision: str) -> torch.Tensor:
        mixed = torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else None
        if name == STOCK:
            noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
            with mixed or contextlib.nullcontext():
                predicted = unet(noisy, batch.timesteps, batch.labels).sample
            return torch.nn.functional.mse_loss(predicted.float(), batch.noise)
        noisy = hybrid_loss.add_noise(batch.images, batch.noise, batch.timesteps)
        with mixed or contextlib.nullcontext():
            output = unet(noisy, batch.timesteps, batch.labels).sample
        return hybrid_loss(output, batch.images, batch.noise, noisy, batch.timesteps).total.mean()

    def step(precision: str) -> None:
        loss(precision).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def find_stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """Options of the network of diffusers that has as many operations."""
    with torch.device("meta"):
        flops = count_branch_flops(ClassConditionalUNet2DModel(**config))
    return matching_config(config, flops)


def training_flops(config: dict[str, Any], stock_config: dict[str, Any]) -> dict[str, float]:
    """FLOPs of a forward and backward pass of one image, of each."""
    once, again = (
        estimate_cost(config, gradient_checkpointing=checkpointed).training_flops for checkpointed in (False, True)
    )
    stock = count_stock_flops(stock_config, backward=True)
    return {OURS: once, CHECKPOINTED: again, STOCK: stock}


def measure_pace(
    config: dict[str, Any], stock_config: dict[str, Any], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Images per second of each, in turn; an entry for each precision, with the ceilings of that run."""
    batch = Batch(config, options.batch_size, options.device)
    flops = training_flops(config, stock_config)
    steps = {name: make_step(name, config, stock_config, batch, options.device) for name in NAMES}
    found = {}
    for precision in options.precision:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        ceilings = Ceilings(options.device, dtype, recipe_convolutions(config), options.batch_size, options.small)
        seconds = alternate(
            {
                name: lambda step=step, precision=precision: seconds_of(lambda: step(precision), options.device)
                for name, step in steps.items()
            },
            options.repeats,
        )
        ceilings.measure()
        found[precision] = {
            "images_per_second": {
                name: spread(options.batch_size / value for value in values) for name, values in seconds.items()
            },
            "ratio_to_ours": ratios_to(OURS, seconds),
            "share_of_ceiling": {
                name: ceilings.share(options.batch_size * flops[name], statistics.median(values))
                for name, values in seconds.items()
            },
            "gflop_per_image": {name: rounded(count / 1e9) for name, count in flops.items()},
            "ceilings": ceilings.figures(),
        }
    return found


def has_bfloat16(device: str) -> bool:
    """Whether a device has instructions for bfloat16; CPUs without compute in it all the same, slowly."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resident_bytes(key: str) -> int:
    """VmRSS or VmHWM of this process, as Linux tells them: what it holds, and the most that it held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s*(\d+) kB", status)[1]) * 1024


def measure_own_memory(
    name: str, config: dict[str, Any], stock_config: dict[str, Any], options: argparse.Namespace
) -> int:
    """The peak of two steps above what the process held before; in the second AdamW has its moments."""
    on_gpu = options.device.startswith("cuda")
    before = 0 if on_gpu else resident_bytes("VmRSS")
    batch = Batch(config, options.batch_size, options.device)
    step = make_step(name, config, stock_config, batch, options.device)
    for _ in range(2):
        step(options.precision[0])
    peak = torch.cuda.max_memory_allocated(options.device) if on_gpu else resident_bytes("VmHWM")
    return peak - before


def measure_memory(name: str, precision: str, options: argparse.Namespace) -> int:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--memory_of", name, "--precision", precision, "--config", options.config]
    command += ["--batch_size", str(options.batch_size), "--device", options.device]
    command += ["--small"] if options.small else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def print_precision(precision: str, figures: dict[str, Any]) -> None:
    """The table of one precision."""
    columns = f"{'images/s':>9} {'of ceiling':>11} {'times as long as ours':>24} {'memory':>10}"
    print(f"\n{PRECISIONS[precision]:32} {columns}")
    for name, pace in figures["images_per_second"].items():
        ratio = figures["ratio_to_ours"].get(name)
        memory = figures["peak_bytes"].get(name)
        print(
            f"  {name:30} {pace['median']:9.3g} {100 * figures['share_of_ceiling'][name]:9.1f} %"
            f" {words_of(ratio) if ratio else '':>24} {f'{memory / 2**30:.2f} GiB' if memory else '':>10}"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="res_res", help="recipe (default: res_res)")
    parser.add_argument("--batch_size", type=int, help="images of a step (default: 4)")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=list(PRECISIONS),
        help="default: both, or float32 alone where bfloat16 would be a hundred times slower",
    )
    parser.add_argument("--repeats", type=int, help="rounds of steps (default: 5)")
    parser.add_argument("--memory_of", choices=NAMES, help=argparse.SUPPRESS)
    add_options(parser, device=True)
    options = parser.parse_args()
    if options.precision is None:
        options.precision = list(PRECISIONS) if has_bfloat16(options.device) else ["no"]
    choose_sizes(options, batch_size=(4, 2), repeats=(5, 1))
    config = recipe_config(options.config, options.small)
    # which takes seconds
    stock_config = find_stock_config(config) if options.memory_of in (None, STOCK) else {}
    # as our training does where it runs on the CPU
    kept = options.device == "cpu" and keep_freed_memory()
    if options.memory_of:
        print(json.dumps(measure_own_memory(options.memory_of, config, stock_config, options)))
        return

    # before the networks of the timing take theirs
    peaks = {
        precision: {
            name: measure_memory(name, precision, options)
            for name in NAMES
            if not options.small or (name == CHECKPOINTED and precision == options.precision[0])
        }
        for precision in options.precision
    }
    found = measure_pace(config, stock_config, options)
    for precision, figures in found.items():
        figures["peak_bytes"] = peaks[precision]
        print_precision(precision, figures)
    result = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "recipe": options.config,
        "batch_size": options.batch_size,
        "rounds": options.repeats,
        "keeps_freed_memory": kept,
        "stock": {key: stock_config[key] for key in ("block_out_channels", "layers_per_block")},
        "precisions": found,
    }
    name = f"training_step-{options.config.replace('/', '_')}-batch{options.batch_size}"
    write_result(name, result, ("diffusers", "torch"), results_dir(options), options.device)


if __name__ == "__main__":
    main()
