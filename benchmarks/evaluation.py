"""How fast images are generated and evaluated, and what share of the time is the network's own.

Runs ``evaluate_models.py model`` with the classifier of the demo's digits, on a recipe's network with random weights
unless a model is given. The calls of the network, of the feature extractor and of loading are timed; the rest is
scheduler, noise and files. Writes benchmarks/results/evaluation-<processor>.json.
"""

import statistics
import tempfile

from networks import make_pipeline, recipe_config
from performance_page import publish
from report import DIGITS_PROTOCOL, Clock, call_command, parse_options, rounded, seconds_of, spread

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.evaluation.extractors import FeatureExtractor
from imagenet64_diffusion.evaluation.images import GeneratedImages


NETWORK, FEATURES, LOADING, REST = "network", "features", "loading the model", "everything else"


def measure(model: str, words: list[str], rounds: int, warmup: int) -> list[dict[str, float]]:
    """Seconds of each part and ``total`` in each round."""
    clock = Clock()
    clock.around(ClassConditionalUNet2DModel, "forward", NETWORK)
    clock.around(FeatureExtractor, "__call__", FEATURES)
    clock.around(GeneratedImages, "__init__", LOADING)
    found = []
    for _ in range(warmup + rounds):
        clock.seconds.clear()
        with tempfile.TemporaryDirectory() as folder:
            call = ("evaluate_models", "model", "--model", model, "--output_dir", folder, *DIGITS_PROTOCOL, *words)
            total = seconds_of(lambda call=call: call_command(*call))
        parts = dict(clock.seconds)
        # nothing is left where parts run at the same time
        found.append({**parts, REST: max(0.0, total - sum(parts.values())), "total": total})
    return found[warmup:]


def main() -> None:
    """The command line."""
    options = parse_options(
        __doc__,
        device=True,
        num_images=(500, 4, "images of each round"),
        num_inference_steps=(20, 2, "denoising steps"),
        repeats=(3, 1, "rounds"),
        batch_size=(100, 100, "images at a time"),
        guidance_scale=(2.5, 2.5, "both branches above 1"),
        model={"help": "pipeline folder (default: a recipe with random weights)"},
        config={"default": "demo", "help": "that recipe (default: demo)"},
    )
    settings = {
        name: getattr(options, name) for name in ("num_images", "num_inference_steps", "guidance_scale", "batch_size")
    }
    words = [f"--{name}={value}" for name, value in settings.items()] + ["--device", options.device]
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_pipeline(recipe_config(options.config, options.small)).save_pretrained(folder)
        rounds = measure(options.model or folder, words, options.repeats, warmup=0 if options.small else 1)

    def rate(seconds: list[float]) -> dict[str, float]:
        return spread(options.num_images / each for each in seconds)

    loaded = [seconds["total"] - seconds[LOADING] for seconds in rounds]
    network = [seconds[NETWORK] for seconds in rounds]
    figures = {
        "recipe": options.config if options.model is None else None,
        **settings,
        "rounds": options.repeats,
        "images_per_second": rate([seconds["total"] for seconds in rounds]),
        "images_per_second_without_loading": rate(loaded),
        "images_per_second_of_the_network_alone": rate(network),
        "features_images_per_second": rate([seconds[FEATURES] for seconds in rounds]),
        "shares": {
            part: rounded(statistics.median(seconds[part] / seconds["total"] for seconds in rounds))
            for part in (NETWORK, FEATURES, LOADING, REST)
        },
        "share_of_the_network_without_loading": spread(
            own / whole for own, whole in zip(network, loaded, strict=True)
        ),
    }
    publish("evaluation", figures, options, ["transformers"])


if __name__ == "__main__":
    main()
