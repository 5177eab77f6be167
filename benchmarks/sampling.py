"""What a guided denoising step costs, ours against two others, and whole images.

In one process and in turn: our network as the pipeline calls it, the same network called by a plain loop, the
plain composition of its layers (benchmarks/plain_unet.py), and diffusers' own U-Net with as many operations
(benchmarks/stock_unet.py). A step is both branches of guidance and what the scheduler does with them. All
weights are random, which changes no time. Beside the times stand the operations, and the share of the matrix
products that the machine can do in the same time. Ratios compare between machines, times do not. Prints
tables and writes benchmarks/results/sampling-<dtype>-batch<size>-<processor>.json, with the recipes in its
name if they are chosen.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from ceilings import Ceilings
from flops import count_flops
from networks import is_original, make_pipeline, make_scheduler, recipe_config
from plain_unet import PlainUNet
from plain_unet import guided_prediction as plain_prediction
from report import add_options, choose_sizes, results_dir, write_result
from stock_unet import TOLERANCE, count_stock_flops, make_stock_scheduler, make_stock_unet, matching_config
from stock_unet import guided_prediction as stock_prediction
from timing import alternate, ratios_to, rounded, seconds_of, spread, synchronize, words_of

from imagenet64_diffusion import ClassConditionalUNet2DModel


RECIPES = ["res_res", "res_res_atn", "original/res_res", "original/res_res_atn"]
GUIDANCE_SCALE = 5.0
OURS, BARE, PLAIN, STOCK = "ours", "ours, by a loop of one's own", "plain layers", "stock diffusers"


class Contest:
    """The networks of one recipe, and how each of them draws.

    Args:
        recipe: Its name.
        options: Of the command line.
    """

    def __init__(self, recipe: str, options: argparse.Namespace):
        self.device, self.batch_size = options.device, options.batch_size
        config = recipe_config(recipe, options.small)
        dtype = getattr(torch, options.dtype)

        self.pipeline = make_pipeline(config).to(self.device)
        if dtype != torch.float32:
            self.pipeline.to(dtype)
        unet = self.pipeline.unet
        self.plain = PlainUNet(unet).eval()
        with torch.device("meta"):
            flops = count_branch_flops(ClassConditionalUNet2DModel(**config))
            plain_flops = count_branch_flops(PlainUNet(ClassConditionalUNet2DModel(**config)))
        self.stock_config = matching_config(config, flops)
        stock_flops = count_stock_flops(self.stock_config)
        if abs(stock_flops / flops - 1) > TOLERANCE and not options.small:
            raise ValueError(f"no stock network has as many operations as {recipe}: {stock_flops:g} and {flops:g}")
        self.stock = make_stock_unet(self.stock_config).to(self.device)
        if dtype != torch.float32:
            self.stock.to(dtype=dtype)
        # of a step, whatever the scheduler does: it multiplies no matrices
        branches = 2 * self.batch_size
        self.flops = {OURS: branches * flops, BARE: branches * flops}
        self.flops |= {PLAIN: branches * plain_flops, STOCK: branches * stock_flops}

        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, config["in_channels"], config["sample_size"], config["sample_size"])
        self.noise = torch.randn(shape, generator=generator).to(self.device)
        self.labels = torch.arange(self.batch_size, device=self.device) % config["num_class_embeds"]
        guides_variance = is_original(config)
        self.predict: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            BARE: lambda sample, t: doubled_prediction(unet, sample, t, self.labels, guides_variance),
            PLAIN: lambda sample, t: plain_prediction(
                self.plain, sample, t, self.labels, GUIDANCE_SCALE, guides_variance
            ),
            STOCK: lambda sample, t: stock_prediction(self.stock, sample, t, self.labels, GUIDANCE_SCALE),
        }
        self.schedulers = {name: make_scheduler(config) for name in (BARE, PLAIN)} | {STOCK: make_stock_scheduler()}

    def relative_difference(self) -> float:
        """How far ours and the plain prediction are apart, as a share of the largest value."""
        timestep = torch.tensor(500, device=self.device)
        ours, plain = (self.predict[name](self.noise, timestep) for name in (BARE, PLAIN))
        return float((ours - plain).abs().max() / plain.abs().max())

    def draw(self, name: str, num_inference_steps: int) -> torch.Tensor:
        """Whole images in [0, 1], (images, channels, height, width)."""
        if name == OURS:
            return self._call_pipeline(num_inference_steps, output_type="pt")
        scheduler, latents = self.schedulers[name], self.noise
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        for timestep in scheduler.timesteps:
            latents = scheduler.step(self.predict[name](latents, timestep), timestep, latents).prev_sample
        return (latents / 2 + 0.5).clamp(0, 1)

    def step_seconds(self, name: str) -> float:
        """Of one step of a loop."""
        scheduler = self.schedulers[name]
        scheduler.set_timesteps(10, device=self.device)
        timestep = scheduler.timesteps[5]
        return seconds_of(
            lambda: scheduler.step(self.predict[name](self.noise, timestep), timestep, self.noise), self.device
        )

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


def count_branch_flops(unet: torch.nn.Module) -> int:
    """FLOPs of a forward pass for one image, of a network on the meta device."""
    size = unet.config.sample_size
    sample = torch.empty(1, unet.config.in_channels, size, size, device="meta")
    timestep = labels = torch.zeros(1, dtype=torch.long, device="meta")
    return count_flops(lambda: unet(sample, timestep, labels))


@torch.no_grad()
def doubled_prediction(
    unet: ClassConditionalUNet2DModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    labels: torch.Tensor,
    guide_variance: bool,
) -> torch.Tensor:
    """The guided prediction of ours as a loop of one's own would have it: both branches in one batch."""
    both = torch.cat([torch.full_like(labels, unet.config.num_class_embeds), labels])
    output = unet(sample.to(unet.dtype).repeat(2, 1, 1, 1), timestep, both).sample.to(sample.dtype)
    null, conditional = output.chunk(2)
    guided = torch.lerp(null, conditional, GUIDANCE_SCALE)
    channels = sample.shape[1]
    return guided if guide_variance else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def measure_recipe(recipe: str, options: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    """Steps and whole images of one recipe, as JSON values."""
    contest = Contest(recipe, options)
    difference = contest.relative_difference()
    if options.dtype == "float32" and not difference < 1e-3:
        raise ValueError(f"{recipe}: ours and the plain layers are {difference:.1e} apart: not the same work")

    entering = []

    def ours() -> float:
        step, before = contest.pipeline_step_seconds(options.steps)
        entering.append(before)
        return step

    others = {name: lambda name=name: contest.step_seconds(name) for name in (BARE, PLAIN, STOCK)}
    seconds = alternate({OURS: ours, **others}, options.repeats)
    whole = alternate(
        {
            name: lambda name=name: seconds_of(lambda: contest.draw(name, options.num_inference_steps), options.device)
            for name in (OURS, PLAIN, STOCK)
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
        "share_of_matrix_products": {
            name: ceilings.share(contest.flops[name], statistics.median(values)) for name, values in seconds.items()
        },
        "image": {
            "num_inference_steps": options.num_inference_steps,
            "seconds_per_image": {
                name: spread(value / options.batch_size for value in values) for name, values in whole.items()
            },
            "ratio_to_ours": ratios_to(OURS, whole),
        },
        "relative_difference_to_plain": rounded(difference, 2),
        "stock": {key: contest.stock_config[key] for key in ("block_out_channels", "layers_per_block")},
    }


def print_recipe(recipe: str, figures: dict[str, Any]) -> None:
    """The tables of one recipe."""
    print(f"\n{recipe:32} {'s a step':>9} {'GFLOP':>9} {'of ceiling':>11} {'times as long as ours':>26}")
    for name, step in figures["step_seconds"].items():
        ratio = figures["ratio_to_ours"].get(name)
        share = figures["share_of_matrix_products"][name]
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

    ceilings = Ceilings(options.device, getattr(torch, options.dtype), options.small)
    recipes = {}
    for recipe in options.config:
        recipes[recipe] = measure_recipe(recipe, options, ceilings)
        print_recipe(recipe, recipes[recipe])
    found = ceilings.figures()
    print(f"\nmatrix products: {max(found['matrix_product_gflops']):,.4g} GFLOP/s;", end=" ")
    print(f"copying: {max(found['copy_gbytes_per_second']):,.4g} GB/s")
    figures = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "rounds": options.repeats,
        "guidance_scale": GUIDANCE_SCALE,
        "ceilings": found,
        "recipes": recipes,
    }
    chosen = "" if options.config == RECIPES else "-" + "-".join(name.replace("/", "_") for name in options.config)
    name = f"sampling-{options.dtype}-batch{options.batch_size}{chosen}"
    write_result(name, figures, ("diffusers", "torch"), results_dir(options), options.device)


if __name__ == "__main__":
    main()
