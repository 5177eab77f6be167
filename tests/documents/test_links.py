"""Every link in every Markdown file leads somewhere: to a file, a heading in it, a picture. Nothing is fetched."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token


ROOT = Path(__file__).parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("table")
# what nobody wrote, or git does not keep
LEFT_OUT = {"outputs", "build", "dist"}
PICTURES = {".png", ".gif", ".jpg", ".svg"}


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found = []
    for file in ROOT.rglob("*.md"):
        folders = file.relative_to(ROOT).parts[:-1]
        hidden = any(part.startswith(".") and part != ".github" for part in folders)
        if not hidden and not LEFT_OUT.intersection(folders):
            found.append(file)
    return sorted(found)


def tokens(file: Path) -> Iterator[Token]:
    """The tokens of a file, those inside of paragraphs and headings too."""
    for token in MARKDOWN.parse(file.read_text(encoding="utf-8")):
        yield token
        yield from token.children or []


def links(file: Path) -> Iterator[tuple[str, bool]]:
    """Where the links of a file lead, and whether each shows a picture."""
    for token in tokens(file):
        if token.type == "link_open":
            yield str(token.attrs["href"]), False
        elif token.type == "image":
            yield str(token.attrs["src"]), True
        elif token.type in ("html_block", "html_inline"):
            for name, target in re.findall(r"""\b(href|src)=["']([^"']+)["']""", token.content):
                yield target, name == "src"


def anchors(file: Path) -> set[str]:
    """What can stand after the # of a link to a file: its headings as GitHub writes them, and names given in HTML."""
    found: set[str] = set()
    counts: Counter[str] = Counter()
    all_tokens = list(tokens(file))
    for before, token in itertools.pairwise(all_tokens):
        if before.type == "heading_open":
            text = "".join(child.content for child in token.children or [] if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(f"{slug}-{counts[slug]}" if counts[slug] else slug)
            counts[slug] += 1
        elif token.type in ("html_block", "html_inline"):
            found.update(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", token.content))
    return found


def what_is_wrong(file: Path, target: str, is_picture: bool, root: Path = ROOT) -> str | None:
    """What is wrong with a link of a file, or None."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return None if parts.netloc else "names no host"
    if parts.scheme == "mailto":
        return None
    if parts.scheme or parts.netloc or target.startswith("/"):
        return "is absolute: give the path from this file"
    place = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not place.is_relative_to(root):
        return "leads out of the repository"
    if not place.exists():
        return "leads nowhere"
    if is_picture and place.suffix not in PICTURES:
        return "is no picture"
    heading = unquote(parts.fragment)
    if heading and (place.suffix != ".md" or heading not in anchors(place)):
        return f"{place.name} has no heading #{heading}"
    return None


def test_there_are_documents():
    names = {str(file.relative_to(ROOT)) for file in documents()}
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/training.md"} <= names
    assert not [name for name in names if name.startswith((".venv", "outputs"))]


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    wrong = [
        f"{target} {reason}"
        for target, is_picture in links(file)
        if (reason := what_is_wrong(file, target, is_picture)) is not None
    ]
    assert wrong == []


TEXT = """# A *first* `heading`, (with_signs) & more

## Twice

## Twice

Über GPUs & all
===============

[here](#twice) [there][1] ![seen](a.png) `[not](a-link.md)` <a href="other.md">html</a> <a id="by-hand"></a>

    [not](a-link.md) either

| table |
|---|
| [in a table](b.md) |

[1]: other.md "title"
"""


def test_what_counts_as_a_link(tmp_path):
    file = tmp_path / "text.md"
    file.write_text(TEXT)
    assert list(links(file)) == [
        ("#twice", False),
        ("other.md", False),
        ("a.png", True),
        ("other.md", False),
        ("b.md", False),
    ]


def test_anchors_are_written_as_on_github(tmp_path):
    file = tmp_path / "text.md"
    file.write_text(TEXT)
    assert anchors(file) == {"a-first-heading-with_signs--more", "twice", "twice-1", "über-gpus--all", "by-hand"}


@pytest.mark.parametrize(
    ("target", "is_picture", "wrong"),
    [
        ("text.md", False, None),
        ("text.md#twice-1", False, None),
        ("#twice", False, None),
        ("folder", False, None),
        ("folder/a%20picture.png", True, None),
        ("https://example.org/x#y", False, None),
        ("mailto:a@example.org", False, None),
        ("nothing.md", False, "leads nowhere"),
        ("text.md#thrice", False, "text.md has no heading #thrice"),
        ("#Twice", False, "text.md has no heading #Twice"),
        ("folder#twice", False, "folder has no heading #twice"),
        ("../text.md", False, "leads out of the repository"),
        ("/text.md", False, "is absolute: give the path from this file"),
        ("//example.org", False, "is absolute: give the path from this file"),
        ("file:///text.md", False, "is absolute: give the path from this file"),
        ("https:text.md", False, "names no host"),
        ("text.md", True, "is no picture"),
    ],
)
def test_what_is_wrong_with_a_link(tmp_path, target, is_picture, wrong):
    file = tmp_path / "text.md"
    file.write_text(TEXT)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a picture.png").touch()
    assert what_is_wrong(file, target, is_picture, tmp_path) == wrong
