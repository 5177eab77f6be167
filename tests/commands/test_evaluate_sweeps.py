"""imagenet64-evaluate sweep, as its users run it."""

import csv
import json
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from imagenet64_diffusion.evaluation.evaluation_folder import Evaluation
from imagenet64_diffusion.evaluation.options import SweepOptions
from imagenet64_diffusion.evaluation.sweeping import Sweep
from imagenet64_diffusion.tests.commands.evaluation_runs import (  # noqa: F401 - fixtures among them
    EvaluationProcess,
    classifier_fixture,
    evaluate,
    files,
    model_fixture,
    reference_fixture,
    run_fixture,
    to_arguments,
    together,
)
from imagenet64_diffusion.tests.commands.processes import snapshot, wait_until
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.hub.conftest import files_under, hub, online  # noqa: F401 - fixtures
from imagenet64_diffusion.tests.hub.loopback_hub import Blob, LoopbackHub, Repository


SWEEP = {"protocol": "pixels", "num_images": 12, "device": "cpu", "batch_size": 12, "seed": 5}


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cells(folder: Path) -> dict[Path, int]:
    """The finished entries, and when they were written."""
    return {file: file.stat().st_mtime_ns for file in (folder / "cells").glob("[!.]*.json")}


@pytest.fixture(scope="module")
def models(run, tmp_path_factory) -> list[Path]:
    """Three pipelines of two trainings: a folder that stands for two of them, and a third one."""
    third = tmp_path_factory.mktemp("other") / "other" / "pipelines" / "step_0000005"
    make_pipeline(stem_channels=16).save_pretrained(third)
    return [run, third]


@pytest.fixture(scope="module")
def swept(tmp_path_factory, models, reference) -> Path:
    """Three models under four samplers, killed after some entries, interrupted after more, and resumed."""
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    common = {"reference": reference, "models": models, "output_dir": folder, **SWEEP}
    common |= {"num_inference_steps": [2, 3], "eta": [0, 1]}
    done: dict[Path, int] = {}
    for number, (signal_number, code) in enumerate(((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130))):
        process = EvaluationProcess(to_arguments("sweep", **common), folder.parent / f"log_{number}.txt")
        wait_until(lambda done=done: len(cells(folder)) >= len(done) + 2, process)
        process.send(signal_number)
        assert process.end() == code, process.output()
        now = cells(folder)
        assert now.items() >= done.items()
        assert len(done) + 2 <= len(now) < 12
        done = now
    assert evaluate("sweep", **common) == 0
    assert cells(folder).items() >= done.items()
    assert len(cells(folder)) == 12
    return folder


def test_a_sweep_is_what_its_parts_are(swept, run, models, reference, tmp_path):
    rows = table(swept)
    assert [(row["model"], row["step"], row["num_inference_steps"], row["eta"]) for row in rows] == [
        (str(model), step, steps, eta)
        for model, step in sorted(
            [
                (models[1], "5"),
                (run / "pipelines" / "step_0000010", "10"),
                (run / "pipelines" / "step_0000020", "20"),
            ]
        )
        for steps in ("2", "3")
        for eta in ("0.0", "1.0")
    ]
    assert {row["family"] for row in rows} == {str(run), str(models[1].parents[1])}
    assert {row["error"] for row in rows} == {row["revision"] for row in rows} == {""}
    for number in (1, 6, 11):
        row, folder = rows[number], tmp_path / str(number)
        sampling = {name: row[name] for name in ("model", "num_inference_steps", "eta")}
        assert evaluate("model", **SWEEP, **sampling, output_dir=folder) == 0
        assert evaluate("score", reference=reference, model=folder) == 0
        metrics = json.loads((folder / "scores.json").read_text())["metrics"]
        for name in ("fid", "precision", "recall", "density", "coverage"):
            assert float(row[name]) == metrics[name]
        assert float(row["kid"]) == metrics["kid"]["mean"]
    assert len({row["fid"] for row in rows}) == 12
    # charts, and nothing of the evaluations
    names = {path.name for path in swept.iterdir()}
    assert {"fid_over_steps_run.png", "fid_over_steps_run.svg", "fid_minima.png", "results.csv"} <= names
    assert not list((swept / "evaluations").iterdir())


def test_shared_by_models_and_from_a_grid(swept, models, reference, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "- {num_inference_steps: 2}\n- {num_inference_steps: 2, eta: 1.0}\n"
        "- num_inference_steps: 3\n  scheduler: own\n- {num_inference_steps: 3, eta: 1.0}\n"
    )
    common = {"reference": reference, "models": models, "output_dir": tmp_path / "sweep", **SWEEP}
    common["grid"] = grid
    for process in together(to_arguments("sweep", share="models", **common), 2, tmp_path / "log"):
        assert process.end() == 0, process.output()
    assert (tmp_path / "sweep" / "results.csv").read_bytes() == (swept / "results.csv").read_bytes()


def test_one_that_fails_does_not_stop_the_others(run, reference, tmp_path):
    common = {"reference": reference, "models": run, "output_dir": tmp_path / "sweep", "num_inference_steps": 2}
    common |= SWEEP | {"num_images": 8}
    arguments = to_arguments("sweep", scheduler=["LCM", "own"], **common)
    for number, processes in enumerate((2, 1)):
        processes = together(arguments, processes, tmp_path / f"log_{number}")
        assert {process.end() for process in processes} == {2}, processes[0].output()
        assert f"4 evaluations, of which {2 * number} are there already" in processes[0].output()
        (error,) = [line for process in processes for line in process.errors() if line.startswith("error")]
        assert error.startswith(f"error: 2 of 4 evaluations failed, which {tmp_path / 'sweep' / 'results.csv'} says")
        assert "LCMScheduler cannot generate with this network" in error
        rows = table(tmp_path / "sweep")
        assert ["LCMScheduler cannot" in row["error"] for row in rows] == [True, False, True, False]
        assert [row["fid"] != "" for row in rows] == [False, True, False, True]
        assert (tmp_path / "sweep" / "fid_over_steps_run.png").is_file()


def test_changed_weights_are_evaluated_again(model, reference, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    common = {"reference": reference, "models": tmp_path / "model", "output_dir": tmp_path / "sweep", **SWEEP}
    common |= {"num_images": 4, "num_inference_steps": 1}
    assert evaluate("sweep", **common) == 0
    (before,) = table(tmp_path / "sweep")
    assert evaluate("sweep", **common) == 0
    assert "1 evaluations, of which 1 are there already" in capsys.readouterr().out
    make_pipeline(class_embed_dim=8).save_pretrained(tmp_path / "model")
    assert evaluate("sweep", **common) == 0
    (after,) = table(tmp_path / "sweep")
    assert after["fid"] != before["fid"]


def push(repository: Repository, folder: Path) -> str:
    """Makes a folder the content of a repository, and returns the commit."""
    names = files_under(folder)
    content = {name: Blob((folder / name).read_bytes(), name.endswith(".safetensors")) for name in names}
    return repository.commit(content, f"Upload {folder.name}")


def test_a_changed_hub_repository_is_evaluated_again(
    online: LoopbackHub,  # noqa: F811
    model,
    run,
    reference,
    tmp_path,
    capsys,
):
    first, second = model, run / "pipelines" / "step_0000020"
    repository = online.repositories["me/tiny"] = Repository()
    common = {"reference": reference, "output_dir": tmp_path / "sweep", **SWEEP}
    common |= {"num_images": 4, "num_inference_steps": [1, 2]}
    on_the_hub = {"models": "me/tiny", **common}

    def fids(folder: Path) -> list[str]:
        output_dir = tmp_path / f"{folder.name}_sweep"
        assert evaluate("sweep", **{**common, "models": folder, "output_dir": output_dir}) == 0
        capsys.readouterr()
        return [row["fid"] for row in table(output_dir)]

    expected = {first: fids(first), second: fids(second)}
    assert not set(expected[first]) & set(expected[second])
    done = 0
    # the last has the content of the first, and may be anything for all that its name says
    for pushed in (first, second, first):
        commit = push(repository, pushed)
        if pushed == second:
            # left by a call that was stopped: one entry of the other commit
            next(iter(cells(tmp_path / "sweep"))).unlink()
            done -= 1
        assert evaluate("sweep", **on_the_hub) == 0
        assert "2 evaluations, of which 0 are there already" in capsys.readouterr().out
        rows = table(tmp_path / "sweep")
        assert [row["revision"] for row in rows] == [commit, commit]
        assert [row["fid"] for row in rows] == expected[pushed]
        done += 2
        assert len(cells(tmp_path / "sweep")) == done
        assert evaluate("sweep", **on_the_hub) == 0
        assert "2 evaluations, of which 2 are there already" in capsys.readouterr().out

    # without the Hub it is the commit that was loaded last
    online.faults[("GET", "/api/models/me/tiny")] = 503
    before = snapshot(tmp_path / "sweep")
    assert evaluate("sweep", **on_the_hub) == 0
    assert "2 evaluations, of which 2 are there already" in capsys.readouterr().out
    assert table(tmp_path / "sweep") == rows
    assert snapshot(tmp_path / "sweep") == before
    # and one that there is not at all is said before anything is evaluated
    assert evaluate("sweep", **{**common, "models": "me/none", "output_dir": tmp_path / "none"}) == 2
    error = capsys.readouterr().err
    assert "error: me/none is not a folder, and cannot be loaded from the Hub: there is" in error
    assert not (tmp_path / "none").exists()


def test_what_is_pushed_meanwhile_is_for_the_next_call(online, model, run, reference, tmp_path):  # noqa: F811
    repository = online.repositories["me/tiny"] = Repository()
    first = push(repository, model)
    common = {"reference": str(reference), "num_inference_steps": [1], **SWEEP, "num_images": 4}
    running = Sweep(
        SweepOptions(models=["me/tiny"], output_dir=str(tmp_path / "sweep"), **common), PartialState(cpu=True)
    )
    second = push(repository, run / "pipelines" / "step_0000020")
    running.prepare_folder()
    running.evaluate_missing()
    assert evaluate("sweep", models=model, output_dir=tmp_path / "first", **common) == 0
    (row,), (expected,) = table(tmp_path / "sweep"), table(tmp_path / "first")
    assert (row["revision"], row["fid"]) == (first, expected["fid"])
    assert evaluate("sweep", models="me/tiny", output_dir=tmp_path / "sweep", **common) == 0
    (row,) = table(tmp_path / "sweep")
    assert row["revision"] == second
    assert row["fid"] != expected["fid"]


def test_the_commit_of_an_evaluation_is_told(online: LoopbackHub, model, tmp_path, capsys):  # noqa: F811
    """Another commit with the same network and settings is found again, one with another network refused."""
    repository = online.repositories["me/tiny"] = Repository()
    commit = push(repository, model)
    common = {"model": "me/tiny", "output_dir": tmp_path / "out", "num_inference_steps": 1}
    common |= {"protocol": "pixels", "num_images": 3, "device": "cpu"}
    assert evaluate("model", **common) == 0
    assert Evaluation.load(tmp_path / "out").header["images"]["revision"] == commit
    repository.commit({**repository.files, "README.md": Blob(b"About it")}, "Say more")
    assert evaluate("model", **common) == 0
    assert "evaluated already" in capsys.readouterr().out
    pipeline = make_pipeline()
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1e-3)
    pipeline.save_pretrained(tmp_path / "changed")
    push(repository, tmp_path / "changed")
    assert evaluate("model", **common) == 2
    assert f'{tmp_path / "out"} has an evaluation of me/tiny with weights_sha256 "' in capsys.readouterr().err


def test_charts_that_are_no_longer_made_go(run, reference, tmp_path):
    """Those that a sweep has made itself, and that nobody has changed since."""
    other = tmp_path / "other"
    shutil.copytree(run, other)
    sweep = tmp_path / "sweep"
    common = {"reference": reference, "output_dir": sweep, "num_inference_steps": 1, **SWEEP, "num_images": 4}
    assert evaluate("sweep", models=[run, other], **common) == 0

    def charts() -> set[str]:
        return {path.name for path in sweep.iterdir() if path.suffix in (".png", ".svg")}

    def pair(name: str) -> set[str]:
        return {f"{name}.png", f"{name}.svg"}

    both = pair("fid_over_steps_run") | pair("fid_over_steps_other") | pair("fid_minima")
    assert charts() == both
    # somebody's own files, by names that a sweep could give, and a chart that somebody has changed
    mine = {"fid_over_steps_mine.png": b"mine", "trade_offs.svg": b"mine"}
    mine["fid_over_steps_other.svg"] = b"<svg/>"
    for name, content in mine.items():
        (sweep / name).write_bytes(content)
    assert evaluate("sweep", models=run, **common) == 0
    assert charts() == pair("fid_over_steps_run") | set(mine)
    assert {name: (sweep / name).read_bytes() for name in mine} == mine
    # what has been evaluated comes back, with its charts
    assert evaluate("sweep", models=[run, other], **common) == 0
    assert charts() == both | set(mine)
    ElementTree.parse(sweep / "fid_over_steps_other.svg")
    # they go too where nothing is left to show
    (sweep / "fid_over_steps_run.png").unlink()
    assert evaluate("sweep", models=run / "pipelines" / "step_0000010", **common) == 0
    assert charts() == {"fid_over_steps_mine.png", "trade_offs.svg"}


def test_wrong_sweeps(run, reference, prepared, classifier, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "grid.yaml").write_text("- {num_inference_step: 2}\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "results.csv").write_text("mine")
    read = tmp_path / "read"
    by_classifier = {"protocol": "classifier", "weights": classifier}
    assert evaluate("reference", source=prepared, output_dir=read, device="cpu", **by_classifier) == 0
    in_bfloat16 = f"dtype is float32 in {read} and bfloat16 in this sweep"
    common = {"reference": reference, "models": run, "output_dir": tmp_path / "sweep", **SWEEP}
    for changes, message in (
        ({"models": tmp_path / "empty"}, "a folder in which there is no pipeline"),
        ({"models": "no/such/folder"}, "models names no/such/folder, which is neither a folder nor a Hub id"),
        ({"reference": tmp_path / "empty"}, "is not an evaluation"),
        (by_classifier, "features of different protocols cannot be compared"),
        ({"reference": read, "extractor_dtype": "bfloat16", **by_classifier}, in_bfloat16),
        ({"grid": tmp_path / "grid.yaml"}, "names 'num_inference_step', but must be made of scheduler, num_inf"),
        ({"grid": tmp_path / "grid.yaml", "eta": 1}, "grid says how images are sampled, and so does eta"),
        ({"grid": tmp_path / "none.yaml"}, "No such file or directory"),
        ({"eta": -1}, "eta is -1.0, but must be at least 0"),
        ({"output_dir": tmp_path / "taken"}, "which holds another results.csv"),
    ):
        assert evaluate("sweep", **{**common, **changes}) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "sweep").exists()
    assert files(tmp_path / "taken" / "results.csv") == ["results.csv"]
