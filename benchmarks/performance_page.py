"""Writes docs/performance.md and the figures of README.md from the JSON files of benchmarks/results."""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT
from timing import words_of


PAGE = ROOT / "docs" / "performance.md"
# how far FID and class accuracy may be from those of many steps: 500 images do not tell more apart
TOLERATED = 0.05

INTRODUCTION = """\
# Performance

The scripts in `benchmarks/` measured these figures; their results are in `benchmarks/results`, and
`python benchmarks/performance_page.py` writes this page from them. Each table names its machine and command.

Times depend on the machine; compare ratios instead. Both sides of a ratio ran in turn in the same minutes, most of
them in one process; a ratio is the median of all rounds, with its quartiles in brackets unless noted. A share of the
ceiling is a share of the operations that the fastest of several kernels did in the same run, in the same data type
and on as many threads: matrix products, inner products, and the network's own convolutions.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a Markdown table; all columns but the first are numbers."""
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "---:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def prose(text: str) -> Iterator[str]:
    """The lines of a paragraph."""
    yield from textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)
    yield ""


def number(value: float) -> str:
    """Three significant digits, without an exponent, and with commas."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    """A share, such as ``34.3 %``."""
    return f"{100 * share:.1f} %"


def ratio(spread: dict[str, Any] | None) -> str:
    """A ratio with its quartiles; 1 for the reference."""
    return "1" if spread is None else words_of(spread)


def share_of(found: dict[str, Any], name: str) -> str:
    """The share of the ceiling; empty in results of an earlier version, whose ceiling was too low."""
    return percent(found["share_of_ceiling"][name]) if "share_of_ceiling" in found else ""


def without_empty_columns(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns that no row fills."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def ceiling(found: dict[str, Any]) -> str:
    """The most that the machine did in that run."""
    return (
        f"The ceiling is {number(found['gflops'])} GFLOP/s ({found['kernel']}, {found['cpu_capability']}); memory was"
        f" copied at {number(found['copy_gbytes_per_second'])} GB/s."
    )


def sampling_section(result: dict[str, Any]) -> Iterator[str]:
    images = "1 image" if result["batch_size"] == 1 else f"{result['batch_size']} images"
    kind = f"Guided steps of {images} in {result['dtype']}"
    yield from prose(f"{kind}: both branches, and what the scheduler does with them. {result['rounds']} rounds.")
    rows, whole, notes = [], [], []
    for recipe, found in result["recipes"].items():
        for name, step in found["step_seconds"].items():
            rows.append(
                [
                    f"`{recipe}`, {name}",
                    number(step["median"]),
                    number(found["gflop_per_step"][name]),
                    share_of(found, name),
                    ratio(found["ratio_to_ours"].get(name)),
                ]
            )
        image = found["image"]
        for name, seconds in image["seconds_per_image"].items():
            words = [f"`{recipe}`, {name}", str(image["num_inference_steps"]), number(seconds["median"])]
            whole.append([*words, ratio(image["ratio_to_ours"].get(name))])
        widths = " ".join(map(str, found["stock"]["block_out_channels"]))
        notes.append(
            "The first step of a call of the pipeline takes"
            f" {number(found['once_per_call_seconds']['median'])} s more."
            f" The stock network is a `UNet2DModel` of as many operations: {widths} with"
            f" {found['stock']['layers_per_block']} layers a block."
        )
        if "ceilings" in found:
            notes[-1] += f" {ceiling(found['ceilings'])}"
    header = ["", "seconds a step", "GFLOP", "of the ceiling", "times as long as ours"]
    yield from table(*without_empty_columns(header, rows))
    for note in notes:
        yield from prose(note)
    yield from prose("Whole images by the pipeline, and by a loop around the stock network:")
    yield from table(["", "steps", "seconds an image", "times as long as ours"], whole)


def training_step_section(result: dict[str, Any]) -> Iterator[str]:
    names = {"no": "float32", "bf16": "bfloat16 autocast"}
    yield from prose(
        f"Steps of `{result['recipe']}` with batches of {result['batch_size']}: forward, loss, backward, AdamW."
        f" {result['rounds']} rounds. Memory is what two steps take at most, weights and moments included."
    )
    for precision, found in result["precisions"].items():
        rows = []
        for name, pace in found["images_per_second"].items():
            memory = found["peak_bytes"].get(name)
            rows.append(
                [
                    name,
                    number(pace["median"]),
                    share_of(found, name),
                    ratio(found["ratio_to_ours"].get(name)),
                    "" if memory is None else f"{memory / 2**30:.2f} GiB",
                ]
            )
        header = [names[precision], "images/s", "of the ceiling", "times as long as ours", "memory"]
        yield from table(*without_empty_columns(header, rows))
        if "ceilings" in found:
            yield from prose(ceiling(found["ceilings"]))


def training_section(result: dict[str, Any]) -> Iterator[str]:
    milliseconds = number(result["milliseconds_per_step"])
    yield from prose(f"Parts of {result['steps']} steps of the demo's run, {milliseconds} ms each:")
    shares = sorted(result["shares"].items(), key=lambda item: -item[1])
    outside = result["share_outside_forward_backward_optimizer"]
    rows = [[part, percent(share)] for part, share in shares]
    yield from table(["", "share"], [*rows, ["outside forward, backward and AdamW", percent(outside)]])
    pace = result["pace"]
    spread = {"median": pace["ratio"], "quartiles": pace["ratio_quartiles"]}
    yield from prose(
        f"Against a plain loop with the same network, loss, clipping, AdamW and EMA, {pace['rounds']} pairs"
        f" of stretches of {pace['steps_in_a_stretch']} steps: {number(pace['ours_images_per_second'])} images/s"
        f" against {number(pace['plain_images_per_second'])}, {words_of(spread)} times as many."
    )


def evaluation_section(result: dict[str, Any]) -> Iterator[str]:
    yield from prose(
        f"{result['num_images']} images of {result['num_inference_steps']} guided steps, {result['batch_size']} at a"
        f" time, as `evaluate_models.py model` samples and evaluates them. {result['rounds']} rounds."
    )
    rows = [
        ["sampled and evaluated", number(result["images_per_second"]["median"])],
        ["the same without loading the model", number(result["images_per_second_without_loading"]["median"])],
        ["the network alone", number(result["images_per_second_of_the_network_alone"]["median"])],
        ["features alone", number(result["features_images_per_second"]["median"])],
    ]
    yield from table(["", "images/s"], rows)
    yield from table(["", "share of the time"], [[part, percent(share)] for part, share in result["shares"].items()])
    share = result["share_of_the_network_without_loading"]
    low, high = share["quartiles"]
    yield from prose(
        f"Without loading, the network's share is {percent(share['median'])} ({percent(low)} to {percent(high)})."
    )


def startup_section(result: dict[str, Any]) -> Iterator[str]:
    yield from prose(
        f"Fresh processes; `{result['recipe']}` with {number(result['file_bytes'] / 1e6)} MB of weights in the page"
        f" cache. {result['rounds']} rounds."
    )
    rows = [[part, number(seconds["median"])] for part, seconds in result["seconds"].items()]
    yield from table(["", "seconds"], rows)
    yield from table(["", "ratio"], [[name, words_of(spread)] for name, spread in result["ratios"].items()])


def conversion_section(result: dict[str, Any]) -> Iterator[str]:
    rows = [
        ["checkpoint", f"{number(result['file_bytes'] / 1e6)} MB"],
        ["conversion, with its checks", f"{number(result['conversion_seconds'])} s"],
        ["peak memory", f"{result['peak_ratio_to_file']:.2f} x the file"],
        ["above what the imports take", f"{result['peak_ratio_to_file_above_imports']:.2f} x the file"],
        ["loading the folder, one step", f"{number(result['load_and_one_step_seconds'])} s"],
    ]
    yield from table(["", "measured"], rows)


def data_section(result: dict[str, Any]) -> Iterator[str]:
    yield from prose(
        f"Random batches of {result['batch_size']} of {result['num_images']:,} images of 64x64x3, one process:"
    )
    ratios = result["ratio_of_prepared_folder_to"]
    rows = [[name, f"{rate:,}", f"{ratios[name]:.2f}"] for name, rate in result["images_per_second"].items()]
    yield from table(["", "images/s", "the prepared folder is so many times as fast"], rows)


def frechet_section(result: dict[str, Any]) -> Iterator[str]:
    yield from prose(
        f"The distance of two sets of {result['num_features']} features of {result['num_images']:,} images:"
    )
    rows = [[name, ", ".join(map(number, seconds))] for name, seconds in result["seconds"].items()]
    yield from table(["", "seconds of each round"], rows)
    found = result["ratio_of_clean_fid_to_ours"]
    yield from prose(
        f"clean-fid's takes {found['median']:.2f} times as long (smallest {found['smallest']:.2f}, largest"
        f" {found['largest']:.2f}), and the values differ by {result['relative_difference']:.1e} of their size."
    )
    rates = result["statistics_images_per_second"].items()
    rows = [[f"statistics, batches of {size}", f"{rate:,}"] for size, rate in rates]
    yield from table(["", "images/s"], rows)


def samplers_section(result: dict[str, Any]) -> Iterator[str]:
    guidance = f"guidance {result['guidance_scale']:g}"
    yield from prose(
        f"How many evaluations of the network good images take: {result['num_images']} digits of each sampler from the"
        f" same starting noise, {guidance}, in the features of the classifier that comes along. A guided step takes"
        " two evaluations, one outside the guidance interval one. `digits` is the model that travels with the package,"
        " `demo` that of `make demo`, trained for less than a quarter of its steps."
    )
    yield from ["![FID and class accuracy over evaluations of the network](images/samplers.png)", ""]
    yield from prose(
        "Heun's method, whose few steps are far apart, lies outside the panels. For each sampler the fewest"
        " evaluations whose FID and class accuracy are within"
        f" {percent(TOLERATED)} of those of DDIM with the most steps:"
    )
    results = result["results"]
    for model in dict.fromkeys(entry["model"] for entry in results):
        own = [entry for entry in results if entry["model"] == model]
        best = max((entry for entry in own if entry["label"] == "DDIM"), key=lambda entry: entry["cost"])
        rows = [_sampler_row(f"DDIM, {best['num_inference_steps']} steps, for comparison", best)]
        for label in dict.fromkeys(entry["label"] for entry in own):
            enough = [entry for entry in own if entry["label"] == label and is_as_good(entry, best)]
            if enough:
                rows.append(_sampler_row(label, min(enough, key=lambda entry: entry["cost"])))
            else:
                rows.append([label, "not reached", "", "", ""])
        yield from table([f"`{model}`", "steps", "evaluations", "FID", "class accuracy"], rows)


def is_as_good(entry: dict[str, Any], best: dict[str, Any]) -> bool:
    """Whether a sampler's FID and class accuracy are those of another, within `TOLERATED`."""
    good_fid = entry["fid"] <= best["fid"] * (1 + TOLERATED)
    return good_fid and entry["class_accuracy"] >= best["class_accuracy"] * (1 - TOLERATED)


def _sampler_row(label: str, entry: dict[str, Any]) -> list[str]:
    figures = [f"{entry['fid']:.2f}", percent(entry["class_accuracy"])]
    return [label, str(entry["num_inference_steps"]), str(entry["cost"]), *figures]


# benchmark -> title, and what makes its lines
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[str]]]] = {
    "sampling": ("Sampling", sampling_section),
    "samplers": ("Fewer steps", samplers_section),
    "training_step": ("A training step", training_step_section),
    "training": ("The training loop", training_section),
    "evaluation": ("Evaluating a model", evaluation_section),
    "startup": ("Starting", startup_section),
    "conversion": ("Converting a checkpoint", conversion_section),
    "data": ("Reading images", data_section),
    "frechet": ("The Frechet distance", frechet_section),
}

# what is not about speed
ON_OTHER_PAGES = ("quality",)


def machine(result: dict[str, Any], benchmark: str) -> str:
    """The machine and the command of a result."""
    facts = dict(result["machine"])
    cores = f"{facts.pop('cores')} cores"
    threads = result.get("threads")
    words = [facts.pop("gpu", None), facts.pop("processor"), cores, threads and f"{threads} threads"]
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    words = ", ".join(word for word in words if word).replace(" 1 threads", " 1 thread")
    return f"{words}; {versions}.  \n`{result.get('command', f'python benchmarks/{benchmark}.py')}`"


def make_page(folder: Path) -> str:
    """The page of the results in a folder.

    Args:
        folder: With files ``{benchmark}-{...}.json``, as `report.write_result` writes them.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.json")):
        files.setdefault(file.stem.partition("-")[0], []).append(file)
    lines = [INTRODUCTION]
    for benchmark, (title, section) in SECTIONS.items():
        if benchmark not in files:
            continue
        lines += [f"## {title}", ""]
        for file in files.pop(benchmark):
            result = json.loads(file.read_text(encoding="utf-8"))
            lines += [machine(result, benchmark), "", *section(result)]
    for benchmark in ON_OTHER_PAGES:
        files.pop(benchmark, None)
    if files:
        lines += ["## What else was measured", ""]
        lines += [f"- `benchmarks/results/{file.name}`" for group in files.values() for file in group]
    return "\n".join(lines).rstrip() + "\n"


README = ROOT / "README.md"
BEGIN, END = "<!-- figures of benchmarks/performance_page.py -->\n", "<!-- end of the figures -->\n"


def readme_figures(folder: Path = RESULTS) -> str:
    """The paragraph between the two marks of README.md."""

    def read(benchmark: str) -> dict[str, Any]:
        return json.loads(min(folder.glob(f"{benchmark}-*.json")).read_text(encoding="utf-8"))

    sampling, training = read("sampling-float32-batch1-original_res_res"), read("training")
    conversion, data = read("conversion"), read("data")
    found = sampling["recipes"]["original/res_res"]
    share = found.get("share_of_ceiling", {}).get("ours")
    words = (
        f"On {sampling['machine']['cores']} cores of an {sampling['machine']['processor']}, a guided step of the"
        f" original's `res_res` takes {found['step_seconds']['ours']['median']:.1f} s. A stock diffusers U-Net"
        f" of as many operations takes {found['ratio_to_ours']['stock diffusers']['median']:.2f} times as long."
        + (f" Ours is at {percent(share)} of the fastest kernel's rate." if share else "")
        + f" The training loop runs at {training['pace']['ratio']:.2f} times the images per second of a plain loop. A"
        f" checkpoint of {conversion['file_bytes'] / 1e6:.0f} MB is converted in"
        f" {conversion['conversion_seconds']:.0f} s. A prepared folder gives"
        f" {round(data['images_per_second']['prepared folder'], -3):,} random images per second."
    )
    return "\n".join(prose(words))


def split_readme(text: str) -> tuple[str, str, str]:
    """The README before its figures, they themselves, and the rest."""
    before, _, rest = text.partition(BEGIN)
    figures, _, after = rest.partition(END)
    return before + BEGIN, figures, END + after


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(make_page(options.results_dir), encoding="utf-8")
    if options.output == PAGE:
        before, _, after = split_readme(README.read_text(encoding="utf-8"))
        README.write_text(before + readme_figures(options.results_dir) + after, encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
