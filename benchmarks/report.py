"""Writing down what a benchmark measured, with the machine it ran on."""

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_result(benchmark: str, figures: dict[str, Any], libraries: Sequence[str]) -> Path:
    """Writes figures to ``results/{benchmark}-{processor}.json``.

    Args:
        benchmark: Name of the benchmark.
        figures: What it measured, as JSON values.
        libraries: Installed libraries whose versions matter.
    """
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }
    RESULTS.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    file = RESULTS / f"{benchmark}-{slug}.json"
    file.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}")
    return file
