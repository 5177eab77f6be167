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
# every console script's --help, and where its code is
SHOW_HELP = """
import contextlib, importlib.metadata, io, json
shown = {}
for script in importlib.metadata.distribution("imagenet64-diffusion").entry_points:
    main, output = script.load(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        main(["--help"])
    shown[script.name] = [main.__globals__["__file__"], output.getvalue()]
print(json.dumps(shown))
"""


def python(*arguments: object, **options) -> str:
    """What a Python process prints; pip is told to stay off the network."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, **options)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def repository_files() -> list[str]:
    """The files that git keeps, or will once they are added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("git does not list the files here")
    return sorted(name for name in listed.stdout.split("\0") if (ROOT / name).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: building leaves a folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", *LEFT_OUT)
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder / "source", cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder into which the wheel is installed, without the libraries that it needs."""
    folder = tmp_path_factory.mktemp("installed")
    python("-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"imagenet64_diffusion/{name}"
        for name in repository_files()
        if (Path(name).parts[0] not in LEFT_OUT and not name.startswith(".") and "/" in name)
        or ("/" not in name and (name.endswith(".py") or name == "py.typed"))
    }
    assert held == expected
    assert "imagenet64_diffusion/pretrained/digits/unet/diffusion_pytorch_model.safetensors" in held


def test_every_console_script_elsewhere(installed, tmp_path):
    shown = json.loads(python("-c", SHOW_HELP, cwd=tmp_path, env={"PYTHONPATH": str(installed)}))
    assert set(shown) == {
        f"imagenet64-{verb}" for verb in ("app", "convert", "evaluate", "generate", "prepare", "train")
    }
    for name, (file, text) in shown.items():
        assert Path(file).parent == installed / "imagenet64_diffusion", name
        assert text.startswith("usage: ")
        assert (installed / "bin" / name).is_file()


def test_drawing_elsewhere(installed, tmp_path):
    """With the model that travels along, by the console script."""
    options = ["--class_labels", "3", "null", "--num_inference_steps", "2", "--output_dir", "drawn"]
    script = installed / "bin" / "imagenet64-generate"
    python(script, *options, cwd=tmp_path, env={"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"})
    manifest = json.loads((tmp_path / "drawn" / "manifest.json").read_text())
    assert manifest["model"] == str(installed / "imagenet64_diffusion" / "pretrained" / "digits")
    assert [image["class_name"] for image in manifest["images"]] == ["3", ""]
    assert (tmp_path / "drawn" / "00001.png").is_file()


def test_options_that_travel_along(installed, tmp_path):
    """A run of training by the name of its file of options, as far as it goes without data."""
    ask = (
        "from imagenet64_diffusion.train_imagenet64 import main; import sys;"
        "sys.exit(0 if main(['--config', 'digits', '--train_data_dir', 'nowhere']) == 2 else 1)"
    )
    command = [sys.executable, "-c", ask]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0
    assert finished.stderr.startswith("error: train_data_dir is nowhere, but there is no such folder")
