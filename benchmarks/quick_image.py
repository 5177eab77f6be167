"""What the quick setting saves: one guided image by it, and one as the original program draws it.

The quick setting (docs/performance.md, "Fewer steps") needs few evaluations of the network, and ours takes less time
for each. Drawn in turn: ours with UniPC and several numbers of steps, guided throughout or for a part of the steps;
and the plain composition of the same layers (benchmarks/plain_unet.py) with deterministic DDIM and 100 steps. Weights
are random, which changes no time; that the images are as good is measured by benchmarks/samplers.py. Prints a table
and writes benchmarks/results/quick_image-<recipe>-<processor>.json.
"""

import argparse
from typing import Any

import torch
from report import add_options, choose_sizes, results_dir, write_result
from sampling import GUIDANCE_SCALE, PLAIN, Contest
from timing import alternate, seconds_of, spread, words_of

from imagenet64_diffusion.pipelines.loading import swap_scheduler


SCHEDULER = "UniPCMultistep"
# fractions of the steps that are guided, from the noisy end -> what the table calls it
INTERVALS = {
    (0.0, 1.0): "guided throughout",
    (0.0, 0.75): "first three quarters guided",
    (0.0, 0.5): "first half guided",
}


def draw_quickly(contest: Contest, num_inference_steps: int, interval: tuple[float, float]) -> None:
    """One image by ours."""
    contest.pipeline(
        contest.labels,
        guidance_scale=GUIDANCE_SCALE,
        guidance_interval=interval,
        num_inference_steps=num_inference_steps,
        latents=contest.noise,
        output_type="pt",
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way, and the ratios, as JSON values."""
    contest = Contest(options.config, options)
    swap_scheduler(contest.pipeline, SCHEDULER)
    plain = f"{PLAIN}, DDIM, {options.plain_steps} steps"
    ways = {plain: lambda: seconds_of(lambda: contest.draw(PLAIN, options.plain_steps), options.device)}
    for steps in options.steps:
        for interval, words in INTERVALS.items():

            def quickly(steps: int = steps, interval: tuple[float, float] = interval) -> float:
                return seconds_of(lambda: draw_quickly(contest, steps, interval), options.device)

            ways[f"ours, UniPC, {steps} steps, {words}"] = quickly
    # a single round after one quick image, which warms up what starts slowly
    draw_quickly(contest, options.steps[0], (0.0, 1.0))
    seconds = alternate(ways, options.repeats, warmup=0)
    faster = {name: [long / own for long, own in zip(seconds[plain], seconds[name], strict=True)] for name in seconds}
    return {
        "seconds_per_image": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": {name: spread(values) for name, values in faster.items() if name != plain},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="res_res", help="recipe (default: res_res)")
    parser.add_argument("--steps", type=int, nargs="+", help="of ours (default: 6 8 10)")
    parser.add_argument("--plain_steps", type=int, help="of the plain layers (default: 100)")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (default: 1, of minutes)")
    add_options(parser, device=True)
    options = parser.parse_args()
    choose_sizes(options, steps=([6, 8, 10], [2]), plain_steps=(100, 4))
    options.batch_size, options.dtype = 1, "float32"
    figures = measure(options)
    for name, seconds in figures["seconds_per_image"].items():
        ratio = figures["times_as_fast"].get(name)
        print(f"  {name:56} {seconds['median']:9.3g} s {f'{words_of(ratio)} times as fast' if ratio else ''}")
    result = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "recipe": options.config,
        "rounds": options.repeats,
        "guidance_scale": GUIDANCE_SCALE,
        **figures,
    }
    name = f"quick_image-{options.config.replace('/', '_')}"
    write_result(name, result, ("diffusers", "torch"), results_dir(options), options.device)


if __name__ == "__main__":
    main()
