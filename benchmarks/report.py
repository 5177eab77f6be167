"""What benchmarks share: their options, commands of the project, and the JSON file of a run with its machine."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DIGITS_DATA = ROOT / "outputs" / "demo" / "data"
DIGITS_PROTOCOL = ("--protocol", "classifier", "--weights", str(ROOT / "evaluation" / "digits_classifier"))


def parse_options(description: str, device: bool = False, **options: Any) -> argparse.Namespace:
    """Parses the options of a benchmark, named with their default, default with ``--small`` and help, or as a dict of
    arguments of ``add_argument``; and those that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    where = "folder of the JSON (default: benchmarks/results, with --small outputs/bench)"
    parser.add_argument("--results_dir", type=Path, help=where)
    if device:
        parser.add_argument("--device", help="such as cpu, cuda (default: cpu)")
    sizes = {name: value for name, value in options.items() if isinstance(value, tuple)}
    for name, (usual, _, words) in sizes.items():
        options[name] = {"type": type(usual), "help": f"{words} (default: {usual})"}
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    parsed = parser.parse_args()
    for name, (usual, small, _) in sizes.items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, small if parsed.small else usual)
    parsed.results_dir = parsed.results_dir or (ROOT / "outputs" / "bench" if parsed.small else RESULTS)
    return parsed


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
