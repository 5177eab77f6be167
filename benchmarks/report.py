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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import timer  # waits for the device


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS_DATA = ("the prepared digits", ROOT / "outputs" / "demo" / "data")
DEVICE = ("such as cpu, cuda", "cpu")
DIGITS_PROTOCOL = ("--protocol", "classifier", "--weights", str(ROOT / "evaluation" / "digits_classifier"))


def parse_options(description: str, **options: Any) -> argparse.Namespace:
    """Parses the options of a benchmark: arguments of ``add_argument``, or help, default, and default with --small."""
    is_small = "--small" in sys.argv
    parser = argparse.ArgumentParser(description=description.split("\n\n")[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    where = "folder of the JSON (default: benchmarks/results, with --small outputs/bench)"
    results_dir = ROOT / "outputs" / "bench" if is_small else RESULTS
    parser.add_argument("--results_dir", type=Path, default=results_dir, help=where)
    for name, settings in options.items():
        if isinstance(settings, tuple):
            words, usual, *small = settings
            default = small[0] if small and is_small else usual
            settings = {"type": type(usual), "default": default, "help": f"{words} (default: {usual})"}
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
    return next(iter(names), platform.processor() or platform.machine())


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
    benchmark: str, options: argparse.Namespace, libraries: tuple[str, ...] = (), **figures: Any
) -> dict[str, Any]:
    """Writes {results_dir}/{benchmark}-{processor}.json with the machine, and returns its content."""
    machine = {"processor": processor(), "cores": os.cpu_count()}
    if options.device.startswith("cuda"):
        machine["gpu"] = processor(options.device)
    versions = {name: importlib.metadata.version(name) for name in sorted(("diffusers", "torch", *libraries))}
    machine |= {"python": platform.python_version(), **versions}
    rounded = json.loads(json.dumps(figures), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    result = {"command": command_line(), "threads": torch.get_num_threads(), **rounded, "machine": machine}
    options.results_dir.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", processor(options.device).lower()).strip("-")
    file = options.results_dir / f"{benchmark}-{slug}.json"
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")
    return result


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call, with the work that it leaves to the device."""
    begin = timer()
    function(*arguments)
    return timer() - begin


def alternate(measures: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[Any]]:
    """The results of functions that measure once, called alternately, every second round in the reverse order."""
    found: dict[str, list[Any]] = {name: [] for name in measures}
    for number in range(-warmup, rounds):
        for name in measures if number % 2 else reversed(measures):
            found[name].append(measures[name]())
    return {name: results[warmup:] for name, results in found.items()}


def alternate_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """The seconds of functions that are called alternately."""
    return alternate({name: partial(seconds_of, call) for name, call in calls.items()}, rounds, warmup)


def spread(values: Iterable[float]) -> dict[str, Any]:
    """``median`` and ``quartiles`` of some numbers."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high]}


def ratios_to(reference: str, seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """How many times as long as the reference each of the others takes: spreads of the ratios of all rounds."""
    return {
        name: spread(one / other for one, other in zip(values, seconds[reference], strict=True))
        for name, values in seconds.items()
        if name != reference
    }


def time_methods(*methods: tuple[Any, str, str]) -> dict[str, float]:
    """Times methods, (owner, name, part of the work), from now on; gives the seconds of each part, to which calls add.

    Timed methods that others call do not count twice.
    """
    seconds: dict[str, float] = defaultdict(float)
    running = threading.local()

    def around(method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(running, "is_timed", False):
                return method(*arguments, **options)
            running.is_timed = True
            begin = timer()
            try:
                return method(*arguments, **options)
            finally:
                seconds[part] += timer() - begin
                running.is_timed = False

        return timed

    for owner, name, part in methods:
        setattr(owner, name, around(getattr(owner, name), part))
    return seconds


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a new process, whose peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_bytes(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, its present and its peak memory, as Linux reports them."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{key}:\s*(\d+) kB", status)[1]) * 1024
