"""A guided denoising step and whole images: our pipeline against a stock diffusers U-Net of as many operations."""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import networks
import torch
from diffusers import DDIMScheduler, UNet2DModel
from networks import OURS, STOCK
from performance_page import cell, publish
from report import DEVICE, alternate, alternate_seconds, parse_options, ratios_to, spread, timer

from imagenet64_diffusion import ClassConditionalUNet2DModel


RECIPES = ["res_res", "res_res_atn", "original/res_res", "original/res_res_atn"]
GUIDANCE_SCALE = 5.0


def stock_sampler(
    config: dict[str, Any], latents: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Callable[..., torch.Tensor]:
    """A loop around diffusers' network as their pipelines have it, with both branches of guidance in one batch."""
    unet = networks.make_unet(UNet2DModel, config).to(latents.device, dtype)
    scheduler = DDIMScheduler(**networks.COSINE)
    both = torch.cat([torch.full_like(labels, config["num_class_embeds"] - 1), labels])

    @torch.no_grad()
    def generate(num_inference_steps: int, callback_on_step_end: Callable[..., Any] = lambda: None) -> torch.Tensor:
        sample = latents
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        for timestep in scheduler.timesteps:
            output = unet(torch.cat([sample] * 2).to(dtype), timestep, both, return_dict=False)[0]
            null, conditional = output.to(sample.dtype).chunk(2)
            prediction = null + GUIDANCE_SCALE * (conditional - null)
            sample = scheduler.step(prediction, timestep, sample).prev_sample
            callback_on_step_end()
        return (sample / 2 + 0.5).clamp(0, 1)

    return generate


def step_seconds(generate: Callable[..., Any], steps: int) -> tuple[float, float]:
    """Seconds of a step of a loop, the median of some, and what its first step takes more."""
    moments = [timer()]
    note = lambda *_: moments.append(timer()) or {}  # noqa: E731
    generate(num_inference_steps=1 + steps, callback_on_step_end=note)
    first, *others = (after - before for before, after in itertools.pairwise(moments))
    return statistics.median(others), first - statistics.median(others)


def measure_recipe(recipe: str, options: argparse.Namespace) -> list[Any]:
    """Steps and whole images of one recipe, as blocks of the page."""
    config, dtype = networks.recipe_config(recipe, options.small), getattr(torch, options.dtype)
    flops = networks.network_flops(ClassConditionalUNet2DModel, config)
    stock = networks.stock_config(config, flops)
    stock_flops = networks.network_flops(UNet2DModel, stock)
    if abs(stock_flops / flops - 1) > networks.TOLERANCE and not options.small:
        raise ValueError(f"no stock network has as many operations as {recipe}: {stock_flops:g} and {flops:g}")
    branches = 2 * options.batch_size
    step_flops = {OURS: branches * flops, STOCK: branches * stock_flops}

    latents, *_, labels = networks.make_inputs(config, options.batch_size, options.device)
    pipeline = networks.make_pipeline(config).to(options.device, dtype)
    call = {"class_labels": labels, "guidance_scale": GUIDANCE_SCALE, "latents": latents, "output_type": "pt"}
    loops = {OURS: partial(pipeline, **call), STOCK: stock_sampler(stock, latents, labels, dtype)}
    measures = {name: partial(step_seconds, loop, options.steps) for name, loop in loops.items()}
    steps = alternate(measures, options.repeats)
    seconds = {name: [step for step, _ in values] for name, values in steps.items()}
    count = options.num_inference_steps
    images = {name: partial(loop, num_inference_steps=count) for name, loop in loops.items()}
    whole = alternate_seconds(images, options.image_repeats, warmup=0)
    kernels = networks.kernels(config, options.device, dtype, branches, options.small)
    columns, ceiling = networks.compare(seconds, step_flops, kernels, options.small)
    columns = {
        "seconds per step": {name: spread(values) for name, values in seconds.items()},
        "GFLOP": {name: flops / 1e9 for name, flops in step_flops.items()},
        **columns,
        f"seconds per image of {count} steps": {
            name: spread(value / options.batch_size for value in values) for name, values in whole.items()
        },
        "relative time per image": ratios_to(OURS, whole),
    }
    once = cell(statistics.median(more for _, more in steps[OURS]))
    text = (
        f"Our first step of a call takes {once} s more. Stock diffusers is a `UNet2DModel` of as many operations,"
        f" widths {stock['block_out_channels']} with {stock['layers_per_block']} layers per block. {ceiling}"
    )
    return [(f"`{recipe}`", columns), text]


def main() -> None:
    options = parse_options(
        __doc__,
        device=DEVICE,
        repeats=("rounds of steps", 9, 2),
        image_repeats=("rounds of whole images", 3, 1),
        num_inference_steps=("steps of whole images", 10, 2),
        steps=("steps that count in each call of the pipeline", 2),
        batch_size=("images, each in two branches", 1),
        config={"nargs": "+", "default": RECIPES, "help": f"recipes (default: {' '.join(RECIPES)})"},
        dtype={"choices": ["float32", "bfloat16", "float16"], "default": "float32"},
    )
    blocks: list[Any] = [
        f"Guided steps in {options.dtype}, batches of {options.batch_size}: both branches and the scheduler."
        f" {options.repeats} rounds."
    ]
    for recipe in options.config:
        blocks += measure_recipe(recipe, options)
    chosen = "" if options.config == RECIPES else "-" + "-".join(name.replace("/", "_") for name in options.config)
    publish(f"sampling-{options.dtype}-batch{options.batch_size}{chosen}", options, blocks)


if __name__ == "__main__":
    main()
