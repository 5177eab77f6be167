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
    return [
        file
        for file in sorted(ROOT.rglob("*.md"))
        if not any(part in LEFT_OUT or re.match(r"\.(?!github)", part) for part in file.relative_to(ROOT).parts)
    ]


def read(file: Path) -> tuple[dict[str, bool], set[str]]:
    """Targets of the links of a file, with whether each is an image; and its headings as GitHub's anchors."""
    links: dict[str, bool] = {}
    anchors: set[str] = set()
    blocks = MARKDOWN.parse(file.read_text(encoding="utf-8"))
    for before, block in itertools.pairwise([None, *blocks]):
        assert block.type != "html_block" or block.content.startswith("<!--"), "write links as Markdown"
        children = block.children or []
        if before is not None and before.type == "heading_open":
            text = "".join(child.content for child in children if child.type in ("text", "code_inline"))
            anchors.add(re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-"))
        links |= {str(token.attrs["href"]): False for token in children if token.type == "link_open"}
        links |= {str(token.attrs["src"]): True for token in children if token.type == "image"}
    return links, anchors


def what_is_wrong(file: Path, target: str, is_image: bool) -> str | None:
    """What is wrong with a link of a file, or None."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return None if parts.netloc else "names no host"
    if parts.scheme or parts.netloc or target.startswith("/"):
        return "is absolute: give the path from this file"
    place = (file.parent / unquote(parts.path)).resolve() if parts.path else file
    if not place.exists():
        return "leads nowhere"
    if is_image and place.suffix not in IMAGES:
        return "is no image"
    if parts.fragment and (place.suffix != ".md" or unquote(parts.fragment) not in read(place)[1]):
        return f"{place.name} has no heading #{parts.fragment}"
    return None


@pytest.mark.parametrize("file", documents(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file):
    reasons = {target: what_is_wrong(file, target, is_image) for target, is_image in read(file)[0].items()}
    assert {target: reason for target, reason in reasons.items() if reason} == {}
