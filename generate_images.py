"""Generates images of given classes, and writes them with a labelled grid, an animation and a manifest."""

import sys
from collections.abc import Sequence
from pathlib import Path

from imagenet64_diffusion.pipelines.generation_options import GenerateOptions
from imagenet64_diffusion.utils.command_line import run_command


EXAMPLE = """--class_labels 3 7 null --num_images_per_label 4
--guidance_scale 2.5 --num_inference_steps 20
--output_dir outputs/generated"""


def generate(options: GenerateOptions) -> Path:
    """Generates the images and writes them with a grid, an animation and a manifest; returns their folder."""
    # torch and diffusers take seconds to import, which --help should not
    from imagenet64_diffusion.pipelines import generation

    return generation.generate(options)


def main(argv: Sequence[str] | None = None) -> int:
    """The command imagenet64-generate; returns the exit code."""
    return run_command(GenerateOptions, generate, __doc__, argv, example=EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
