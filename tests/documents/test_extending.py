"""The changes of docs/extending.md work as they are printed, in a copy of the package."""

import os
import shutil
import subprocess
import sys

import pytest

from imagenet64_diffusion.tests.documents.pages import ROOT, Block, commands, read_blocks, read_change


PAGE = ROOT / "docs" / "extending.md"


def section(title: str) -> list[Block]:
    """The code below one heading of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    headings = [number for number, line in enumerate(lines, start=1) if line.startswith("## ")]
    begin = lines.index(f"## {title}") + 1
    end = min((number for number in headings if number > begin), default=len(lines) + 1)
    return [block for block in read_blocks(PAGE) if begin < block.line < end]


def test_the_changes_pass_their_tests(tmp_path):
    copy = tmp_path / "imagenet64_diffusion"
    left_out = shutil.ignore_patterns(".*", "outputs", "build", "*.egg-info", "__pycache__", "results", "images")
    shutil.copytree(ROOT, copy, ignore=left_out)
    blocks = read_blocks(PAGE)
    changes = [read_change(block) for block in blocks if block.kind == "diff"]
    for change in changes:
        change.apply(copy)
    lines = [words for block in blocks if block.kind == "shell" for _, words in commands(block)]
    assert all(words[:3] == ["python", "-m", "pytest"] for words in lines)
    files = [file for words in lines for file in words[3:]]
    # every test that the page writes is among those that it runs
    assert {change.file for change in changes if change.file.startswith("tests/")} <= set(files)
    # before the installed package, so that the tests see the copy
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    finished = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]


def test_a_layer_type_is_one_class_one_line_and_one_test():
    """What the package asks of a newcomer."""
    network, test = (read_change(block) for block in section("A layer type") if block.kind == "diff")
    assert network.file == "models/unet_class_conditional.py"
    (before_class, after_class), (before_line, after_line) = network.hunks
    added = after_class.removesuffix(before_class)
    assert added.startswith("class ")
    assert added.count("\nclass ") == 0
    [line] = set(after_line.splitlines()) - set(before_line.splitlines())
    assert line == '    "identity": IdentityLayer,'
    assert test.file == "tests/models/test_layers.py"
    [(before, after)] = test.hunks
    assert after.removesuffix(before).startswith("class TestIdentity(LayerContract):")


def test_a_metric_is_one_function_one_line_and_one_test():
    function, table, test = (read_change(block) for block in section("A metric") if block.kind == "diff")
    assert function.is_new
    assert function.hunks[0][1].count("\ndef ") == 1
    assert table.file == "evaluation/metrics.py"
    [(before, after)] = table.hunks
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    assert test.is_new
    assert test.hunks[0][1].count("\ndef ") == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("--- a/x.py\n+++ b/x.py\n@@\n-one\n+two\n", "has 0 times what the diff changes"),
        ("--- a/x.py\n+++ b/x.py\n@@\n-b\n+c\n", "has 2 times what the diff changes"),
        ("--- /dev/null\n+++ b/x.py\n@@\n+c\n", "is there, but the diff makes it"),
        ("+++ b/x.py\n@@\n+c\n", "is no diff of one file"),
        ("--- a/x.py\n+++ b/x.py\n@@\n*c\n", "is no line of a diff"),
    ],
)
def test_a_change_that_does_not_fit(tmp_path, text, reason):
    (tmp_path / "x.py").write_text("a\nb\nb\n")
    with pytest.raises(ValueError, match=reason):
        read_change(Block("diff", text, 1)).apply(tmp_path)
    assert (tmp_path / "x.py").read_text() == "a\nb\nb\n"
