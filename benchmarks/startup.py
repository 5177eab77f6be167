"""How long it takes until the first step: importing, loading, sampling.

New processes alternate: one imports our pipeline, loads a full-size one with random weights from safetensors and takes
two steps; one imports diffusers' DiffusionPipeline alone; one only reads the file of the weights. The files are in the
page cache. Writes benchmarks/results/startup-<processor>.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from networks import make_pipeline, recipe_config
from performance_page import publish
from report import alternate, parse_options, ratios_to, spread


PROGRAM = """
import json, pathlib, sys, time
moments = [time.perf_counter()]
def done():
    moments.append(time.perf_counter())
{statements}
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
for _ in range(2):
    pipeline(0, num_inference_steps=1, output_type="np")  # whose result is on the CPU
    done()
"""
DIFFUSERS = """
from diffusers import DiffusionPipeline
done()
"""
READING = """
pathlib.Path(sys.argv[1]).read_bytes()
done()
"""
PARTS = ("import", "load", "first step", "second step")
COMPARED = (("import", "import diffusers"), ("load", "read the file"), ("first step", "second step"))


def run(statements: str, *arguments: str | Path) -> list[float]:
    """The seconds of each part of a program, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(statements=statements), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        finished = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=elsewhere, env=environment
        )
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    options = parse_options(
        __doc__,
        device=True,
        repeats=(9, 1, "rounds"),
        config={"default": "res_res", "help": "recipe (default: res_res)"},
    )
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline(recipe_config(options.config, options.small)).save_pretrained(folder)
        weights = Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"
        file_bytes = weights.stat().st_size
        programs = {
            "ours": partial(run, OURS, folder, options.device),
            "import diffusers": partial(run, DIFFUSERS),
            "read the file": partial(run, READING, weights),
        }
        found = alternate(programs, options.repeats, warmup=0 if options.small else 1)
    seconds = {part: [parts[number] for parts in found["ours"]] for number, part in enumerate(PARTS)}
    seconds |= {name: [value for (value,) in found[name]] for name in ("import diffusers", "read the file")}
    figures = {
        "recipe": options.config,
        "file_bytes": file_bytes,
        "rounds": options.repeats,
        "seconds": {part: spread(seconds[part]) for part in dict.fromkeys(part for pair in COMPARED for part in pair)},
        "ratios": {f"{part} to {other}": ratios_to(other, seconds)[part] for part, other in COMPARED},
    }
    publish("startup", figures, options, ["safetensors"])


if __name__ == "__main__":
    main()
