"""The wheel holds the whole package, and works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# what git keeps and a wheel does not: folders that are no packages, and files about the repository
LEFT_OUT = {"benchmarks", "docs", "examples", "tests"}
# every console script's --help, sampling with the model that travels along, and a run of training by the name of its
# file of options, as far as it goes without data
USE = """
import contextlib, importlib.metadata, io, json
shown, scripts = {}, importlib.metadata.distribution("imagenet64-diffusion").entry_points
for script in scripts:
    main, output = script.load(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main(["--help"])
    shown[script.name] = [main.__name__, main.__globals__["__file__"], output.getvalue()]
print(json.dumps(shown))
options = "--class_labels 3 null --num_inference_steps 2 --output_dir generated".split()
assert scripts["imagenet64-generate"].load()(options) == 0
assert scripts["imagenet64-train"].load()("--config digits --train_data_dir nowhere".split()) == 2
"""


def python(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that succeeds and stays off the network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=cwd)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: building leaves a folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", *LEFT_OUT)
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return zipfile.ZipFile(built)


def test_it_holds_the_package_and_nothing_else(wheel):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("git does not list the files here")
    expected = {
        f"imagenet64_diffusion/{name}"
        for name in listed.stdout.split("\0")
        if (ROOT / name).is_file() and not name.startswith((".", *(f"{folder}/" for folder in LEFT_OUT)))
        if "/" in name or name.endswith(".py") or name == "py.typed"
    }
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == expected
    assert "imagenet64_diffusion/pretrained/digits/unet/diffusion_pytorch_model.safetensors" in expected


def test_the_commands_work_elsewhere(wheel, tmp_path):
    """Unpacked, which is how pip installs it but for the programs that call the entry points."""
    package = tmp_path / "installed" / "imagenet64_diffusion"
    wheel.extractall(package.parent)
    used = python("-c", USE, cwd=tmp_path, PYTHONPATH=str(package.parent))
    shown = json.loads(used.stdout.splitlines()[0])
    commands = ("app", "convert", "evaluate", "generate", "prepare", "train")
    assert set(shown) == {f"imagenet64-{command}" for command in commands}
    for function, file, text in shown.values():
        assert (function, Path(file).parent, text[:7]) == ("main", package, "usage: ")
    manifest = json.loads((tmp_path / "generated" / "manifest.json").read_text())
    assert manifest["model"] == str(package / "pretrained" / "digits")
    assert [image["class_name"] for image in manifest["images"]] == ["3", ""]
    assert (tmp_path / "generated" / "00001.png").is_file()
    assert "error: train_data_dir is nowhere, but there is no such folder" in used.stderr
