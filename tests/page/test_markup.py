"""HTML that is made of what others wrote."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from imagenet64_diffusion.page.markup import gallery


@pytest.mark.parametrize("channels", [1, 3])
def test_finished_images_are_exact(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, channels), dtype=np.uint8)
    shown = gallery(pixels, ["a", "b", "b"], 5, finished=True)
    sources = re.findall('src="data:image/png;base64,([^"]+)"', shown)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    assert np.array_equal(np.stack(images).reshape(pixels.shape), pixels)
    assert re.findall('alt="([^"]+)"', shown) == ["a, seed 5", "b, seed 6", "b, seed 7"]
    assert shown.count("<figure>") == 2


@pytest.mark.parametrize("title", ["", "beside another"])
@pytest.mark.parametrize(("number", "size"), [(1, 32), (12, 32), (36, 64), (64, 128), (1, 512)])
def test_images_are_enlarged_by_a_whole_factor(number, size, title):
    shown = gallery(np.zeros((number, size, size, 1), np.uint8), [""] * number, 0, finished=True, title=title)
    wide, narrow = (int(re.search(rf"--{name}:(\d+)", shown)[1]) for name in ("wide", "narrow"))
    # and fit into a telephone's screen of 390 pixels, unless the image itself does not
    assert wide >= narrow == 1 or narrow * size <= 340


def test_class_names_of_a_foreign_model_are_text():
    name = '"><script>alert(1)</script>'
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    shown = gallery(pixels, [name], 0, finished=True, title=name)
    assert "<script" not in shown
    assert shown.count("&lt;script&gt;") == 4
