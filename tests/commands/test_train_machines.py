"""imagenet64-train on several processes, of one machine or of two."""

import json
import shutil
import signal

import pytest
import torch
from accelerate.commands.launch import launch_command, launch_command_parser

from imagenet64_diffusion.tests.commands.processes import CommandProcess, distributed, free_port, snapshot, wait_until
from imagenet64_diffusion.tests.commands.runs import ROOT
from imagenet64_diffusion.tests.commands.training_runs import (
    EVERYTHING,
    NETWORKS,
    QUIET,
    TrainingRun,
    assert_equal_runs,
)
from imagenet64_diffusion.training.checkpoints import load_checkpoint


# Twelve steps of 16 images; drop-out would depend on how they are shared.
SHARED = {**EVERYTHING, "max_train_steps": 12, "train_batch_size": 8, "gradient_accumulation_steps": 1, "dropout": 0}
SHARED |= {"adam_epsilon": 1e-4, "sample_steps": 0, "pipeline_steps": 0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory, prepared) -> TrainingRun:
    """The run of two processes that nothing happens to."""
    run = TrainingRun(tmp_path_factory.mktemp("shared"), prepared, SHARED)
    assert "on 2 x cpu" in TwoLives(run).finish()
    return run


def main(arguments: list[str]) -> int:
    """What accelerate launch calls."""
    launch_command(launch_command_parser().parse_args(arguments))
    return 0


class TwoLives:
    """Two processes of one run, each as on a machine and with an output folder of its own."""

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

    def finish(self) -> str:
        """Lives to the end, and gives what the main process said."""
        assert self.end() == [0, 0], "\n".join(process.output() for process in self.processes)
        return self.processes[0].output()

    def refuse(self) -> str:
        """Both end, and the main process says why."""
        assert self.end() == [2, 2], [process.output() for process in self.processes]
        assert not any("Traceback" in process.output() for process in self.processes)
        assert not any(line.startswith("error: ") for line in self.processes[1].errors())
        return self.processes[0].errors()[-1]


def assert_close_runs(run: TrainingRun, other: TrainingRun) -> None:
    """Two runs are equal to float32 rounding."""
    for entry, expected in zip(run.metrics(), other.metrics(), strict=True):
        for key in set(entry) - {"images_per_second", "peak_memory_gib"}:
            exact = expected[key] is None or key in ("step", "lr", "epoch")
            assert entry[key] == (expected[key] if exact else pytest.approx(expected[key], rel=1e-3)), key
    state, expected = (load_checkpoint(one.checkpoints / "checkpoint-12") for one in (run, other))
    assert state.progress.images_seen == expected.progress.images_seen == 12 * 16
    assert state.averaged_weights[1] == expected.averaged_weights[1] == 12
    torch.testing.assert_close(state.weights, expected.weights, atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(state.averaged_weights[0], expected.averaged_weights[0], atol=2e-5, rtol=1e-3)


def test_two_processes_killed(new_run, shared):
    """By SIGKILL, and resumed by two, bit for bit, or by one with the same batch in two pieces."""
    killed = new_run("killed", **SHARED)
    both = TwoLives(killed)
    wait_until(lambda: len(killed.metrics()) == 2, both.processes[0])
    for process in both.processes:
        process.send(signal.SIGKILL)
    assert both.end() == [-signal.SIGKILL] * 2
    shutil.copytree(killed.folder, killed.folder.with_name("alone"))
    assert not any(both.second_dir.iterdir())
    TwoLives(killed).finish()
    assert_equal_runs(killed, shared)

    alone = new_run("alone", **SHARED)
    assert "ranks was 2 and is 1" in alone.finish(gradient_accumulation_steps=2)
    assert_close_runs(alone, shared)


def test_accelerate_launch(new_run):
    """Stopped by a SIGTERM that the launcher hands on."""
    run = new_run(**SHARED | {"lr_scheduler": "constant"})
    words = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    words += ["--main_process_port", 0, ROOT / "train_imagenet64.py", *run.arguments(max_train_steps=10_000)]
    options = {"environment": {"ACCELERATE_USE_CPU": "true"}, "program": "tests.commands.test_train_machines"}
    launcher = CommandProcess(words, run.folder / "launcher", **options)
    wait_until((run.checkpoints / "checkpoint-6").exists, launcher)
    launcher.send(signal.SIGTERM)
    assert launcher.end() != 0
    step = max(int(name.removeprefix("checkpoint-")) for name in run.checkpoint_names())
    assert launcher.output().count("stopped by") == 1
    assert f"stopped by SIGTERM after step {step:,} of 10,000" in launcher.output()
    assert load_checkpoint(run.checkpoints / f"checkpoint-{step}").progress.step == step


def test_one_is_asked_to_stop(new_run, shared):
    """Both stop after the same step, and go on as if nothing had happened."""
    run = new_run(**SHARED)
    both = TwoLives(run)
    wait_until(lambda: len(run.metrics()) == 1, both.processes[0])
    both.processes[1].send(signal.SIGTERM)
    assert both.end() == [143, 143]
    step = int(run.checkpoint_names()[-1].removeprefix("checkpoint-"))
    assert f"stopped by SIGTERM after step {step} of 12" in both.processes[0].output()
    assert "stopped" not in both.processes[1].output()
    TwoLives(run).finish()
    assert_equal_runs(run, shared)


def test_what_another_machine_has(new_run, tmp_path):
    """If one cannot go on, both end, and the main process says why."""
    run = new_run(**SHARED)
    damaged = shutil.copytree(run.prepared, tmp_path / "damaged")
    next(damaged.glob("*.arrow")).write_bytes(b"no longer an arrow file")
    message = TwoLives(run, second={"train_data_dir": damaged}).refuse()
    assert message.startswith(f"error: process 1 of 2: {damaged}")
    assert TwoLives(run, second={"learning_rate": 0.5}).refuse() == (
        "error: learning_rate is 0.001, but rank 1 has 0.5: all machines must have the same"
    )
    # and what the main process alone can know
    (run.checkpoints / "checkpoint-3").mkdir(parents=True)
    assert "none of the checkpoints in" in TwoLives(run).refuse()
    assert snapshot(run.output_dir) == {}


def test_a_full_disk_of_the_first_machine(new_run):
    run = new_run(**SHARED)
    assert TwoLives(run, largest_file=100_000).refuse().startswith("error: could not write ")
    assert run.checkpoint_names() == []


def test_fine_tuning_on_two_machines(undisturbed, prepared, tmp_path):
    """Each has the pipeline in a place of its own; where one lacks it, both end."""
    first = undisturbed.output_dir / "model"
    second = shutil.copytree(first, tmp_path / "copy")
    options = {**QUIET, "pretrained_model_name_or_path": first, "max_train_steps": 1, "train_batch_size": 8}
    run = TrainingRun(tmp_path / "run", prepared, options)
    both = TwoLives(run, second={"pretrained_model_name_or_path": tmp_path / "nowhere"})
    assert both.refuse().startswith("error: process 1 of 2: ")
    assert not run.output_dir.exists()
    said = TwoLives(run, second={"pretrained_model_name_or_path": second}).finish()
    assert f"training from {first}" in said


def test_edms_loss_with_an_uncertainty(new_run, tmp_path):
    """Both processes reach the parameters of the uncertainty, and two are as one with the batch at once."""
    (tmp_path / "edm2.json").write_text(json.dumps(NETWORKS["edm2"]))
    options = {**SHARED, "model_config_name_or_path": tmp_path / "edm2.json", "objective": "edm"}
    options |= {"timestep_sampling": "uniform", "num_train_timesteps": None}
    both, alone = new_run("both", **options), new_run("alone", **options)
    TwoLives(both).finish()
    alone.finish(train_batch_size=16)
    assert_close_runs(alone, both)
