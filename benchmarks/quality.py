"""What each correction of the original's design is worth, with the same number of steps and the same computing time.

Trains small networks on digits, and has a fixed classifier read what they generate. A second call resumes:

    python benchmarks/quality.py --data outputs/demo/data --output_dir outputs/quality
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from networks import make_inputs, recipe_config
from performance_page import table
from report import DIGITS_DATA, DIGITS_PROTOCOL, ROOT, alternate_seconds, parse_options, ratios_to, write_result

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.pipelines.image_grid import image_grid, to_image
from imagenet64_diffusion.utils.chart_style import BLUE, ORANGE, finish_axes, save_figure


PAGE = ROOT / "docs" / "corrections.md"
MARKS = "<!-- table of benchmarks/quality.py -->\n", "<!-- end of the table -->\n"
UNET_OPTIONS = ("time_embedding_type", "class_attention_type", "output_head_type")
COSINE = "squaredcos_cap_v2"
ORIGINAL = {
    "time_embedding_type": "original_interleaved",
    "class_attention_type": "identity",
    "output_head_type": "original",
    "prediction_type": "epsilon",
    "beta_schedule": "original_cosine",
    "use_ema": False,
}
CORRECTIONS = {
    "+ EMA": {"use_ema": True},
    "+ sinusoidal time encoding": {"time_embedding_type": "sinusoidal"},
    "+ class attention that attends": {"class_attention_type": "channel"},
    "+ convolutional head": {"output_head_type": "conv"},
    "+ velocity, unclamped cosine (default)": {"prediction_type": "v_prediction", "beta_schedule": COSINE},
}
CHANGES = {
    "default, no EMA": {"use_ema": False},
    "default, original time encoding": {"time_embedding_type": "original_interleaved"},
    "default, class attention that does not": {"class_attention_type": "identity"},
    "default, original head": {"output_head_type": "original"},
    "default, clamped cosine": {"beta_schedule": "original_cosine"},
    "default, importance sampling": {"timestep_sampling": "importance"},
    "default, min-SNR 5": {"snr_gamma": 5},
}
METRICS = ("class_accuracy", "fid", "precision", "recall")
# the original, the corrections one after the other, the default without one each, two options: name -> options
VARIANTS: dict[str, dict[str, Any]] = {"as the original has it": ORIGINAL}
for _name, _correction in CORRECTIONS.items():
    VARIANTS[_name] = {**list(VARIANTS.values())[-1], **_correction}
VARIANTS |= {name: {**ORIGINAL, **VARIANTS[_name], **change} for name, change in CHANGES.items()}
NETWORK = {"stem_channels": 8, "block_out_channels": (16, 32)}
TRAINING = {"train_batch_size": 64, "learning_rate": 5e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50}
TRAINING |= {"checkpointing_steps": 0, "num_sample_classes": 1, "num_samples_per_class": 1, "num_inference_steps": 2}


def run(script: str, *words: Any, **options: Any) -> None:
    """Runs a command of the project on one thread."""
    for name, value in options.items():
        words += (f"--{name}", *(value if isinstance(value, tuple) else (value,)))
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, check=True)


def relative_costs(variants: dict[str, dict[str, Any]], rounds: int = 15) -> dict[str, float]:
    """Seconds of a training step of each variant's network, over those of the last one's."""
    config = recipe_config("demo") | NETWORK
    sample, _, timesteps, labels = make_inputs(config, TRAINING["train_batch_size"], "cpu")
    kinds = {name: tuple(options[key] for key in UNET_OPTIONS) for name, options in variants.items()}

    def step(unet: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        unet(sample, timesteps, labels).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = {}
    for kind in set(kinds.values()):
        unet = ClassConditionalUNet2DModel(**{**config, **dict(zip(UNET_OPTIONS, kind, strict=True))})
        steps[kind] = partial(step, unet, torch.optim.AdamW(unet.parameters(), fused=True))
    last = list(kinds.values())[-1]
    ratios = {last: {"median": 1.0}, **ratios_to(last, alternate_seconds(steps, rounds))}
    return {name: ratios[kind]["median"] for name, kind in kinds.items()}


def train_and_evaluate(options: argparse.Namespace, name: str, seed: int, steps: int) -> dict[str, Any]:
    """The scores of a variant after so many steps."""
    slug = "".join(character if character.isalnum() else "_" for character in name)
    folder = options.output_dir / f"{slug}_seed{seed}_{steps}"
    model, evaluated, scores = folder / "model", folder / "evaluated", folder / "evaluated" / "scores.json"
    if not (model / "model_index.json").is_file():
        paths = {"train_data_dir": options.data, "output_dir": folder, "report_to": "none"}
        fixed = {"model_config_name_or_path": "demo", **NETWORK, **TRAINING, "max_train_steps": steps, "seed": seed}
        run("train_imagenet64.py", **paths, **fixed, **VARIANTS[name])
    if not scores.is_file():
        sampling = {"num_images": options.num_images, "num_inference_steps": options.num_inference_steps}
        words = ("model", *DIGITS_PROTOCOL, "--keep_images", "npz", "--batch_size", 100)
        run("evaluate_models.py", *words, model=model, output_dir=evaluated, **sampling)
        run("evaluate_models.py", "score", reference=options.output_dir / "reference", model=evaluated)
    metrics = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    return {**{metric: metrics[metric] for metric in METRICS}, "steps": steps, "folder": folder.name}


def evaluate_all(options: argparse.Namespace, variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of every variant with both budgets, for each seed."""
    # of the networks alone: the pace of the commands changes with whatever else the machine does
    costs = relative_costs(variants)
    # to tenths of the steps, so that networks of about the same cost are not trained twice
    unit, seconds = max(1, options.steps // 10), options.steps * statistics.median(costs.values())
    budgets = {
        "same_steps": dict.fromkeys(variants, options.steps),
        "same_seconds": {name: unit * max(1, round(seconds / cost / unit)) for name, cost in costs.items()},
    }
    found = [{"variant": name, "options": variants[name], "relative_cost": cost} for name, cost in costs.items()]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for budget, steps in budgets.items():
            tasks = list(itertools.product(variants, options.seeds))
            scores = pool.map(lambda task, steps=steps: train_and_evaluate(options, *task, steps[task[0]]), tasks)
            for entry in found:
                entry[budget] = list(itertools.islice(scores, len(options.seeds)))
                print(f"{budget}, {entry['variant']}: {entry[budget]}", flush=True)
    return found


def make_table(results: list[dict[str, Any]]) -> str:
    """The figures of every variant in Markdown: means over the seeds, and their range for FID."""

    def figures(words: str, metric: str, budget: str = "same_steps") -> dict[str, str]:
        values = {result["variant"]: [run[metric] for run in result[budget]] for result in results}
        return {name: words.format(statistics.mean(each), min(each), max(each)) for name, each in values.items()}

    with_range = "{:.2f} ({:.2f} to {:.2f})"
    columns = {
        "class accuracy": figures("{:.3f}", "class_accuracy"),
        "FID": figures(with_range, "fid"),
        "precision": figures("{:.3f}", "precision"),
        "recall": figures("{:.3f}", "recall"),
        "cost of a step": {result["variant"]: f"{result['relative_cost']:.2f}" for result in results},
        "FID, same time": figures(with_range, "fid", "same_seconds"),
    }
    return table("", columns) + "\n"


def plot_samples(results: list[dict[str, Any]], folder: Path, file: Path, count: int = 20) -> None:
    """The first digits of each model of the first seed, a row for each."""
    images = []
    for result in results:
        with np.load(folder / result["same_steps"][0]["folder"] / "evaluated" / "images.npz") as arrays:
            images += map(to_image, arrays["arr_0"][:count])
    captions = [result["variant"].removesuffix(" (default)") for result in results for _ in range(count)]
    image_grid(images, captions, count).save(file, optimize=True)


def plot_bars(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of class accuracy and FID with both budgets; a dot for each seed."""
    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    budgets = (("same_steps", BLUE, "same number of steps"), ("same_seconds", ORANGE, "same time"))
    metrics = {"class_accuracy": "class accuracy", "fid": "FID in the classifier's features"}
    for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
        for offset, (budget, colour, label) in enumerate(budgets):
            values = np.array([[run[metric] for run in result[budget]] for result in results])
            places = np.arange(len(results)) + 0.36 * (offset - 0.5)
            axes.barh(places, values.mean(1), 0.34, color=colour, label=label)
            axes.plot(values, places, ".", color="black", markersize=5)
        finish_axes(axes, "", None)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(title, fontsize=12)
    panels[0].set_yticks(range(len(results)), [result["variant"] for result in results])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, file)


def main() -> None:
    options = parse_options(
        __doc__,
        steps=("optimizer steps of each training", 200, 2),
        num_images=("digits of each model", 500, 20),
        num_inference_steps=("DDIM steps", 20, 2),
        data=DIGITS_DATA,
        output_dir=("models and evaluations", ROOT / "outputs" / "quality"),
        seeds={"type": int, "nargs": "+", "default": [0, 1]},
        jobs=("trainings at a time, one thread each", os.cpu_count()),
    )
    words = ("--source", options.data, "--output_dir", options.output_dir / "reference")
    run("evaluate_models.py", "reference", *words, *DIGITS_PROTOCOL)
    variants = dict(list(VARIANTS.items())[:: len(VARIANTS) - 1]) if options.small else VARIANTS
    results = evaluate_all(options, variants)
    settings = {name: getattr(options, name) for name in ("steps", "num_images", "num_inference_steps", "seeds")}
    write_result("quality", options, settings=settings, results=results)
    print(make_table(results))
    images = options.results_dir if options.small else ROOT / "docs" / "images"
    plot_bars(results, images / "quality.png")
    plot_samples(results, options.output_dir, images / "quality_samples.png")
    if not options.small:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text(before + make_table(results).join(MARKS) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
