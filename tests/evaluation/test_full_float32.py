"""Settings of float32 products, mixed of torch's old and new ones, are taken away and given back."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from imagenet64_diffusion.evaluation import precision_and_recall
from imagenet64_diffusion.evaluation.extractors import PixelExtractor
from imagenet64_diffusion.evaluation.protocols import full_float32
from imagenet64_diffusion.tests.commands import training_runs  # noqa: F401 - its server of processes has imported torch


PLACES = (
    "",
    "cudnn.",
    "cuda.matmul.",
    "cudnn.conv.",
    "cudnn.rnn.",
    "mkldnn.matmul.",
    "mkldnn.conv.",
    "mkldnn.rnn.",
)
HAS_NEW_SETTINGS = hasattr(torch.backends, "fp32_precision")
needs_new_settings = pytest.mark.skipif(not HAS_NEW_SETTINGS, reason="torch before 2.9 has but the old ones")

# what a program may have said, in this order; "matmul" is set_float32_matmul_precision
OLD = [
    {},
    {"matmul": "highest"},
    {"matmul": "medium", "cudnn.allow_tf32": False, "cudnn.benchmark": True},
    {"cuda.matmul.allow_tf32": True, "cudnn.deterministic": True},
]
# of those that are marked torch cannot say any more what the old setting is
MIXED = [
    {"cuda.matmul.fp32_precision": "tf32"},  # this one
    {"fp32_precision": "tf32"},  # this one
    {"matmul": "high", "cuda.matmul.fp32_precision": "ieee"},
    {"matmul": "high", "cuda.matmul.fp32_precision": "none", "fp32_precision": "ieee"},
    {"matmul": "medium", "mkldnn.matmul.fp32_precision": "tf32"},  # this one
    {"mkldnn.matmul.fp32_precision": "bf16", "mkldnn.conv.fp32_precision": "bf16"},  # this one
    {"cudnn.fp32_precision": "ieee", "mkldnn.rnn.fp32_precision": "tf32"},
    {"cudnn.conv.fp32_precision": "ieee"},
    {"cudnn.allow_tf32": False, "cudnn.fp32_precision": "tf32"},  # this one
]


@pytest.fixture(name="run_alone", scope="module")
def run_alone_fixture() -> Iterator[Callable[..., Any]]:
    """Calls a function in a new process, forked from one in which nobody has touched the settings."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as untouched:
        yield lambda *call: untouched.submit(fork, *call).result()


def fork(function: Callable[..., Any], *arguments: Any) -> Any:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def say(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if name == "matmul":
            torch.set_float32_matmul_precision(value)
        else:
            *path, attribute = name.split(".")
            setattr(functools.reduce(getattr, path, torch.backends), attribute, value)


def read(name: str) -> Any:
    if name == "matmul":
        return torch.get_float32_matmul_precision()
    return functools.reduce(getattr, name.split("."), torch.backends)


def found_settings() -> dict[str, Any]:
    """Every setting; those that cannot be read are there too."""
    names = ["matmul", "cuda.matmul.allow_tf32", "cudnn.allow_tf32", "cudnn.benchmark", "cudnn.deterministic"]
    names += [f"{place}fp32_precision" for place in PLACES if HAS_NEW_SETTINGS]
    found = {}
    for name in names:
        try:
            found[name] = read(name)
        except RuntimeError:
            found[name] = "cannot be read"
    return found


def observe(settings: dict[str, Any], entered: bool) -> list[dict[str, Any]]:
    """Settings inside, and afterwards, and after further ones that some of them follow."""
    say(settings)
    states = []
    if entered:
        try:
            with full_float32():
                states.append(found_settings())
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
    states.append(found_settings())
    values = ("ieee", "tf32", "none")
    further = [{f"{place}fp32_precision": value} for place in PLACES[:2] for value in values]
    for change in [*(further if HAS_NEW_SETTINGS else []), {"matmul": "high"}]:
        say(change)
        states.append(found_settings())
    return states


@pytest.mark.parametrize(
    "settings",
    [*OLD, *(pytest.param(each, marks=needs_new_settings) for each in MIXED)],
    ids=str,
)
def test_all_is_full_inside_and_as_it_was_afterwards(settings, run_alone):
    untouched = run_alone(observe, settings, False)
    inside, *afterwards = run_alone(observe, settings, True)
    assert afterwards == untouched
    assert inside["matmul"] == "highest"
    assert inside["cuda.matmul.allow_tf32"] is False
    assert (inside["cudnn.benchmark"], inside["cudnn.deterministic"]) == (False, True)
    if HAS_NEW_SETTINGS:
        assert {inside[f"{place}fp32_precision"] for place in PLACES[2:]} == {"ieee"}
    else:
        assert inside["cudnn.allow_tf32"] is False


def compute(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Metrics and features under settings, and whether torch can tell the old one of products."""
    say(settings)
    rng = np.random.default_rng(0)
    metrics = precision_and_recall(rng.normal(size=(60, 8)), rng.normal(0.5, 1, (50, 8)))
    images = torch.from_numpy(rng.integers(0, 256, (3, 3, 16, 16), dtype=np.uint8))
    return tuple(metrics), PixelExtractor()(images).features.numpy().tolist(), found_settings()["matmul"]


@needs_new_settings
def test_settings_that_torch_cannot_read_do_not_hinder(run_alone):
    *expected, _ = run_alone(compute, {})
    unreadable = 0
    for settings in MIXED:
        *found, matmul = run_alone(compute, settings)
        assert found == expected
        unreadable += matmul == "cannot be read"
    assert unreadable == 5
