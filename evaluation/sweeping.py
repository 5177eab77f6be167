"""Many models under many samplers: a table that grows, is resumed after a stop, and becomes charts."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from accelerate import PartialState

from ..pipelines.sampler import Sampler
from ..utils.atomic_write import atomic_file, only_writer
from ..utils.distributed import on_every_process, on_main_process
from ..utils.nearest_names import perhaps
from .charts import make_sweep_charts
from .evaluating import distributed_state, evaluate_model, open_extractor
from .evaluation_folder import STATISTICS_NAME, Evaluation, write_json
from .images import find_revision
from .options import ExtractionOptions, ModelOptions, SamplingOptions, SweepOptions
from .protocols import COMPARED_ENTRIES, check_comparable
from .scoring import compare
from .weights import file_digest


RESULTS_NAME = "results.csv"
_CELLS_NAME = "cells"
_CHARTS_NAME = ".charts.json"
_EVALUATIONS_NAME = "evaluations"
_MODEL_SUFFIXES = (".json", ".safetensors")
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


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        model: What is evaluated.
        sampler: How its images are generated.
        key: Names its files, and depends on all that its numbers depend on.
        revision: Commit of a Hub repository; None for a folder.
    """

    model: SweptModel
    sampler: Sampler
    key: str
    revision: str | None


def sweep(options: SweepOptions) -> Path:
    """Evaluates every model under every sampler, and scores them against one reference.

    Every finished entry is a file in ``cells``, from which ``results.csv`` and the charts are made anew each time. The
    table has what is asked for now; entries of other calls stay in their files and come back when they are asked for.
    Charts of earlier calls that this one does not make go, unless someone has changed them. A model whose folder has
    changed, or whose Hub repository has another commit, is evaluated anew. An entry that fails is a row with its
    reason in the column ``error``, the others go on, and the next call tries it again. The disk holds the parts of one
    evaluation at a time, or of one for each rank that takes models of its own, and with ``keep_features`` all that
    were evaluated.

    Args:
        options: What to evaluate.

    Returns:
        ``results.csv``.

    Raises:
        ValueError: If a setting does not fit; or, at the end, if entries failed.
        OSError: If something cannot be written, another run sweeps into the same folder, or a Hub repository cannot
            be reached.
    """
    with distributed_state(options.device) as state, contextlib.ExitStack() as stack:
        running = Sweep(options, state)

        def begin() -> None:
            stack.enter_context(only_writer(running.folder))
            running.prepare_folder()

        on_main_process(state, begin)
        running.evaluate_missing()
        on_main_process(state, running.finish)
    return running.folder / RESULTS_NAME


class Sweep:
    """A sweep in one of its ranks; `sweep` calls its methods in their order.

    Args:
        options: What to evaluate.
        state: The ranks that share the work.
    """

    def __init__(self, options: SweepOptions, state: PartialState):
        self.options, self.state = options, state
        self.folder = Path(options.output_dir)
        self.sampling = _values(options, SamplingOptions)
        self.reference = on_every_process(state, lambda: Evaluation.load(options.reference))
        image_size = self.reference.header["images"].get("image_size", [3])
        self.extractor = open_extractor(options, image_size[0], state)
        protocols = (self.reference.header["protocol"], self.extractor.header)
        on_every_process(state, lambda: check_comparable(*protocols, str(self.reference.folder), "this sweep"))
        models = on_every_process(state, lambda: find_models(options.models))
        samplers = on_every_process(state, lambda: sampler_grid(options))
        # one rank reads the weights, and asks the Hub
        found = on_main_process(state, lambda: {model.name: _identity(model.name) for model in models})
        self.cells: list[Cell] = on_every_process(state, lambda: self._list_cells(models, samplers, found))

    def prepare_folder(self) -> None:
        """Raises ValueError if the folder has a table that no sweep has made."""
        if (self.folder / RESULTS_NAME).exists() and not (self.folder / _CELLS_NAME).is_dir():
            raise ValueError(f"output_dir is {self.folder}, which holds another {RESULTS_NAME}: name another folder")
        (self.folder / _CELLS_NAME).mkdir(parents=True, exist_ok=True)
        done = [cell for cell in self.cells if self._file(cell).is_file()]
        print(f"{len(self.cells)} evaluations, of which {len(done)} are there already", flush=True)
        for cell in () if self.options.keep_features else done:
            # left by a call that was killed just then
            shutil.rmtree(self._evaluated(cell), ignore_errors=True)

    def evaluate_missing(self) -> None:
        """Evaluates what is missing, each entry by all ranks or all entries shared out among them."""
        missing = [cell for cell in self.cells if not self._file(cell).is_file()]
        # nobody writes before everybody has looked
        self.state.wait_for_everyone()
        state: PartialState | _Alone = self.state
        if self.options.share == "models" and state.num_processes > 1:
            missing = missing[state.process_index :: state.num_processes]
            state = _Alone(self.state)
        for cell in missing:
            try:
                self._evaluate_cell(cell, state)
            except (ValueError, OSError) as error:
                if state.is_main_process:
                    write_json(self._file(cell, failed=True), {"row": self._row(cell) | {"error": str(error)}})
                    print(f"{cell.model.name}, {cell.sampler.title()}: {error}", file=sys.stderr, flush=True)
            if self.state.is_main_process:
                self.write_table()
        self.state.wait_for_everyone()

    def finish(self) -> None:
        """Writes table and charts; raises ValueError if entries failed."""
        rows = self.write_table()
        failed = [row for row in rows if "error" in row]
        charts = make_sweep_charts([row for row in rows if "error" not in row], self.folder)
        self._remove_stale_charts(charts)
        print(f"{self.folder}: {', '.join([RESULTS_NAME, *(chart.name for chart in charts)])}")
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(rows)} evaluations failed, which {self.folder / RESULTS_NAME} says with the"
                f" reasons; the first is {failed[0]['model']} with {failed[0]['sampler']}: {failed[0]['error']}"
            )

    def _remove_stale_charts(self, charts: list[Path]) -> None:
        """Removes what an earlier call has made and this one has not, unless someone has changed it."""
        made = [file for chart in charts for file in (chart, chart.with_suffix(".svg"))]
        record = self.folder / _CHARTS_NAME
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        for name, digest in before.items():
            file = self.folder / name
            if file not in made and file.is_file() and file_digest(file) == digest:
                file.unlink()
        write_json(record, {file.name: file_digest(file) for file in made})

    def write_table(self) -> list[dict[str, Any]]:
        """Writes ``results.csv`` from the entries that there are, and returns its rows."""
        files = [(self._file(cell), self._file(cell, failed=True)) for cell in self.cells]
        found = [next((file for file in pair if file.is_file()), None) for pair in files]
        rows = [json.loads(file.read_text(encoding="utf-8"))["row"] for file in found if file is not None]
        names = list(dict.fromkeys(name for row in rows for name in row if name != "error"))
        results = self.folder / RESULTS_NAME
        with atomic_file(results) as writing, writing.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, [*names, "error"])
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def _list_cells(
        self, models: list[SweptModel], samplers: list[Sampler], identities: dict[str, dict[str, str]]
    ) -> list[Cell]:
        reference = Path(self.options.reference)
        shared = {
            **self.sampling,
            "num_features": self.options.num_features,
            "reference": file_digest(reference / STATISTICS_NAME if reference.is_dir() else reference),
            "protocol": {entry: self.extractor.header.get(entry) for entry in COMPARED_ENTRIES},
        }
        cells = []
        for model in models:
            identity = identities[model.name]
            for sampler in samplers:
                key = {**shared, **identity, "sampler": dataclasses.asdict(sampler)}
                digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
                cells.append(Cell(model, sampler, digest, identity.get("revision")))
        return cells

    def _evaluate_cell(self, cell: Cell, state: "PartialState | _Alone") -> None:
        evaluated = self._evaluated(cell)
        sampler = dataclasses.asdict(cell.sampler) | {"guidance_interval": list(cell.sampler.guidance_interval)}
        extraction = _values(self.options, ExtractionOptions) | {"output_dir": str(evaluated)}
        options = ModelOptions(model=cell.model.name, **extraction, **self.sampling, **sampler)
        evaluate_model(options, state, self.extractor, quiet=True, revision=cell.revision)

        def keep_scores() -> None:
            scores = compare(self.reference, Evaluation.load(evaluated), device=self.extractor.device)
            metrics = scores["metrics"].items()
            means = {name: value["mean"] if isinstance(value, dict) else value for name, value in metrics}
            write_json(self._file(cell), {"row": self._row(cell) | means, "scores": scores})
            self._file(cell, failed=True).unlink(missing_ok=True)
            print(f"{cell.model.name}, {cell.sampler.title()}: fid {means['fid']:.6g}", flush=True)
            if not self.options.keep_features:
                shutil.rmtree(evaluated)

        on_main_process(state, keep_scores)

    def _row(self, cell: Cell) -> dict[str, Any]:
        """What is known of an entry before it is evaluated."""
        return {
            "model": cell.model.name,
            "revision": cell.revision,
            "family": cell.model.family,
            "step": cell.model.step,
            "sampler": cell.sampler.title(),
            **dataclasses.asdict(cell.sampler),
            "guidance_interval": " ".join(map(str, cell.sampler.guidance_interval)),
            "num_images": self.options.num_images,
            "class_labels": " ".join(self.options.class_labels),
            "seed": self.options.seed,
            "protocol": self.options.protocol,
        }

    def _file(self, cell: Cell, failed: bool = False) -> Path:
        return self.folder / _CELLS_NAME / f"{cell.key}{'.failed' if failed else ''}.json"

    def _evaluated(self, cell: Cell) -> Path:
        return self.folder / _EVALUATIONS_NAME / cell.key


def _values(options: Any, kind: type) -> dict[str, Any]:
    """Those of the options that one class of options has."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}


def _identity(model: str) -> dict[str, str]:
    """What a model's numbers depend on: its place with its content, or its Hub id with its commit."""
    revision = find_revision(model)
    if revision is not None:
        return {"model": model, "revision": revision}
    files = [file for file in sorted(Path(model).rglob("*")) if file.suffix in _MODEL_SUFFIXES]
    return {"model": str(Path(model).resolve()), "files": file_digest(*files)}


class _Alone:
    """One rank of several, which does a whole evaluation by itself."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, state: PartialState):
        self.device = state.device

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


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
