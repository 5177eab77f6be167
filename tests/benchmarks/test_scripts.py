"""Every benchmark runs, in a process of its own and at tiny size, and the pages show what is committed."""

import json
import re
import runpy
import sys
from pathlib import Path

import performance_page
import pytest
import quality
import samplers
from report import RESULTS, ROOT

from imagenet64_diffusion.tests.commands.processes import run_function


# benchmark -> what it is given besides --small
SCRIPTS = {
    "conversion": ["--threads", "1"],
    "data": [],
    "evaluation": [],
    "frechet": ["--rounds", "1"],
    "samplers": ["--data", "{prepared}", "--output_dir", "{tmp_path}/evaluated"],
    "sampling": ["--config", "original/res_res_atn", "--repeats", "1"],
    "startup": [],
    "training": ["--data", "{prepared}"],
    "training_step": ["--config", "demo", "--precision", "no"],
}
# they start processes of their own, each of which imports torch, or take seconds even at tiny size
SLOW = ("conversion", "data", "evaluation", "frechet", "samplers", "sampling", "startup", "training_step")


def run(script: Path, arguments: list[str]) -> None:
    """Does what Python does with a script."""
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.soak) if name in SLOW else name for name in SCRIPTS]
)
def test_small_run(script, prepared, tmp_path):
    arguments = [word.format(prepared=prepared, tmp_path=tmp_path) for word in SCRIPTS[script]]
    arguments += ["--small", "--results_dir", str(tmp_path / "results")]
    committed = {file: file.read_bytes() for file in RESULTS.iterdir()}
    code, output = run_function(run, ROOT / "benchmarks" / f"{script}.py", arguments)
    assert code == 0, output
    assert {file: file.read_bytes() for file in RESULTS.iterdir()} == committed

    [file] = (tmp_path / "results").glob("*.json")
    result = json.loads(file.read_text())
    assert file.stem.split("-")[0] == script
    assert result["machine"]["processor"]
    assert result["command"].startswith(f"OMP_NUM_THREADS=1 python benchmarks/{script}.py ")
    assert str(ROOT) not in file.read_text()
    page = performance_page.make_page(tmp_path / "results")
    assert result["command"] in page
    assert all(line in output for line in page.splitlines() if line.startswith("|"))


def test_all_scripts_are_run():
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "def main()" in file.read_text()}
    # quality trains networks for hours, and published needs the programs of others
    assert programs - {"performance_page", "quality"} == {*SCRIPTS, "published"} == {*performance_page.SECTIONS}
    assert {file.stem.split("-")[0] for file in RESULTS.iterdir()} <= {*SCRIPTS, "quality", "published"}


def test_the_pages_show_what_is_committed():
    """They are golden answers of how figures are computed and written, too."""
    page = performance_page.PAGE.read_text(encoding="utf-8")
    assert page == performance_page.make_page(RESULTS), "run python benchmarks/performance_page.py"
    _, speed, *_ = re.split("## Speed|## Documentation", (ROOT / "README.md").read_text(encoding="utf-8"))
    figures = re.findall(r"\d[\d,.]*\d", speed)
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in page] == []
    corrections, found = (json.loads(next(RESULTS.glob(f"{name}-*")).read_text()) for name in ("quality", "samplers"))
    table = quality.make_table(corrections["results"]).join(quality.MARKS)
    assert table in quality.PAGE.read_text(encoding="utf-8"), "run python benchmarks/quality.py"
    assert {result["variant"]: result["options"] for result in corrections["results"]} == quality.VARIANTS
    assert json.loads(json.dumps([*samplers.describe(found["results"], 500)])) == found["blocks"]


def test_costs_are_over_the_last_network(monkeypatch):
    monkeypatch.setitem(quality.TRAINING, "train_batch_size", 2)
    names = list(quality.VARIANTS)
    costs = quality.relative_costs({name: quality.VARIANTS[name] for name in (names[0], names[-1])}, rounds=1)
    assert costs[names[-1]] == 1.0
    assert costs[names[0]] > 0
