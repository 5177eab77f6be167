"""What stands in both scheduler files stays the same in both."""

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

from imagenet64_diffusion.schedulers import scheduling_ddim_eta, scheduling_ddpm_learned


MARK = re.compile(r"^\s*# Copied from ([\w.]+?)(?: with (\w+)->(\w+))?(?:  # noqa: E501)?$")
# What differs on purpose, under one name
OWN = {"step", "_compatibles"}


def definitions(path: Path) -> dict[str, tuple[int, str]]:
    """Qualified name -> (first line, source) of all module-level definitions and their members."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                name, decorators = node.name, node.decorator_list
            elif isinstance(node, ast.Assign):
                name, decorators = node.targets[0].id, []
            else:
                continue
            start = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            found[prefix + name] = (start, textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno])))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{name}.")

    visit(ast.parse("\n".join(lines)).body, "")
    return found


def marks(path: Path) -> list[tuple[int, str, str, str]]:
    """(line below, origin, replaced, replacement) of every mark in a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [(number, MARK.match(line)) for number, line in enumerate(lines, start=1) if "# Copied from" in line]
    assert all(match for _, match in found), "a mark that this test cannot read"
    return [(number + 1, match[1], match[2] or "", match[3] or "") for number, match in found]


COPY = Path(scheduling_ddim_eta.__file__)
ORIGIN = Path(scheduling_ddpm_learned.__file__)


@pytest.mark.parametrize(("line", "origin", "old", "new"), marks(COPY), ids=lambda value: str(value).split(".")[-1])
def test_copy_equals_its_origin(line, origin, old, new):
    module = re.match(r"imagenet64_diffusion\.schedulers\.\w+", origin)[0]
    source = definitions(Path(importlib.import_module(module).__file__))[origin.removeprefix(module + ".")][1]
    copies = [text for start, text in definitions(COPY).values() if start == line]
    assert copies == [source.replace(old, new) if old else source]


def test_everything_shared_is_marked():
    ours, theirs = definitions(COPY), definitions(ORIGIN)
    marked = {line for line, *_ in marks(COPY)}

    def covered(name):
        return any(ours[part][0] in marked for part in (name, name.split(".")[0]) if part in ours)

    for name, (_, text) in ours.items():
        twin = name.replace("EtaDDIMScheduler", "LearnedVarianceDDPMScheduler")
        if twin not in theirs or name == "EtaDDIMScheduler" or name.split(".")[-1] in OWN or covered(name):
            continue
        # Constants are too small for a mark
        assert "def " not in text, f"{name} stands in both files without a mark"
        assert text == theirs[twin][1], f"{name} differs between the two files"


def test_files_stand_alone():
    for path in (COPY, ORIGIN):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            allowed = {"torch", "diffusers", "math", "numbers", "operator", "bisect", "collections", "dataclasses"}
            assert {name.split(".")[0] for name in names} <= allowed | {"typing"}


def test_shared_part_of_the_class_docstrings():
    def options(module, name):
        text = getattr(module, name).__doc__
        return text[text.index("Args:") :]

    assert options(scheduling_ddim_eta, "EtaDDIMScheduler") == options(
        scheduling_ddpm_learned, "LearnedVarianceDDPMScheduler"
    )
