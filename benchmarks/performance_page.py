"""Writes docs/performance.md from the JSON files of benchmarks/results."""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
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
    """A Markdown table from the cells of each column by their row; rows as in the first column, no column empty."""
    filled = {title: cells for title, cells in columns.items() if cells}
    rows = [[first, *filled], *([row] for row in next(iter(filled.values()), {}))]
    for row in rows[1:]:
        row += [cell(cells.get(row[0], "")) for cells in filled.values()]
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|---|{'---:|' * len(filled)}", *lines])


def ceiling(found: Mapping[str, Any]) -> str:
    """The ceiling of a run; results of earlier versions have none."""
    words = "The ceiling is {gflops:.4g} GFLOP/s ({kernel}, {cpu_capability})."
    return words.format(**found["ceilings"]) if "ceilings" in found else ""


# ------------------------------------------------------------------ a section for each benchmark: its blocks


def sampling(result: dict[str, Any]) -> Iterator[str]:
    yield "Guided steps in {dtype}, batches of {batch_size}: both branches and the scheduler. {rounds} rounds."
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
        yield table(f"`{recipe}`", columns)
        yield (
            f"Our first step of a call takes {once} s more. Stock diffusers is a `UNet2DModel` of as many operations,"
            " widths {block_out_channels} with {layers_per_block} layers per block.".format(**found["stock"])
        )
        yield ceiling(found)


def training_step(result: dict[str, Any]) -> Iterator[str]:
    yield (
        "Steps of `{recipe}` with batches of {batch_size}: forward, loss, backward, AdamW. {rounds} rounds. Memory is"
        " the peak of two steps, with weights and moments."
    )
    for precision, found in result["precisions"].items():
        columns = {
            "images/s": found["images_per_second"],
            "of the ceiling": percents(found.get("share_of_ceiling", {})),
            "relative time": found["ratio_to_ours"],
            "memory": {name: f"{size / 2**30:.2f} GiB" for name, size in found["peak_bytes"].items()},
        }
        yield table(PRECISIONS[precision], columns)
        yield ceiling(found)


def training(result: dict[str, Any]) -> Iterator[str]:
    shares = dict(sorted(result["shares"].items(), key=lambda item: -item[1]))
    shares["outside forward, backward and AdamW"] = result["share_outside_forward_backward_optimizer"]
    pace = result["pace"]
    ratio = cell({"median": pace["ratio"], "quartiles": pace["ratio_quartiles"]})
    yield f"Parts of {{steps}} steps of the demo's run, {cell(result['milliseconds_per_step'])} ms each:"
    yield table("", {"share": percents(shares)})
    yield (
        "Beside a plain loop with the same network, loss, clipping, AdamW and EMA, in {rounds} pairs of stretches of"
        " {steps_in_a_stretch} steps: {ours_images_per_second:.0f} images/s against {plain_images_per_second:.0f},"
        " {0} times as many.".format(ratio, **pace)
    )


def evaluation(result: dict[str, Any]) -> Iterator[str]:
    yield (
        "{num_images} images of {num_inference_steps} guided steps, {batch_size} at a time, by"
        " `evaluate_models.py model`. {rounds} rounds."
    )
    rates = {
        "generated and evaluated": result["images_per_second"],
        "the network alone": result["images_per_second_of_the_network_alone"],
        "features alone": result["features_images_per_second"],
    }
    yield table("", {"images/s": rates})
    yield table("", {"share of the time": percents(result["shares"])})


def startup(result: dict[str, Any]) -> Iterator[str]:
    size = f"{result['file_bytes'] / 1e6:.0f} MB"
    yield f"New processes; `{{recipe}}`, {size} of weights in the page cache. {{rounds}} rounds."
    yield table("", {"seconds": result["seconds"]})
    yield table("", {"ratio": result["ratios"]})


def conversion(result: dict[str, Any]) -> Iterator[str]:
    measured = {
        "checkpoint": f"{result['file_bytes'] / 1e6:.0f} MB",
        "conversion, with its checks": f"{result['conversion_seconds']:.2f} s",
        "peak memory": f"{result['peak_ratio_to_file']:.2f} x the file",
        "above that of the imports": f"{result['peak_ratio_to_file_above_imports']:.2f} x the file",
        "loading the folder, one step": f"{result['load_and_one_step_seconds']:.2f} s",
    }
    yield table("", {"measured": measured})


def data(result: dict[str, Any]) -> Iterator[str]:
    rates, ratios = result["images_per_second"], result["ratio_of_prepared_folder_to"]
    yield "Random batches of {batch_size} of {num_images:,} images of 64x64x3, one process:"
    yield table("", {"images/s": rates, "relative speed of the prepared folder": ratios})


def frechet(result: dict[str, Any]) -> Iterator[str]:
    yield "The distance of two sets of {num_features} features of {num_images:,} images:"
    yield table("", {"seconds": {name: ", ".join(map(cell, each)) for name, each in result["seconds"].items()}})
    yield (
        "clean-fid takes {ratio_of_clean_fid_to_ours[median]:.2f} times as long (smallest"
        " {ratio_of_clean_fid_to_ours[smallest]:.2f}, largest {ratio_of_clean_fid_to_ours[largest]:.2f}). The relative"
        " difference of the values is {relative_difference:.1e}."
    )


def samplers(result: dict[str, Any]) -> Iterator[str]:
    yield (
        "How many network evaluations good images need: {num_images} digits per sampler from the same noise, guidance"
        " {guidance_scale:g}, in the features of the bundled classifier. A guided step takes two evaluations, a step"
        " outside the guidance interval one. `digits` is the bundled model, `demo` that of `make demo`, trained for"
        " less than a quarter of its steps."
    )
    yield "![FID and class accuracy over network evaluations](images/samplers.png)"
    yield (
        "Heun's method, whose few steps are far apart, lies outside the panels. The fewest evaluations of each sampler"
        f" whose FID and class accuracy are within {TOLERANCE:.0%} of those of DDIM with the most steps, if any are:"
    )
    for model in dict.fromkeys(entry["model"] for entry in result["results"]):
        own = [entry for entry in result["results"] if entry["model"] == model]
        best = max((entry for entry in own if entry["label"] == "DDIM"), key=lambda entry: entry["cost"])
        rows = {f"DDIM, {best['num_inference_steps']} steps, for comparison": best}
        for entry in sorted(own, key=lambda entry: entry["cost"]):
            fits = entry["fid"] <= best["fid"] * (1 + TOLERANCE)
            if fits and entry["class_accuracy"] >= best["class_accuracy"] * (1 - TOLERANCE):
                rows.setdefault(entry["label"], entry)
        keys = {"steps": "num_inference_steps", "evaluations": "cost", "FID": "fid"}
        columns = {title: {label: row[key] for label, row in rows.items()} for title, key in keys.items()}
        columns["class accuracy"] = percents({label: row["class_accuracy"] for label, row in rows.items()})
        yield table(f"`{model}`", columns)


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


def show(result: Mapping[str, Any], section: Callable[[Mapping[str, Any]], Iterator[str]]) -> list[str]:
    """The machine, the command and the blocks of a result; in texts the figures of the result are filled in."""
    facts, threads = dict(result["machine"]), result.get("threads")
    words = [facts.pop("gpu", None), facts.pop("processor"), f"{facts.pop('cores')} cores"]
    words.append(threads and f"{threads} thread{'s' * (threads > 1)}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    blocks = [f"{', '.join(filter(None, words))}; {versions}.  \n`{result['command']}`"]
    for block in filter(None, section(result)):
        if not block.startswith("|"):
            block = textwrap.fill(block.format(**result), 119, break_long_words=False, break_on_hyphens=False)
        blocks.append(block)
    return blocks


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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(make_page(options.results_dir), encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
