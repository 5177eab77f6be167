"""Every link in every Markdown file leads somewhere: to a file, a heading in it, an image. Nothing is fetched."""

import itertools
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt


ROOT = Path(__file__).parents[2]
MARKDOWN = MarkdownIt("commonmark").enable("table")
# what nobody wrote, or git does not keep
LEFT_OUT = {"outputs", "build", "dist"}
IMAGES = {".png", ".gif", ".jpg", ".svg"}


def documents() -> list[Path]:
    """Every Markdown file of the repository."""
    found = []
    for file in sorted(ROOT.rglob("*.md")):
        folders = file.relative_to(ROOT).parts[:-1]
        hidden = any(part.startswith(".") and part != ".github" for part in folders)
        if not hidden and not LEFT_OUT.intersection(folders):
            found.append(file)
    return found


def read(file: Path) -> tuple[list[tuple[str, bool]], set[str]]:
    """Targets of the links of a file, with whether each is an image; and its anchors.

    Anchors are its headings as GitHub writes them, and names given in HTML.
    """
    links: list[tuple[str, bool]] = []
    anchors: set[str] = set()
    blocks = MARKDOWN.parse(file.read_text(encoding="utf-8"))
    for before, block in zip([None, *blocks], blocks, strict=False):
        children = block.children or []
        if before is not None and before.type == "heading_open":
            text = "".join(child.content for child in children if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            repeated = (name for number in itertools.count(1) if (name := f"{slug}-{number}") not in anchors)
            anchors.add(next(repeated) if slug in anchors else slug)
        for token in (block, *children):
            if token.type == "link_open":
                links.append((str(token.attrs["href"]), False))
            elif token.type == "image":
                links.append((str(token.attrs["src"]), True))
            elif token.type in ("html_block", "html_inline"):
                found = re.findall(r"""\b(href|src|id|name)=["']([^"']+)["']""", token.content)
                links += [(value, name == "src") for name, value in found if name in ("href", "src")]
                anchors.update(value for name, value in found if name in ("id", "name"))
    return links, anchors


def what_is_wrong(file: Path, target: str, is_image: bool, root: Path = ROOT) -> str | None:
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
    if is_image and place.suffix not in IMAGES:
        return "is no image"
    heading = unquote(parts.fragment)
    if heading and (place.suffix != ".md" or heading not in read(place)[1]):
        return f"{place.name} has no heading #{heading}"
    return None


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    reasons = {target: what_is_wrong(file, target, is_image) for target, is_image in read(file)[0]}
    assert {target: reason for target, reason in reasons.items() if reason} == {}


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


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "text.md").write_text(TEXT)
    return tmp_path / "text.md"


def test_what_links_and_anchors_are(file):
    links, anchors = read(file)
    assert [target for target, _ in links] == ["#twice", "other.md", "a.png", "other.md", "b.md"]
    assert [target for target, is_image in links if is_image] == ["a.png"]
    assert anchors == {"a-first-heading-with_signs--more", "twice", "twice-1", "über-gpus--all", "by-hand"}


def test_what_is_wrong_with_a_link(file):
    (file.parent / "folder").mkdir()
    (file.parent / "folder" / "an image.png").touch()
    absolute = "is absolute: give the path from this file"
    expected = {
        **dict.fromkeys(["text.md", "text.md#twice-1", "#twice", "folder", "folder/an%20image.png"]),
        **dict.fromkeys(["https://example.org/x#y", "mailto:a@example.org"]),
        "nothing.md": "leads nowhere",
        "text.md#thrice": "text.md has no heading #thrice",
        "#Twice": "text.md has no heading #Twice",
        "folder#twice": "folder has no heading #twice",
        "../text.md": "leads out of the repository",
        **dict.fromkeys(["/text.md", "//example.org", "file:///text.md"], absolute),
        "https:text.md": "names no host",
    }
    assert {target: what_is_wrong(file, target, False, file.parent) for target in expected} == expected
    assert what_is_wrong(file, "folder/an%20image.png", True, file.parent) is None
    assert what_is_wrong(file, "text.md", True, file.parent) == "is no image"
