"""The changes of docs/extending.md work as they are printed, in a copy of the package."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from imagenet64_diffusion.tests.commands.processes import forget_package, run_function
from imagenet64_diffusion.tests.documents.pages import ROOT, commands, read_blocks, read_change


BLOCKS = read_blocks(ROOT / "docs" / "extending.md")
CHANGES = {change.file: change for change in (read_change(block) for block in BLOCKS if block.kind == "diff")}


def run_tests(copy: Path, arguments: list[str]) -> None:
    """Runs pytest on a copy of the package, in a process that has imported its dependencies."""
    forget_package()
    # before the installed package, so that the tests see the copy
    sys.path.insert(0, str(copy.parent))
    os.chdir(copy)
    sys.exit(pytest.main(["-p", "no:cacheprovider", "-p", "no:xdist", *arguments]))


def test_the_changes_pass_their_tests(tmp_path):
    copy = tmp_path / "imagenet64_diffusion"
    left_out = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "results", "images")
    shutil.copytree(ROOT, copy, ignore=left_out)
    for change in CHANGES.values():
        change.apply(copy)
    lines = [words for block in BLOCKS if block.kind == "shell" for _, words in commands(block)]
    assert all(words[:3] == ["python", "-m", "pytest"] for words in lines)
    files = [file for words in lines for file in words[3:]]
    tests = [change for change in CHANGES.values() if change.file.startswith("tests/")]
    # every test that the page writes is among those that it runs; those that were there run elsewhere
    assert {change.file for change in tests} <= set(files)
    names = re.findall(r"(?:def|class) ([Tt]est\w+)", "".join(after for change in tests for _, after in change.hunks))
    code, output = run_function(run_tests, copy, ["-k", " or ".join(names), *files])
    assert code == 0, output[-6000:]
