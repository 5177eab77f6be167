"""How few network evaluations make good images: samplers compared at equal cost, by evaluate_models.py sweep.

python benchmarks/samplers.py --model outputs/demo/model pretrained/digits --data outputs/demo/data
"""

import argparse
import csv
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from performance_page import publish
from report import DIGITS_DATA, DIGITS_PROTOCOL, ROOT, call_command, parse_options

from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.utils.chart_style import COLOURS, finish_axes, save_figure


# label -> --scheduler, the part of the steps that is guided
SAMPLERS = {
    "DDIM": ("own", (0.0, 1.0)),
    "DPM-Solver++ (2M)": ("DPMSolverMultistep", (0.0, 1.0)),
    "UniPC": ("UniPCMultistep", (0.0, 1.0)),
    "Heun": ("HeunDiscrete", (0.0, 1.0)),
    "UniPC, first half guided": ("UniPCMultistep", (0.0, 0.5)),
    "UniPC, first three quarters guided": ("UniPCMultistep", (0.0, 0.75)),
    "UniPC, middle half guided": ("UniPCMultistep", (0.25, 0.75)),
}
GUIDANCE_SCALE = 2.5
TOLERANCE = 0.05  # relative difference of FID and class accuracy that 500 images do not show
METRICS = ("fid", "class_accuracy", "precision", "recall")


def grid(few: list[int], many: list[int]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Label, network evaluations per image and settings of each sampler; DDIM also takes ``many`` steps."""
    for label, (scheduler, (begin, end)) in SAMPLERS.items():
        for steps in [*few, *many] if label == "DDIM" else few:
            # a guided step takes two, one outside the interval one; Heun evaluates twice in every step but the last
            evaluations, guided = steps, round(end * steps) - round(begin * steps)
            if label == "Heun":
                steps = (steps + 1) // 2
                evaluations = guided = 2 * steps - 1
            settings = {"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
            yield label, evaluations + guided, {**settings, "guidance_interval": [begin, end]}


def evaluate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The metrics of every sampler for every model."""
    few, many = ([2], []) if options.small else ([4, 6, 8, 10, 16], [100])
    entries = list(grid(few, many))
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    reference, grid_file = folder / "reference", folder / "grid.json"
    words = ("--source", options.data, "--output_dir", reference)
    call_command("evaluate_models", "reference", *words, *DIGITS_PROTOCOL)
    grid_file.write_text(json.dumps([settings for *_, settings in entries]), encoding="utf-8")
    words = ("--reference", reference, "--models", *options.model, "--grid", grid_file, "--batch_size", 100)
    words += ("--output_dir", folder / "sweep", "--num_images", options.num_images, *DIGITS_PROTOCOL)
    call_command("evaluate_models", "sweep", *words)
    with (folder / "sweep" / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    results = []
    for model in options.model:
        name = model.parent.name if model.name == "model" else model.name
        own = (row for row in rows if Path(row["model"]) == model)
        # a sweep keeps the order of its grid
        for row, (label, cost, settings) in zip(own, entries, strict=True):
            figures = {metric: float(row[metric]) for metric in METRICS}
            results.append({"model": name, **settings, "label": label, "cost": cost, **figures})
    return results


def describe(results: list[dict[str, Any]], num_images: int) -> Iterator[Any]:
    """The blocks of the page: the fewest evaluations of each sampler that are as good as many."""
    yield (
        f"How many network evaluations good images need: {num_images} digits per sampler from the same noise, guidance"
        f" {GUIDANCE_SCALE:g}, in the features of the bundled classifier. A guided step takes two evaluations, a step"
        " outside the guidance interval one. `digits` is the bundled model, `demo` that of `make demo`, trained for"
        " less than a quarter of its steps."
    )
    yield "![FID and class accuracy over network evaluations](images/samplers.png)"
    yield (
        "Heun's method, whose few steps are far apart, lies outside the panels. The fewest evaluations of each sampler"
        f" that comes within {TOLERANCE:.0%} of FID and class accuracy of DDIM with the most steps:"
    )
    for model in dict.fromkeys(entry["model"] for entry in results):
        own = [entry for entry in results if entry["model"] == model]
        best = max((entry for entry in own if entry["label"] == "DDIM"), key=lambda entry: entry["cost"])
        rows = {f"DDIM, {best['num_inference_steps']} steps, for comparison": best}
        for entry in sorted(own, key=lambda entry: entry["cost"]):
            fits = entry["fid"] <= best["fid"] * (1 + TOLERANCE)
            if fits and entry["class_accuracy"] >= best["class_accuracy"] * (1 - TOLERANCE):
                rows.setdefault(entry["label"], entry)
        keys = {
            "steps": "num_inference_steps",
            "evaluations": "cost",
            "FID": "fid",
            "class accuracy": "class_accuracy",
        }
        yield f"`{model}`", {title: {label: row[key] for label, row in rows.items()} for title, key in keys.items()}


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """FID and class accuracy over evaluations, a line for each sampler and a row of panels for each model."""
    models = list(dict.fromkeys(result["model"] for result in results))
    figure = Figure(figsize=(12, 4.5 * len(models)), dpi=100, layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    metrics = (("fid", "FID in the classifier's features"), ("class_accuracy", "class accuracy"))
    for axes, (model, (metric, title)) in zip(panels.flat, itertools.product(models, metrics), strict=True):
        own = [result for result in results if result["model"] == model]
        for label, colour in zip(SAMPLERS, COLOURS, strict=True):
            line = sorted((result["cost"], result[metric]) for result in own if result["label"] == label)
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("network evaluations per image", fontsize=12)
        axes.set_title(model, fontsize=12)
        # Heun's few steps would leave no room for the others
        values = [result[metric] for result in own if result["label"] != "Heun"]
        finish_axes(axes, title, (min(values), max(values)))
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    save_figure(figure, file)


def main() -> None:
    options = parse_options(
        __doc__,
        num_images=("digits of each sampler", 500, 20),
        model={"type": Path, "nargs": "+", "default": [DIGITS], "help": "pipelines of digits"},
        data=DIGITS_DATA,
        output_dir=("evaluations", Path("outputs/samplers")),
    )
    results = evaluate(options)
    publish("samplers", options, list(describe(results, options.num_images)), results=results)
    plot(results, options.results_dir / "samplers.png" if options.small else ROOT / "docs" / "images" / "samplers.png")


if __name__ == "__main__":
    main()
