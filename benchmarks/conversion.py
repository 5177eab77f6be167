"""How long the conversion of a checkpoint of the largest original recipe takes, and how much memory: the peak resident
set, with the mapped pages of the file."""

import os
import tempfile
from pathlib import Path

import torch
from networks import make_pipeline, recipe_config
from performance_page import publish
from report import call_command, in_own_process, parse_options, resident_bytes, seconds_of

import imagenet64_diffusion.conversion.converting  # noqa: F401, so that no import is measured
from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint


def convert(threads: int, files: dict[str, Path]) -> tuple[float, int, int]:
    """Converts; returns the seconds, and the peak memory before and after."""
    torch.set_num_threads(threads)
    before = resident_bytes("VmHWM")
    return seconds_of(lambda: convert_checkpoint(**files)), before, resident_bytes("VmHWM")


def load(threads: int, folder: Path) -> float:
    """Loads the pipeline and takes a step; returns the seconds."""

    def use() -> None:
        pipeline = ClassConditionalPipeline.from_pretrained(folder)
        if not pipeline(0, num_inference_steps=1, output_type="pt").images.isfinite().all():
            raise ValueError("the converted pipeline gives values that are not finite")

    torch.set_num_threads(threads)
    return seconds_of(use)


def main() -> None:
    options = parse_options(__doc__, threads=("threads of torch", os.cpu_count()))
    with tempfile.TemporaryDirectory() as name:
        folder, original = Path(name), Path(name) / "original"
        make_pipeline(recipe_config("original/res_res_atn", options.small)).save_pretrained(folder / "pipeline")
        words = ("--checkpoint", folder / "pipeline", "--output_dir", original, "--epoch", 469, "--step", 600_000)
        call_command("convert_checkpoints", "--to_original", *words)
        (model,), (params,) = original.glob("*.pkl"), original.glob("*.json")
        file_bytes, files = model.stat().st_size, {"checkpoint": model, "params": params, "output_dir": folder / "out"}
        seconds, before, peak = in_own_process(convert, options.threads, files)
        loading = in_own_process(load, options.threads, folder / "out")
    figures = {
        "checkpoint, MB": file_bytes / 1e6,
        "conversion with its checks, s": seconds,
        "peak memory, times the file": peak / file_bytes,
        "above that of the imports, times the file": (peak - before) / file_bytes,
        "loading the folder and one step, s": loading,
    }
    torch.set_num_threads(options.threads)
    publish("conversion", options, [("", {"measured": figures})], ("safetensors",))


if __name__ == "__main__":
    main()
