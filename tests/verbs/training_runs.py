"""Training runs as processes of their own, which may be stopped and killed, and what they leave behind."""

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


TINY = {
    "stem_channels": 8,
    "block_out_channels": [8, 16],
    "layer_types": ["resnet", "class_attention", "channel_attention"],
    "time_embed_dim": 16,
    "class_embed_dim": 16,
}
# Twenty steps of ten images in which everything that a checkpoint must keep has an effect: batches cross the borders
# of epochs, the history of losses fills, and entries of the log, checkpoints and pictures come at different steps.
EVERYTHING = {
    "max_train_steps": 20,
    "train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "timestep_sampling": "importance",
    "num_train_timesteps": 4,
    "dropout": 0.1,
    "random_flip": True,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
    "logging_steps": 4,
    "checkpointing_steps": 6,
    "sample_steps": 6,
    "pipeline_steps": 12,
    "num_inference_steps": 2,
    "num_samples_per_class": 1,
    "report_to": "none",
}

# Importing these takes longer than the runs. A server imports them once, and the processes are forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["imagenet64_diffusion.training.loop", "transformers", "matplotlib.figure", "datasets", "filelock", "tensorboard"]
)


class Life:
    """A process in which a command of the project runs, from its start to its end.

    It leads a process group of its own.

    Attributes:
        program: The command's module.

    Args:
        arguments: Its command line.
        log: Where its output goes.
        environment: Further environment variables.
        largest_file: How many bytes a file may have that it writes; as on a full disk, writing more fails.
        directory: Where it runs.
    """

    program = "train_imagenet64"

    def __init__(
        self,
        arguments: Iterable[Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        directory: Path | None = None,
    ):
        self.log = log
        arguments = [str(argument) for argument in arguments]
        self._process = _CONTEXT.Process(
            target=_live, args=(self.program, arguments, log, dict(environment or {}), largest_file, directory)
        )
        self._process.start()

    def send(self, number: signal.Signals, group: bool = False) -> None:
        """Sends a signal, to the process or, once it leads one, to its whole group; nothing if it is over."""
        with contextlib.suppress(ProcessLookupError):
            leads = group and os.getpgid(self._process.pid) == self._process.pid
            (os.killpg if leads else os.kill)(self._process.pid, number)

    def is_over(self) -> bool:
        return self._process.exitcode is not None

    def end(self, timeout: float = 200) -> int:
        """Waits for the end; gives the exit code, negative for a signal that ended it."""
        self._process.join(timeout)
        if not self.is_over():
            self.send(signal.SIGKILL, group=True)
            raise AssertionError(f"still running after {timeout} s: {self.output()}")
        return self._process.exitcode

    def output(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def errors(self) -> list[str]:
        """The lines of its output that are not of the progress bar."""
        lines = self.output().replace("\r", "\n").splitlines()
        return [line for line in lines if line and not line.startswith("training:")]


def _live(
    program: str,
    arguments: list[str],
    log: Path,
    environment: dict[str, str],
    largest_file: int | None,
    directory: Path | None,
) -> None:
    import torch

    main = importlib.import_module(f"imagenet64_diffusion.{program}").main
    os.setsid()
    # where the tests run in the background of a shell, they are started with interrupts ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the processes of its own that read images are made as in any other Python, not by the server
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})
    if directory is not None:
        os.chdir(directory)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(arguments))


class TrainingRun:
    """A command that trains, which may live several times.

    Args:
        folder: Has the output folder ``out``, named alike in all runs, and the logs of all lives.
        prepared: The images.
        options: Of the run; a value of None leaves an option out.
    """

    def __init__(self, folder: Path, prepared: Path, options: Mapping[str, Any]):
        folder.mkdir(exist_ok=True, parents=True)
        self.folder, self.prepared, self.options = folder, prepared, dict(options)
        self.output_dir, self.checkpoints = folder / "out", folder / "out" / "checkpoints"
        self._lives = 0
        if "pretrained_model_name_or_path" not in options:
            self.options.setdefault("model_config_name_or_path", folder / "unet.json")
            (folder / "unet.json").write_text(json.dumps(TINY))

    def arguments(self, **changes: Any) -> list[str]:
        """The command line, with changed options."""
        options = {"train_data_dir": self.prepared, "output_dir": self.output_dir, **self.options, **changes}
        found = []
        for name, value in options.items():
            if value is not None:
                values = value if isinstance(value, (list, tuple)) else [value]
                found += [f"--{name}", *map(str, values)]
        return found

    def start(
        self,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        directory: Path | None = None,
        **changes: Any,
    ) -> Life:
        """Begins a life of the run, with changed options."""
        self._lives += 1
        log = self.folder / f"life_{self._lives}.txt"
        return Life(self.arguments(**changes), log, environment, largest_file, directory)

    def finish(self, **changes: Any) -> Life:
        """Lives to the end, which must be a good one."""
        life = self.start(**changes)
        assert life.end() == 0, life.output()
        return life

    def metrics(self) -> list[dict[str, Any]]:
        """The entries of the log."""
        file = self.output_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def checkpoint_names(self) -> list[str]:
        """What is in the folder of checkpoints, hidden ones too."""
        return sorted(path.name for path in self.checkpoints.iterdir()) if self.checkpoints.exists() else []

    def contents(self) -> dict[str, Any]:
        """What the run has left, by file, without its speed, its memory and its place."""
        found = {}
        for file in sorted(path for path in self.output_dir.rglob("*") if path.is_file()):
            name = str(file.relative_to(self.output_dir))
            if name == "metrics.jsonl":
                found[name] = [
                    {key: value for key, value in entry.items() if key not in ("images_per_second", "peak_memory_gib")}
                    for entry in self.metrics()
                ]
            elif file.name == "training_state.json":
                state = json.loads(file.read_text())
                state.pop("sha256", None)
                for key in ("output_dir", "model_config_name_or_path", "dataloader_num_workers"):
                    state["options"].pop(key)
                found[name] = state
            elif not name.startswith("train/"):
                found[name] = file.read_bytes()
        return found


def assert_equal_runs(run: TrainingRun, undisturbed: TrainingRun) -> None:
    """Everything that two runs have left is equal, bit for bit."""
    left, expected = run.contents(), undisturbed.contents()
    assert sorted(left) == sorted(expected), sorted({*left} ^ {*expected})
    different = {name: _difference(left[name], expected[name]) for name in left if left[name] != expected[name]}
    assert not different, different


def _difference(left: Any, expected: Any) -> Any:
    """Where two values differ, to be read by people."""
    if isinstance(left, dict) and isinstance(expected, dict):
        return {
            key: _difference(left.get(key), expected.get(key))
            for key in sorted({*left, *expected})
            if left.get(key) != expected.get(key)
        }
    if isinstance(left, bytes):
        return f"{len(left)} and {len(expected)} bytes"
    return (left, expected)


def wait_until(happens: Callable[[], Any], life: Life | None = None, seconds: float = 120) -> None:
    """Waits for something to happen, and fails if the life ends before it."""
    ends = time.monotonic() + seconds
    while not happens():
        if life is not None and life.is_over() and not happens():
            raise AssertionError(f"the process ended before: {life.output()}")
        if time.monotonic() > ends:
            raise AssertionError(f"waited for {seconds} s: {life.output() if life else ''}")
        time.sleep(0.0002)


def free_port() -> int:
    """A port of this machine that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def distributed(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher tells a process: one of several that share a run, on CPUs, each on a machine of its own."""
    return {
        "ACCELERATE_USE_CPU": "true",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_MIXED_PRECISION": "no",
    }


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
