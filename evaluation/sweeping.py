"""Many models under many samplers: a table that grows, is resumed after a stop, and becomes charts."""

import collections
import contextlib
import csv
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import yaml
from accelerate.utils import gather_object

from ..pipelines.generation_options import Sampler
from ..utils.atomic_write import atomic_file, only_writer, write_json
from ..utils.command_line import Parser
from ..utils.distributed import distributed_state, on_every_process, on_main_process
from ..utils.file_digest import file_digest
from ..utils.nearest_names import perhaps
from .charts import make_sweep_charts
from .evaluating import STATISTICS_NAME, Evaluation, evaluate_model, open_extractor
from .extractors import FeatureExtractor
from .images import find_revision
from .options import INTERVALS, SAMPLER_NAMES, ModelOptions, SamplingOptions, SweepOptions
from .protocols import COMPARED_ENTRIES, check_comparable
from .scoring import compare


RESULTS_NAME = "results.csv"
_ENTRIES_NAME = "cells"
_PIPELINE_NAME = "model_index.json"
_STEP = re.compile(r"(?:step_|checkpoint-|\d+e_)(\d+)s?")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Entry(NamedTuple):
    """One evaluation of a sweep: its file, what the table says of it before the metrics, and how it is made."""

    file: Path
    row: dict[str, Any]
    options: ModelOptions


def sweep(options: SweepOptions) -> Path:
    """Evaluates every model under every sampler, scores them against one reference, and returns ``results.csv``.

    Every finished entry is a file in ``cells``, from which the table and the charts of what is asked for now are made
    anew each time. Charts that are not made any more go, unless someone has changed them. An entry that fails is a
    row with its reason as ``error``, ends in a ValueError after all others, and is tried again by the next call.
    """
    folder = Path(options.output_dir)
    with distributed_state(cpu=options.device == "cpu") as state, contextlib.ExitStack() as stack:
        reference = on_every_process(state, lambda: Evaluation.load(options.reference))
        extractor = open_extractor(options, reference.header["images"].get("image_size", [3])[0], state)

        def begin() -> tuple[list[Entry], list[Entry]]:
            entries = list_entries(options, reference, extractor)
            stack.enter_context(only_writer(folder))
            if (folder / RESULTS_NAME).exists() and not (folder / _ENTRIES_NAME).is_dir():
                raise ValueError(f"output_dir is {folder}, which holds another {RESULTS_NAME}: name another folder")
            (folder / _ENTRIES_NAME).mkdir(parents=True, exist_ok=True)
            missing = [entry for entry in entries if not entry.file.is_file()]
            print(f"{len(entries)} evaluations, of which {len(entries) - len(missing)} are there already", flush=True)
            for entry in entries:
                if entry.file.is_file() and not options.keep_features:
                    # left by a call that was killed just then
                    shutil.rmtree(entry.options.output_dir, ignore_errors=True)
            return entries, missing

        # one rank reads the weights, and asks the Hub
        entries, missing = on_main_process(state, begin)
        ranks: Any = state
        if options.share == "models":
            missing = missing[state.process_index :: state.num_processes]
            ranks = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=state.device)
        errors: dict[Path, str] = {}
        for entry in missing:
            try:
                _evaluate_entry(entry, options, reference, extractor, ranks)
            except (ValueError, OSError) as error:
                errors[entry.file] = str(error)
                if ranks.is_main_process:
                    print(f"{entry.row['model']}, {entry.row['sampler']}: {error}", file=sys.stderr, flush=True)
            if state.is_main_process:
                _write_table(folder, entries, errors)
        # of what several say the main process' words
        errors = dict(collections.ChainMap(*gather_object([errors])))
        on_main_process(state, lambda: _finish(folder, entries, errors))
    return folder / RESULTS_NAME


def list_entries(options: SweepOptions, reference: Evaluation, extractor: FeatureExtractor) -> list[Entry]:
    """What a sweep evaluates, in the order of its table; ValueError or OSError where that cannot be."""
    check_comparable(reference.header["protocol"], extractor.header, str(reference.folder), "this sweep")
    names = [item.name for item in dataclasses.fields(ModelOptions) if item.name not in SAMPLER_NAMES]
    shared = {name: getattr(options, name) for name in names if hasattr(options, name)}
    columns = {name: shared[name] for name in ("num_images", "class_labels", "seed", "protocol")}
    folder, file = Path(options.output_dir), Path(options.reference)
    depends = {
        **{item.name: shared[item.name] for item in dataclasses.fields(SamplingOptions)},
        "num_features": options.num_features,
        "reference": file_digest(file / STATISTICS_NAME if file.is_dir() else file),
        "protocol": {entry: extractor.header.get(entry) for entry in COMPARED_ENTRIES},
    }
    entries, samplers = [], sampler_grid(options)
    for model, family, step in find_models(options.models):
        revision = find_revision(model)
        identity = {"model": model, "revision": revision}
        if revision is None:
            files = [path for path in sorted(Path(model).rglob("*")) if path.suffix in (".json", ".safetensors")]
            identity = {"model": str(Path(model).resolve()), "files": file_digest(*files)}
        for sampler in samplers:
            settings = dataclasses.asdict(sampler)
            key = json.dumps({**depends, **identity, "sampler": settings}, sort_keys=True)
            name = hashlib.sha256(key.encode()).hexdigest()[:16]
            row: dict[str, Any] = {"model": model, "revision": revision, "family": family, "step": step}
            row |= {"sampler": sampler.title(), **settings, **columns}
            row |= {name: " ".join(map(str, value)) for name, value in row.items() if isinstance(value, (list, tuple))}
            shared |= {"model": model, "output_dir": str(folder / "evaluations" / name)}
            entries.append(Entry(folder / _ENTRIES_NAME / f"{name}.json", row, ModelOptions(**shared | settings)))
    return entries


def _evaluate_entry(
    entry: Entry, options: SweepOptions, reference: Evaluation, extractor: FeatureExtractor, ranks: Any
) -> None:
    folder = evaluate_model(entry.options, ranks, extractor, entry.row["revision"])

    def keep_scores() -> None:
        scores = compare(reference, Evaluation.load(folder), device=extractor.device)
        metrics = scores["metrics"].items()
        means = {name: value["mean"] if isinstance(value, dict) else value for name, value in metrics}
        write_json(entry.file, {"row": entry.row | means, "scores": scores})
        print(f"{entry.row['model']}, {entry.row['sampler']}: fid {means['fid']:.6g}", flush=True)
        if not options.keep_features:
            shutil.rmtree(folder)

    on_main_process(ranks, keep_scores)


def _write_table(folder: Path, entries: Sequence[Entry], errors: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Writes ``results.csv`` of the entries that are finished or have failed, and returns its rows."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if entry.file in errors:
            rows.append({**entry.row, "error": errors[entry.file]})
        elif entry.file.is_file():
            rows.append(json.loads(entry.file.read_text())["row"])
    names = dict.fromkeys(name for row in rows for name in row if name != "error")
    with atomic_file(folder / RESULTS_NAME) as writing, writing.open("w", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, [*names, "error"])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _finish(folder: Path, entries: Sequence[Entry], errors: Mapping[Path, str]) -> None:
    """Writes table and charts; raises ValueError if entries failed."""
    rows = _write_table(folder, entries, errors)
    charts = make_sweep_charts([row for row in rows if "error" not in row], folder)
    made = [file for chart in charts for file in (chart, chart.with_suffix(".svg"))]
    record = folder / ".charts.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    for file in (folder / name for name in before):
        # of an earlier call, and as that has left it
        if file not in made and file.is_file() and file_digest(file) == before[file.name]:
            file.unlink()
    write_json(record, {file.name: file_digest(file) for file in made})
    print(f"{folder}: {', '.join([RESULTS_NAME, *(chart.name for chart in charts)])}")
    if errors:
        first = next(row for row in rows if "error" in row)
        raise ValueError(
            f"{len(errors)} of {len(rows)} evaluations failed, which {folder / RESULTS_NAME} says with the reasons;"
            f" the first is {first['model']} with {first['sampler']}: {first['error']}"
        )


def find_models(names: Sequence[str]) -> list[tuple[str, str, int | None]]:
    """Each model with the training that it comes from and its optimizer steps, in the order of these two.

    ``run/pipelines/step_0001000`` and ``run/469e_600000s`` come from ``run``; a name without a step gives None. A
    folder with pipelines in it, at any depth, stands for all of them. ValueError if there is none where a name says.
    """
    found: list[str] = []
    for name in names:
        folder = Path(name)
        if not folder.is_dir() and not _HUB_ID.fullmatch(name):
            raise ValueError(f"models names {name}, which is neither a folder nor a Hub id")
        if not folder.is_dir() or (folder / _PIPELINE_NAME).is_file():
            found.append(name)
            continue
        inside = [file.parent.relative_to(folder) for file in folder.rglob(_PIPELINE_NAME)]
        # hidden ones are half written
        inside = [place for place in inside if not any(part[0] == "." for part in place.parts)]
        if not inside:
            raise ValueError(f"models names {name}, a folder in which there is no pipeline")
        found += [str(folder / place) for place in inside]
    models: list[tuple[str, str, int | None]] = []
    for name in dict.fromkeys(found):
        place, folder = Path(name).name, Path(name).parent
        run = folder.parent if folder.name == "pipelines" else folder
        match = _STEP.fullmatch(place)
        is_of_run = match or (place == "model" and (run / "pipelines").is_dir())
        models.append((name, str(run) if is_of_run else name, int(match[1]) if match else None))
    # a training's last pipeline, which has no step in its name, comes after the others
    return sorted(models, key=lambda model: (model[1], model[2] is None, model[2], model[0]))


def sampler_grid(options: SweepOptions) -> list[Sampler]:
    """The samplers of a sweep, each once: the product of its options, or those that its file lists."""
    steps = [{name: number} for name in ("num_inference_steps", "step_size") for number in getattr(options, name)]
    listed: Any = [
        {"scheduler": scheduler, **step, "guidance_scale": scale, "classifier_scale": classifier_scale, "eta": eta}
        | {"clip_sample": options.clip_sample}
        | ({"scheduler_options": options.scheduler_options} if options.scheduler_options else {})
        | ({name: getattr(options, name) for name in INTERVALS} if scale > 1 else {})
        for scheduler in options.scheduler
        for step in steps or [{}]
        for scale in options.guidance_scale
        for classifier_scale in options.classifier_scale
        for eta in options.eta
    ]
    kinds = Parser("sweep", "", Sampler).kinds
    try:
        if options.grid is not None:
            # JSON is YAML too
            listed = yaml.safe_load(Path(options.grid).read_text(encoding="utf-8"))
        if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
            raise ValueError("samplers must be a list, each with names and values")
        return list(dict.fromkeys(_sampler(entry, kinds) for entry in listed))
    except (yaml.YAMLError, ValueError) as error:
        if options.grid is None:
            raise
        raise ValueError(f"grid is {options.grid}, which is wrong: {' '.join(str(error).split())}") from error


def _sampler(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> Sampler:
    for name in values:
        if name not in SAMPLER_NAMES:
            known = ", ".join(SAMPLER_NAMES) + perhaps(name, SAMPLER_NAMES)
            raise ValueError(f"it names {name!r}, but must be made of {known}")
    checked = {name: kinds[name].from_file(value, name) for name, value in values.items()}
    return Sampler(**{name: value for name, value in checked.items() if (name, value) != ("scheduler", "own")})
