"""Generates the same images from the same noise with several schedulers: python examples/swap_scheduler.py"""

import argparse
from pathlib import Path

import torch

from imagenet64_diffusion import ClassConditionalPipeline, swap_scheduler
from imagenet64_diffusion.pipelines.image_grid import image_grid
from imagenet64_diffusion.pretrained import DIGITS


def main() -> None:
    """One row of images for each scheduler."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DIGITS), help="pipeline folder or Hub id (default: the digits)")
    names = ["DDIM", "UniPCMultistep", "DPMSolverMultistep", "SASolver"]
    parser.add_argument("--schedulers", nargs="+", default=names, help="as generate_images.py takes them")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--num_reference_steps", type=int, default=100, help="of the first row")
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--num_classes", type=int, default=10, help="columns: the first classes of the model")
    parser.add_argument("--output", type=Path, default=Path("outputs/schedulers.png"))
    options = parser.parse_args()

    pipeline = ClassConditionalPipeline.from_pretrained(options.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    class_labels = list(range(options.num_classes))
    images, captions = [], []

    def add_row(name: str, steps: int) -> None:
        # a new generator with the same seed for each image, so that every row starts from the same noise
        arguments = {"generator": [torch.Generator().manual_seed(seed) for seed in class_labels]}
        arguments |= {"guidance_scale": options.guidance_scale, "num_inference_steps": steps}
        images.extend(pipeline(class_labels, **arguments).images)
        captions.extend([f"{name}, {steps} steps"] * len(class_labels))

    # what all of them are after: the pipeline's own scheduler with many steps
    add_row(type(pipeline.scheduler).__name__.removesuffix("Scheduler"), options.num_reference_steps)
    for name in options.schedulers:
        # with plain diffusers: pipeline.scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
        swap_scheduler(pipeline, name)
        add_row(name, options.num_inference_steps)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, captions, columns=options.num_classes).save(options.output)
    print(f"{1 + len(options.schedulers)} schedulers are in {options.output}")


if __name__ == "__main__":
    main()
