"""Settings of float32 products, mixed of torch's old and new ones, are taken away and given back."""

import contextlib
import multiprocessing
from operator import attrgetter
from typing import Any

import torch

from imagenet64_diffusion.evaluation.extractors import full_float32, make_extractor
from imagenet64_diffusion.tests.commands import processes  # noqa: F401 - its server of processes has imported torch


PLACES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
NEW_SETTINGS = [f"{place}.fp32_precision" for place in PLACES if hasattr(torch.backends, "fp32_precision")]
SETTINGS = ["cuda.matmul.allow_tf32", "cudnn.allow_tf32", "cudnn.benchmark", "cudnn.deterministic", *NEW_SETTINGS]

# what a program may have said, in this order; "matmul" is set_float32_matmul_precision
OLD: list[dict[str, Any]] = [
    {},
    {"matmul": "medium", "cudnn.allow_tf32": False, "cudnn.benchmark": True},
    {"cuda.matmul.allow_tf32": True, "cudnn.deterministic": True},
]
MIXED: list[dict[str, Any]] = [
    {"matmul": "high", "cuda.matmul.fp32_precision": "none", "fp32_precision": "ieee"},
    {"cudnn.fp32_precision": "ieee", "mkldnn.rnn.fp32_precision": "tf32"},
    # of these torch cannot say any more what the old setting is
    {"fp32_precision": "tf32"},
    {"mkldnn.matmul.fp32_precision": "bf16", "mkldnn.conv.fp32_precision": "bf16"},
    {"cudnn.allow_tf32": False, "cudnn.fp32_precision": "tf32"},
]


def found_settings() -> dict[str, Any]:
    """Every setting that can be read."""
    found = {}
    for name in ("matmul", *SETTINGS):
        with contextlib.suppress(RuntimeError):
            matmul = name == "matmul"
            found[name] = torch.get_float32_matmul_precision() if matmul else attrgetter(name)(torch.backends)
    return found


def observe(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Settings before, inside and afterwards, and features, in a process in which nobody has touched the settings."""
    for name, value in settings.items():
        place, _, attribute = f"backends.{name}".rpartition(".")
        if name == "matmul":
            torch.set_float32_matmul_precision(value)
        else:
            setattr(attrgetter(place)(torch), attribute, value)
    before = found_settings()
    with contextlib.suppress(KeyboardInterrupt), full_float32():
        inside = found_settings()
        raise KeyboardInterrupt
    images = torch.arange(3 * 256, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(1, 3, 16, 16)
    return before, inside, found_settings(), make_extractor("pixels")(images).features.tolist()


def test_all_is_full_inside_and_as_it_was_afterwards():
    cases = [*OLD, *(MIXED if NEW_SETTINGS else [])]
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        observed = pool.map(observe, cases, chunksize=1)
    expected = {"matmul": "highest", "cuda.matmul.allow_tf32": False}
    expected |= {"cudnn.benchmark": False, "cudnn.deterministic": True}
    expected |= dict.fromkeys(NEW_SETTINGS, "ieee") if NEW_SETTINGS else {"cudnn.allow_tf32": False}
    for settings, (before, inside, afterwards, features) in zip(cases, observed, strict=True):
        assert afterwards == before, settings
        assert inside.items() >= expected.items(), settings
        assert features == observed[0][3], settings
    assert ["matmul" in before for before, *_ in observed].count(False) == (3 if NEW_SETTINGS else 0)
