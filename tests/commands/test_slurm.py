"""docs/slurm_train.sh, run by stand-ins for Slurm's two commands on this machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from imagenet64_diffusion.tests.commands.processes import wait_until
from imagenet64_diffusion.tests.commands.runs import ROOT
from imagenet64_diffusion.training.options import TrainOptions
from imagenet64_diffusion.utils.command_line import parse_options


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
echo "$@" >> "$LOG"
[ "$1" = show ] && echo 127.0.0.1
exit 0
"""
# writes down its words, and fails
ACCELERATE = """#!/bin/bash
printf '%s\\n' "$@" > "$LOG.$SLURM_NODEID"
exit 3
"""


@pytest.fixture
def job(tmp_path, prepared):
    """Starts the script as sbatch does, with two machines of one process each."""
    environment = {**os.environ, "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"SLURM_JOB_NODELIST": "machine[0-1]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": "2"}
    environment |= {"SLURM_GPUS_ON_NODE": "1", "MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LOG": str(tmp_path / "log")}
    arguments = ["--train_data_dir", str(prepared), "--output_dir", str(tmp_path / "out"), "--layer_types", "resnet"]
    arguments += ["--stem_channels", "8", "--block_out_channels", "8", "--train_batch_size", "4"]
    arguments += ["--report_to", "none", "--num_inference_steps", "2", "--logging_steps", "1"]

    def start(*more: str, **stand_ins: str) -> subprocess.Popen:
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **stand_ins}.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
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
    log = (tmp_path / "log").read_text().splitlines()
    assert log == ["show hostnames machine[0-1]", f"requeue {os.getpid()}"]
    [checkpoint] = (tmp_path / "out" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("checkpoint-"))

    second = job("--max_train_steps", str(step + 2))
    said = second.communicate(timeout=120)[0]
    assert second.returncode == 0, said
    assert f"from step {step:,} of" in said
    assert (tmp_path / "out" / "model" / "model_index.json").is_file()
    assert (tmp_path / "log").read_text().count("requeue") == 1


def test_an_error_ends_the_job(job, tmp_path):
    """And each machine starts accelerate with what it takes."""
    failed = job("--max_train_steps", "2", accelerate=ACCELERATE)
    assert failed.wait(timeout=120) == 3
    assert "requeue" not in (tmp_path / "log").read_text()
    for rank in range(2):
        launch, *words = (tmp_path / f"log.{rank}").read_text().splitlines()
        found = launch_command_parser().parse_args(words)
        assert (launch, found.training_script, found.machine_rank) == ("launch", "train_imagenet64.py", rank)
        assert (found.num_machines, found.num_processes, found.main_process_ip) == (2, 2, "127.0.0.1")
        assert parse_options(TrainOptions, "", found.training_script_args).max_train_steps == 2
