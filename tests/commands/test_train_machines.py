"""imagenet64-train on several processes, of one machine or of two."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from imagenet64_diffusion.tests.commands.processes import distributed, free_port, snapshot, wait_until
from imagenet64_diffusion.tests.commands.runs import ROOT
from imagenet64_diffusion.tests.commands.training_runs import TrainingRun, assert_equal_runs
from imagenet64_diffusion.training.checkpoints import load_checkpoint


# Twelve steps of 16 images; drop-out would depend on how they are shared.
SHARED = {
    "max_train_steps": 12,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "dropout": 0,
    "adam_epsilon": 1e-4,
    "sample_steps": 0,
    "pipeline_steps": 0,
}


@pytest.fixture
def shared_run(new_run):
    """Makes a run of two processes, or of a batch for two."""
    return lambda name, **changes: new_run(name, **{**SHARED, **changes})


class TwoLives:
    """Two processes of one run, each as on a machine of its own: the second has an output folder of its own."""

    def __init__(self, run: TrainingRun, **changes):
        port = free_port()
        self.second_dir = run.folder / "second"
        self.second_dir.mkdir(exist_ok=True)
        second = {"output_dir": self.second_dir / "out", **changes.pop("second", {})}
        self.processes = [
            run.start(environment=distributed(0, 2, port), **changes),
            run.start(environment=distributed(1, 2, port), directory=self.second_dir, **{**changes, **second}),
        ]

    def end(self) -> list[int]:
        return [process.end() for process in self.processes]

    def finish(self) -> "TwoLives":
        assert self.end() == [0, 0], "\n".join(process.output() for process in self.processes)
        return self


def assert_close_runs(run: TrainingRun, other: TrainingRun) -> None:
    """Two runs are equal to float32 rounding."""
    logs = [[{**entry} for entry in one.metrics()] for one in (run, other)]
    assert [entry["step"] for entry in logs[0]] == [entry["step"] for entry in logs[1]]
    for entry, expected in zip(*logs, strict=True):
        for key in ("lr", "epoch"):
            assert entry[key] == expected[key]
        for key in ("loss", "loss_quarter_1", "loss_quarter_2", "loss_quarter_3", "loss_quarter_4", "gradient_norm"):
            assert entry[key] == (None if expected[key] is None else pytest.approx(expected[key], rel=1e-3)), key
    states = [load_checkpoint(one.checkpoints / "checkpoint-12") for one in (run, other)]
    assert states[0].progress.images_seen == states[1].progress.images_seen
    assert states[0].averaged_weights[1] == states[1].averaged_weights[1]
    names = list(states[0].weights)
    found, expected = ([*(state.weights[name] for name in names), *state.averaged_weights[0]] for state in states)
    for weight, expected_weight in zip(found, expected, strict=True):
        torch.testing.assert_close(weight, expected_weight, atol=2e-5, rtol=1e-3)


def test_two_processes_killed(shared_run):
    """By SIGTERM to one of them and by SIGKILL; then again by one process with the same batch."""
    undisturbed, killed = shared_run("undisturbed"), shared_run("killed")
    assert "on 2 x cpu" in TwoLives(undisturbed).finish().processes[0].output()

    both = TwoLives(killed)
    wait_until(lambda: len(killed.metrics()) == 1, both.processes[0])
    both.processes[1].send(signal.SIGTERM)
    assert both.end() == [143, 143]
    step = int(killed.checkpoint_names()[-1].removeprefix("checkpoint-"))
    assert f"stopped by SIGTERM after step {step} of 12" in both.processes[0].output()
    assert "stopped" not in both.processes[1].output()
    if step < 9:
        both = TwoLives(killed)
        wait_until(lambda: len(killed.metrics()) == 2, both.processes[0])
        for process in both.processes:
            process.send(signal.SIGKILL)
        assert both.end() == [-signal.SIGKILL] * 2
    shutil.copytree(killed.folder, killed.folder.with_name("alone"))
    assert not any((both.second_dir).iterdir())
    TwoLives(killed).finish()
    assert_equal_runs(killed, undisturbed)

    alone = shared_run("alone")
    process = alone.finish(gradient_accumulation_steps=2)
    assert "was shared by 2 ranks in pieces of 8 and is by 1 in pieces of 8" in process.output()
    assert_close_runs(alone, undisturbed)


def launch(arguments: list[str], folder: Path, machine: int = 0, port: int = 0, machines: int = 1) -> subprocess.Popen:
    """accelerate's launcher of two processes, on this machine or one on each of two that meet over the network."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
    launcher += ["--dynamo_backend", "no", "--num_machines", str(machines), "--main_process_port", str(port)]
    if machines > 1:
        launcher += ["--machine_rank", str(machine), "--main_process_ip", "127.0.0.1", "--rdzv_backend", "static"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_imagenet64.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_machines(shared_run, tmp_path):
    """Without a common disk: one process with twice the batch does the same, and one disk is enough to go on."""
    whole, run = shared_run("whole", train_batch_size=16), shared_run("run")
    whole.finish()
    second, port = tmp_path / "second", free_port()
    second.mkdir()
    launchers = [
        launch(run.arguments(), run.folder, 0, port, machines=2),
        launch(run.arguments(output_dir="out"), second, 1, port, machines=2),
    ]
    try:
        wait_until((run.checkpoints / "checkpoint-6").exists)
        # a job scheduler tells the launchers, and those their processes
        for launcher in launchers:
            launcher.send_signal(signal.SIGTERM)
        outputs = [launcher.communicate(timeout=100)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    step = max(int(name.removeprefix("checkpoint-")) for name in run.checkpoint_names())
    assert f"stopped by SIGTERM after step {step} of 12" in outputs[0]
    assert "stopped by" not in outputs[1]
    assert 6 <= step < 12
    assert list(second.iterdir()) == []

    assert f"from step {step} of" in TwoLives(run).finish().processes[0].output()
    assert_close_runs(run, whole)


def test_what_another_machine_has(shared_run, tmp_path):
    """If one cannot go on, both end, and the main process says why."""
    run = shared_run("run")
    damaged = shutil.copytree(run.prepared, tmp_path / "damaged")
    next(damaged.glob("*.arrow")).write_bytes(b"no longer an arrow file")
    both = TwoLives(run, second={"train_data_dir": damaged})
    assert both.end() == [2, 2]
    assert both.processes[0].errors()[-1].startswith(f"error: process 1 of 2: {damaged}")
    assert both.processes[1].errors() == []

    other = shutil.copytree(run.prepared, tmp_path / "other")
    record = json.loads((other / "preparation.json").read_text())
    (other / "preparation.json").write_text(json.dumps({**record, "fingerprint": "sha256:" + 64 * "0"}))
    both = TwoLives(run, second={"train_data_dir": other})
    assert both.end() == [2, 2]
    assert "the images' fingerprint is sha256:" in both.processes[0].errors()[-1]

    both = TwoLives(run, second={"learning_rate": 0.5})
    assert both.end() == [2, 2]
    assert both.processes[0].errors()[-1] == (
        "error: learning_rate is 0.001, but rank 1 has 0.5: all machines must have the same"
    )
    # and what the main process alone can know
    run.checkpoints.mkdir(parents=True)
    (run.checkpoints / "checkpoint-3").mkdir()
    both = TwoLives(run)
    assert both.end() == [2, 2]
    assert "none of the checkpoints in" in both.processes[0].errors()[-1]
    assert both.processes[1].errors() == []
    assert snapshot(run.output_dir) == {}


def test_a_full_disk_of_the_first_machine(shared_run):
    run = shared_run("run")
    both = TwoLives(run, largest_file=100_000)
    assert both.end() == [2, 2]
    assert both.processes[0].errors()[-1].startswith("error: could not write ")
    assert not any("Traceback" in process.output() for process in both.processes)
    assert run.checkpoint_names() == []


@pytest.mark.soak
def test_a_launcher_interrupted(shared_run):
    """Ctrl-C, which the terminal sends to the launcher and its processes, and the launcher to its processes again."""
    run = shared_run("run", max_train_steps=1000, checkpointing_steps=0)
    launcher = launch(run.arguments(), run.folder)
    try:
        wait_until(lambda: len(run.metrics()) == 1)
        os.killpg(launcher.pid, signal.SIGINT)
        output = launcher.communicate(timeout=100)[0]
    finally:
        launcher.kill()
    assert "stopped by SIGINT after step" in output
    assert len(run.checkpoint_names()) == 1


def test_fine_tuning_on_two_machines(undisturbed, prepared, tmp_path):
    """Each has the pipeline in a place of its own; where one lacks it, both end."""
    first, second = (
        undisturbed.output_dir / "model",
        shutil.copytree(undisturbed.output_dir / "model", tmp_path / "copy"),
    )
    options = {**SHARED, "max_train_steps": 1, "num_train_timesteps": None, "pretrained_model_name_or_path": first}
    for name in ("dropout", "timestep_sampling"):
        options.pop(name, None)
    options |= {"report_to": "none", "logging_steps": 1, "num_inference_steps": 2, "num_samples_per_class": 1}
    run = TrainingRun(tmp_path / "run", prepared, options)
    both = TwoLives(run, second={"pretrained_model_name_or_path": tmp_path / "nowhere"})
    assert both.end() == [2, 2], [process.output() for process in both.processes]
    assert both.processes[0].errors()[-1].startswith("error: process 1 of 2: ")
    assert not run.output_dir.exists()
    both = TwoLives(run, second={"pretrained_model_name_or_path": second}).finish()
    assert f"training from {first}" in both.processes[0].output()
