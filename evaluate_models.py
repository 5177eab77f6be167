"""Evaluates models so that the numbers can be trusted and compared."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imagenet64_diffusion.evaluation.options import (
    ClassifierOptions,
    ModelOptions,
    ReferenceOptions,
    ScoreOptions,
    SweepOptions,
)
from imagenet64_diffusion.utils.command_line import SubCommand, run_sub_commands


def _run(module: str, function: str, options: Any) -> Any:
    # torch, diffusers and accelerate take seconds to import, which --help should not
    return getattr(importlib.import_module(f"imagenet64_diffusion.evaluation.{module}"), function)(options)


def reference(options: ReferenceOptions) -> Path:
    """Evaluates real images, to compare models with, into a folder."""
    return _run("evaluating", "evaluate_reference", options)


def model(options: ModelOptions) -> Path:
    """Generates images with a model and evaluates them into a folder. The same call resumes one that was stopped; with
    accelerate launch several ranks share the work."""
    return _run("evaluating", "evaluate_model", options)


def score(options: ScoreOptions) -> dict[str, Any]:
    """FID and other numbers from two evaluations, with their protocol."""
    return _run("scoring", "score", options)


def sweep(options: SweepOptions) -> Path:
    """Many models under many samplers: a table and charts. The same call resumes one that was stopped."""
    return _run("sweeping", "sweep", options)


def classifier(options: ClassifierOptions) -> Path:
    """Trains a small classifier on a dataset, to evaluate with. Say --protocol classifier --weights its_folder."""
    return _run("classifier_training", "train_classifier", options)


_EXAMPLES: dict[Callable[[Any], Any], str] = {
    reference: "--source outputs/digits\n--output_dir outputs/reference --protocol pixels",
    model: "--model outputs/train/model\n--output_dir outputs/evaluated --protocol pixels\n--num_images 500"
    " --num_inference_steps 20",
    score: "--reference outputs/reference\n--model outputs/evaluated",
    sweep: "--reference outputs/reference\n--models outputs/train --output_dir outputs/sweep\n"
    "--protocol pixels --num_images 100\n--num_inference_steps 10 20 --eta 0 1",
    classifier: "--train_data_dir outputs/digits\n--output_dir outputs/classifier",
}
COMMANDS = {
    command.__name__: SubCommand(command.__annotations__["options"], command, command.__doc__ or "", example)
    for command, example in _EXAMPLES.items()
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-evaluate; returns the exit code."""
    return run_sub_commands(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
