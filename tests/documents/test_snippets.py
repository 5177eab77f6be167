"""Every piece of code on the pages of the documentation does what the page says.

The Python of a page runs in order, in one namespace, with its command lines in between, in a folder that looks like
the root: see `stand_ins` and `commands`. Denoising steps in Python become 2, and the Hub is one on this machine.
"""

import re
import sys
from pathlib import Path
from typing import Any

import diffusers.utils.dynamic_modules_utils
import pytest

from imagenet64_diffusion import ClassConditionalPipeline
from imagenet64_diffusion.pretrained import DIGITS
from imagenet64_diffusion.tests.documents.commands import COMMANDS, follow
from imagenet64_diffusion.tests.documents.pages import PAGES, ROOT, Block, commands, read_blocks, read_change
from imagenet64_diffusion.tests.documents.stand_ins import make_root, provide
from imagenet64_diffusion.tests.hub.conftest import hub, online  # noqa: F401
from imagenet64_diffusion.tests.hub.loopback_hub import TOKEN


HUB_ID = "your-name/your-model"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The current folder: a root with no outputs."""
    folder = make_root(tmp_path / "root")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.fixture
def model_on_the_hub(online, monkeypatch, tmp_path):  # noqa: F811
    """The digits' model under the id that the pages use, and a user who may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # where diffusers copies the code of a repository before it imports it, which another test may have had elsewhere
    modules = tmp_path / "modules"
    modules.mkdir()
    forget_downloaded_code()
    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    ClassConditionalPipeline.from_pretrained(DIGITS).push_to_hub(HUB_ID)
    yield
    forget_downloaded_code()


def forget_downloaded_code() -> None:
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, root, request, capfd):
    blocks = read_blocks(page)
    if HUB_ID in page.read_text(encoding="utf-8"):
        request.getfixturevalue("model_on_the_hub")
    made_by_page = {read_change(block).file for block in blocks if block.kind == "diff"}
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.kind == "python":
            run_python(block, page, namespace)
        elif block.kind == "shell":
            for line, words in commands(block):
                try:
                    follow(words, made_by_page)
                except AssertionError as error:
                    said = capfd.readouterr().err[-2000:]
                    pytest.fail(f"{page.name}:{line}: {' '.join(words)}\n{error}\n{said}", pytrace=False)


def run_python(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    """Runs a block; a traceback names the line of the page."""
    for name in re.findall(r'"([^"\s]+/[^"\s]*)"', block.text):
        provide(name)
    text = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", block.text)
    exec(compile("\n" * (block.line - 1) + text, str(page), "exec"), namespace)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("python generate_images.py --class_label 3 --steps 5", "exit code 2"),
        ("python train_imagenet64.py --no_such_option 1 ...", "exit code 2"),
        ("accelerate launch nothing.py", "there is no script nothing.py"),
        ("python benchmarks/data.py --no_such_option", "exit code 2"),
        ("python docs/nothing.py", "there is no script"),
        ("python -m pytest tests/nothing.py", "there is no tests/nothing.py"),
        ("make nothing", "there is no target nothing"),
        ("rm -rf outputs", "no test knows what to do with it"),
    ],
)
def test_a_wrong_line_is_found(root, line, reason):
    with pytest.raises((AssertionError, SystemExit), match=reason):
        follow(line.split(), set())


def test_every_kind_of_block_is_known(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text\n\n```yaml\na: 1\n```\n")
    with pytest.raises(ValueError, match=r"page.md:3: a block of 'yaml' is neither run nor checked"):
        read_blocks(page)


def test_scripts_of_the_root_are_all_known():
    with_main = {path.stem for path in ROOT.glob("*.py") if "sys.exit(main())" in path.read_text(encoding="utf-8")}
    assert with_main == COMMANDS
