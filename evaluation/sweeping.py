"""Many models under many samplers: a table that grows, is taken up again after a stop, and becomes charts."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..pipelines.sampler import Sampler
from ..utils.atomic_write import atomic_file, only_writer
from ..utils.distributed import on_every_process, on_main_process
from .charts import draw_sweep_charts
from .drawing import find_revision
from .extractors import FeatureExtractor
from .grids import SweptModel, find_models, sampler_grid
from .measurement import STATISTICS_NAME, Measurement
from .measuring import distributed_state, measure_model, open_extractor
from .options import ModelOptions, SamplingOptions, SweepOptions
from .protocols import COMPARED_ENTRIES, check_comparable
from .scoring import compare
from .weights import file_digest


RESULTS_NAME = "results.csv"
_CELLS_NAME = "cells"
_CHARTS_NAME = ".charts.json"
_MEASUREMENTS_NAME = "measurements"
_MODEL_SUFFIXES = (".json", ".safetensors")


@dataclass(frozen=True)
class Cell:
    """One entry of the table.

    Attributes:
        model: What is measured.
        sampler: How its images are drawn.
        key: Names its files, and depends on all that its numbers depend on.
        revision: Commit of a Hub repository; None for a folder.
    """

    model: SweptModel
    sampler: Sampler
    key: str
    revision: str | None


def sweep(options: SweepOptions) -> Path:
    """Measures every model under every sampler, and scores them against one reference.

    Every finished entry is a file in ``cells``, from which ``results.csv`` and the charts are made anew each time. The
    table has what is asked for now; entries of other calls stay in their files and come back when they are asked for.
    Charts of earlier calls that this one does not draw anew go, unless someone has changed them. A model
    whose folder has changed, or whose Hub repository has another commit, is measured anew. An entry that
    fails is a row with its reason in the column ``error``, the others go on, and the next call tries it
    again. The disk holds the parts of one measurement (`extraction`) at a time, or of one for each process
    that takes models of its own, and with ``keep_features`` all that were measured.

    Args:
        options: What to measure.

    Returns:
        ``results.csv``.

    Raises:
        ValueError: If a setting does not fit; or, at the end, if entries failed.
        OSError: If something cannot be written, another process sweeps into the same folder, or a Hub
            repository cannot be reached.
    """
    with distributed_state(options.device) as state, contextlib.ExitStack() as stack:
        running = _Sweep(options, state)

        def take_place() -> None:
            stack.enter_context(only_writer(running.folder))
            running.make_room()

        on_main_process(state, take_place)
        running.fill()
        on_main_process(state, running.finish)
    return running.folder / RESULTS_NAME


class _Sweep:
    """A sweep in one of its processes."""

    def __init__(self, options: SweepOptions, state: PartialState):
        self.options, self.state = options, state
        self.folder = Path(options.output_dir)
        self.reference = on_every_process(state, lambda: Measurement.load(options.reference))
        self.extractor = self._open_extractor()
        models = on_every_process(state, lambda: find_models(options.models))
        samplers = on_every_process(state, lambda: sampler_grid(options))
        # one process reads the weights, and asks the Hub
        found = on_main_process(state, lambda: {model.name: _identity(model.name) for model in models})
        self.cells: list[Cell] = on_every_process(state, lambda: self._list_cells(models, samplers, found))

    def make_room(self) -> None:
        """Readies the folder.

        Raises:
            ValueError: If it has a table that no sweep has made.
        """
        if (self.folder / RESULTS_NAME).exists() and not (self.folder / _CELLS_NAME).is_dir():
            raise ValueError(f"output_dir is {self.folder}, which holds another {RESULTS_NAME}: name another folder")
        (self.folder / _CELLS_NAME).mkdir(parents=True, exist_ok=True)
        missing = [cell for cell in self.cells if not self._file(cell).is_file()]
        print(
            f"{len(self.cells)} measurements, of which {len(self.cells) - len(missing)} are there already", flush=True
        )
        if not self.options.keep_features:
            for cell in self.cells:
                if cell not in missing:
                    # left by a call that was killed just then
                    shutil.rmtree(self._measured(cell), ignore_errors=True)

    def fill(self) -> None:
        """Measures what is missing, each entry by all processes or all entries shared out among them."""
        missing = [cell for cell in self.cells if not self._file(cell).is_file()]
        # nobody writes before everybody has looked
        self.state.wait_for_everyone()
        state: PartialState | _Alone = self.state
        if self.options.share == "models" and state.num_processes > 1:
            missing = missing[state.process_index :: state.num_processes]
            state = _Alone(self.state)
        for cell in missing:
            try:
                self._fill_cell(cell, state)
            except (ValueError, OSError) as error:
                if state.is_main_process:
                    self._write_cell(self._failed_file(cell), {"row": self._row(cell) | {"error": str(error)}})
                    print(f"{cell.model.name}, {cell.sampler.title()}: {error}", file=sys.stderr, flush=True)
            if self.state.is_main_process:
                self.write_table()
        self.state.wait_for_everyone()

    def finish(self) -> None:
        """Writes table and charts.

        Raises:
            ValueError: If entries failed.
        """
        rows = self.write_table()
        failed = [row for row in rows if "error" in row]
        charts = draw_sweep_charts([row for row in rows if "error" not in row], self.folder)
        self._remove_stale_charts(charts)
        print(f"{self.folder}: {', '.join([RESULTS_NAME, *(chart.name for chart in charts)])}")
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(rows)} measurements failed, which {self.folder / RESULTS_NAME} says with the"
                f" reasons; the first is {failed[0]['model']} with {failed[0]['sampler']}: {failed[0]['error']}"
            )

    def _remove_stale_charts(self, charts: list[Path]) -> None:
        """Removes what an earlier call has drawn and this one has not, unless someone has changed it."""
        drawn = [file for chart in charts for file in (chart, chart.with_suffix(".svg"))]
        record = self.folder / _CHARTS_NAME
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        for name, digest in before.items():
            file = self.folder / name
            if file not in drawn and file.is_file() and file_digest(file) == digest:
                file.unlink()
        with atomic_file(record) as writing:
            digests = {file.name: file_digest(file) for file in drawn}
            writing.write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")

    def write_table(self) -> list[dict[str, Any]]:
        """Writes ``results.csv`` from the entries that there are, and returns its rows."""
        rows = []
        for cell in self.cells:
            for file in (self._file(cell), self._failed_file(cell)):
                if file.is_file():
                    rows.append(json.loads(file.read_text(encoding="utf-8"))["row"])
                    break
        names = list(dict.fromkeys(name for row in rows for name in row if name != "error"))
        results = self.folder / RESULTS_NAME
        with atomic_file(results) as writing, writing.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, [*names, "error"])
            writer.writeheader()
            writer.writerows(rows)
        return rows

    def _open_extractor(self) -> FeatureExtractor:
        """The extractor of all entries, which must be that of the reference."""
        image_size = self.reference.header["images"].get("image_size", [3])
        extractor = open_extractor(self.options, image_size[0], self.state)

        def check() -> None:
            header = self.reference.header["protocol"]
            check_comparable(header, extractor.header, str(self.reference.folder), "this sweep")

        on_every_process(self.state, check)
        return extractor

    def _list_cells(
        self, models: list[SweptModel], samplers: list[Sampler], identities: dict[str, dict[str, str]]
    ) -> list[Cell]:
        options = self.options
        shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingOptions)}
        shared |= {"num_features": options.num_features, "reference": _digest(Path(options.reference))}
        shared |= {"protocol": {entry: self.extractor.header.get(entry) for entry in COMPARED_ENTRIES}}
        cells = []
        for model in models:
            identity = identities[model.name]
            for sampler in samplers:
                key = {**shared, **identity, "sampler": dataclasses.asdict(sampler)}
                digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
                cells.append(Cell(model, sampler, digest, identity.get("revision")))
        return cells

    def _fill_cell(self, cell: Cell, state: "PartialState | _Alone") -> None:
        options, measured = self.options, self._measured(cell)
        sampling = {field.name: getattr(options, field.name) for field in dataclasses.fields(SamplingOptions)}
        sampler = dataclasses.asdict(cell.sampler) | {"guidance_interval": list(cell.sampler.guidance_interval)}
        model_options = ModelOptions(
            output_dir=str(measured),
            protocol=options.protocol,
            weights=options.weights,
            extractor_dtype=options.extractor_dtype,
            num_features=options.num_features,
            batch_size=options.batch_size,
            device=options.device,
            model=cell.model.name,
            **sampling,
            **sampler,
        )
        measure_model(model_options, state, self.extractor, quiet=True, revision=cell.revision)

        def keep_scores() -> None:
            scores = compare(self.reference, Measurement.load(measured), device=self.extractor.device)
            metrics = scores["metrics"].items()
            means = {name: value["mean"] if isinstance(value, dict) else value for name, value in metrics}
            self._write_cell(self._file(cell), {"row": self._row(cell) | means, "scores": scores})
            self._failed_file(cell).unlink(missing_ok=True)
            print(f"{cell.model.name}, {cell.sampler.title()}: fid {means['fid']:.6g}", flush=True)
            if not options.keep_features:
                shutil.rmtree(measured)

        on_main_process(state, keep_scores)

    def _row(self, cell: Cell) -> dict[str, Any]:
        """What is known of an entry before it is measured."""
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

    def _file(self, cell: Cell) -> Path:
        return self.folder / _CELLS_NAME / f"{cell.key}.json"

    def _failed_file(self, cell: Cell) -> Path:
        return self.folder / _CELLS_NAME / f"{cell.key}.failed.json"

    def _measured(self, cell: Cell) -> Path:
        return self.folder / _MEASUREMENTS_NAME / cell.key

    @staticmethod
    def _write_cell(file: Path, content: dict[str, Any]) -> None:
        with atomic_file(file) as writing:
            writing.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _identity(model: str) -> dict[str, str]:
    """What a model's numbers depend on: its place with its content, or its Hub id with its commit."""
    folder = Path(model)
    revision = find_revision(model)
    if revision is not None:
        return {"model": model, "revision": revision}
    files = [file for file in sorted(folder.rglob("*")) if file.suffix in _MODEL_SUFFIXES]
    return {"model": str(folder.resolve()), "files": file_digest(*files)}


def _digest(reference: Path) -> str:
    return file_digest(reference / STATISTICS_NAME if reference.is_dir() else reference)


class _Alone:
    """One process of several, which does a whole measurement by itself.

    Args:
        state: The processes.
    """

    num_processes = 1
    process_index = 0
    is_main_process = True

    def __init__(self, state: PartialState):
        self.device = state.device

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""
