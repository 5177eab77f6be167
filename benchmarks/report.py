"""What benchmarks share: options, the JSON file of a run with its machine, and timing things alternately."""

import argparse
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer  # waits for the device


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS_DATA = ROOT / "outputs" / "demo" / "data"
DIGITS_PROTOCOL = ("--protocol", "classifier", "--weights", str(ROOT / "evaluation" / "digits_classifier"))


def parse_options(description: str, device: bool = False, **options: Any) -> argparse.Namespace:
    """Parses the options of a benchmark, named with their default, default with ``--small`` and help, or as a dict of
    arguments of ``add_argument``; and those that every benchmark has."""
    is_small = "--small" in sys.argv
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    where = "folder of the JSON (default: benchmarks/results, with --small outputs/bench)"
    results_dir = ROOT / "outputs" / "bench" if is_small else RESULTS
    parser.add_argument("--results_dir", type=Path, default=results_dir, help=where)
    if device:
        parser.add_argument("--device", help="such as cpu, cuda (default: cpu)")
    for name, settings in options.items():
        if isinstance(settings, tuple):
            usual, small, words = settings
            settings = {"default": small if is_small else usual, "help": f"{words} (default: {usual})"}
            settings["type"] = type(usual)
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def call_command(command: str, *words: Any) -> None:
    """Calls a command of the project, such as ``evaluate_models``, in this process."""
    code = importlib.import_module(f"imagenet64_diffusion.{command}").main([str(word) for word in words])
    if code:
        raise SystemExit(code)


def processor(device: str = "cpu") -> str:
    """The name of the processor, or of a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def command_line() -> str:
    """This process's command, as typed in the root of the repository; other folders of this machine are left out."""
    threads = os.environ.get("OMP_NUM_THREADS")
    words = [f"OMP_NUM_THREADS={threads}"] if threads else []
    words += ["python", f"benchmarks/{Path(sys.argv[0]).name}"]
    for word in sys.argv[1:]:
        path = Path(word)
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        words.append(str(shown) if path.is_absolute() else word)
    return " ".join(words)


def write_result(
    benchmark: str, figures: Mapping[str, Any], options: argparse.Namespace, libraries: Sequence[str] = ()
) -> dict[str, Any]:
    """Writes ``{results_dir}/{benchmark}-{processor}.json`` with the machine, and returns its content."""
    machine = {"processor": processor(), "cores": os.cpu_count()}
    if options.device.startswith("cuda"):
        machine["gpu"] = processor(options.device)
    versions = {name: importlib.metadata.version(name) for name in sorted(("diffusers", "torch", *libraries))}
    machine |= {"python": platform.python_version(), **versions}
    shared = {"command": command_line(), "device": options.device, "threads": torch.get_num_threads()}
    result = {**shared, **figures, "machine": machine}
    options.results_dir.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", processor(options.device).lower()).strip("-")
    file = options.results_dir / f"{benchmark}-{slug}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")
    return result


# ------------------------------------------------------------------ timing


def seconds_of(function: Callable[[], Any]) -> float:
    """Seconds of a call, with the work that it leaves to the device."""
    begin = timer()
    function()
    return timer() - begin


def alternate(measures: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[Any]]:
    """The results of functions that measure once, called alternately, every second round in the reverse order."""
    found: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(-warmup, rounds):
        for name in measures if number % 2 else reversed(measures):
            result = measures[name]()
            if number >= 0:
                found[name].append(result)
    return found


def rounded(value: float, digits: int = 4) -> float:
    """A number to so many significant digits."""
    return float(f"{value:.{digits}g}")


def spread(values: Iterable[float]) -> dict[str, Any]:
    """``median`` and ``quartiles`` of some numbers."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": rounded(middle), "quartiles": [rounded(low), rounded(high)]}


def ratios_to(reference: str, seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """How many times as long as the reference each of the others takes: spreads of the ratios of all rounds."""
    return {
        name: spread(one / other for one, other in zip(values, seconds[reference], strict=True))
        for name, values in seconds.items()
        if name != reference
    }


class Clock:
    """Sums the seconds spent in methods, for each part that they belong to, in ``seconds``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = threading.local()

    def around(self, owner: Any, name: str, part: str) -> None:
        """Times a method of a class or object from now on; timed methods that it calls do not count twice."""
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(self._running, "part", None):
                return method(*arguments, **options)
            self._running.part = part
            begin = timer()
            try:
                return method(*arguments, **options)
            finally:
                self.seconds[part] += timer() - begin
                self._running.part = None

        setattr(owner, name, timed)


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, its present and its peak memory, as Linux reports them."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s*(\d+) kB", status)[1]) * 1024
