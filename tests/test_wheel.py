"""The wheel holds the whole package, and works where there is no checkout."""

import contextlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from imagenet64_diffusion.tests.commands.processes import forget_package, run_function


ROOT = Path(__file__).parents[1]
# what git keeps and a wheel does not: folders that are no packages, and files about the repository
LEFT_OUT = {"benchmarks", "docs", "examples", "tests"}


def use(installed: Path, folder: Path) -> None:
    """Every console script's --help, sampling with the model that travels along, and a run of training by the name of
    its file of options, as far as it goes without data."""
    forget_package()
    sys.path.insert(0, str(installed))
    os.chdir(folder)
    shown, scripts = {}, importlib.metadata.distribution("imagenet64-diffusion").entry_points
    for script in scripts:
        main, output = script.load(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main(["--help"])
        shown[script.name] = [main.__name__, main.__globals__["__file__"], output.getvalue()]
    (folder / "shown.json").write_text(json.dumps(shown))
    options = ["--class_labels", "3", "null", "--num_inference_steps", "2", "--output_dir", "generated"]
    assert scripts["imagenet64-generate"].load()(options) == 0
    assert scripts["imagenet64-train"].load()(["--config", "digits", "--train_data_dir", "nowhere"]) == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, built from a copy: building leaves a folder beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    left_out = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", *LEFT_OUT)
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist"]
    finished = subprocess.run([*command, folder / "source"], capture_output=True, text=True, timeout=240, cwd=folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
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
    code, said = run_function(use, package.parent, tmp_path)
    assert code == 0, said[-3000:]
    shown = json.loads((tmp_path / "shown.json").read_text())
    commands = ("app", "convert", "evaluate", "generate", "prepare", "train")
    assert set(shown) == {f"imagenet64-{command}" for command in commands}
    for function, file, text in shown.values():
        assert (function, Path(file).parent, text[:7]) == ("main", package, "usage: ")
    manifest = json.loads((tmp_path / "generated" / "manifest.json").read_text())
    assert manifest["model"] == str(package / "pretrained" / "digits")
    assert [image["class_name"] for image in manifest["images"]] == ["3", ""]
    assert (tmp_path / "generated" / "00001.png").is_file()
    assert "error: train_data_dir is nowhere, but there is no such folder" in said
