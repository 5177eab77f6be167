"""What each correction of the original's design is worth, measured with the same budget.

Trains a small network on the 5,000 MNIST digits, first as the original program has it and then with one correction
after the other, for the same number of steps and for the same computing time, with two seeds. Every model generates
digits without guidance; a fixed classifier reads them, and FID, precision and recall are computed in its features.
All by train_imagenet64.py and evaluate_models.py. A second call resumes one that was stopped. Writes
benchmarks/results/quality-<processor>.json, a chart, samples of each model, and the table in docs/corrections.md:

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
from report import DIGITS_DATA, DIGITS_PROTOCOL, ROOT, alternate, parse_options, seconds_of, write_result

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.pipelines.image_grid import image_grid, to_image
from imagenet64_diffusion.utils.chart_style import BLUE, ORANGE, finish_axes, save_figure


PAGE = ROOT / "docs" / "corrections.md"
MARKS = "<!-- table of benchmarks/quality.py -->\n", "<!-- end of the table -->\n"
UNET_OPTIONS = ("time_embedding_type", "class_attention_type", "output_head_type")
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
    "+ velocity, unclamped cosine (default)": {
        "prediction_type": "v_prediction",
        "beta_schedule": "squaredcos_cap_v2",
    },
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
# the original, the corrections one after the other, the default without one each, two options: name -> options
VARIANTS: dict[str, dict[str, Any]] = {"as the original has it": ORIGINAL}
for _name, _correction in CORRECTIONS.items():
    VARIANTS[_name] = {**list(VARIANTS.values())[-1], **_correction}
VARIANTS |= {name: {**ORIGINAL, **VARIANTS[_name], **change} for name, change in CHANGES.items()}
NETWORK = {"stem_channels": 8, "block_out_channels": (16, 32)}
TRAINING = {"train_batch_size": 64, "learning_rate": 5e-3, "lr_scheduler": "cosine", "lr_warmup_steps": 50}
TRAINING |= {"checkpointing_steps": 0, "num_sample_classes": 1, "num_samples_per_class": 1, "num_inference_steps": 2}


def run(script: str, *words: Any, **options: Any) -> None:
    """Runs a command of the project on one thread; its output is seen if it fails."""
    for name, value in options.items():
        words += (f"--{name}", *(value if isinstance(value, tuple) else (value,)))
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}: {finished.stderr[-2000:]}")


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
    seconds = alternate({kind: partial(seconds_of, each) for kind, each in steps.items()}, rounds)
    last = seconds[list(kinds.values())[-1]]
    ratios = {kind: [own / other for own, other in zip(each, last, strict=True)] for kind, each in seconds.items()}
    return {name: statistics.median(ratios[kind]) for name, kind in kinds.items()}


def train_and_evaluate(options: argparse.Namespace, name: str, seed: int, steps: int) -> dict[str, Any]:
    """The scores of a variant after so many steps."""
    slug = "".join(character if character.isalnum() else "_" for character in name)
    folder = options.output_dir / f"{slug}_seed{seed}_{steps}"
    model, evaluated = folder / "model", folder / "evaluated"
    if not (model / "model_index.json").is_file():
        paths = {"train_data_dir": options.data, "output_dir": folder, "report_to": "none"}
        fixed = {"model_config_name_or_path": "demo", **NETWORK, **TRAINING, "max_train_steps": steps, "seed": seed}
        run("train_imagenet64.py", **paths, **fixed, **VARIANTS[name])
    scores = evaluated / "scores.json"
    if not scores.is_file():
        sampling = {"num_images": options.num_images, "num_inference_steps": options.num_inference_steps}
        words = ("model", *DIGITS_PROTOCOL, "--keep_images", "npz", "--batch_size", 100)
        run("evaluate_models.py", *words, model=model, output_dir=evaluated, **sampling)
        run("evaluate_models.py", "score", reference=options.output_dir / "reference", model=evaluated)
    found = json.loads(scores.read_text(encoding="utf-8"))["metrics"]
    metrics = {metric: found[metric] for metric in ("class_accuracy", "fid", "precision", "recall")}
    return {**metrics, "steps": steps, "folder": folder.name}


def evaluate_all(options: argparse.Namespace, variants: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures of every variant with both budgets, for each seed."""
    found = {name: {"variant": name, "options": settings} for name, settings in variants.items()}

    def evaluate(budget: str, steps: dict[str, int]) -> None:
        tasks = list(itertools.product(variants, options.seeds))
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            results = pool.map(lambda task: train_and_evaluate(options, *task, steps[task[0]]), tasks)
            for (name, seed), scores in zip(tasks, results, strict=True):
                print(f"{budget}, {name}, seed {seed}: {scores}", flush=True)
                found[name].setdefault(budget, []).append(scores)

    evaluate("same_steps", dict.fromkeys(variants, options.steps))
    # of the networks alone: the pace of the commands changes with whatever else the machine does
    costs = relative_costs(variants)
    # to tenths of the steps, so that networks of about the same cost are not trained twice
    unit, budget = max(1, options.steps // 10), options.steps * statistics.median(costs.values())
    evaluate("same_seconds", {name: unit * max(1, round(budget / cost / unit)) for name, cost in costs.items()})
    return [{**entry, "relative_cost": costs[name]} for name, entry in found.items()]


def make_table(results: list[dict[str, Any]]) -> str:
    """The figures of every variant in Markdown: means over the seeds, and their range for FID."""

    def values(budget: str, metric: str) -> dict[str, list[float]]:
        return {result["variant"]: [run[metric] for run in result[budget]] for result in results}

    def means(metric: str) -> dict[str, str]:
        return {name: f"{statistics.mean(each):.3f}" for name, each in values("same_steps", metric).items()}

    def ranges(budget: str) -> dict[str, str]:
        words = "{:.2f} ({:.2f} to {:.2f})"
        found = values(budget, "fid").items()
        return {name: words.format(statistics.mean(each), min(each), max(each)) for name, each in found}

    columns = {"class accuracy": means("class_accuracy"), "FID": ranges("same_steps")}
    columns |= {metric: means(metric) for metric in ("precision", "recall")}
    columns["cost of a step"] = {result["variant"]: f"{result['relative_cost']:.2f}" for result in results}
    return table("", {**columns, "FID, same time": ranges("same_seconds")}) + "\n"


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
    """The command line."""
    options = parse_options(
        __doc__,
        steps=(200, 2, "optimizer steps of each training"),
        num_images=(500, 20, "digits of each model"),
        num_inference_steps=(20, 2, "DDIM steps"),
        data={"type": Path, "default": DIGITS_DATA, "help": "the prepared digits"},
        output_dir={"type": Path, "default": ROOT / "outputs" / "quality", "help": "models and evaluations"},
        seeds={"type": int, "nargs": "+", "default": [0, 1]},
        jobs={"type": int, "default": os.cpu_count(), "help": "trainings at a time, one thread each"},
    )
    words = ("--source", options.data, "--output_dir", options.output_dir / "reference")
    run("evaluate_models.py", "reference", *words, *DIGITS_PROTOCOL)
    variants = dict(list(VARIANTS.items())[:: len(VARIANTS) - 1]) if options.small else VARIANTS
    results = evaluate_all(options, variants)
    settings = {name: str(getattr(options, name)) for name in ("steps", "num_images", "num_inference_steps")}
    write_result("quality", {"settings": settings, "seeds": options.seeds, "results": results}, options)
    print(make_table(results))
    images = options.results_dir if options.small else ROOT / "docs" / "images"
    plot_bars(results, images / "quality.png")
    plot_samples(results, options.output_dir, images / "quality_samples.png")
    if not options.small:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        PAGE.write_text("".join([before, begin, make_table(results), MARKS[1], after]), encoding="utf-8")


if __name__ == "__main__":
    main()
