"""The package installs, and what it names is there; test_wheel.py has the wheel."""

import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import imagenet64_diffusion
from imagenet64_diffusion import evaluation
from imagenet64_diffusion.train_imagenet64 import TrainOptions
from imagenet64_diffusion.utils.command_line import parse_options


ROOT = Path(__file__).parents[1]


def test_editable_install_from_another_folder(tmp_path):
    """Importing it is cheap: torch and diffusers come with what needs them."""
    program = (
        "import sys, imagenet64_diffusion as package, imagenet64_diffusion.evaluation.metrics;"
        "print(package.__file__, {'torch', 'diffusers'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert printed == f"{ROOT / '__init__.py'} set()\n"


@pytest.mark.parametrize("package", [imagenet64_diffusion, evaluation])
def test_public_names(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert dir(package) == sorted(package.__all__)
    # a module of that name would take its place once it is imported
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & set(package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_citation():
    """The version is that of the package, and the papers are those that the README names."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == imagenet64_diffusion.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    papers = re.findall(r"\(https://arxiv\.org/abs/[\d.]+\)", readme)
    assert {f"({reference['url']})" for reference in citation["references"]} == set(papers)
    assert all(each["authors"] and each["title"] and each["year"] for each in citation["references"])
    assert f"## {imagenet64_diffusion.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "training").iterdir()), ids=lambda file: file.stem)
def test_training_configs_are_options(file, prepared):
    options = parse_options(TrainOptions, "", ["--config", str(file), "--train_data_dir", str(prepared)])
    assert options.max_train_steps > 0


STANDING_ALONE = [f"models.{name}" for name in ("unet_class_conditional", "unet_edm2", "unet_adm", "classifier_adm")]
STANDING_ALONE += [f"pipelines.{name}" for name in ("cached_weights", "noise_kinds", "pipeline_class_conditional")]


@pytest.mark.parametrize(
    "module", [*STANDING_ALONE, "schedulers.scheduling_ddim_eta", "schedulers.scheduling_edm_heun"]
)
def test_what_a_repository_carries_stands_alone(module):
    """torch, diffusers and the standard library only, and what `save_pretrained` carries beside the pipeline."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    source = re.sub(r"from \.(cached_weights|noise_kinds) import .*", "", source)
    imports = re.findall(r"^\s*(?:from|import) ([\w.]+)", source, re.MULTILINE)
    assert {name.split(".")[0] for name in imports} - set(sys.stdlib_module_names) <= {"torch", "diffusers"}


def test_no_root_module_hides_a_library():
    """Scripts run from the root have it on their path, where data.py would hide a library called data."""
    installed = importlib.metadata.packages_distributions()
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not (ours - {"imagenet64_diffusion"}) & {name.replace("-", "_").lower() for name in installed}
