"""How long the conversion of a full-size checkpoint takes, and how much memory, as a multiple of its file.

Makes a checkpoint of the largest original recipe, res_res_atn with 213 million parameters, from seeded noise, converts
it in its own process, and in another one loads the folder and takes one denoising step. Memory is the peak resident
set as Linux tells it, with the mapped pages of the file. Writes benchmarks/results/conversion-<processor>.json.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import add_options, results_dir, write_result

from imagenet64_diffusion.conversion.original import original_weight_shapes


PARAMS = {
    "inCh": 3,
    "embCh": 128,
    "chMult": 1,
    "num_blocks": 3,
    "blk_types": ["res", "res", "clsAtn", "atn", "chnAtn"],
    "T": 1000,
    "beta_sched": "cosine",
    "t_dim": 512,
    "c_dim": 512,
    "num_classes": 1000,
    "atn_resolution": 16,
    "epoch": 469,
    "step": 600_000,
}
SMALL = {"embCh": 8, "t_dim": 16, "c_dim": 16}

_MEASURED = """
import json, re, time
from pathlib import Path
import torch
torch.set_num_threads({threads})
from imagenet64_diffusion import ClassConditionalPipeline
import imagenet64_diffusion.conversion.converting
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint

def peak_bytes():
    # not getrusage, whose peak is the parent's at first
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before, begin = peak_bytes(), time.perf_counter()
{statement}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "peak_bytes_before": before, "peak_bytes": peak_bytes()}}))
"""


def write_checkpoint(folder: Path, params: dict[str, Any]) -> tuple[Path, Path]:
    """Writes the model's file and its JSON; the weights are noise of the size that keeps features of order 1."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in original_weight_shapes(params).items():
        scale = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        weights[name] = torch.randn(shape, generator=generator).mul_(scale)
    name = f"{params['epoch']}e_{params['step']}s"
    files = folder / f"model_{name}.pkl", folder / f"model_params_{name}.json"
    torch.save(weights, files[0])
    files[1].write_text(json.dumps(params), encoding="utf-8")
    return files


def measure(statement: str, threads: int) -> dict[str, float]:
    """Runs a statement in a process of its own, after the imports.

    Returns:
        ``seconds`` of the statement, ``peak_bytes`` of the whole process, and ``peak_bytes_before`` the statement.
    """
    finished = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(statement=statement, threads=threads)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch (default: all cores)")
    add_options(parser)
    options = parser.parse_args()
    params = PARAMS | (SMALL if options.small else {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, description = write_checkpoint(folder, params)
        file_size = model.stat().st_size
        out = folder / "out"
        conversion = measure(
            f"convert_checkpoint({str(model)!r}, {str(description)!r}, {str(out)!r})", options.threads
        )
        loading = measure(
            f"pipeline = ClassConditionalPipeline.from_pretrained({str(out)!r})\n"
            "image = pipeline('tabby', num_inference_steps=1, output_type='pt').images\n"
            "assert image.isfinite().all()",
            options.threads,
        )
    above = conversion["peak_bytes"] - conversion["peak_bytes_before"]
    rows = {
        "checkpoint": f"{file_size / 1e6:.0f} MB",
        "conversion, with its checks": f"{conversion['seconds']:.1f} s",
        "peak memory": f"{conversion['peak_bytes'] / file_size:.2f} x the file",
        "above what the imports take": f"{above / file_size:.2f} x the file",
        "loading the folder, one step": f"{loading['seconds']:.1f} s",
    }
    for what, value in rows.items():
        print(f"{what:30} {value:>18}")
    result = {
        "params": params,
        "file_bytes": file_size,
        "threads": options.threads,
        "conversion_seconds": round(conversion["seconds"], 2),
        "peak_bytes": conversion["peak_bytes"],
        "peak_bytes_of_imports": conversion["peak_bytes_before"],
        "peak_ratio_to_file": round(conversion["peak_bytes"] / file_size, 3),
        "peak_ratio_to_file_above_imports": round(above / file_size, 3),
        "load_and_one_step_seconds": round(loading["seconds"], 2),
    }
    write_result("conversion", result, ("diffusers", "safetensors", "torch"), results_dir(options))


if __name__ == "__main__":
    main()
