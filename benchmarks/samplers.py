"""How few evaluations of the network make good images: samplers against each other at equal cost.

Generates digits with every sampler and several numbers of steps, from the same starting noise and on the exact noise
schedule, and measures them in the features of a fixed classifier, by evaluate_models.py sweep. Cost is counted in
evaluations of the network for one image: a step with guidance takes two, one outside the guidance interval one, and
Heun's method evaluates twice in every step but the last. What has been measured is not measured again. Prints a table
and writes benchmarks/results/samplers-<processor>.json and docs/images/samplers.png:

    python benchmarks/samplers.py --model outputs/demo/model pretrained/digits --data outputs/demo/data
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import ROOT, add_options, choose_sizes, results_dir, write_result

from imagenet64_diffusion.utils.chart_style import COLOURS, finish_axes, save_figure


CLASSIFIER = ROOT / "evaluation" / "digits_classifier"
PROTOCOL = ("--protocol", "classifier", "--weights", CLASSIFIER)
# what the chart calls a sampler: the name that evaluate_models.py takes, and how many evaluations its steps make
SAMPLERS = {
    "DDIM": ("own", 1),
    "DPM-Solver++ (2M)": ("DPMSolverMultistep", 1),
    "UniPC": ("UniPCMultistep", 1),
    "Heun": ("HeunDiscrete", 2),
}
# guidance for a part of the steps, as fractions of them from the noisy end
INTERVALS = {
    "UniPC, first half guided": (0.0, 0.5),
    "UniPC, first three quarters guided": (0.0, 0.75),
    "UniPC, middle half guided": (0.25, 0.75),
}
FEW = [4, 6, 8, 10, 16]
MANY = [100]  # for DDIM alone, the reference


def guided_steps(num_inference_steps: int, interval: tuple[float, float]) -> int:
    """How many steps the pipeline guides."""
    begin, end = interval
    return round(end * num_inference_steps) - round(begin * num_inference_steps)


def grid(few: list[int], many: list[int], guidance_scale: float) -> list[dict[str, Any]]:
    """The samplers to measure, each with its ``label`` and its ``cost`` in evaluations for an image."""
    entries = []
    for label, (scheduler, order) in SAMPLERS.items():
        for count in [*few, *(many if label == "DDIM" else [])]:
            steps = count if order == 1 else (count + 1) // 2
            made = steps if order == 1 else 2 * steps - 1
            settings = {"scheduler": scheduler, "num_inference_steps": steps, "guidance_scale": guidance_scale}
            entries.append({**settings, "label": label, "cost": 2 * made if guidance_scale > 1 else made})
    if guidance_scale > 1:
        for label, interval in INTERVALS.items():
            for steps in few:
                settings = {"scheduler": "UniPCMultistep", "num_inference_steps": steps}
                settings |= {"guidance_scale": guidance_scale, "guidance_interval": list(interval)}
                entries.append({**settings, "label": label, "cost": steps + guided_steps(steps, interval)})
    return entries


def run(script: str, *words: Any) -> None:
    """Runs a command of the project; its progress is seen."""
    subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], check=True)


def measure(options: argparse.Namespace, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """FID, class accuracy, precision and recall of every sampler, for every model."""
    folder = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "reference").is_dir():
        run(
            "evaluate_models.py",
            "reference",
            "--source",
            options.data,
            "--output_dir",
            folder / "reference",
            *PROTOCOL,
        )
    grid_file = folder / "grid.json"
    settings = [{key: value for key, value in entry.items() if key not in ("label", "cost")} for entry in entries]
    grid_file.write_text(json.dumps(settings), encoding="utf-8")
    run(
        "evaluate_models.py",
        *("sweep", "--reference", folder / "reference", "--models", *options.model, "--grid", grid_file),
        *("--output_dir", folder / "sweep", "--num_images", options.num_images, "--batch_size", 100, *PROTOCOL),
    )
    with (folder / "sweep" / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    results = []
    for model in options.model:
        for entry in entries:
            (row,) = (row for row in rows if Path(row["model"]) == model and _is(row, entry))
            figures = {name: float(row[name]) for name in ("fid", "class_accuracy", "precision", "recall")}
            name = model.parent.name if model.name == "model" else model.name
            results.append({"model": name, **entry, **figures})
    return results


def _is(row: dict[str, str], entry: dict[str, Any]) -> bool:
    """Whether a row of the results is of this sampler."""
    interval = entry.get("guidance_interval", [0.0, 1.0])
    return (
        row["scheduler"] == ("" if entry["scheduler"] == "own" else entry["scheduler"])
        and int(row["num_inference_steps"]) == entry["num_inference_steps"]
        and float(row["guidance_scale"]) == entry["guidance_scale"]
        and [float(word) for word in row["guidance_interval"].split()] == interval
    )


def draw_chart(results: list[dict[str, Any]], file: Path) -> None:
    """FID and class accuracy over evaluations, a line for each sampler and a row of panels for each model.

    Where Heun's method is far worse than all others it lies outside.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(result["model"] for result in results))
    figure = Figure(figsize=(12, 4.5 * len(models)), dpi=100, layout="constrained")
    rows = figure.subplots(len(models), 2, squeeze=False)
    for model, panels in zip(models, rows, strict=True):
        own = [result for result in results if result["model"] == model]
        for axes, name, label in zip(
            panels, ("fid", "class_accuracy"), ("FID in the classifier's features", "class accuracy"), strict=True
        ):
            for sampler, colour in zip(dict.fromkeys(result["label"] for result in own), COLOURS, strict=False):
                line = sorted((result["cost"], result[name]) for result in own if result["label"] == sampler)
                axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour, label=sampler)
            # Heun's few steps would leave no room for the others
            values = [result[name] for result in own if result["label"] != "Heun"]
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel("evaluations of the network for an image", fontsize=12)
            axes.set_title(model, fontsize=12)
            finish_axes(axes, label, (min(values), max(values)))
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[ROOT / "pretrained" / "digits"], help="pipelines of the digits"
    )
    parser.add_argument("--data", type=Path, default=Path("outputs/demo/data"), help="the prepared digits")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/samplers"), help="what was measured")
    parser.add_argument("--num_images", type=int, help="digits of each sampler (default: 500)")
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    add_options(parser)
    options = parser.parse_args()
    choose_sizes(options, num_images=(500, 100))
    entries = grid([2, 3], [], options.guidance_scale) if options.small else grid(FEW, MANY, options.guidance_scale)
    results = measure(options, entries)
    print(f"\n{'model':16} {'sampler':28} {'steps':>5} {'cost':>5} {'FID':>8} {'accuracy':>8} precision recall")
    for result in results:
        print(
            f"{result['model']:16} {result['label']:28} {result['num_inference_steps']:5} {result['cost']:5}"
            f" {result['fid']:8.2f} {result['class_accuracy']:8.3f} {result['precision']:9.3f} {result['recall']:6.3f}"
        )
    if not options.small:
        draw_chart(results, ROOT / "docs" / "images" / "samplers.png")
    figures = {"num_images": options.num_images, "guidance_scale": options.guidance_scale, "results": results}
    write_result("samplers", figures, ("diffusers", "torch"), results_dir(options))


if __name__ == "__main__":
    main()
