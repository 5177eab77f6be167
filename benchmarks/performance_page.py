"""Writes docs/performance.md from the JSON files of benchmarks/results."""

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, write_result


PAGE = ROOT / "docs" / "performance.md"
INTRODUCTION = """\
# Performance

The scripts in `benchmarks/` measured these figures. `python benchmarks/performance_page.py` writes this page from
their results in `benchmarks/results`. Each table has its machine and command.

Times depend on the machine: compare ratios. Both sides of a ratio ran alternately in the same minutes, most of them in
one process. Figures are medians over all rounds, with quartiles in brackets; ratios are taken in each round. The
ceiling is the rate of the fastest of several kernels in the same run, data type and number of threads: matrix
products, inner products, and the network's own convolutions."""
# benchmark -> heading, in the order of the page
SECTIONS = {
    "sampling": "Sampling",
    "samplers": "Fewer steps",
    "training_step": "A training step",
    "training": "The training loop",
    "evaluation": "Evaluating a model",
    "startup": "Starting",
    "conversion": "Converting a checkpoint",
    "published": "Networks of others",
    "data": "Reading images",
    "frechet": "The Frechet distance",
}


def cell(value: Any) -> str:
    """A text as it is, a number with three significant digits, a spread with its quartiles if it has any."""
    if isinstance(value, Mapping):
        low, high = value["quartiles"]
        return cell(value["median"]) + (f" ({cell(low)} to {cell(high)})" if low < high else "")
    if isinstance(value, str):
        return value
    digits = 0 if isinstance(value, int) else max(0, 2 - int(f"{value:e}".partition("e")[2]))
    return f"{value:,.{digits}f}"


def table(first: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table from the cells of each column by their row; rows as in the first column, no column empty."""
    filled = {title: cells for title, cells in columns.items() if cells}
    rows = [[first, *filled], *([row] for row in next(iter(filled.values()), {}))]
    for row in rows[1:]:
        row += [cell(cells.get(row[0], "")) for cells in filled.values()]
    head, *lines = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, f"|---|{'---:|' * len(filled)}", *lines])


def show(result: Mapping[str, Any]) -> list[str]:
    """The machine and the command of a result, and its blocks, which are texts and tables."""
    facts, threads = dict(result["machine"]), result.get("threads")
    words = [facts.pop("gpu", None), facts.pop("processor"), f"{facts.pop('cores')} cores"]
    words.append(threads and f"{threads} thread{'s' * (threads > 1)}")
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    shown = [f"{', '.join(filter(None, words))}; {versions}.  \n`{result['command']}`"]
    for block in result["blocks"]:
        is_text = isinstance(block, str)
        shown.append(textwrap.fill(block, 119, break_on_hyphens=False) if is_text else table(*block))
    return shown


def make_page(folder: Path) -> str:
    """The page of the results in a folder, as `write_result` writes them."""
    blocks = [INTRODUCTION]
    for benchmark, title in SECTIONS.items():
        files = [file for file in sorted(folder.glob("*.json")) if file.stem.partition("-")[0] == benchmark]
        blocks += [f"## {title}"] * bool(files)
        for file in files:
            blocks += show(json.loads(file.read_text(encoding="utf-8")))
    return "\n\n".join(blocks) + "\n"


def publish(
    benchmark: str, options: argparse.Namespace, blocks: list[Any], libraries: tuple[str, ...] = (), **figures: Any
) -> None:
    """Writes a result and prints its part of the page: blocks are texts, and the two arguments of `table`."""
    print("\n\n".join(show(write_result(benchmark, options, libraries, blocks=blocks, **figures))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results_dir", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(make_page(options.results_dir), encoding="utf-8")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
