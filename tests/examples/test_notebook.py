"""The notebook runs from top to bottom, and what is committed with it is what it draws."""

import base64
import io
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image


FILE = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(FILE, as_version=4)


@pytest.fixture(scope="module")
def executed(committed, tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook, run in an empty folder."""
    notebook = nbformat.from_dict(committed)
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def pictures(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    """All pictures that it shows."""
    found = [
        output["data"]["image/png"]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    # the digits are grey, and so is what is committed
    images = [Image.open(io.BytesIO(base64.b64decode(text))).convert("L") for text in found]
    return [np.asarray(image, dtype=np.float32) for image in images]


def test_it_draws_what_is_committed_with_it(committed, executed):
    before, after = pictures(committed), pictures(executed)
    assert len(before) == len(after) >= 6
    for one, other in zip(before, after, strict=True):
        assert one.shape == other.shape
        # between machines they differ by rounding
        assert np.abs(one - other).mean() < 4
        assert other.std() > 20


def test_what_is_committed_is_small_and_whole(committed):
    assert FILE.stat().st_size < 300_000
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type in ("error", "stream")]
