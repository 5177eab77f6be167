"""What each correction of the original's design is worth, measured with the same budget.

Trains a small network on the 5,000 MNIST digits, first as the original program has it and then with one correction
after the other, for the same number of steps and, again, for the same computing time, with two seeds.
Every model generates the same number of digits without guidance; a fixed classifier reads them, and FID, precision and
recall are taken in its features. All by the commands that users have: train_imagenet64.py and evaluate_models.py. What
has been done is not done again, so it can be stopped. Writes benchmarks/results/quality-<processor>.json, a chart, a
strip of samples of each model, and the table in docs/corrections.md:

    python benchmarks/quality.py --data outputs/demo/data --output_dir outputs/quality
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from report import write_result

from imagenet64_diffusion import ClassConditionalUNet2DModel


ROOT = Path(__file__).parents[1]
CLASSIFIER = ROOT / "evaluation" / "digits_classifier"
METRICS = ("class_accuracy", "fid", "precision", "recall")
PAGE = ROOT / "docs" / "corrections.md"
BEGIN, END = "<!-- table of benchmarks/quality.py -->", "<!-- end of the table -->"
UNET_OPTIONS = ("time_embedding_type", "class_attention_type", "output_head_type")
STRIP = 20  # digits of each model in the strip


@dataclass(frozen=True)
class Variant:
    """A training.

    Attributes:
        name: What the table calls it.
        options: Of train_imagenet64.py, on top of those that all have.
    """

    name: str
    options: dict[str, Any]

    def with_(self, name: str, **options: Any) -> "Variant":
        """One more correction."""
        return Variant(name, {**self.options, **options})


def variants() -> list[Variant]:
    """The original's way, its corrections one after the other, the default without one each, and two options."""
    faithful = Variant(
        "as the original has it",
        {
            "time_embedding_type": "original_interleaved",
            "class_attention_type": "identity",
            "output_head_type": "original",
            "prediction_type": "epsilon",
            "beta_schedule": "original_cosine",
            "use_ema": False,
        },
    )
    averaged = faithful.with_("+ EMA", use_ema=True)
    encoded = averaged.with_("+ sinusoidal time encoding", time_embedding_type="sinusoidal")
    attending = encoded.with_("+ class attention that attends", class_attention_type="channel")
    head = attending.with_("+ convolutional head", output_head_type="conv")
    unclamped = {"beta_schedule": "squaredcos_cap_v2"}
    velocity = head.with_("+ velocity, unclamped cosine (default)", prediction_type="v_prediction", **unclamped)
    return [
        *(faithful, averaged, encoded, attending, head, velocity),
        velocity.with_("default, no EMA", use_ema=False),
        velocity.with_("default, original time encoding", time_embedding_type="original_interleaved"),
        velocity.with_("default, class attention that does not", class_attention_type="identity"),
        velocity.with_("default, original head", output_head_type="original"),
        velocity.with_("default, clamped cosine", beta_schedule="original_cosine"),
        velocity.with_("default, importance sampling", timestep_sampling="importance"),
        velocity.with_("default, min-SNR 5", snr_gamma=5),
    ]


NETWORK = {"model_config_name_or_path": "demo", "stem_channels": 8, "block_out_channels": (16, 32)}
BATCH_SIZE = 64


def run(script: str, *arguments: Any) -> None:
    """Runs a command of the project on one thread; its output goes nowhere unless it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {finished.returncode}: {finished.stderr[-2000:]}")


def relative_costs(variants: list[Variant], rounds: int = 15) -> dict[str, float]:
    """Time of a training step of each variant's network, over that of the last one, measured in turns."""
    config = json.loads((ROOT / "configs" / "demo.json").read_text(encoding="utf-8"))
    config |= {name: NETWORK[name] for name in ("stem_channels", "block_out_channels")}
    size, channels = config["sample_size"], config["in_channels"]
    images, labels = torch.randn(BATCH_SIZE, channels, size, size), torch.arange(BATCH_SIZE) % 10
    timesteps = torch.arange(BATCH_SIZE) * 15
    options = {variant.name: tuple(variant.options[name] for name in UNET_OPTIONS) for variant in variants}
    networks = {}
    for values in set(options.values()):
        unet = ClassConditionalUNet2DModel.from_config({**config, **dict(zip(UNET_OPTIONS, values, strict=True))})
        networks[values] = unet, torch.optim.AdamW(unet.parameters(), fused=True)
    seconds: dict[tuple, list[float]] = {values: [] for values in networks}
    for number in range(rounds + 1):
        for values, (unet, optimizer) in networks.items():
            begin = time.perf_counter()
            unet(images, timesteps, labels).sample.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if number:  # the first round warms up
                seconds[values].append(time.perf_counter() - begin)
    last = seconds[options[variants[-1].name]]
    return {
        name: statistics.median(own / other for own, other in zip(seconds[values], last, strict=True))
        for name, values in options.items()
    }


@dataclass(frozen=True)
class Settings:
    """What all trainings and measurements have in common."""

    data: Path
    folder: Path
    steps: int
    num_images: int
    num_inference_steps: int


def train_and_measure(variant: Variant, seed: int, steps: int, settings: Settings) -> dict[str, Any]:
    """Trains for so many steps and measures what comes out."""
    name = "".join(character if character.isalnum() else "_" for character in variant.name)
    folder = settings.folder / f"{name}_seed{seed}_{steps}"
    options = {
        **NETWORK,
        "block_out_channels": " ".join(map(str, NETWORK["block_out_channels"])),
        "train_batch_size": BATCH_SIZE,
        "learning_rate": 5e-3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 50,
        "checkpointing_steps": 0,
        "num_sample_classes": 1,
        "num_samples_per_class": 1,
        "num_inference_steps": 2,
        "report_to": "none",
        "max_train_steps": steps,
        "seed": seed,
        **variant.options,
    }
    if not (folder / "model" / "model_index.json").is_file():
        words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
        run("train_imagenet64.py", "--train_data_dir", settings.data, "--output_dir", folder, *words)
    measured = folder / "measured"
    if not (measured / "scores.json").is_file():
        sampling = ("--num_images", settings.num_images, "--num_inference_steps", settings.num_inference_steps)
        run(
            "evaluate_models.py",
            *("model", "--model", folder / "model", "--output_dir", measured, *sampling),
            *("--protocol", "classifier", "--weights", CLASSIFIER, "--batch_size", 100, "--keep_images", "npz"),
        )
        run("evaluate_models.py", "score", "--reference", settings.folder / "reference", "--model", measured)
    scores = json.loads((measured / "scores.json").read_text(encoding="utf-8"))["metrics"]
    return {
        **{name: scores[name] for name in METRICS},
        "steps": steps,
        "folder": folder.name,
    }


def measure_all(settings: Settings, seeds: list[int], jobs: int) -> list[dict[str, Any]]:
    """Every variant with both budgets; an entry for each, with the figures of every seed."""
    found = {variant.name: {"variant": variant.name, "options": variant.options} for variant in variants()}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:

        def both(tasks: list[tuple[Variant, int, int]]) -> list[dict[str, Any]]:
            futures = [pool.submit(train_and_measure, *task, settings) for task in tasks]
            for number, future in enumerate(concurrent.futures.as_completed(futures), 1):
                print(f"{number} of {len(futures)}: {future.result()}", flush=True)
            return [future.result() for future in futures]

        tasks = [(variant, seed, settings.steps) for variant in variants() for seed in seeds]
        for (variant, _, _), figures in zip(tasks, both(tasks), strict=True):
            found[variant.name].setdefault("same_steps", []).append(figures)

        # of the networks alone: the commands' own pace changes with whatever else the machine does
        costs = relative_costs(variants())
        budget = statistics.median(costs.values())
        tasks = []
        for variant in variants():
            found[variant.name]["relative_cost"] = costs[variant.name]
            # to tenths of the steps, so that networks of about the same cost are not trained twice
            unit = max(1, settings.steps // 10)
            steps = unit * max(1, round(settings.steps * budget / costs[variant.name] / unit))
            tasks += [(variant, seed, steps) for seed in seeds]
        for (variant, _, _), figures in zip(tasks, both(tasks), strict=True):
            found[variant.name].setdefault("same_seconds", []).append(figures)
    return list(found.values())


def table(results: list[dict[str, Any]]) -> list[str]:
    """The figures of every variant as the lines of a Markdown table: means over the seeds, and their range for FID."""
    lines = [
        "| | class accuracy | FID | precision | recall | cost of a step | FID, same time |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        runs = result["same_steps"]
        means = {name: statistics.mean(figures[name] for figures in runs) for name in METRICS}
        cells = [
            result["variant"],
            f"{means['class_accuracy']:.3f}",
            _mean_and_range([figures["fid"] for figures in runs]),
            f"{means['precision']:.3f}",
            f"{means['recall']:.3f}",
            f"{result['relative_cost']:.2f}",
            _mean_and_range([figures["fid"] for figures in result["same_seconds"]]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _mean_and_range(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def write_table(results: list[dict[str, Any]], page: Path) -> None:
    """Puts the table between the two marks of a page."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    page.write_text("\n".join([before + begin, *table(results), end + after]), encoding="utf-8")


def draw_strips(results: list[dict[str, Any]], folder: Path, file: Path) -> None:
    """The first digits of each model of the first seed, one row for each."""
    size, factor, left = 32, 2, 300
    sheet = Image.new("RGB", (left + STRIP * (size * factor + 2), len(results) * (size * factor + 4)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for row, result in enumerate(results):
        with np.load(folder / result["same_steps"][0]["folder"] / "measured" / "images.npz") as arrays:
            images = arrays["arr_0"][:STRIP]
        y = row * (size * factor + 4)
        pen.text((left - 10, y + size * factor / 2), result["variant"], fill="black", font=font, anchor="rm")
        for column, image in enumerate(images):
            tile = Image.fromarray(image.squeeze(-1)).resize((size * factor,) * 2, Image.Resampling.NEAREST)
            sheet.paste(tile.convert("RGB"), (left + column * (size * factor + 2), y))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def draw_chart(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of class accuracy and FID with both budgets; a dot for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name, label in zip(
        panels, ("class_accuracy", "fid"), ("class accuracy", "FID in the classifier's features"), strict=True
    ):
        for offset, (budget, colour, words) in enumerate(
            (("same_steps", "#0072B2", "same number of steps"), ("same_seconds", "#E69F00", "same time"))
        ):
            heights = [statistics.mean(figures[name] for figures in result[budget]) for result in results]
            places = np.arange(len(results)) + 0.36 * (offset - 0.5)
            axes.barh(places, heights, 0.34, color=colour, label=words)
            for place, result in zip(places, results, strict=True):
                values = [figures[name] for figures in result[budget]]
                axes.plot(values, [place] * len(values), ".", color="black", markersize=5)
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(results)), [result["variant"] for result in results])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "outputs" / "demo" / "data", help="the prepared digits")
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "outputs" / "quality", help="models and measurements"
    )
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each training")
    parser.add_argument("--num_images", type=int, default=500, help="digits of each model")
    parser.add_argument("--num_inference_steps", type=int, default=20, help="DDIM steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings at a time, one thread each")
    options = parser.parse_args()
    settings = Settings(
        options.data, options.output_dir, options.steps, options.num_images, options.num_inference_steps
    )
    run(
        "evaluate_models.py",
        *("reference", "--source", options.data, "--output_dir", settings.folder / "reference"),
        *("--protocol", "classifier", "--weights", CLASSIFIER),
    )
    results = measure_all(settings, options.seeds, options.jobs)
    print("\n".join(table(results)))
    write_table(results, PAGE)
    draw_chart(results, ROOT / "docs" / "images" / "quality.png")
    draw_strips(results, settings.folder, ROOT / "docs" / "images" / "quality_samples.png")
    shared = {key: str(value) for key, value in dataclasses.asdict(settings).items() if key not in ("data", "folder")}
    write_result("quality", {"settings": shared, "seeds": options.seeds, "results": results}, ("diffusers", "torch"))


if __name__ == "__main__":
    main()
