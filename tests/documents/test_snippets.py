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
from imagenet64_diffusion.tests.documents.commands import follow
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
