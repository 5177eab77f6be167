"""How long it takes until the first step: importing, loading, sampling; beside new processes that only import
DiffusionPipeline, or read the file of the weights."""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from networks import make_pipeline, recipe_config
from performance_page import publish
from report import DEVICE, alternate, parse_options, ratios_to, spread


PROGRAM = """
import json, pathlib, sys, time
moments = [time.perf_counter()]
def done():
    moments.append(time.perf_counter())
{statements}
done()
print(json.dumps([after - before for before, after in zip(moments, moments[1:])]))
"""
OURS = """
from imagenet64_diffusion import ClassConditionalPipeline
done()
pipeline = ClassConditionalPipeline.from_pretrained(sys.argv[1])
if sys.argv[2] != "cpu":
    pipeline.to(sys.argv[2])
done()
pipeline.set_progress_bar_config(disable=True)
pipeline(0, num_inference_steps=1, output_type="np")  # whose result is on the CPU
done()
pipeline(0, num_inference_steps=1, output_type="np")
"""
# what is compared -> with what
COMPARED = {"import": "import diffusers", "load": "read the file", "first step": "second step"}


def run(statements: str, *arguments: str | Path) -> list[float]:
    """The seconds of each part of a program, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(statements=statements), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        output = subprocess.check_output(command, text=True, cwd=elsewhere, env=environment)
    return json.loads(output.splitlines()[-1])


def main() -> None:
    options = parse_options(__doc__, device=DEVICE, repeats=("rounds", 9, 1), config=("recipe", "res_res"))
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(recipe_config(options.config, options.small)).save_pretrained(folder)
        weights = Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"
        file_bytes = weights.stat().st_size
        programs = {
            ("import", "load", "first step", "second step"): partial(run, OURS, folder, options.device),
            ("import diffusers",): partial(run, "from diffusers import DiffusionPipeline"),
            ("read the file",): partial(run, "pathlib.Path(sys.argv[1]).read_bytes()", weights),
        }
        found = alternate(programs, options.repeats, warmup=0 if options.small else 1)
    seconds = {
        part: list(values)
        for parts, rounds in found.items()
        for part, values in zip(parts, zip(*rounds, strict=True), strict=True)
    }
    blocks = [
        f"New processes; `{options.config}`, {file_bytes / 1e6:.0f} MB of weights in the page cache."
        f" {options.repeats} rounds.",
        ("", {"seconds": {part: spread(seconds[part]) for pair in COMPARED.items() for part in pair}}),
        ("", {"ratio": {f"{part} to {other}": ratios_to(other, seconds)[part] for part, other in COMPARED.items()}}),
    ]
    publish("startup", options, blocks, ("safetensors",))


if __name__ == "__main__":
    main()
