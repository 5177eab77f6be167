"""imagenet64-evaluate sweep, as its users run it."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest

from imagenet64_diffusion.evaluation import sweeping
from imagenet64_diffusion.evaluation.evaluating import Evaluation
from imagenet64_diffusion.tests.commands.evaluation_runs import (  # noqa: F401 - fixtures among them
    PIXELS,
    error_of,
    evaluate,
    files,
    model_fixture,
    reference_fixture,
    run_fixture,
    start,
)
from imagenet64_diffusion.tests.commands.processes import snapshot, wait_until
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.hub.conftest import files_under, hub, online  # noqa: F401 - fixtures
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, Repository


SWEEP = {**PIXELS, "num_images": 6, "seed": 5}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cells(folder: Path) -> dict[Path, int]:
    """The finished entries, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in (folder / "cells").glob("[!.]*.json")}


def charts(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix in (".png", ".svg")}


def pair(*names: str) -> set[str]:
    return {f"{name}.{ending}" for name in names for ending in ("png", "svg")}


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A pipeline of another training."""
    folder = tmp_path_factory.mktemp("other") / "other" / "pipelines" / "step_0000005"
    make_pipeline(stem_channels=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def swept(tmp_path_factory, run, other, reference) -> Path:
    """Three models under two samplers, killed after an entry, interrupted after another one, and resumed."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    common = {"reference": reference, "models": [run, other], "output_dir": folder, **SWEEP}
    common |= {"num_inference_steps": [2, 3], "eta": 1, "batch_size": 1}
    done: dict[Path, int] = {}
    for number, (signal_number, code) in enumerate(((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130))):
        (process,) = start(folder.parent / f"log_{number}", "sweep", **common)
        wait_until(lambda done=done: len(cells(folder)) > len(done), process)
        process.send(signal_number)
        assert process.end() == code, process.output()
        now = cells(folder)
        assert now.items() >= done.items()
        assert len(done) < len(now) < 6
        done = now
    assert evaluate("sweep", **common) == 0
    assert cells(folder).items() >= done.items()
    assert len(cells(folder)) == 6
    return folder


def test_a_sweep_is_what_its_parts_are(swept, run, other, reference, tmp_path):
    rows = table(swept)
    models = sorted([(other, "5"), *((run / "pipelines" / f"step_00000{step}", step) for step in ("10", "20"))])
    assert [(row["model"], row["step"], row["num_inference_steps"], row["eta"]) for row in rows] == [
        (str(model), step, steps, "1.0") for model, step in models for steps in ("2", "3")
    ]
    assert {row["family"] for row in rows} == {str(run), str(other.parents[1])}
    assert {row["error"] for row in rows} == {row["revision"] for row in rows} == {""}
    for number in (1, 4):
        row, folder = rows[number], tmp_path / str(number)
        sampling = {name: row[name] for name in ("model", "num_inference_steps", "eta")}
        assert evaluate("model", **SWEEP | sampling, batch_size=1, output_dir=folder) == 0
        assert evaluate("score", reference=reference, model=folder) == 0
        metrics = json.loads((folder / "scores.json").read_text())["metrics"]
        for name in ("fid", "precision", "recall", "density", "coverage"):
            assert float(row[name]) == metrics[name]
        assert float(row["kid"]) == metrics["kid"]["mean"]
    assert len({row["fid"] for row in rows}) == 6
    # charts, and nothing of the evaluations
    assert {"fid_over_steps_run.png", "fid_minima.svg", "trade_offs.png"} <= charts(swept)
    assert not list((swept / "evaluations").iterdir())


def test_shared_by_models_and_from_a_grid(swept, run, other, reference, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("- {num_inference_steps: 2, eta: 1.0}\n- num_inference_steps: 3\n  scheduler: own\n  eta: 1.0\n")
    common = {"reference": reference, "models": [run, other], "output_dir": tmp_path / "sweep", **SWEEP}
    common |= {"batch_size": 1, "grid": grid, "share": "models", "keep_features": "true"}
    # the second time one entry is missing, which leaves the other rank without any
    for number in range(2):
        for process in start(tmp_path / f"log{number}", "sweep", ranks=2, **common):
            assert process.end(100) == 0, process.output()
        assert (tmp_path / "sweep" / "results.csv").read_bytes() == (swept / "results.csv").read_bytes()
        missing = sorted((tmp_path / "sweep" / "cells").iterdir())[0]
        if number == 0:
            missing.unlink()
            shutil.rmtree(tmp_path / "sweep" / "evaluations" / missing.stem)
    kept = [Evaluation.load(folder) for folder in (tmp_path / "sweep" / "evaluations").iterdir()]
    assert [len(evaluation.features) for evaluation in kept] == [6] * 6


def test_one_that_fails_does_not_stop_the_others(run, reference, tmp_path):
    folder = tmp_path / "sweep"
    common = {"reference": reference, "models": run, "output_dir": folder, "num_inference_steps": 2, **SWEEP}
    for number, (ranks, share) in enumerate(((2, "images"), (2, "models"), (1, "images"))):
        processes = start(
            tmp_path / f"{number}", "sweep", ranks=ranks, share=share, scheduler=["LCM", "own"], **common
        )
        assert {process.end() for process in processes} == {2}, processes[0].output()
        assert f"4 evaluations, of which {2 if number else 0} are there already" in processes[0].output()
        error = error_of(processes[0])
        assert error.startswith(f"error: 2 of 4 evaluations failed, which {folder / 'results.csv'} says")
        assert "LCMScheduler cannot generate with this network" in error
        assert "error: " not in "".join(process.output() for process in processes[1:])
        rows = table(folder)
        assert ["LCMScheduler cannot" in row["error"] for row in rows] == [True, False, True, False]
        assert [row["fid"] != "" for row in rows] == [False, True, False, True]
    assert charts(folder) == pair("fid_over_steps_run")


def push(repository: Repository, folder: Path) -> str:
    """Makes a folder the content of a repository, and returns the commit."""
    content = {name: Blob((folder / name).read_bytes(), name.endswith(".safetensors")) for name in files_under(folder)}
    return repository.commit(content, f"Upload {folder.name}")


def test_what_has_changed_is_evaluated_again(online, model, run, reference, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A folder with other weights, and a Hub repository with another commit."""
    # they take most of a small sweep's time
    monkeypatch.setattr(sweeping, "make_sweep_charts", lambda rows, folder: [])

    def sweep_one(models: Path | str, name: str, there: int) -> dict[str, str]:
        common = {"reference": reference, **SWEEP, "num_inference_steps": 1}
        assert evaluate("sweep", models=models, output_dir=tmp_path / name, **common) == 0
        assert f"1 evaluations, of which {there} are there already" in capsys.readouterr().out
        (row,) = table(tmp_path / name)
        return row

    second = run / "pipelines" / "step_0000020"
    fids = {}
    for each in (model, second):
        shutil.copytree(each, tmp_path / "changing", dirs_exist_ok=True)
        fids[each] = sweep_one(tmp_path / "changing", "local", 0)["fid"]
        assert sweep_one(tmp_path / "changing", "local", 1)["fid"] == fids[each]
    assert len(set(fids.values())) == 2

    repository = online.repositories["me/tiny"] = Repository()
    # the last has the content of the first, and may be anything for all that its name says
    for number, pushed in enumerate((model, second, model)):
        commit = push(repository, pushed)
        row = sweep_one("me/tiny", "hub", 0)
        assert (row["revision"], row["fid"]) == (commit, fids[pushed])
        assert len(cells(tmp_path / "hub")) == number + 1
    # without the Hub it is the commit that was loaded last
    online.faults[("GET", "/api/models/me/tiny")] = 503
    before = snapshot(tmp_path / "hub")
    assert sweep_one("me/tiny", "hub", 1) == row
    assert snapshot(tmp_path / "hub") == before
    online.faults.clear()

    # what is pushed meanwhile is for the next call
    def push_and_evaluate(*arguments, **options):
        if len(repository.commits) == 3:
            push(repository, second)
        return evaluate_model(*arguments, **options)

    evaluate_model = sweeping.evaluate_model
    monkeypatch.setattr(sweeping, "evaluate_model", push_and_evaluate)
    row = sweep_one("me/tiny", "meanwhile", 0)
    assert (row["revision"], row["fid"]) == (commit, fids[model])
    assert sweep_one("me/tiny", "meanwhile", 0)["fid"] == fids[second]


def test_the_commit_of_an_evaluation_is_told(online, model, run, tmp_path, capsys):  # noqa: F811
    """Another commit with the same network and settings is found again, one with another network refused."""
    repository = online.repositories["me/tiny"] = Repository()
    commit = push(repository, model)
    common = {"model": "me/tiny", "output_dir": tmp_path / "out", "num_inference_steps": 1, **SWEEP}
    assert evaluate("model", **common) == 0
    assert Evaluation.load(tmp_path / "out").header["images"]["revision"] == commit
    repository.commit({**repository.files, "README.md": Blob(b"About it")}, "Say more")
    assert evaluate("model", **common) == 0
    assert "evaluated already" in capsys.readouterr().out
    push(repository, run / "pipelines" / "step_0000020")
    assert evaluate("model", **common) == 2
    assert f'{tmp_path / "out"} has an evaluation of me/tiny with weights_sha256 "' in capsys.readouterr().err


def test_charts_that_are_no_longer_made_go(swept, run, reference, tmp_path):
    """Those that a sweep has made itself, and that nobody has changed since."""
    sweep = tmp_path / "sweep"
    shutil.copytree(swept, sweep)
    # somebody's own files, by names that a sweep could give, and a chart that somebody has changed
    mine = dict.fromkeys(("fid_over_steps_mine.png", "fid_over_steps_copy.svg", "fid_minima.svg"), b"mine")
    for name, content in mine.items():
        (sweep / name).write_bytes(content)
    common = {"reference": reference, "output_dir": sweep, "num_inference_steps": 2, "eta": 1, **SWEEP}
    assert evaluate("sweep", models=run, **common) == 0
    assert charts(sweep) == pair("fid_over_steps_run") | set(mine)
    assert {name: (sweep / name).read_bytes() for name in mine} == mine
    # they go too where nothing is left to show
    assert evaluate("sweep", models=run / "pipelines" / "step_0000010", **common) == 0
    assert charts(sweep) == set(mine)


def test_wrong_sweeps(online, run, reference, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "grid.yaml").write_text("- {num_inference_step: 2}\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.csv").write_text("mine")
    by_classifier = {"protocol": "classifier", "weights": Path(sweeping.__file__).parent / "digits_classifier"}
    for changes, message in (
        ({"models": tmp_path / "empty"}, "a folder in which there is no pipeline"),
        ({"models": "no/such/folder"}, "models names no/such/folder, which is neither a folder nor a Hub id"),
        ({"models": "me/none"}, "me/none is not a folder, and cannot be loaded from the Hub"),
        ({"reference": tmp_path / "empty"}, "is not an evaluation"),
        (by_classifier, "features of different protocols cannot be compared: protocol is pixels in"),
        ({"grid": tmp_path / "grid.yaml", "eta": 1}, "grid says how images are sampled, and so does eta"),
        ({"output_dir": tmp_path / "taken"}, "which holds another results.csv"),
    ):
        common = {"reference": reference, "models": run, "output_dir": tmp_path / "sweep", **SWEEP}
        assert evaluate("sweep", **{**common, **changes}) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "sweep").exists()
    assert files(tmp_path / "taken") == ["results.csv"]
