"""Every benchmark runs, in a process of its own and at tiny size, and what it writes is on the page."""

import json
import multiprocessing
import os
import runpy
import sys
from pathlib import Path

import performance_page
import pytest
from report import RESULTS, ROOT

# its server of processes has imported what takes longer than the runs
import imagenet64_diffusion.tests.commands.training_runs  # noqa: F401


_CONTEXT = multiprocessing.get_context("forkserver")
# benchmark -> what it is given besides --small
SCRIPTS = {
    "conversion": ["--threads", "1"],
    "data": [],
    "evaluation": [],
    "frechet": ["--rounds", "1"],
    "samplers": [],
    "sampling": ["--config", "original/res_res_atn", "--repeats", "1"],
    "startup": [],
    "training": [],
    "training_step": ["--config", "demo", "--precision", "no"],
}


def _run(script: Path, arguments: list[str], log: Path) -> None:
    """Does what Python does with a script."""
    import torch

    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")


# these start many processes of their own
SLOW = ("conversion", "samplers", "startup", "training_step")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.soak) if name in SLOW else name for name in SCRIPTS]
)
def test_small_run(script, prepared, tmp_path):
    arguments = [*SCRIPTS[script], "--small", "--results_dir", str(tmp_path / "results")]
    if script in ("training", "samplers"):
        arguments += ["--data", str(prepared)]
    if script == "samplers":
        arguments += ["--output_dir", str(tmp_path / "measured")]
    committed = {file: file.read_bytes() for file in RESULTS.iterdir()}
    log = tmp_path / "log.txt"
    process = _CONTEXT.Process(target=_run, args=(ROOT / "benchmarks" / f"{script}.py", arguments, log))
    process.start()
    process.join(200)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0, log.read_text(errors="replace")
    assert {file: file.read_bytes() for file in RESULTS.iterdir()} == committed

    [file] = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert file.stem.split("-")[0] == script
    assert result["machine"]["processor"]
    assert result["command"].split("=1 ")[-1].startswith(f"python benchmarks/{script}.py ")
    assert str(ROOT) not in file.read_text()
    page = performance_page.make_page(tmp_path / "results")
    assert f"## {performance_page.SECTIONS[script][0]}\n" in page
    assert result["command"] in page


def test_all_scripts_are_run():
    programs = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "def main()" in file.read_text()}
    # quality trains networks for hours
    assert programs - {"performance_page", "quality"} == {*SCRIPTS} == {*performance_page.SECTIONS}


def test_the_page_shows_what_is_committed():
    page = performance_page.PAGE.read_text(encoding="utf-8")
    assert page == performance_page.make_page(RESULTS), "run python benchmarks/performance_page.py"


def test_the_readme_shows_what_is_committed():
    figures = performance_page.split_readme(performance_page.README.read_text(encoding="utf-8"))[1]
    assert figures == performance_page.readme_figures(), "run python benchmarks/performance_page.py"


def test_results_without_a_section_are_named(tmp_path):
    (tmp_path / "unheard-of-amd-epyc.json").write_text("{}")
    assert "- `benchmarks/results/unheard-of-amd-epyc.json`" in performance_page.make_page(tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.01234, "0.0123"), (0.5, "0.500"), (12.34, "12.3"), (123.4, "123"), (1e6, "1,000,000")],
)
def test_numbers(value, words):
    assert performance_page.number(value) == words
