"""Timing things alternately, so that whatever slows the machine slows all of them."""

import multiprocessing
import re
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torch.utils.benchmark import timer  # waits for the device


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
