"""Trains a class-conditional diffusion model on prepared images. The same call goes on with a run that was stopped.

Start it with accelerate launch, and several processes and machines share the work.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from imagenet64_diffusion.configs import CONFIG_DIR
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.command_line import run_command


EXAMPLE = "--config demo --train_data_dir outputs/digits\n--output_dir outputs/train"


def train(options: TrainOptions) -> Path | None:
    """Trains a network and saves it as a pipeline, or resumes a training that was stopped.

    Returns:
        The folder of the pipeline, ``output_dir/model``, or None after a dry run.

    Raises:
        ValueError: If options, dataset and what the run starts from do not fit together.
        FloatingPointError: If the loss is no longer finite.
        OSError: If something cannot be written, or another run writes to the same folder.
        StoppedBySignalError: After SIGTERM or SIGINT, when a checkpoint has been written.
    """
    # torch, diffusers and accelerate take seconds to import, which --help should not
    from imagenet64_diffusion.training.loop import train as run

    return run(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-train; returns the exit code."""
    return run_command(TrainOptions, train, __doc__, argv, example=EXAMPLE, presets=CONFIG_DIR / "training")


if __name__ == "__main__":
    sys.exit(main())
