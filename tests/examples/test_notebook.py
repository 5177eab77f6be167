"""The notebook runs from top to bottom, and what is committed with it is what it shows."""

import ast
import base64
import io
from pathlib import Path

import nbformat
import numpy as np
from PIL import Image


FILE = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def test_it_shows_what_is_committed_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert FILE.stat().st_size < 300_000
    cells = [cell for cell in nbformat.read(FILE, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type in ("error", "stream")]
    names, shown = {}, 0
    for cell in cells:
        *statements, last = ast.parse(cell.source).body
        exec(compile(ast.Module(statements, []), str(FILE), "exec"), names)
        if not cell.outputs:
            exec(compile(ast.Module([last], []), str(FILE), "exec"), names)
            continue
        value, data = eval(compile(ast.Expression(last.value), str(FILE), "eval"), names), cell.outputs[0].data
        if isinstance(value, Image.Image):
            # the digits are grey, and so is what is committed
            committed = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("L")
            before, after = (np.asarray(image, np.float32) for image in (committed, value.convert("L")))
            assert before.shape == after.shape
            # between machines they differ by rounding
            assert np.abs(before - after).mean() < 4
            assert after.std() > 20
            shown += 1
        else:
            assert repr(value) == data["text/plain"]
    assert shown >= 6
    assert list(tmp_path.iterdir()) == []
