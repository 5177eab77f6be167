"""How long it takes until the first step: importing, loading, sampling.

In fresh processes and in turn: one imports our pipeline, loads a full-size one with random weights from
safetensors and takes its first step; one imports diffusers' DiffusionPipeline alone; one only reads the file
of the weights. The files are in the page cache. Ratios compare between machines, times do not. Prints a table
and writes benchmarks/results/startup-<processor>.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from networks import make_pipeline, recipe_config
from report import add_options, choose_sizes, results_dir, write_result
from timing import ratios_to, spread


OURS = """
import json, sys, time
moments = [time.perf_counter()]
from imagenet64_diffusion import ClassConditionalPipeline
moments.append(time.perf_counter())
pipeline = ClassConditionalPipeline.from_pretrained(sys.argv[1])
if sys.argv[2] != "cpu":
    pipeline.to(sys.argv[2])
moments.append(time.perf_counter())
pipeline.set_progress_bar_config(disable=True)
for _ in range(2):
    # whose result is on the CPU
    pipeline(0, num_inference_steps=1, output_type="np")
    moments.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(moments, moments[1:])]))
"""
DIFFUSERS = """
import json, time
begin = time.perf_counter()
from diffusers import DiffusionPipeline
print(json.dumps([time.perf_counter() - begin]))
"""
READING = """
import json, pathlib, sys, time
begin = time.perf_counter()
pathlib.Path(sys.argv[1]).read_bytes()
print(json.dumps([time.perf_counter() - begin]))
"""


def run(program: str, *arguments: str | Path) -> list[float]:
    """The seconds that a program tells, in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with tempfile.TemporaryDirectory() as elsewhere:
        output = subprocess.run(
            command,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=elsewhere,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ).stdout
    return json.loads(output.splitlines()[-1])


def measure(folder: Path, device: str, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds of each part in each round."""
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    seconds: dict[str, list[float]] = {
        name: [] for name in ("import", "import diffusers", "load", "read the file", "first step", "second step")
    }
    for number in range(-warmup, rounds):
        found = {}

        def ours(found: dict[str, float] = found) -> None:
            parts = run(OURS, folder, device)
            found.update(zip(("import", "load", "first step", "second step"), parts, strict=True))

        def others(found: dict[str, float] = found) -> None:
            [found["import diffusers"]] = run(DIFFUSERS)
            [found["read the file"]] = run(READING, weights)

        for take in (ours, others) if number % 2 else (others, ours):
            take()
        if number >= 0:
            for name, value in found.items():
                seconds[name].append(value)
    return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="res_res", help="recipe (default: res_res)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 9)")
    add_options(parser, device=True)
    options = parser.parse_args()
    choose_sizes(options, repeats=(9, 1))

    with tempfile.TemporaryDirectory() as name:
        pipeline = make_pipeline(recipe_config(options.config, options.small))
        pipeline.save_pretrained(name)
        file_bytes = (Path(name) / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
        del pipeline
        seconds = measure(Path(name), options.device, options.repeats, warmup=0 if options.small else 1)

    ratios = {
        "import": ratios_to("import diffusers", seconds)["import"],
        "load": ratios_to("read the file", seconds)["load"],
        "first step": ratios_to("second step", seconds)["first step"],
    }
    print(f"{options.config}, {file_bytes / 1e6:.0f} MB of weights; seconds (median of {options.repeats})")
    for part, values in seconds.items():
        print(f"  {part:18} {spread(values)['median']:9.3g}")
    for part, other in (("import", "import diffusers"), ("load", "read the file"), ("first step", "second step")):
        low, high = ratios[part]["quartiles"]
        print(f"  {part} / {other}: {ratios[part]['median']:.3f} (quartiles {low:.3f} to {high:.3f})")
    result = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "recipe": options.config,
        "file_bytes": file_bytes,
        "rounds": options.repeats,
        "seconds": {part: spread(values) for part, values in seconds.items()},
        "ratios": {
            "import to import diffusers": ratios["import"],
            "load to read the file": ratios["load"],
            "first step to second step": ratios["first step"],
        },
    }
    write_result("startup", result, ("diffusers", "safetensors", "torch"), results_dir(options), options.device)


if __name__ == "__main__":
    main()
