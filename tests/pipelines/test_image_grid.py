"""Grids and animations."""

import numpy as np
import pytest
from PIL import Image

from imagenet64_diffusion.pipelines.image_grid import image_grid, save_animation


def plain(level: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.full((size, size), level, dtype=np.uint8))


def test_rows_of_one_caption():
    images = [plain(20 * i) for i in range(6)]
    grid = np.asarray(image_grid(images, ["cat", "cat", "cat", "dog", "dog", "dog"]).convert("L"))
    # 16 pixels are enlarged to 64; a level fills its cell and no other
    for level in (20, 40, 60, 80, 100):
        assert (grid == level).sum() >= 64 * 64
    rows = [np.flatnonzero((grid == level).sum(axis=1) >= 64) for level in (0, 60)]
    assert len(rows[0]) == len(rows[1]) == 64
    assert rows[0].max() < rows[1].min()


def test_captions_below_and_long_ones():
    wide = image_grid([plain(9, 64)] * 4, ["a", "b", "c", "d"], columns=2)
    assert wide.height > 2 * 64 + 2 * 14
    assert wide.width < 2 * 64 + 20
    caption = "a very long name of a class, with a second one, and a third that says the same once more"
    assert image_grid([plain(0)] * 2, [caption] * 2, columns=2).width < 2 * 66 + 280
    assert image_grid([plain(0)] * 2, [caption, "b"], columns=2).width < 2 * 66 + 20
    for images, captions in (([], []), ([plain(0)], ["a", "b"])):
        with pytest.raises(ValueError, match="a grid needs images and as many captions"):
            image_grid(images, captions)


def test_animation(tmp_path):
    save_animation([plain(0), plain(100), plain(200)], tmp_path / "a.gif", fps=20, hold_seconds=2)
    durations = []
    with Image.open(tmp_path / "a.gif") as animation:
        for frame in range(animation.n_frames):
            animation.seek(frame)
            durations.append(animation.info["duration"])
        assert animation.info["loop"] == 0
    assert durations == [50, 50, 2000]
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
