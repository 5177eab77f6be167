"""Commands as processes of their own, which may be stopped and killed, and what they leave behind."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


# Importing these takes longer than the runs. A server imports them once, and the processes are forked from it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "imagenet64_diffusion.training.loop",
        "imagenet64_diffusion.evaluation.evaluating",
        "accelerate.commands.launch",
        "transformers",
        "matplotlib.figure",
        "datasets",
        "filelock",
        "tensorboard",
        "scipy.linalg",
        "PIL.ImageDraw",
    ]
)


class CommandProcess:
    """A process in which a command of the project runs, from its start to its end, in a process group of its own.

    Its output goes to ``log``, stderr to ``error_log`` if one is given; writing more than ``largest_file`` bytes to a
    file fails, as on a full disk; ``environment`` has further variables, ``program`` is the command's module.
    """

    program = "train_imagenet64"

    def __init__(
        self,
        arguments: Iterable[Any],
        log: Path,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
        directory: Path | None = None,
        program: str | None = None,
        error_log: Path | None = None,
    ):
        self.log = log
        words = [program or self.program, *map(str, arguments)]
        logs = (log, error_log or log)
        self._process = _CONTEXT.Process(target=_live, args=(words, logs, environment or {}, largest_file, directory))
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


def run_command(program: str, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in a process of its own; the options are those of `CommandProcess`."""
    with tempfile.TemporaryDirectory() as folder:
        logs = (Path(folder, "out"), Path(folder, "err"))
        process = CommandProcess(arguments, logs[0], program=program, error_log=logs[1], **options)
        code = process.end()
        return subprocess.CompletedProcess([program, *arguments], code, *(log.read_text() for log in logs))


def run_function(function: Callable[..., Any], *arguments: Any, timeout: float = 200) -> tuple[int, str]:
    """Calls a function of a module in a process of its own; gives the exit code and the output."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "out")
        process = _CONTEXT.Process(target=_call_function, args=(log, function, *arguments))
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return process.exitcode, log.read_text(errors="replace")


def forget_package() -> None:
    """Makes this process import the package and its tests anew, from the first place on its path."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("imagenet64_diffusion", "tests"):
            del sys.modules[name]


def _call_function(log: Path, function: Callable[..., Any], *arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    function(*arguments)


def _live(
    words: list[str],
    logs: tuple[Path, Path],
    environment: Mapping[str, str],
    largest_file: int | None,
    directory: Path | None,
) -> None:
    import torch

    program, *arguments = words
    main = importlib.import_module(f"imagenet64_diffusion.{program}").main
    sys.argv = [f"{program}.py", *arguments]
    os.setsid()
    # where the tests run in the background of a shell, they are started with interrupts ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # the processes of its own that read images are made as in any other Python, not by the server
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    torch.set_num_threads(1)
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})
    if directory is not None:
        os.chdir(directory)
    for stream, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(main(arguments))


def wait_until(happens: Callable[[], Any], process: CommandProcess | None = None, seconds: float = 120) -> None:
    """Waits for something to happen, and fails if the process ends before it."""
    ends = time.monotonic() + seconds
    while not happens():
        if process is not None and process.is_over() and not happens():
            raise AssertionError(f"the process ended before: {process.output()}")
        if time.monotonic() > ends:
            raise AssertionError(f"waited for {seconds} s: {process.output() if process else ''}")
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
