"""What the page gives away: an image grid, an animation, a manifest, and all of it as generate_images.py writes it."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ..pipelines.generation import ANIMATION_NAME, GRID_NAME, MANIFEST_NAME, class_caption, make_manifest
from ..pipelines.image_grid import image_grid, save_animation, to_image


if TYPE_CHECKING:
    from .generation import Generation


ARCHIVE_NAME = "everything.zip"
FILE_NAMES = (GRID_NAME, ANIMATION_NAME, MANIFEST_NAME, ARCHIVE_NAME)
_MARGIN, _TITLE_HEIGHT = 12, 26


def write_downloads(generations: "Sequence[Generation]", folder: Path) -> list[Path]:
    """Writes the files of one finished generation, or of two side by side, to a folder; those of `FILE_NAMES`."""
    paths = [folder / name for name in FILE_NAMES]
    sides = [""] if len(generations) == 1 else ["left/", "right/"]
    fps = generations[0].request.options.fps
    manifests = [_manifest_of(each) for each in generations]
    animations = [_animation(each) for each in generations]
    # frame i of the longest one, and what the other one has come to by then
    length = max(map(len, animations))
    titles = [each.request.title for each in generations]
    frames = [
        _beside(titles, [own[max(0, (i + 1) * len(own) // length - 1)] for own in animations]) for i in range(length)
    ]
    frames[-1].save(paths[0])
    save_animation(frames, paths[1], fps)
    whole = manifests[0] if len(generations) == 1 else dict(zip(("left", "right"), manifests, strict=True))
    paths[2].write_text(_as_json(whole), encoding="utf-8")

    with zipfile.ZipFile(paths[3], "w") as archive:
        for side, generation, manifest, animation in zip(sides, generations, manifests, animations, strict=True):
            files = [entry["file"] for entry in manifest["images"]]
            for image, name in zip([*generation.images, animation[-1]], [*files, GRID_NAME], strict=True):
                with archive.open(side + name, "w") as file:
                    image.save(file, format="png")
            own = folder / "side.gif"
            save_animation(animation, own, fps)
            archive.write(own, side + ANIMATION_NAME)
            archive.writestr(side + MANIFEST_NAME, _as_json(manifest))
    return paths


def captions(generation: "Generation") -> list[str]:
    """The class name of each image; empty for the null class."""
    return [class_caption(generation.request.pipeline, class_id) for class_id in generation.request.class_ids]


def _manifest_of(generation: "Generation") -> dict[str, Any]:
    request = generation.request
    return make_manifest(request.pipeline, request.options, request.class_ids, generation.timesteps)


def _animation(generation: "Generation") -> list[Image.Image]:
    """A labelled grid of the images after each step."""
    names, columns = captions(generation), generation.request.options.columns
    return [image_grid(list(map(to_image, frame)), names, columns) for frame in generation.frames]


def _beside(titles: Sequence[str], grids: Sequence[Image.Image]) -> Image.Image:
    """Image grids beside each other, each under its title; one alone stays as it is."""
    if len(grids) == 1:
        return grids[0]
    font = ImageFont.load_default(14)
    widths = [max(grid.width, round(font.getlength(title))) for grid, title in zip(grids, titles, strict=True)]
    size = (sum(widths) + _MARGIN * (len(grids) + 1), max(each.height for each in grids) + _TITLE_HEIGHT)
    sheet = Image.new("RGB", size, color="white")
    left = _MARGIN
    for grid, title, width in zip(grids, titles, widths, strict=True):
        ImageDraw.Draw(sheet).text((left, 5), title, fill="black", font=font)
        sheet.paste(grid, (left, _TITLE_HEIGHT))
        left += width + _MARGIN
    return sheet


def _as_json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"
