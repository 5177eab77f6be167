"""The page about the corrections shows what was measured."""

import json

import pytest
import quality
from report import RESULTS


RESULT_FILES = sorted(RESULTS.glob("quality-*.json"))


def test_the_table_is_that_of_the_committed_figures():
    [file] = RESULT_FILES
    rows = "\n".join(quality.table(json.loads(file.read_text(encoding="utf-8"))["results"]))
    page = quality.PAGE.read_text(encoding="utf-8")
    assert f"{quality.BEGIN}\n{rows}\n{quality.END}" in page, "run python benchmarks/quality.py"


def test_all_variants_are_in_it():
    [file] = RESULT_FILES
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [result["variant"] for result in results] == [variant.name for variant in quality.variants()]
    for result in results:
        assert len(result["same_steps"]) == len(result["same_seconds"]) == 2


def test_means_and_ranges():
    runs = [
        {"class_accuracy": accuracy, "fid": fid, "precision": 0.25, "recall": 0.75}
        for accuracy, fid in ((0.25, 1.0), (0.75, 4.0))
    ]
    result = {"variant": "x", "same_steps": runs, "same_seconds": runs[:1], "relative_cost": 1.5}
    [*_, row] = quality.table([result])
    assert row == "| x | 0.500 | 2.50 (1.00 to 4.00) | 0.250 | 0.750 | 1.50 | 1.00 (1.00 to 1.00) |"


def test_the_table_goes_between_the_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{quality.BEGIN}\nold\n{quality.END}\n\nafter\n")
    quality.write_table([], page)
    heading = "\n".join(quality.table([]))
    assert page.read_text() == f"before\n\n{quality.BEGIN}\n{heading}\n{quality.END}\n\nafter\n"


def test_costs_are_over_the_last_network():
    variants = quality.variants()
    first, last = variants[0], variants[-1]
    costs = quality.relative_costs([first, last], rounds=1)
    assert costs[last.name] == pytest.approx(1.0)
    assert costs[first.name] > 0
