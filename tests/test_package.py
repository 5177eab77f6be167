"""The package installs, and what it names is there; test_wheel.py has the wheel."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import imagenet64_diffusion
from imagenet64_diffusion.train_imagenet64 import TrainOptions
from imagenet64_diffusion.utils.command_line import parse_options


ROOT = Path(__file__).parents[1]
USE = (
    "import imagenet64_diffusion as package; from imagenet64_diffusion.data.class_names import imagenet64_names;"
    "from imagenet64_diffusion.training.components import load_model_config;"
    "assert package.ClassConditionalPipeline and len(imagenet64_names()) == 1000;"
    "assert load_model_config('original/res_res')['output_head_type'] == 'original';"
    "print(package.__file__)"
)


def python(*arguments, **options) -> str:
    return subprocess.run(
        [sys.executable, *arguments], check=True, capture_output=True, text=True, timeout=240, **options
    ).stdout


def test_editable_install_from_another_folder(tmp_path):
    assert Path(python("-c", USE, cwd=tmp_path).strip()) == ROOT / "__init__.py"


def test_public_names():
    for name in imagenet64_diffusion.__all__:
        assert getattr(imagenet64_diffusion, name) is not None
    assert dir(imagenet64_diffusion) == sorted(imagenet64_diffusion.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        imagenet64_diffusion.Nothing  # noqa: B018


def test_citation():
    """The version is that of the package, and the papers are those that the README names."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == imagenet64_diffusion.__version__
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    papers = re.findall(r"\(https://arxiv\.org/abs/[\d.]+\)", readme)
    assert {f"({reference['url']})" for reference in citation["references"]} == set(papers)
    assert all(
        reference["authors"] and reference["title"] and reference["year"] for reference in citation["references"]
    )
    assert f"## {imagenet64_diffusion.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_is_lazy():
    program = "import sys, imagenet64_diffusion.evaluation.metrics; print({'torch', 'diffusers'} & set(sys.modules))"
    assert python("-c", program).strip() == "set()"


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "training").iterdir()), ids=lambda file: file.stem)
def test_training_configs_are_options(file, prepared):
    options = parse_options(TrainOptions, "", ["--config", str(file), "--train_data_dir", str(prepared)])
    assert options.max_train_steps > 0


@pytest.mark.parametrize(
    "module",
    [
        "models/unet_class_conditional",
        "pipelines/cached_weights",
        "pipelines/pipeline_class_conditional",
        "schedulers/scheduling_ddim_eta",
    ],
)
def test_what_a_repository_carries_stands_alone(module):
    """torch, diffusers and the standard library only, and what `save_pretrained` carries beside the pipeline."""
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    if module == "pipelines/pipeline_class_conditional":
        source = source.replace("from .cached_weights import cached_weights", "")
    imports = [line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert set(imports) - set(sys.stdlib_module_names) <= {"torch", "diffusers"}
    assert "    from ." not in source


def test_no_root_module_hides_a_library():
    """Scripts run from the root have it on their path, where data.py would hide a library called data."""
    installed = importlib.metadata.packages_distributions()
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert not (ours - {"imagenet64_diffusion"}) & {name.replace("-", "_").lower() for name in installed}


def test_no_test_imports_from_a_top_level_tests():
    """torch-fidelity, for one, installs a package of that name."""
    wrong = re.compile(r"^\s*(?:from|import) tests\b|-m tests\.", re.MULTILINE)
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "Makefile"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split() if (ROOT / name).is_file()]
    assert [file for file in files if wrong.search(file.read_text("utf-8"))] == []
