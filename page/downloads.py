"""What the page gives away: a picture, an animation, a manifest, and everything as generate_images.py writes it."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..pipelines.generation import MANIFEST_NAME, class_caption, make_manifest
from ..pipelines.image_grid import image_grid, save_animation, to_image
from .drawing import Drawing


PICTURE_NAME, ANIMATION_NAME, ARCHIVE_NAME = "grid.png", "denoising.gif", "everything.zip"
FILE_NAMES = (PICTURE_NAME, ANIMATION_NAME, MANIFEST_NAME, ARCHIVE_NAME)
_MARGIN, _TITLE_HEIGHT = 12, 26


def write_downloads(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Writes the files of one finished drawing or two to a folder.

    Args:
        drawings: Their steps have all been taken.
        folder: Where to.

    Returns:
        The files of `FILE_NAMES`, in that order.
    """
    paths = [folder / name for name in FILE_NAMES]
    sides = [Path()] if len(drawings) == 1 else [Path("left"), Path("right")]
    manifests = [_manifest_of(drawing) for drawing in drawings]
    animations = [_animation(drawing) for drawing in drawings]
    num_frames = max(map(len, animations))
    frames = [_beside(drawings, [_at(frames, i, num_frames) for frames in animations]) for i in range(num_frames)]
    fps = drawings[0].request.options.fps

    # an animation may have only some of the steps, but has the last one
    frames[-1].save(paths[0])
    save_animation(frames, paths[1], fps)
    whole = (
        manifests[0] if len(drawings) == 1 else {str(side): each for side, each in zip(sides, manifests, strict=True)}
    )
    paths[2].write_text(_as_json(whole), encoding="utf-8")

    with zipfile.ZipFile(paths[3], "w") as archive:
        for side, drawing, manifest, animation in zip(sides, drawings, manifests, animations, strict=True):
            for image, entry in zip(drawing.images, manifest["images"], strict=True):
                with archive.open(str(side / entry["file"]), "w") as file:
                    image.save(file, format="png")
            with archive.open(str(side / PICTURE_NAME), "w") as file:
                animation[-1].save(file, format="png")
            own = folder / f"{side.name}{ANIMATION_NAME}"
            if len(drawings) > 1:
                save_animation(animation, own, fps)
            archive.write(own, str(side / ANIMATION_NAME))
            archive.writestr(str(side / MANIFEST_NAME), _as_json(manifest))
    return paths


def captions(drawing: Drawing) -> list[str]:
    """The class name of each image; empty for the null class."""
    return [class_caption(drawing.request.pipeline, class_id) for class_id in drawing.request.class_ids]


def _manifest_of(drawing: Drawing) -> dict[str, Any]:
    request = drawing.request
    pipeline, options = request.pipeline, request.options
    images = [
        {"file": f"{i:05d}.png", "class_label": class_id, "class_name": name, "seed": options.seed + i}
        for i, (class_id, name) in enumerate(zip(request.class_ids, captions(drawing), strict=True))
    ]
    manifest = make_manifest(pipeline, options, drawing.timesteps, pipeline.unet.device)
    return manifest | {"files": [PICTURE_NAME, ANIMATION_NAME], "images": images}


def _animation(drawing: Drawing) -> list[Image.Image]:
    """A labelled grid of the images after each step."""
    names, columns = captions(drawing), drawing.request.options.columns
    return [image_grid(list(map(to_image, frame)), names, columns) for frame in drawing.frames]


def _at(frames: Sequence[Image.Image], number: int, of: int) -> Image.Image:
    """The frame of an animation that is shown beside frame ``number`` of another one with ``of`` frames."""
    return frames[(number + 1) * len(frames) // of - 1 if (number + 1) * len(frames) >= of else 0]


def _beside(drawings: Sequence[Drawing], pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures beside each other, each under its title; one alone stays as it is."""
    if len(pictures) == 1:
        return pictures[0]
    font = ImageFont.load_default(14)
    titles = [drawing.request.title for drawing in drawings]
    widths = [
        max(picture.width, round(font.getlength(title))) for picture, title in zip(pictures, titles, strict=True)
    ]
    size = (sum(widths) + _MARGIN * (len(pictures) + 1), max(each.height for each in pictures) + _TITLE_HEIGHT)
    sheet = Image.new("RGB", size, color="white")
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN
    for picture, title, width in zip(pictures, titles, widths, strict=True):
        draw.text((left, 5), title, fill="black", font=font)
        sheet.paste(picture, (left, _TITLE_HEIGHT))
        left += width + _MARGIN
    return sheet


def _as_json(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"
