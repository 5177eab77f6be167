"""Timing things against one another, in turn, so that what slows the machine slows them all."""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


def synchronize(device: str | torch.device) -> None:
    """Waits until a device has done what it was told."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], Any], device: str | torch.device = "cpu") -> float:
    """How long a call takes, with the work that it leaves to the device."""
    synchronize(device)
    begin = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - begin


def alternate(measures: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Takes measurements in turn, every second round in the reverse order.

    Args:
        measures: Name -> what measures once, and gives seconds.
        rounds: How often.
        warmup: Rounds before these that do not count.

    Returns:
        Name -> the seconds of each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-warmup, rounds):
        order = list(measures) if number % 2 else list(reversed(measures))
        for name in order:
            taken = measures[name]()
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def spread(values: Iterable[float], digits: int = 4) -> dict[str, Any]:
    """``median`` and ``quartiles`` of some numbers, to so many significant digits."""
    values = list(values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": rounded(middle, digits), "quartiles": [rounded(low, digits), rounded(high, digits)]}


def ratios_to(reference: str, seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """How many times as long as the reference each of the others takes: spreads of the ratios of all rounds."""
    return {
        name: spread(one / other for one, other in zip(values, seconds[reference], strict=True))
        for name, values in seconds.items()
        if name != reference
    }


def rounded(value: float, digits: int = 4) -> float:
    """A number to so many significant digits, as JSON should have it."""
    return float(f"{value:.{digits}g}")


def words_of(spread: Mapping[str, Any]) -> str:
    """A ratio for people, such as ``1.43 (1.41 to 1.46)``: the median, and the quartiles."""
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f} to {high:.2f})"


class Clock:
    """Sums the time spent in functions that it has been wrapped around.

    Args:
        device: Where their work is done; it is waited for.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self._running = threading.local()

    def around(self, owner: Any, name: str, part: str) -> Callable[[], None]:
        """Times a method of an object, or of a class; what it calls does not count twice.

        Returns:
            What puts the method back.
        """
        method = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if getattr(self._running, "part", None) is not None:
                return method(*arguments, **options)
            self._running.part = part
            synchronize(self.device)
            start = time.perf_counter()
            try:
                result = method(*arguments, **options)
                synchronize(self.device)
                return result
            finally:
                self.seconds[part] += time.perf_counter() - start
                self._running.part = None

        setattr(owner, name, timed)
        return lambda: setattr(owner, name, method)
