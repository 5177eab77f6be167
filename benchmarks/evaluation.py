"""How fast ``evaluate_models.py model`` generates and evaluates images of digits, and what share of the time is the
network's own."""

import statistics
import tempfile

from networks import make_pipeline, recipe_config
from performance_page import publish
from report import DEVICE, DIGITS_PROTOCOL, call_command, parse_options, seconds_of, spread, time_methods

from imagenet64_diffusion import ClassConditionalUNet2DModel
from imagenet64_diffusion.evaluation.extractors import FeatureExtractor
from imagenet64_diffusion.evaluation.images import GeneratedImages


NETWORK, FEATURES, LOADING, REST = "network", "features", "loading the model", "everything else"
SETTINGS = ("num_images", "num_inference_steps", "guidance_scale", "batch_size", "device")


def measure(model: str, words: list[str], rounds: int, warmup: int) -> list[dict[str, float]]:
    """Seconds of each part and ``total`` in each round."""
    seconds = time_methods(
        (ClassConditionalUNet2DModel, "forward", NETWORK),
        (FeatureExtractor, "__call__", FEATURES),
        (GeneratedImages, "__init__", LOADING),
    )
    found = []
    for _ in range(warmup + rounds):
        seconds.clear()
        with tempfile.TemporaryDirectory() as folder:
            all_words = ("--model", model, "--output_dir", folder, *DIGITS_PROTOCOL, *words)
            total = seconds_of(call_command, "evaluate_models", "model", *all_words)
        # nothing is left where parts run at the same time
        found.append({**seconds, REST: max(0.0, total - sum(seconds.values())), "total": total})
    return found[warmup:]


def main() -> None:
    options = parse_options(
        __doc__,
        device=DEVICE,
        num_images=("images of each round", 500, 4),
        num_inference_steps=("denoising steps", 20, 2),
        repeats=("rounds", 3, 1),
        batch_size=("images at a time", 100),
        guidance_scale=("both branches above 1", 2.5),
        model={"help": "pipeline folder (default: a recipe with random weights)"},
        config=("that recipe", "demo"),
    )
    words = [f"--{name}={getattr(options, name)}" for name in SETTINGS]
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_pipeline(recipe_config(options.config, options.small)).save_pretrained(folder)
        rounds = measure(options.model or folder, words, options.repeats, warmup=0 if options.small else 1)

    def rate(part: str) -> dict[str, float]:
        return spread(options.num_images / seconds[part] for seconds in rounds)

    about = (
        f"{options.num_images} images of {options.num_inference_steps} guided steps, {options.batch_size} at a time,"
        f" by `evaluate_models.py model`. {options.repeats} rounds."
    )
    rates = {
        "generated and evaluated": rate("total"),
        "the network alone": rate(NETWORK),
        "features alone": rate(FEATURES),
    }
    shares = {
        part: 100 * statistics.median(seconds[part] / seconds["total"] for seconds in rounds)
        for part in (NETWORK, FEATURES, LOADING, REST)
    }
    blocks = [about, ("", {"images/s": rates}), ("", {"share of the time, %": shares})]
    publish("evaluation", options, blocks, ("transformers",))


if __name__ == "__main__":
    main()
