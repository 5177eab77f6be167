"""What a sweep measures: the models that names stand for, and the samplers that its options or a file list."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from ..pipelines.sampler import Sampler
from ..utils.nearest_names import perhaps
from .options import SweepOptions


_STEP = re.compile(r"(?:step_|checkpoint-|\d+e_)(\d+)s?")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PIPELINE_NAME = "model_index.json"


class SweptModel(NamedTuple):
    """A model of a sweep.

    Attributes:
        name: Pipeline folder or Hub id.
        family: The training that it comes from: models of one family differ in their step.
        step: Optimizer steps, as its name says; None where it says none.
    """

    name: str
    family: str
    step: int | None


def find_models(names: Sequence[str]) -> list[SweptModel]:
    """Each model with its family and step, in their order.

    Args:
        names: Pipeline folders or Hub ids; a folder with pipelines in it, at any depth, stands for all of them.

    Raises:
        ValueError: If there is no pipeline where a name says.
    """
    found: list[str] = []
    for name in names:
        folder = Path(name)
        if folder.is_dir() and not (folder / _PIPELINE_NAME).is_file():
            inside = [path.parent for path in folder.rglob(_PIPELINE_NAME)]
            # hidden ones are half written
            inside = [path for path in inside if not any(part[0] == "." for part in path.relative_to(folder).parts)]
            if not inside:
                raise ValueError(f"models names {name}, a folder in which there is no pipeline")
            found += map(str, sorted(inside))
        elif folder.is_dir() or _HUB_ID.fullmatch(name):
            found.append(name)
        else:
            raise ValueError(f"models names {name}, which is neither a folder nor a Hub id")
    models = {_with_family_and_step(name) for name in found}
    # a training's last pipeline, which has no step in its name, comes after the others
    return sorted(models, key=lambda model: (model.family, model.step is None, model.step, model.name))


def _with_family_and_step(name: str) -> SweptModel:
    """A pipeline's training and its step: ``run/pipelines/step_0001000`` and ``models/469e_600000s`` have both."""
    path = Path(name)
    match = _STEP.fullmatch(path.name)
    if match is not None:
        family = path.parent.parent if path.parent.name == "pipelines" else path.parent
        return SweptModel(name, str(family), int(match[1]))
    if path.name == "model" and (path.parent / "pipelines").is_dir():
        return SweptModel(name, str(path.parent), None)
    return SweptModel(name, name, None)


def sampler_grid(options: SweepOptions) -> list[Sampler]:
    """The samplers of a sweep, each once: the product of its options, or those that its file lists.

    Raises:
        ValueError: If a value is wrong, or the file is not a list of samplers.
        OSError: If the file cannot be read.
    """
    if options.grid is not None:
        samplers = [_sampler(entry, options.grid) for entry in _read_grid(Path(options.grid))]
        return list(dict.fromkeys(samplers))
    steps: list[dict[str, int | None]] = [{"num_inference_steps": number} for number in options.num_inference_steps]
    steps += [{"step_size": number} for number in options.step_size]
    interval = cast(tuple[float, float], tuple(options.guidance_interval))
    samplers = [
        Sampler(
            scheduler=None if scheduler == "own" else scheduler,
            guidance_scale=guidance_scale,
            guidance_interval=interval if guidance_scale > 1 else (0.0, 1.0),
            eta=eta,
            clip_sample=options.clip_sample,
            **step,
        )
        for scheduler in options.scheduler
        for step in steps or [{}]
        for guidance_scale in options.guidance_scale
        for eta in options.eta
    ]
    return list(dict.fromkeys(samplers))


def _read_grid(file: Path) -> list[dict[str, Any]]:
    try:
        # JSON is YAML too
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"grid is {file}, which is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"grid is {file}, which must hold a list of samplers, each with names and values")
    return entries


def _sampler(entry: dict[str, Any], file: str) -> Sampler:
    known = [field.name for field in dataclasses.fields(Sampler)]
    unknown = [name for name in entry if name not in known]
    if unknown:
        near = perhaps(unknown[0], known)
        raise ValueError(f"grid is {file}, which names {unknown[0]!r}, but must be made of {', '.join(known)}{near}")
    values = dict(entry)
    if values.get("scheduler") == "own":
        values["scheduler"] = None
    if isinstance(values.get("guidance_interval"), list):
        values["guidance_interval"] = tuple(values["guidance_interval"])
    try:
        return Sampler(**values)
    except ValueError as error:
        raise ValueError(f"grid is {file}: {error}") from error
