"""Settings of float32 products, mixed of torch's old and new ones, are taken away and given back."""

import contextlib
import functools
import multiprocessing
from typing import Any

import torch

from imagenet64_diffusion.evaluation.extractors import full_float32, make_extractor
from imagenet64_diffusion.tests.commands import processes  # noqa: F401 - its server of processes has imported torch


PLACES = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
HAS_NEW_SETTINGS = hasattr(torch.backends, "fp32_precision")

# what a program may have said, in this order; "matmul" is set_float32_matmul_precision
OLD: list[dict[str, Any]] = [
    {},
    {"matmul": "medium", "cudnn.allow_tf32": False, "cudnn.benchmark": True},
    {"cuda.matmul.allow_tf32": True, "cudnn.deterministic": True},
]
# of those that are marked torch cannot say any more what the old setting is
MIXED: list[dict[str, Any]] = [
    {"cuda.matmul.fp32_precision": "tf32"},  # this one
    {"fp32_precision": "tf32"},  # this one
    {"matmul": "high", "cuda.matmul.fp32_precision": "none", "fp32_precision": "ieee"},
    {"mkldnn.matmul.fp32_precision": "bf16", "mkldnn.conv.fp32_precision": "bf16"},  # this one
    {"cudnn.fp32_precision": "ieee", "mkldnn.rnn.fp32_precision": "tf32"},
    {"cudnn.allow_tf32": False, "cudnn.fp32_precision": "tf32"},  # this one
]


def say(name: str, value: Any) -> None:
    if name == "matmul":
        torch.set_float32_matmul_precision(value)
    else:
        *path, attribute = name.split(".")
        setattr(functools.reduce(getattr, path, torch.backends), attribute, value)


def found_settings() -> dict[str, Any]:
    """Every setting; those that cannot be read are there too."""
    names = ["cuda.matmul.allow_tf32", "cudnn.allow_tf32", "cudnn.benchmark", "cudnn.deterministic"]
    names += [f"{place}.fp32_precision" for place in PLACES if HAS_NEW_SETTINGS]
    readers = {name: functools.partial(functools.reduce, getattr, name.split("."), torch.backends) for name in names}
    found = {}
    for name, read in {"matmul": torch.get_float32_matmul_precision, **readers}.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "cannot be read"
    return found


def observe(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Settings before, inside and afterwards, and features, in a process in which nobody has touched the settings."""
    for name, value in settings.items():
        say(name, value)
    before = found_settings()
    with contextlib.suppress(KeyboardInterrupt), full_float32():
        inside = found_settings()
        raise KeyboardInterrupt
    images = torch.arange(3 * 256, dtype=torch.int64).remainder(251).to(torch.uint8).reshape(1, 3, 16, 16)
    return before, inside, found_settings(), make_extractor("pixels")(images).features.tolist()


def test_all_is_full_inside_and_as_it_was_afterwards():
    cases = [*OLD, *(MIXED if HAS_NEW_SETTINGS else [])]
    with multiprocessing.get_context("forkserver").Pool(1, maxtasksperchild=1) as pool:
        observed = pool.map(observe, cases, chunksize=1)
    for settings, (before, inside, afterwards, features) in zip(cases, observed, strict=True):
        assert afterwards == before, settings
        expected = {"matmul": "highest", "cuda.matmul.allow_tf32": False}
        expected |= {"cudnn.benchmark": False, "cudnn.deterministic": True}
        new = {f"{place}.fp32_precision": "ieee" for place in PLACES}
        expected |= new if HAS_NEW_SETTINGS else {"cudnn.allow_tf32": False}
        assert inside.items() >= expected.items(), settings
        assert features == observed[0][3], settings
    assert [before["matmul"] for before, *_ in observed].count("cannot be read") == (4 if HAS_NEW_SETTINGS else 0)
