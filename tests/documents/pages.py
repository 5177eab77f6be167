"""The code on the pages of the documentation: Python, command lines, changes of files."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# the language of a fenced block -> what is done with it; the figure is compared with the imports
_KINDS = {"python": "python", "bash": "shell", "diff": "diff", "mermaid": "figure"}


class Block(NamedTuple):
    """Code on a page: its kind, its text without fences and indentation, and the number of its first line."""

    kind: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    """All code of a page in order: fenced blocks, and indented ones, which are command lines."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        begin = number + 1
        if fence := re.match(r"\s*(```+|~~~+)\s*(\S*)", lines[number]):
            if fence[2] not in _KINDS:
                raise ValueError(f"{page.name}:{begin}: a block of {fence[2]!r} is neither run nor checked")
            number = next(i for i in range(begin, len(lines)) if lines[i].strip() == fence[1])
            blocks.append(Block(_KINDS[fence[2]], "\n".join(lines[begin:number]), begin + 1))
        elif re.match(r"    +\S", lines[number]) and not (number and lines[number - 1].strip()):
            while number < len(lines) and re.match(r"    |\s*$", lines[number]):
                number += 1
            blocks.append(Block("shell", "\n".join(part[4:] for part in lines[begin - 1 : number]), begin))
            continue
        number += 1
    return blocks


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """The command lines of a block as words, each with the number of its line on the page."""
    found = []
    # a continued line keeps its place
    text = re.sub(r"\\\n", " \0", block.text)
    number = block.line
    for line in text.splitlines():
        if words := shlex.split(line.replace("\0", ""), comments=True):
            found.append((number, words))
        number += 1 + line.count("\0")
    return found


class Change(NamedTuple):
    """What a diff does to one file: path from the root, whether it is new, each text with what replaces it."""

    file: str
    is_new: bool
    hunks: tuple[tuple[str, str], ...]

    def apply(self, root: Path) -> None:
        """Changes the file below a folder, which must be as the diff says."""
        path = root / self.file
        assert path.exists() != self.is_new
        text = "" if self.is_new else path.read_text(encoding="utf-8")
        for before, after in self.hunks:
            assert not before or text.count(before) == 1, f"{self.file} has not once what the diff changes:\n{before}"
            text = text.replace(before, after) if before else after
        path.write_text(text, encoding="utf-8")


def read_change(block: Block) -> Change:
    """A block with a diff of one file, whose hunks begin with ``@@`` and need no line numbers."""
    old, new, *rest = block.text.splitlines()
    assert (old[:4], new[:6]) == ("--- ", "+++ b/"), f"line {block.line}: the block is no diff of one file"
    hunks: list[list[str]] = []
    for line in rest:
        if line.startswith("@@"):
            hunks.append(["", ""])
        else:
            for side, other in enumerate("+-"):
                hunks[-1][side] += "" if line.startswith(other) else f"{line[1:]}\n"
    return Change(new.removeprefix("+++ b/"), old == "--- /dev/null", tuple((old, new) for old, new in hunks))
