"""What the pages of the documentation show as code: their Python, their command lines, their changes of files."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
# these are written from measurements, and have no code that is not on another page
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# the language of a fenced block -> what is done with it; the figure is compared with the imports
_KINDS = {"python": "python", "bash": "shell", "diff": "diff", "mermaid": "figure"}


@dataclass(frozen=True)
class Block:
    """A piece of code on a page.

    Attributes:
        kind: ``"python"``, ``"shell"`` or ``"diff"``.
        text: Without fences and indentation.
        line: Number of its first line on the page.
    """

    kind: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    """All code of a page in order: fenced blocks, and indented ones, which are command lines.

    Raises:
        ValueError: If a fenced block names no language that the tests know.
    """
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        begin = number + 1
        if fence := re.match(r"\s*(```+|~~~+)\s*(\S*)", line):
            kind = _KINDS.get(fence[2])
            if kind is None:
                raise ValueError(f"{page.name}:{begin}: a block of {fence[2]!r} is neither run nor checked")
            end = next(i for i in range(begin, len(lines)) if lines[i].strip() == fence[1])
            blocks.append(Block(kind, "\n".join(lines[begin:end]), begin + 1))
            number = end + 1
        elif line.startswith("    ") and line.strip() and (number == 0 or not lines[number - 1].strip()):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            blocks.append(Block("shell", "\n".join(part[4:] for part in lines[number:end]), begin))
            number = end
        else:
            number += 1
    return blocks


def commands(block: Block) -> list[tuple[int, list[str]]]:
    """The command lines of a block as words, each with the number of its line on the page."""
    found = []
    pending, begin = "", block.line
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if not pending:
            begin = number
        if line.rstrip().endswith("\\"):
            pending += line.rstrip()[:-1] + " "
            continue
        words = shlex.split(pending + line, comments=True)
        pending = ""
        if words:
            found.append((begin, words))
    return found


@dataclass(frozen=True)
class Change:
    """What a diff does to one file.

    Attributes:
        file: Its path from the root.
        is_new: Whether the diff makes it.
        hunks: For each, what must be there and what comes in its place.
    """

    file: str
    is_new: bool
    hunks: tuple[tuple[str, str], ...]

    def apply(self, root: Path) -> None:
        """Changes the file below a folder.

        Raises:
            ValueError: If it is not as the diff says, or a hunk fits several places.
        """
        path = root / self.file
        if self.is_new:
            if path.exists():
                raise ValueError(f"{self.file} is there, but the diff makes it")
            path.write_text(self.hunks[0][1], encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        for before, after in self.hunks:
            if text.count(before) != 1:
                raise ValueError(f"{self.file} has {text.count(before)} times what the diff changes:\n{before}")
            text = text.replace(before, after)
        path.write_text(text, encoding="utf-8")


def read_change(block: Block) -> Change:
    """A block with a diff of one file, whose hunks begin with ``@@`` and need no line numbers."""
    old, new, *rest = block.text.splitlines()
    if not (old.startswith("--- ") and new.startswith("+++ b/") and rest and rest[0].startswith("@@")):
        raise ValueError(f"line {block.line}: the block is no diff of one file")
    hunks: list[tuple[list[str], list[str]]] = []
    for line in rest:
        if line.startswith("@@"):
            hunks.append(([], []))
            continue
        sign, text = line[:1], line[1:]
        if sign not in ("+", "-", " ", ""):
            raise ValueError(f"line {block.line}: {line!r} is no line of a diff")
        for side, signs in zip(hunks[-1], ("- ", "+ "), strict=True):
            if sign in signs or not sign:
                side.append(text)
    joined = tuple(tuple("".join(f"{line}\n" for line in side) for side in hunk) for hunk in hunks)
    return Change(new.removeprefix("+++ b/"), old == "--- /dev/null", joined)
