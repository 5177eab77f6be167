"""Changes the guidance during sampling, in a callback: python examples/callback_guidance.py"""

import argparse
from pathlib import Path
from typing import Any

import torch

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pipelines.image_grid import image_grid
from imagenet64_diffusion.pretrained import DIGITS


def main() -> None:
    """A row with constant guidance, and one in which it falls from twice as much to none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DIGITS), help="pipeline folder or Hub id (default: the digits)")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="the mean of either row")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--num_classes", type=int, default=10, help="columns: the first classes of the model")
    parser.add_argument("--output", type=Path, default=Path("outputs/callback_guidance.png"))
    options = parser.parse_args()

    pipeline = ClassConditionalPipeline.from_pretrained(options.model)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    class_labels = list(range(options.num_classes))
    highest = 2 * options.guidance_scale - 1
    changes = []

    def lower_guidance(pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        # called after each step: what is set here holds from the next one on
        changes.append((tensors["latents"] - tensors["pred_original_sample"]).abs().mean().item())
        done = (step + 1) / (pipeline.num_timesteps - 1)
        pipeline._guidance_scale = highest + (1 - highest) * min(done, 1)
        return {}  # {"latents": ...} would replace the images

    def generate(guidance_scale: float, **callback: Any) -> list:
        callback["generator"] = [torch.Generator().manual_seed(seed) for seed in class_labels]
        steps = options.num_inference_steps
        return pipeline(class_labels, guidance_scale=guidance_scale, num_inference_steps=steps, **callback).images

    wanted = ("latents", "pred_original_sample")
    images = generate(options.guidance_scale)
    images += generate(highest, callback_on_step_end=lower_guidance, callback_on_step_end_tensor_inputs=wanted)
    print(f"noise in the images, after the first and the last step: {changes[0]:.2f} and {changes[-1]:.2f}")
    print(f"guidance scale, after the first and the last step: {highest:g} and {pipeline.guidance_scale:g}")

    captions = [text for text in (f"guidance {options.guidance_scale:g}", f"{highest:g} to 1") for _ in class_labels]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, captions, columns=options.num_classes).save(options.output)
    print(f"both are in {options.output}")


if __name__ == "__main__":
    main()
