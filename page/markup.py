"""The parts of the page that are HTML: the images, how far they are, what went wrong."""

import base64
import html
import io
import itertools
import shlex
from collections.abc import Sequence

import numpy as np

from ..pipelines.generation_options import GenerateOptions
from ..pipelines.image_grid import to_image


# The sides in screen pixels that images have at most where there are so many of them: (images, on a wide screen, on a
# narrow one, on both beside another gallery). They are enlarged by a whole factor, so that every pixel has one size.
_SIDES = ((1, 320, 320, 256, 128), (4, 192, 128, 160, 128), (12, 128, 96, 96, 64), (64, 96, 64, 64, 64))


def gallery(pixels: np.ndarray, captions: Sequence[str], seed: int, finished: bool, title: str = "") -> str:
    """Images, uint8 (images, height, width, channels), under their class names, which neighbours of one class share.

    Not `gr.Gallery`, which writes a file for each image of each step, and blurs small images. The seed is the first's;
    the title is that of one beside another.
    """
    height, width = pixels.shape[1:3]
    sides = next(each for each in _SIDES if len(pixels) <= each[0])
    wide, narrow = (max(1, side // max(height, width)) for side in (sides[3:] if title else sides[1:3]))
    kind = {"format": "png"} if finished else {"format": "jpeg", "quality": 90, "subsampling": 0}
    figures = ""
    for caption, group in itertools.groupby(range(len(pixels)), key=lambda number: captions[number]):
        name, images = html.escape(caption or "no class"), ""
        for number in group:
            buffer = io.BytesIO()
            to_image(pixels[number]).save(buffer, **kind)
            source = f"data:image/{kind['format']};base64,{base64.b64encode(buffer.getvalue()).decode()}"
            # decoded before it is painted, so that nothing flickers
            images += f'<img src="{source}" alt="{name}, seed {seed + number}" decoding="sync">'
        figures += f'<figure><div>{images}</div><figcaption title="{name}">{name}</figcaption></figure>'
    style = f"--height:{height};--width:{width};--wide:{wide};--narrow:{narrow}"
    shown = f'<div class="gallery" style="{style}">{figures}</div>'
    return f'<section class="side"><h2>{html.escape(title)}</h2>{shown}</section>' if title else shown


def progress(number: int, total: int) -> str:
    """How many steps are done."""
    bar = f'<progress max="{total}" value="{number}" aria-label="denoising steps"></progress>'
    return f'<div class="progress"><span>step {number} of {total}</span>{bar}</div>'


def note(text: str, is_problem: bool = False) -> str:
    """A sentence, about what went wrong or not."""
    kind, role = ("problem", "alert") if is_problem else ("note", "status")
    return f'<p class="{kind}" role="{role}">{html.escape(text)}</p>'


def done(text: str, all_options: Sequence[GenerateOptions]) -> str:
    """A sentence, and the command lines that generate the same images."""
    lines, defaults = "", GenerateOptions()
    for options in all_options:
        words = ["imagenet64-generate"]
        for name, value in vars(options).items():
            # the device is the page's own affair
            if name != "device" and value != getattr(defaults, name):
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        lines += html.escape(shlex.join(words) + "\n")
    summary = "<summary>The same on a command line</summary>"
    return f'{note(text)}<details class="again">{summary}<pre>{lines.rstrip()}</pre></details>'
