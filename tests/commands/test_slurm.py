"""docs/slurm_train.sh, run by stand-ins for Slurm's two commands on this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from imagenet64_diffusion.tests.commands.processes import wait_until
from imagenet64_diffusion.tests.commands.runs import ROOT


# Starts the task once for each machine, hands SIGTERM on, and ends with the worst exit code, as srun does.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
trap 'kill -TERM $first $second' TERM
worst=0
for task in $first $second; do
    while true; do
        wait $task; status=$?
        kill -0 $task 2>/dev/null || break
    done
    [ $status -gt $worst ] && worst=$status
done
exit $worst
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_LOG"
[ "$1" = show ] && echo 127.0.0.1
exit 0
"""


@pytest.fixture
def job(tmp_path, prepared):
    """Starts the script as sbatch does, with two machines of one process each."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SCONTROL_LOG": str(tmp_path / "scontrol.log")}
    environment |= {"SLURM_JOB_NODELIST": "machine[0-1]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "1", "MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = ["--train_data_dir", str(prepared), "--output_dir", str(tmp_path / "out"), "--layer_types", "resnet"]
    arguments += ["--stem_channels", "8", "--block_out_channels", "8", "--train_batch_size", "4"]
    arguments += ["--report_to", "none", "--num_inference_steps", "2", "--logging_steps", "1"]

    def start(*more: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "docs" / "slurm_train.sh"), *arguments, *more]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **streams)

    return start


@pytest.mark.soak
def test_a_job_that_is_stopped_queues_again_and_ends(job, tmp_path):
    first = job("--max_train_steps", "100000", "--checkpointing_steps", "0")
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() or first.poll() is not None)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=90)[0]
    assert first.returncode == 0, said
    assert "stopped by SIGTERM after step" in said
    assert "of 8 images" in said
    log = (tmp_path / "scontrol.log").read_text().splitlines()
    assert log == ["show hostnames machine[0-1]", f"requeue {os.getpid()}"]
    [checkpoint] = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("checkpoint-"))

    second = job("--max_train_steps", str(step + 2))
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    assert f"from step {step:,} of" in said
    assert (tmp_path / "out" / "model" / "model_index.json").is_file()
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1


def test_an_error_ends_the_job(job, tmp_path):
    wrong = job("--max_train_steps", "2", "--learning_rate", "-1")
    said = wrong.communicate(timeout=120)[0]
    assert wrong.returncode != 0
    assert "learning_rate is -1.0, but must be above 0" in said
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()
