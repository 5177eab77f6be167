"""What benchmarks have in common: options, and writing down what was measured, with the machine."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# where runs with --small write, whose figures mean nothing
SMALL_RESULTS = ROOT / "outputs" / "bench"


def add_options(parser: argparse.ArgumentParser, device: bool = False) -> None:
    """Adds the options that every benchmark has.

    Args:
        parser: That of the benchmark.
        device: Whether it can run on several devices.
    """
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs; figures mean nothing")
    parser.add_argument(
        "--results_dir",
        type=Path,
        help="where the JSON goes (default: benchmarks/results, or outputs/bench with --small)",
    )
    if device:
        parser.add_argument("--device", default="cpu", help="such as cpu, cuda (default: cpu)")


def choose_sizes(options: argparse.Namespace, **sizes: tuple[Any, Any]) -> None:
    """Gives options that are None their usual value, the first, or with --small the second."""
    for name, (usual, small) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, small if options.small else usual)


def results_dir(options: argparse.Namespace) -> Path:
    """Where the options say that results go."""
    return options.results_dir or (SMALL_RESULTS if options.small else RESULTS)


def processor(device: str = "cpu") -> str:
    """The name of the processor, or of the GPU that a device is."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_line() -> str:
    """How this process was started, as it would be typed in the root of the repository."""
    words = ["python"]
    if "OMP_NUM_THREADS" in os.environ:
        words.insert(0, f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}")
    for word in sys.argv:
        path = Path(word)
        if path.is_absolute():
            # a place on this machine says nothing elsewhere
            word = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        words.append(word)
    if not words[-len(sys.argv)].startswith("benchmarks/"):
        words[-len(sys.argv)] = f"benchmarks/{Path(sys.argv[0]).name}"
    return " ".join(words)


def write_result(
    benchmark: str, figures: dict[str, Any], libraries: Sequence[str], folder: Path = RESULTS, device: str = "cpu"
) -> Path:
    """Writes figures to ``{folder}/{benchmark}-{processor}.json``.

    Args:
        benchmark: Name of the benchmark; what follows a hyphen tells its variants apart.
        figures: What it measured, as JSON values.
        libraries: Installed libraries whose versions matter.
        folder: Where to.
        device: Where it ran.
    """
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        **({"gpu": processor(device)} if device.startswith("cuda") else {}),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", processor(device).lower()).strip("-")
    file = folder / f"{benchmark}-{slug}.json"
    content = {"command": command_line(), **figures, "machine": machine}
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")
    return file
