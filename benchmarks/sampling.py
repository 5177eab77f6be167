"""A guided denoising step and whole images: our pipeline against a stock diffusers U-Net of as many operations.

Both run in one process, in turn. A step is both branches of guidance and the scheduler. Weights are random. Beside the
times stand the operations and their share of the ceiling (benchmarks/ceilings.py). Ratios compare between machines,
times do not. Writes benchmarks/results/sampling-<dtype>-batch<size>-<processor>.json, with the recipes in its name if
they are chosen.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ceilings import Ceilings, network_convolutions
from flops import count_flops
from networks import make_pipeline, recipe_config
from report import add_options, choose_sizes, results_dir, write_result
from stock_unet import (
    TOLERANCE,
    count_stock_flops,
    guided_prediction,
    make_stock_scheduler,
    make_stock_unet,
    matching_config,
)
from timing import alternate, ratios_to, rounded, seconds_of, spread, synchronize, words_of

from imagenet64_diffusion import ClassConditionalUNet2DModel


RECIPES = ["res_res", "res_res_atn", "original/res_res", "original/res_res_atn"]
GUIDANCE_SCALE = 5.0
OURS, STOCK = "ours", "stock diffusers"


class Contest:
    """The two networks of one recipe, and how each of them samples."""

    def __init__(self, recipe: str, options: argparse.Namespace):
        self.device, self.batch_size = options.device, options.batch_size
        config = recipe_config(recipe, options.small)
        dtype = getattr(torch, options.dtype)
        self.pipeline = make_pipeline(config).to(self.device)
        if dtype != torch.float32:
            self.pipeline.to(dtype)
        with torch.device("meta"):
            flops = count_branch_flops(ClassConditionalUNet2DModel(**config))
        self.stock_config = matching_config(config, flops)
        stock_flops = count_stock_flops(self.stock_config)
        if abs(stock_flops / flops - 1) > TOLERANCE and not options.small:
            raise ValueError(f"no stock network has as many operations as {recipe}: {stock_flops:g} and {flops:g}")
        self.stock = make_stock_unet(self.stock_config).to(self.device, dtype)
        self.scheduler = make_stock_scheduler()
        # of a step, whatever the scheduler does: it multiplies no matrices
        self.flops = {OURS: 2 * self.batch_size * flops, STOCK: 2 * self.batch_size * stock_flops}
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
        self.noise = torch.randn(shape, generator=generator).to(self.device)
        self.labels = torch.arange(self.batch_size, device=self.device) % config["num_class_embeds"]

    def generate(self, name: str, num_inference_steps: int) -> torch.Tensor:
        """Whole images in [0, 1], (images, channels, height, width)."""
        if name == OURS:
            return self._call_pipeline(num_inference_steps, output_type="pt")
        latents = self.noise
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for timestep in self.scheduler.timesteps:
            latents = self._stock_step(timestep, latents)
        return (latents / 2 + 0.5).clamp(0, 1)

    def stock_step_seconds(self) -> float:
        """Of one step of a loop."""
        self.scheduler.set_timesteps(10, device=self.device)
        return seconds_of(lambda: self._stock_step(self.scheduler.timesteps[5], self.noise), self.device)

    def _stock_step(self, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        prediction = guided_prediction(self.stock, latents, timestep, self.labels, GUIDANCE_SCALE)
        return self.scheduler.step(prediction, timestep, latents).prev_sample

    def pipeline_step_seconds(self, steps: int) -> tuple[float, float]:
        """Of a step inside the pipeline, the median of some; and how much more its first takes, from the call."""
        moments = []

        def note(*_: Any) -> dict[str, Any]:
            synchronize(self.device)
            moments.append(time.perf_counter())
            return {}

        synchronize(self.device)
        begin = time.perf_counter()
        self._call_pipeline(1 + steps, output_type="latent", callback_on_step_end=note)
        step = statistics.median(after - before for before, after in itertools.pairwise(moments))
        return step, moments[0] - begin - step

    def _call_pipeline(self, num_inference_steps: int, **options: Any) -> torch.Tensor:
        return self.pipeline(
            self.labels,
            guidance_scale=GUIDANCE_SCALE,
            num_inference_steps=num_inference_steps,
            latents=self.noise,
            **options,
        ).images


def branch_forward(unet: torch.nn.Module) -> Callable[[], Any]:
    """A forward pass for one image, of a network on the meta device."""
    size = unet.config.sample_size
    sample = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    timestep = labels = torch.zeros(1, dtype=torch.long, device="meta")
    return lambda: unet(sample, timestep, labels)


def count_branch_flops(unet: torch.nn.Module) -> int:
    """FLOPs of that pass."""
    return count_flops(branch_forward(unet))


def recipe_convolutions(config: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The most expensive convolutions of a recipe's network, for the ceilings."""
    with torch.device("meta"):
        return network_convolutions(branch_forward(ClassConditionalUNet2DModel(**config)))


def measure_recipe(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """Steps and whole images of one recipe, as JSON values."""
    contest = Contest(recipe, options)
    convolutions = recipe_convolutions(recipe_config(recipe, options.small))
    branches = 2 * options.batch_size
    ceilings = Ceilings(options.device, getattr(torch, options.dtype), convolutions, branches, options.small)
    entering = []

    def ours() -> float:
        step, before = contest.pipeline_step_seconds(options.steps)
        entering.append(before)
        return step

    seconds = alternate({OURS: ours, STOCK: contest.stock_step_seconds}, options.repeats)
    whole = alternate(
        {
            name: lambda name=name: seconds_of(
                lambda: contest.generate(name, options.num_inference_steps), options.device
            )
            for name in (OURS, STOCK)
        },
        options.image_repeats,
        warmup=0,
    )
    ceilings.measure()
    return {
        "step_seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio_to_ours": ratios_to(OURS, seconds),
        # the first round, whose measurements do not count, has one too
        "once_per_call_seconds": spread(entering[1:]),
        "gflop_per_step": {name: rounded(flops / 1e9) for name, flops in contest.flops.items()},
        "ceilings": ceilings.figures(),
        "share_of_ceiling": {
            name: ceilings.share(contest.flops[name], statistics.median(values)) for name, values in seconds.items()
        },
        "image": {
            "num_inference_steps": options.num_inference_steps,
            "seconds_per_image": {
                name: spread(value / options.batch_size for value in values) for name, values in whole.items()
            },
            "ratio_to_ours": ratios_to(OURS, whole),
        },
        "stock": {key: contest.stock_config[key] for key in ("block_out_channels", "layers_per_block")},
    }


def print_recipe(recipe: str, figures: dict[str, Any]) -> None:
    """The tables of one recipe."""
    print(f"\n{recipe:32} {'s a step':>9} {'GFLOP':>9} {'of ceiling':>11} {'times as long as ours':>26}")
    for name, step in figures["step_seconds"].items():
        ratio = figures["ratio_to_ours"].get(name)
        share = figures["share_of_ceiling"][name]
        print(
            f"  {name:30} {step['median']:9.3g} {figures['gflop_per_step'][name]:9.4g} {100 * share:9.1f} %"
            f" {words_of(ratio) if ratio else '':>26}"
        )
    print(f"  the pipeline's first step takes {figures['once_per_call_seconds']['median']:.3g} s more")
    image = figures["image"]
    for name, seconds in image["seconds_per_image"].items():
        ratio = image["ratio_to_ours"].get(name)
        words = f"{image['num_inference_steps']} steps, {seconds['median']:.3g} s an image"
        print(f"  {name:30} {words:31} {words_of(ratio) if ratio else '':>26}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="+", default=RECIPES, help=f"recipes (default: {' '.join(RECIPES)})")
    parser.add_argument("--batch_size", type=int, default=1, help="images, each in two branches (default: 1)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--repeats", type=int, help="rounds of steps (default: 9)")
    parser.add_argument("--steps", type=int, default=2, help="steps that count in each call of the pipeline")
    parser.add_argument("--image_repeats", type=int, help="rounds of whole images (default: 3)")
    parser.add_argument("--num_inference_steps", type=int, help="of whole images (default: 10)")
    add_options(parser, device=True)
    options = parser.parse_args()
    choose_sizes(options, repeats=(9, 2), image_repeats=(3, 1), num_inference_steps=(10, 2))

    recipes = {}
    for recipe in options.config:
        recipes[recipe] = measure_recipe(recipe, options)
        print_recipe(recipe, recipes[recipe])
    figures = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "rounds": options.repeats,
        "guidance_scale": GUIDANCE_SCALE,
        "recipes": recipes,
    }
    chosen = "" if options.config == RECIPES else "-" + "-".join(name.replace("/", "_") for name in options.config)
    name = f"sampling-{options.dtype}-batch{options.batch_size}{chosen}"
    write_result(name, figures, ("diffusers", "torch"), results_dir(options), options.device)


if __name__ == "__main__":
    main()
