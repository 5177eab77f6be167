"""Labelled grids and animations."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..utils.atomic_write import atomic_file


_MIN_CELL = 64  # pixels; smaller images are enlarged by a whole factor so that a person sees them
_GAP, _MARGIN, _FONT_SIZE, _MAX_CAPTION_WIDTH = 2, 8, 14, 240


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (height, width, channels) as an image, grey where there is one channel."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def image_grid(images: Sequence[Image.Image], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """A grid of images of one size with their captions.

    Where every row shows one caption only, it stands once, left of the row; else each image has its own below it.

    Args:
        images: All of one size.
        captions: One for each image; long ones are shortened.
        columns: Images in a row; by default as many as follow one another with the same caption, if that number is
            the same throughout, else a near-square arrangement.
    """
    if not images or len(images) != len(captions):
        raise ValueError(f"a grid needs images and as many captions, but has {len(images)} and {len(captions)}")
    if columns is None:
        runs = {len(list(run)) for _, run in itertools.groupby(captions)}
        columns = max(runs) if len(runs) == 1 and max(runs) > 1 else max(1, round(len(captions) ** 0.5))
    rows = [captions[start : start + columns] for start in range(0, len(captions), columns)]
    factor = -(-_MIN_CELL // min(images[0].size))
    width, height = images[0].width * factor, images[0].height * factor
    font = ImageFont.load_default(_FONT_SIZE)

    captions_left = columns > 1 and all(len(set(row)) == 1 for row in rows)
    captions = [_shorten(caption, _MAX_CAPTION_WIDTH if captions_left else width, font) for caption in captions]
    left = 2 * _MARGIN + int(max(map(font.getlength, captions))) if captions_left else 0
    row_height = height + _GAP + (0 if captions_left else _FONT_SIZE + 4)
    sheet = Image.new("RGB", (left + columns * (width + _GAP) + _GAP, len(rows) * row_height + _GAP), color="white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(index, columns)
        x, y = left + _GAP + column * (width + _GAP), _GAP + row * row_height
        sheet.paste(image.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        if not captions_left:
            draw.text((x + width / 2, y + height + 1), caption, fill="black", font=font, anchor="ma")
        elif column == 0:
            draw.text((left - _MARGIN, y + height / 2), caption, fill="black", font=font, anchor="rm")
    return sheet


def save_animation(frames: Sequence[Image.Image], file: str | Path, fps: float, hold_seconds: float = 1.5) -> None:
    """Writes an endless GIF of frames of one size, whose last one stays for ``hold_seconds``."""
    durations = [round(1000 / fps)] * (len(frames) - 1) + [round(1000 * hold_seconds)]
    with atomic_file(file) as writing:
        frames[0].save(writing, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def _shorten(caption: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The caption, or as much of it as fits into a width in pixels."""
    if font.getlength(caption) <= width:
        return caption
    while caption and font.getlength(caption + "…") > width:
        caption = caption[:-1]
    return caption.rstrip(" ,") + "…"
