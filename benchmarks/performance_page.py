"""Writes docs/performance.md from the JSON files of benchmarks/results."""

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, write_result


PAGE = ROOT / "docs" / "performance.md"
TOLERANCE = 0.05  # relative difference of FID and class accuracy that 500 images do not show
PRECISIONS = {"no": "float32", "bf16": "bfloat16 autocast"}
INTRODUCTION = """\
# Performance

The scripts in `benchmarks/` measured these figures. `python benchmarks/performance_page.py` writes this page from
their results in `benchmarks/results`. Each table has its machine and command.

Times depend on the machine: compare ratios. Both sides of a ratio ran alternately in the same minutes, most of them in
one process. Figures are medians over all rounds, with quartiles in brackets; ratios are taken in each round. The
ceiling is the rate of the fastest of several kernels in the same run, data type and number of threads: matrix
products, inner products, and the network's own convolutions."""


def cell(value: Any) -> str:
    """A text as it is, a number with three significant digits, a spread with its quartiles if it has any."""
    if isinstance(value, Mapping):
        low, high = value["quartiles"]
        return cell(value["median"]) + (f" ({cell(low)} to {cell(high)})" if low < high else "")
    if isinstance(value, str):
        return value
    digits = 0 if isinstance(value, int) else max(0, 2 - int(f"{value:e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def percents(shares: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{100 * share:.1f} %" for name, share in shares.items()}


def table(first: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table from the cells of each column by their row; rows as in the first column, none empty."""
    filled = {title: cells for title, cells in columns.items() if cells}
    lines = [" | ".join([first, *filled]), "|".join(["---", *["---:"] * len(filled)])]
    for row in next(iter(filled.values()), {}):
        lines.append(" | ".join([row, *(cell(cells.get(row, "")) for cells in filled.values())]))
    return "\n".join(f"|{line}|" if line.startswith("---") else f"| {line} |" for line in lines)


def ceiling(found: Mapping[str, Any]) -> str:
    """The ceiling of a run; results of earlier versions have none."""
    if "ceilings" not in found:
        return ""
    return " The ceiling is {gflops:.4g} GFLOP/s ({kernel}, {cpu_capability}).".format(**found["ceilings"])


# ------------------------------------------------------------------ a section for each benchmark: its blocks


def sampling(result: dict[str, Any]) -> list[str]:
    blocks = [
        "Guided steps in {dtype}, batches of {batch_size}: both branches and the scheduler. {rounds} rounds.".format(
            **result
        )
    ]
    for recipe, found in result["recipes"].items():
        image, once = found["image"], cell(found["once_per_call_seconds"]["median"])
        columns = {
            "seconds per step": found["step_seconds"],
            "GFLOP": found["gflop_per_step"],
            "of the ceiling": percents(found.get("share_of_ceiling", {})),
            "relative time": found["ratio_to_ours"],
            f"seconds per image of {image['num_inference_steps']} steps": image["seconds_per_image"],
            "relative time per image": image["ratio_to_ours"],
        }
        blocks += [
            table(f"`{recipe}`", columns),
            f"Our first step of a call takes {once} s more. Stock diffusers is a `UNet2DModel` of as many operations,"
            " widths {block_out_channels} with {layers_per_block} layers per block.".format(**found["stock"])
            + ceiling(found),
        ]
    return blocks


def training_step(result: dict[str, Any]) -> list[str]:
    blocks = [
        "Steps of `{recipe}` with batches of {batch_size}: forward, loss, backward, AdamW. {rounds} rounds. Memory is"
        " the peak of two steps, with weights and moments.".format(**result)
    ]
    for precision, found in result["precisions"].items():
        columns = {
            "images/s": found["images_per_second"],
            "of the ceiling": percents(found.get("share_of_ceiling", {})),
            "relative time": found["ratio_to_ours"],
            "memory": {name: f"{size / 2**30:.2f} GiB" for name, size in found["peak_bytes"].items()},
        }
        blocks += [table(PRECISIONS[precision], columns), ceiling(found).strip()]
    return blocks


def training(result: dict[str, Any]) -> list[str]:
    shares = dict(sorted(result["shares"].items(), key=lambda item: -item[1]))
    shares["outside forward, backward and AdamW"] = result["share_outside_forward_backward_optimizer"]
    pace = result["pace"]
    return [
        f"Parts of {result['steps']} steps of the demo's run, {cell(result['milliseconds_per_step'])} ms each:",
        table("", {"share": percents(shares)}),
        "Beside a plain loop with the same network, loss, clipping, AdamW and EMA, in {rounds} pairs of stretches of"
        " {steps_in_a_stretch} steps: {ours_images_per_second:.0f} images/s against {plain_images_per_second:.0f},"
        " {0} times as many.".format(cell({"median": pace["ratio"], "quartiles": pace["ratio_quartiles"]}), **pace),
    ]


def evaluation(result: dict[str, Any]) -> list[str]:
    rates = {
        "generated and evaluated": result["images_per_second"],
        "the same without loading the model": result["images_per_second_without_loading"],
        "the network alone": result["images_per_second_of_the_network_alone"],
        "features alone": result["features_images_per_second"],
    }
    shares = {**result["shares"], "network, without loading": result["share_of_the_network_without_loading"]["median"]}
    return [
        "{num_images} images of {num_inference_steps} guided steps, {batch_size} at a time, by"
        " `evaluate_models.py model`. {rounds} rounds.".format(**result),
        table("", {"images/s": rates}),
        table("", {"share of the time": percents(shares)}),
    ]


def startup(result: dict[str, Any]) -> list[str]:
    return [
        f"New processes; `{result['recipe']}`, {result['file_bytes'] / 1e6:.0f} MB of weights in the page cache."
        f" {result['rounds']} rounds.",
        table("", {"seconds": result["seconds"]}),
        table("", {"ratio": result["ratios"]}),
    ]


def conversion(result: dict[str, Any]) -> list[str]:
    measured = {
        "checkpoint": f"{result['file_bytes'] / 1e6:.0f} MB",
        "conversion, with its checks": f"{result['conversion_seconds']:.2f} s",
        "peak memory": f"{result['peak_ratio_to_file']:.2f} x the file",
        "above that of the imports": f"{result['peak_ratio_to_file_above_imports']:.2f} x the file",
        "loading the folder, one step": f"{result['load_and_one_step_seconds']:.2f} s",
    }
    return [table("", {"measured": measured})]


def data(result: dict[str, Any]) -> list[str]:
    rates, ratios = result["images_per_second"], result["ratio_of_prepared_folder_to"]
    return [
        "Random batches of {batch_size} of {num_images:,} images of 64x64x3, one process:".format(**result),
        table("", {"images/s": rates, "relative speed of the prepared folder": ratios}),
    ]


def frechet(result: dict[str, Any]) -> list[str]:
    rates = result["statistics_images_per_second"]
    return [
        "The distance of two sets of {num_features} features of {num_images:,} images:".format(**result),
        table("", {"seconds": {name: ", ".join(map(cell, each)) for name, each in result["seconds"].items()}}),
        "clean-fid takes {median:.2f} times as long (smallest {smallest:.2f}, largest {largest:.2f}). The relative"
        " difference of the values is {0:.1e}.".format(
            result["relative_difference"], **result["ratio_of_clean_fid_to_ours"]
        ),
        table("", {"images/s": {f"statistics, batches of {size}": rate for size, rate in rates.items()}}),
    ]


def samplers(result: dict[str, Any]) -> list[str]:
    blocks = [
        "How many network evaluations good images need: {num_images} digits per sampler from the same noise, guidance"
        " {guidance_scale:g}, in the features of the bundled classifier. A guided step takes two evaluations, a step"
        " outside the guidance interval one. `digits` is the bundled model, `demo` that of `make demo`, trained for"
        " less than a quarter of its steps.".format(**result),
        "![FID and class accuracy over network evaluations](images/samplers.png)",
        "Heun's method, whose few steps are far apart, lies outside the panels. The fewest evaluations of each sampler"
        f" whose FID and class accuracy are within {TOLERANCE:.0%} of those of DDIM with the most steps:",
    ]
    for model in dict.fromkeys(entry["model"] for entry in result["results"]):
        own = sorted(
            (entry for entry in result["results"] if entry["model"] == model), key=lambda entry: -entry["cost"]
        )
        best = next(entry for entry in own if entry["label"] == "DDIM")
        rows = {f"DDIM, {best['num_inference_steps']} steps, for comparison": best}
        rows |= dict.fromkeys(dict.fromkeys(entry["label"] for entry in result["results"]))
        for entry in own:
            fits = entry["fid"] <= best["fid"] * (1 + TOLERANCE)
            if fits and entry["class_accuracy"] >= best["class_accuracy"] * (1 - TOLERANCE):
                rows[entry["label"]] = entry
        keys = {"steps": "num_inference_steps", "evaluations": "cost", "FID": "fid"}
        columns = {title: {label: row[key] for label, row in rows.items() if row} for title, key in keys.items()}
        columns["steps"] = {label: columns["steps"].get(label, "not reached") for label in rows}
        columns["class accuracy"] = percents({label: row["class_accuracy"] for label, row in rows.items() if row})
        blocks.append(table(f"`{model}`", columns))
    return blocks


SECTIONS = {
    "Sampling": sampling,
    "Fewer steps": samplers,
    "A training step": training_step,
    "The training loop": training,
    "Evaluating a model": evaluation,
    "Starting": startup,
    "Converting a checkpoint": conversion,
    "Reading images": data,
    "The Frechet distance": frechet,
}


def show(result: Mapping[str, Any], section: Any) -> list[str]:
    """The machine, the command and the blocks of a result, wrapped."""
    facts, threads = dict(result["machine"]), result.get("threads")
    words = [facts.pop("gpu", None), facts.pop("processor"), f"{facts.pop('cores')} cores"]
    words.append(threads and f"{threads} thread{'s' * (threads > 1)}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    head = f"{', '.join(filter(None, words))}; {versions}.  \n`{result['command']}`"
    return [head, *(block if block.startswith("|") else wrap(block) for block in section(result) if block)]


def wrap(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def make_page(folder: Path) -> str:
    """The page of the results in a folder, as `write_result` writes them."""
    blocks = [INTRODUCTION]
    for title, section in SECTIONS.items():
        files = [file for file in sorted(folder.glob("*.json")) if file.stem.partition("-")[0] == section.__name__]
        blocks += [f"## {title}"] * bool(files)
        for file in files:
            blocks += show(json.loads(file.read_text(encoding="utf-8")), section)
    return "\n\n".join(blocks) + "\n"


def publish(benchmark: str, *arguments: Any) -> None:
    """Writes a result, see `write_result`, and prints its section of the page."""
    (section,) = (each for each in SECTIONS.values() if each.__name__ == benchmark.partition("-")[0])
    print("\n\n".join(show(write_result(benchmark, *arguments), section)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(make_page(options.results_dir), encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
