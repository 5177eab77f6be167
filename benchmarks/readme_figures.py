"""Writes the figures of README.md, between its two marks, from the JSON files of benchmarks/results."""

import json
import textwrap
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT


README = ROOT / "README.md"
BEGIN, END = "<!-- figures: python benchmarks/readme_figures.py -->\n", "<!-- end of the figures -->\n"
RECIPE = "original/res_res"
QUICK = "ours, UniPC, 6 steps, first half guided"


def read(folder: Path, benchmark: str) -> dict[str, Any]:
    """The result of a benchmark; the first one where there are several machines."""
    return json.loads(min(folder.glob(f"{benchmark}-*.json")).read_text(encoding="utf-8"))


def make_figures(folder: Path = RESULTS) -> str:
    """The paragraph.

    Args:
        folder: With the results.
    """
    sampling = read(folder, f"sampling-float32-batch1-{RECIPE.replace('/', '_')}")
    found = sampling["recipes"][RECIPE]
    ratios = {name: f"{ratio['median']:.2f}" for name, ratio in found["ratio_to_ours"].items()}
    seconds, share = found["step_seconds"]["ours"]["median"], found["share_of_matrix_products"]["ours"]
    machine = f"{sampling['machine']['cores']} cores of an {sampling['machine']['processor']}"
    quick, training = read(folder, "quick_image"), read(folder, "training")
    conversion, data = read(folder, "conversion"), read(folder, "data")
    words = (
        f"A guided step of the original's full-size `res_res` network took {seconds:.1f} s on {machine},"
        f" {ratios['plain layers']} times less than the original's way of computing it and {ratios['stock diffusers']}"
        f" times less than a stock diffusers U-Net of as many operations: {100 * share:.0f} % of the matrix"
        f" products that the machine can do. An image of `{quick['recipe']}` by the quick setting took"
        f" {quick['seconds_per_image'][QUICK]['median']:.0f} s, {quick['times_as_fast'][QUICK]['median']:.0f} times"
        " less than 100 steps of DDIM by the original's way. The training loop is level with a plain one"
        f" ({training['pace']['ratio']:.2f} times its images per second). A checkpoint of"
        f" {conversion['file_bytes'] / 1e6:.0f} MB is converted in {conversion['conversion_seconds']:.0f} s with"
        f" {conversion['peak_ratio_to_file']:.1f} times its size in memory, and a prepared folder gives"
        f" {round(data['images_per_second']['prepared folder'], -3):,} images/s."
        " [docs/performance.md](docs/performance.md) has every figure with its machine and command."
    )
    return "\n".join(textwrap.wrap(words, 119, break_long_words=False, break_on_hyphens=False)) + "\n"


def parts(text: str) -> tuple[str, str, str]:
    """The README before its figures, they themselves, and the rest.

    Raises:
        ValueError: If the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    figures, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has no {BEGIN.strip()} followed by {END.strip()}")
    return before + begin, figures, end + after


def main() -> None:
    """The command line."""
    before, _, after = parts(README.read_text(encoding="utf-8"))
    README.write_text(before + make_figures() + after, encoding="utf-8")
    print(f"written to {README}")


if __name__ == "__main__":
    main()
