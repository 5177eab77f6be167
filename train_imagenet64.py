"""Trains a class-conditional diffusion model on prepared images: accelerate launch train_imagenet64.py --help."""

import sys
from collections.abc import Sequence
from pathlib import Path

from imagenet64_diffusion.command_line import run_verb
from imagenet64_diffusion.training.options import TrainOptions


def train(options: TrainOptions) -> Path:
    """Trains a network and saves it as a pipeline folder, ``output_dir/model``, which is returned."""
    # torch, diffusers and accelerate take seconds to import, which --help should not
    from imagenet64_diffusion.training.loop import train as run

    return run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-train; returns the exit code."""
    return run_verb(TrainOptions, train, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
