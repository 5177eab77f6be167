"""A run of imagenet64-train that is asked to stop writes a checkpoint first, from which the same command resumes."""

import os
import random
import shutil
import signal
import time

import pytest

from imagenet64_diffusion.tests.commands.processes import wait_until
from imagenet64_diffusion.tests.commands.training_runs import TrainingRun, assert_equal_runs


EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def assert_stopped(run: TrainingRun, process, number: signal.Signals) -> int:
    """The run says after which step it was stopped, and the checkpoint of that step is there; gives the step."""
    assert process.end() == EXIT_CODES[number], process.output()
    step = max(int(name.split("-")[1]) for name in run.checkpoint_names())
    stopped = f"stopped by {number.name} after step {step} of 20: "
    assert process.errors()[-1] == f"{stopped}the same command resumes from {run.checkpoints}/checkpoint-{step}"
    assert "Traceback" not in process.output()
    assert not any(name.startswith(".") for name in run.checkpoint_names())
    assert not (run.output_dir / "model").exists()
    return step


@pytest.mark.parametrize("number", EXIT_CODES)
def test_asked_to_stop(new_run, undisturbed, number):
    """By a signal to the whole process group, as from a terminal or a job scheduler, so that workers get it too."""
    run = new_run(dataloader_num_workers=2)
    process = run.start()
    wait_until(lambda: len(run.metrics()) == 2, process)
    process.send(number, group=True)
    assert assert_stopped(run, process, number) in range(8, 12)
    if number == signal.SIGTERM:
        # and in a step that has a checkpoint anyway
        process = run.start(dataloader_num_workers=0)
        wait_until((run.checkpoints / ".checkpoint-18.writing").exists, process)
        process.send(number)
        assert assert_stopped(run, process, number) == 18
        run.finish()
        assert_equal_runs(run, undisturbed)


def test_interrupted_twice(new_run):
    """The second time at once, and what was being written is gone."""
    run = new_run(sample_steps=0, num_inference_steps=4000, num_train_timesteps=4000, timestep_sampling="uniform")
    # the first of them waits for samples that take long
    process = run.start(sample_steps=8)
    # the last thing before two quick steps, after which the samples begin
    wait_until(lambda: (run.output_dir / "loss_chart.png").is_file(), process)
    time.sleep(2)
    process.send(signal.SIGINT)
    time.sleep(0.2)
    # a launcher of several processes sends what the terminal has sent
    process.send(signal.SIGINT)
    # more than a second, so that the next is a second wish
    time.sleep(1.5)
    assert not process.is_over()
    process.send(signal.SIGINT)
    assert process.end(20) == 130
    assert process.errors()[-1] == "interrupted"
    assert run.checkpoint_names() == ["checkpoint-6"]
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["checkpoints", "loss_chart.png", "metrics.jsonl"]


# ---------------------------------------------------------------------- for minutes, with make soak

SOAK_SEED = int(os.environ.get("IMAGENET64_SOAK_SEED", random.randrange(10**6)))


def moments(run: TrainingRun):
    """Where a run can be hit: a condition for which to wait, and at most so many seconds to wait on."""
    checkpoints, metrics = run.checkpoints, run.output_dir / "metrics.jsonl"
    oldest = min(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), default=None)
    size = metrics.stat().st_size if metrics.exists() else 0
    return [
        (lambda: True, 6.0),
        (lambda: metrics.exists() and metrics.stat().st_size > size, 0.3),
        (lambda: any(checkpoints.glob(".*.writing")), 0.03),
        (lambda: oldest is not None and not oldest.exists(), 0.002),
        ((run.output_dir / ".model.writing").exists, 0.03),
    ]


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_twenty_random_moments(new_run, undisturbed, number):
    """Chains of processes that all end early, until there were twenty of them; each chain ends as if undisturbed."""
    rng = random.Random(f"{SOAK_SEED} {number.name}")
    print(f"IMAGENET64_SOAK_SEED={SOAK_SEED} gives the same moments again")
    hits = chains = 0
    while hits < 20:
        chains += 1
        run = new_run(f"chain_{chains}")
        for _ in range(rng.randint(2, 4)):
            workers, (happens, longest) = rng.choice([0, 2]), rng.choice(moments(run))
            process = run.start(dataloader_num_workers=workers)
            while not happens() and not process.is_over():
                time.sleep(0.0002)
            time.sleep(rng.uniform(0, longest))
            process.send(number, group=rng.random() < 0.5)
            code = process.end()
            # the end may have come first; before its first step and after its last one a run ends at once
            assert code in (0, -number, EXIT_CODES.get(number)), process.output()
            assert "Traceback" not in process.output()
            hits += code != 0
        run.finish()
        assert_equal_runs(run, undisturbed)
        shutil.rmtree(run.folder)
