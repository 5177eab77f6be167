"""Evaluates models so that the numbers can be trusted and compared."""

import importlib
import sys
from collections.abc import Sequence
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
    """Evaluates real images and returns the folder of the evaluation."""
    return _run("evaluating", "evaluate_reference", options)


def model(options: ModelOptions) -> Path:
    """Generates images with a model, evaluates them and returns the folder of the evaluation."""
    return _run("evaluating", "evaluate_model", options)


def score(options: ScoreOptions) -> dict[str, Any]:
    """Computes metrics from two evaluations and returns them with their protocol."""
    return _run("scoring", "score", options)


def sweep(options: SweepOptions) -> Path:
    """Evaluates many models under many samplers and returns the table."""
    return _run("sweeping", "sweep", options)


def classifier(options: ClassifierOptions) -> Path:
    """Trains a small classifier and returns its folder."""
    return _run("classifier_training", "train_classifier", options)


COMMANDS = {
    "reference": SubCommand(
        ReferenceOptions,
        reference,
        "Evaluates real images, to compare models with.",
        "--source outputs/digits\n--output_dir outputs/reference --protocol pixels",
    ),
    "model": SubCommand(
        ModelOptions,
        model,
        "Generates images with a model and evaluates them. The same call resumes one that was stopped; with accelerate"
        " launch several ranks share the work.",
        "--model outputs/train/model\n--output_dir outputs/evaluated --protocol pixels\n--num_images 500"
        " --num_inference_steps 20",
    ),
    "score": SubCommand(
        ScoreOptions,
        score,
        "FID and other numbers from two evaluations, with their protocol.",
        "--reference outputs/reference\n--model outputs/evaluated",
    ),
    "sweep": SubCommand(
        SweepOptions,
        sweep,
        "Many models under many samplers: a table and charts. The same call resumes one that was stopped.",
        "--reference outputs/reference\n--models outputs/train --output_dir outputs/sweep\n"
        "--protocol pixels --num_images 100\n--num_inference_steps 10 20 --eta 0 1",
    ),
    "classifier": SubCommand(
        ClassifierOptions,
        classifier,
        "Trains a small classifier on a dataset, to evaluate with. Say --protocol classifier --weights its_folder.",
        "--train_data_dir outputs/digits\n--output_dir outputs/classifier",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-evaluate; returns the exit code."""
    return run_sub_commands(COMMANDS, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
