"""How fast images are generated and evaluated, and what share of the time is the network's own.

Runs what ``evaluate_models.py model`` runs, with the classifier of the demo's digits: a network of a recipe,
with random weights unless there is a model, generates images, their features are kept, and statistics
put together. The calls of the network and of the extractor are timed. What is left is everything else:
loading the model, scheduler, noise, files. Shares compare between machines, times do not. Prints a table and
writes benchmarks/results/evaluation-<processor>.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from networks import make_pipeline, recipe_config
from report import ROOT, add_options, choose_sizes, results_dir, write_result
from timing import Clock, rounded, spread, synchronize

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.evaluation.evaluating import evaluate_model
from imagenet64_diffusion.evaluation.extractors import FeatureExtractor
from imagenet64_diffusion.evaluation.images import GeneratedImages
from imagenet64_diffusion.evaluation.options import ModelOptions


CLASSIFIER = ROOT / "evaluation" / "digits_classifier"
NETWORK, FEATURES, LOADING, REST = "network", "features", "loading the model", "everything else"


def measure_once(options: argparse.Namespace, model: Path, output_dir: Path) -> dict[str, float]:
    """Seconds of each part of one measurement, and ``total``."""
    clock = Clock(options.device)
    put_back = [
        clock.around(ClassConditionalUNet2DModel, "forward", NETWORK),
        clock.around(FeatureExtractor, "__call__", FEATURES),
        clock.around(GeneratedImages, "__init__", LOADING),
    ]
    settings = ModelOptions(
        model=str(model),
        output_dir=str(output_dir),
        protocol="classifier",
        weights=str(CLASSIFIER),
        num_images=options.num_images,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        batch_size=options.batch_size,
        device=options.device,
    )
    synchronize(options.device)
    begin = time.perf_counter()
    evaluate_model(settings, quiet=True)
    synchronize(options.device)
    total = time.perf_counter() - begin
    for each in put_back:
        each()
    seconds = {part: clock.seconds[part] for part in (NETWORK, FEATURES, LOADING)}
    # where parts run at the same time, nothing is left
    return {**seconds, REST: max(0.0, total - sum(seconds.values())), "total": total}


def figures_of(rounds: list[dict[str, float]], num_images: int) -> dict[str, Any]:
    """What several measurements took, as JSON values."""
    parts = [part for part in rounds[0] if part != "total"]
    return {
        "images_per_second": spread(num_images / seconds["total"] for seconds in rounds),
        "images_per_second_without_loading": spread(
            num_images / (seconds["total"] - seconds[LOADING]) for seconds in rounds
        ),
        "images_per_second_of_the_network_alone": spread(num_images / seconds[NETWORK] for seconds in rounds),
        "features_images_per_second": spread(num_images / seconds[FEATURES] for seconds in rounds),
        "shares": {
            part: rounded(statistics.median(seconds[part] / seconds["total"] for seconds in rounds)) for part in parts
        },
        "share_of_the_network_without_loading": spread(
            seconds[NETWORK] / (seconds["total"] - seconds[LOADING]) for seconds in rounds
        ),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="pipeline folder (default: a recipe with random weights)")
    parser.add_argument("--config", default="demo", help="that recipe (default: demo)")
    parser.add_argument("--num_images", type=int, help="images of each round (default: 500)")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: 20)")
    parser.add_argument("--guidance_scale", type=float, default=2.5, help="both branches above 1 (default: 2.5)")
    parser.add_argument("--batch_size", type=int, default=100, help="images at a time (default: 100)")
    parser.add_argument("--repeats", type=int, help="rounds (default: 3)")
    add_options(parser, device=True)
    options = parser.parse_args()
    choose_sizes(options, num_images=(500, 4), num_inference_steps=(20, 2), repeats=(3, 1))

    with tempfile.TemporaryDirectory() as name:
        model = options.model
        if model is None:
            model = Path(name) / "model"
            make_pipeline(recipe_config(options.config, options.small)).save_pretrained(model)
        if not options.small:
            measure_once(options, model, Path(name) / "warmup")
        rounds = [measure_once(options, model, Path(name) / str(number)) for number in range(options.repeats)]
    figures = figures_of(rounds, options.num_images)

    print(f"{options.num_images} images of {options.num_inference_steps} steps, {options.batch_size} at a time")
    print(f"  generated, evaluated     {figures['images_per_second']['median']:9.4g} images/s")
    print(f"  without loading          {figures['images_per_second_without_loading']['median']:9.4g} images/s")
    print(f"  the network alone        {figures['images_per_second_of_the_network_alone']['median']:9.4g} images/s")
    print(f"  features alone           {figures['features_images_per_second']['median']:9.4g} images/s")
    for part, share in figures["shares"].items():
        print(f"  share of {part:18} {100 * share:6.2f} %")
    result = {
        "device": options.device,
        "threads": torch.get_num_threads(),
        "recipe": options.config if options.model is None else None,
        "num_images": options.num_images,
        "num_inference_steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": options.batch_size,
        "rounds": options.repeats,
        **figures,
    }
    libraries = ("diffusers", "torch", "transformers")
    write_result("evaluation", result, libraries, results_dir(options), options.device)


if __name__ == "__main__":
    main()
