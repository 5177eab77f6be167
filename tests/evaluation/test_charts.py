"""The charts of a sweep: which there are, what is in them, and how they look to a program that reads them."""

import dataclasses
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.font_manager
import numpy as np
import PIL.Image
import PIL.ImageFont
import pytest

from imagenet64_diffusion.evaluation.charts import (
    conditions,
    draw_sweep_charts,
    fid_minima,
    fid_over_steps,
    find_trade_offs,
    make_panels,
    place_labels,
    settings_of,
    short_names,
    slugs,
    with_fid,
)
from imagenet64_diffusion.pipelines.sampler import Sampler


DDIM, DDPM = Sampler("DDIM"), Sampler("DDPMScheduler", step_size=10, eta=1.0)

# the lowest FIDs that the original program reports for its models, with its samplers
ORIGINAL_SAMPLERS = [Sampler(step_size=size, eta=eta) for eta in (1.0, 0.0) for size in (1, 10)]
ORIGINAL_FIDS = {
    "res-conv": (40.33, 41.33, 42.67, 39.29),
    "res-res": (33.46, 34.41, 35.23, 32.83),
    "res": (39.10, 41.89, 41.37, 38.27),
    "res large": (37.22, 38.76, 38.92, 38.93),
    "res-res-atn": (32.57, 34.04, 35.23, 32.24),
}


def row(family, step, sampler, fid, **values):
    settings = dataclasses.asdict(sampler)
    settings["guidance_interval"] = " ".join(map(str, sampler.guidance_interval))
    model = family if step is None else f"{family}/pipelines/step_{step:07}"
    common = {"model": model, "family": family, "step": step, "sampler": sampler.title(), **settings}
    return {**common, "num_images": 10_000, "protocol": "clean", "fid": fid, **values}


def original_rows():
    return [
        row(f"runs/{name}", 500_000, sampler, fid, protocol="original")
        for name, fids in ORIGINAL_FIDS.items()
        for sampler, fid in zip(ORIGINAL_SAMPLERS, fids, strict=True)
    ]


def guided(scale, steps=50, interval=(0.0, 1.0), **values):
    fid = 20 + (scale - 2) ** 2 + 100 / steps
    sampler = Sampler("DDIM", num_inference_steps=steps, guidance_scale=scale, guidance_interval=interval)
    return row("runs/res", 1000, sampler, fid, **values)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def texts(file):
    tree = ElementTree.parse(file)
    assert tree.getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def page(file):
    """Width and height of an SVG."""
    return tuple(map(float, ElementTree.parse(file).getroot().get("viewBox").split()))[2:]


def text_boxes(file):
    """What each text of an SVG covers, in the font that it asks for first: text, left, top, right, bottom."""
    boxes = []
    for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text"):
        style = dict(part.split(": ", 1) for part in element.get("style").split("; "))
        assert style["font-family"].startswith("'DejaVu Sans'")
        weight = "bold" if style.get("font-weight") in ("bold", "700") else "regular"
        font_file = matplotlib.font_manager.findfont(f"DejaVu Sans:weight={weight}")
        # a hundred times as large, so that hinting does not matter
        font = PIL.ImageFont.truetype(font_file, 100 * float(style["font-size"].removesuffix("px")))
        left, top, right, bottom = (edge / 100 for edge in font.getbbox(element.text, anchor="ls"))
        share = {"start": 0, "middle": 0.5, "end": 1}[style.get("text-anchor", "start")]
        moved = share * font.getlength(element.text) / 100
        left, right = left - moved, right - moved
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", element.get("transform"))]
        if element.get("transform").startswith("translate"):
            x, y = numbers
        else:
            turn, x, y = numbers
            assert turn in (0, -90)
            if turn:
                # upwards: what was right is up
                left, top, right, bottom = top, -right, bottom, -left
        boxes.append((element.text, x + left, y + top, x + right, y + bottom))
    return boxes


def check_texts(file):
    """No text of an SVG covers another or sticks out of the picture."""
    width, height = page(file)
    boxes = text_boxes(file)
    for text, left, top, right, bottom in boxes:
        assert 0 <= left < right <= width, text
        assert 0 <= top < bottom <= height, text
    for (text, *one), (other_text, *other) in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, f"{text!r} and {other_text!r}"


def check_pictures(folder, pngs):
    """Every PNG has its SVG, both are whole, legible and of one shape, and there is nothing else."""
    assert names_in(folder) == sorted(path.stem + end for path in pngs for end in (".png", ".svg"))
    for path in pngs:
        with PIL.Image.open(path) as picture:
            colours = picture.convert("RGB").getcolors(picture.width * picture.height)
            assert picture.format == "PNG"
            assert picture.width == 1200
            assert 180 <= picture.height < 4000
            assert len(colours) > 10
            width, height = page(path.with_suffix(".svg"))
            # but for a pixel
            assert height / width * picture.width == pytest.approx(picture.height, abs=1)
        assert texts(path.with_suffix(".svg"))
        check_texts(path.with_suffix(".svg"))


def test_rows_without_a_finite_fid():
    rows = [row("a", 1, DDIM, fid) for fid in (3.0, math.nan, None, math.inf, 4)]
    assert [each["fid"] for each in with_fid([*rows, {"family": "a"}])] == [3.0, 4]


def test_lines_over_the_steps():
    rows = [row("a", 30, DDIM, 5.0), row("a", 10, DDIM, 9.0), row("a", 10, DDPM, 8.0), row("a", 30, DDIM, 4.0)]
    assert fid_over_steps(rows) == {
        "DDIM, 100 steps": ([10, 30], [9.0, 4.0]),
        "DDPM, step size 10, eta 1": ([10], [8.0]),
    }


def test_minima():
    rows = [row("b", step, DDIM, fid) for step, fid in [(30, 5.0), (20, 4.0), (10, 4.0)]]
    rows += [row("a", 5, DDIM, 7.0), row("a", 6, DDPM, 6.0), row("c", None, DDPM, 1.0)]
    minima = fid_minima(rows)
    assert list(minima) == ["b", "a", "c"]
    assert minima == {
        "b": {"DDIM, 100 steps": (4.0, 10)},
        "a": {"DDIM, 100 steps": (7.0, 5), "DDPM, step size 10, eta 1": (6.0, 6)},
        "c": {"DDPM, step size 10, eta 1": (1.0, None)},
    }


def test_minima_of_the_original():
    minima = fid_minima(original_rows())
    titles = [sampler.title() for sampler in ORIGINAL_SAMPLERS]
    for name, fids in ORIGINAL_FIDS.items():
        assert [minima[f"runs/{name}"][title][0] for title in titles] == list(fids)


def test_settings():
    assert settings_of(guided(1.0, interval=(0.2, 0.8)))["guidance_interval"] == (0.0, 1.0)
    assert settings_of(guided(2.0, interval=(0.2, 0.8)))["guidance_interval"] == (0.2, 0.8)
    assert settings_of(row("a", 1, DDIM, 1.0))["num_inference_steps"] == 100
    assert settings_of(row("a", 1, DDPM, 1.0))["num_inference_steps"] is None


def test_panels_of_a_grid():
    rows = [guided(scale, steps) for steps in (20, 50) for scale in (3.0, 1.0)]
    over_guidance, over_steps = make_panels(rows)
    assert (over_guidance.x, over_guidance.y) == ("guidance_scale", "fid")
    assert over_guidance.lines == {
        "20 steps": [(1.0, 26.0, 1.0), (3.0, 26.0, 3.0)],
        "50 steps": [(1.0, 23.0, 1.0), (3.0, 23.0, 3.0)],
    }
    assert (over_steps.x, over_steps.y) == ("num_inference_steps", "fid")
    assert over_steps.lines == {
        "guidance 3": [(20, 26.0, 20), (50, 23.0, 50)],
        "no guidance": [(20, 26.0, 20), (50, 23.0, 50)],
    }


def test_no_panels_without_a_line():
    assert make_panels([guided(1.0)]) == []
    # nothing but the scheduler differs, or more than one setting
    other = row("runs/res", 1000, Sampler("DDPM", num_inference_steps=50), 9.0)
    assert make_panels([guided(1.0), other]) == []
    assert make_panels([guided(1.0, 50), guided(2.0, 20)]) == []


def test_no_guidance_begins_the_line_of_each_interval():
    rows = [guided(1.0), guided(2.0), guided(2.0, interval=(0.2, 0.8)), guided(3.0, interval=(0.2, 0.8))]
    (panel,) = make_panels(rows)
    assert {label: [x for x, _, _ in points] for label, points in panel.lines.items()} == {
        "guided throughout": [1.0, 2.0],
        "guided in [0.2, 0.8]": [1.0, 2.0, 3.0],
    }


def test_panels_of_precision_and_of_class_accuracy():
    metrics = [
        {"precision": 0.6 + 0.1 * k, "recall": 0.7 - 0.1 * k, "class_accuracy": 0.5 + 0.1 * k} for k in range(3)
    ]
    rows = [guided(1.0 + k, **values) for k, values in enumerate(metrics)]
    fid, precision = make_panels(rows)
    assert (fid.y, precision.x, precision.y, precision.setting) == ("fid", "recall", "precision", "guidance_scale")
    np.testing.assert_allclose(precision.lines[""], [(0.7, 0.6, 1), (0.6, 0.7, 2), (0.5, 0.8, 3)])

    for values in rows:
        del values["recall"]
    accuracy = make_panels(rows)[1]
    assert (accuracy.x, accuracy.y) == ("guidance_scale", "class_accuracy")
    np.testing.assert_allclose(accuracy.lines[""], [(1, 0.5, 1), (2, 0.6, 2), (3, 0.7, 3)])

    rows[1]["class_accuracy"] = None
    rows[2]["class_accuracy"] = math.nan
    assert [panel.y for panel in make_panels(rows)] == ["fid"]


def test_trade_offs_are_of_the_best_checkpoint_that_has_any():
    def at(step, *fids):
        samplers = [Sampler(num_inference_steps=steps) for steps in (20, 50)]
        return [row("runs/res", step, sampler, fid) for sampler, fid in zip(samplers, fids, strict=False)]

    rows = [*at(10, 9.0, 8.0), *at(20, 7.5, 7.0), *at(30, 7.8, 7.2), *at(40, 5.0), row("other", 1, DDIM, 1.0)]
    (trade_offs,) = find_trade_offs(rows)
    assert trade_offs.family == "runs/res"
    assert {each["step"] for each in trade_offs.rows} == {20}
    assert trade_offs.panels[0].lines == {"": [(20, 7.5, 20), (50, 7.0, 50)]}


@pytest.mark.parametrize(
    ("protocols", "counts", "expected"),
    [
        (["clean"], [10_000], "clean protocol, 10,000 images"),
        (["clean"], [50_000, 10_000, 20_000], "clean protocol, 10,000 to 50,000 images"),
        (["original", "clean"], [10_000], "original and clean protocols, 10,000 images"),
        ([None], [500], "500 images"),
    ],
)
def test_conditions(protocols, counts, expected):
    assert conditions([{"protocol": p, "num_images": n} for p in protocols for n in counts]) == expected


def test_short_names():
    assert short_names(["runs/res", "runs/atn"]) == {"runs/res": "res", "runs/atn": "atn"}
    assert short_names(["a/b/res", "a/c/res", "d"]) == {"a/b/res": "b/res", "a/c/res": "c/res", "d": "d"}
    assert short_names(["res", "runs/res"]) == {"res": "res", "runs/res": "runs/res"}
    assert short_names(["."]) == {".": "."}
    assert short_names(["/"]) == {"/": "/"}
    long = [f"run-{number:02}-{'x' * 30}-{number:02}" for number in range(3)]
    assert all(len(name) == 28 and "\N{HORIZONTAL ELLIPSIS}" in name for name in short_names(long).values())
    # what tells them apart is in the middle
    middle = ["x" * 30 + letter + "x" * 30 for letter in "ab"]
    assert len(set(short_names(middle).values())) == 2


def test_slugs():
    assert slugs(["runs/res large", "hub/Ünet"]) == {"runs/res large": "res-large", "hub/Ünet": "net"}
    assert slugs(["a/Res", "b/res", "."]) == {"a/Res": "Res", "b/res": "res-2", ".": "family"}
    assert slugs(["a/res", "b/res"]) == {"a/res": "a-res", "b/res": "b-res"}


def test_labels_do_not_cover_each_other():
    rng = np.random.default_rng(0)
    points = np.column_stack([rng.uniform(300, 700, 10), rng.uniform(250, 330, 10)])
    sizes = np.full((10, 2), (40.0, 14.0))
    ink = np.column_stack([np.arange(0, 1000, 5.0), np.full(200, 290.0)])
    moves = place_labels(points, sizes, ink, (0, 0, 1000, 600))
    centres = points + np.array(moves)
    for number, centre in enumerate(centres):
        apart = np.abs(centres - centre) >= sizes
        assert apart.any(axis=1).sum() == 9
        assert (np.abs(points - centre) >= (20, 7)).any(axis=1).all()
        assert (np.abs(moves[number]) <= (20 + 150, 7 + 150)).all()
        assert not ((np.abs(ink - centre) < (20, 7)).all(axis=1)).any()


def test_a_label_without_a_place():
    point, size = np.array([[50.0, 50.0]]), np.array([[40.0, 14.0]])
    (move,) = place_labels(point, size, np.empty((0, 2)), (0, 0, 100, 100))
    assert move == pytest.approx((0, -15))
    assert place_labels(point, size, np.empty((0, 2)), (40, 40, 60, 60)) == [None]


def test_charts_of_the_original(tmp_path):
    pngs = draw_sweep_charts(original_rows(), tmp_path)
    assert [path.name for path in pngs] == ["fid_minima.png", "trade_offs.png"]
    check_pictures(tmp_path, pngs)
    written = texts(tmp_path / "fid_minima.svg")
    assert "original protocol, 10,000 images" in written
    assert {f"{fid:.2f}" for fids in ORIGINAL_FIDS.values() for fid in fids} <= set(written)
    assert {*ORIGINAL_FIDS, *(sampler.title() for sampler in ORIGINAL_SAMPLERS)} <= set(written)
    assert "FID (lower is better)" in written


def test_charts_of_trainings(tmp_path):
    samplers = [Sampler("DDIM", num_inference_steps=50, eta=eta) for eta in (0.0, 1.0)]
    rows = [
        row(family, 1000 * k, sampler, 300 / k + k + 5 * number, num_images=10_000 if k < 9 else 50_000)
        for family in ("runs/res", "runs/res_atn")
        for number, sampler in enumerate(samplers)
        for k in range(1, 21)
    ]
    rows += [row("runs/once", 1000, samplers[0], 12.0), row("runs/unknown", None, samplers[0], 13.0)]
    pngs = draw_sweep_charts(rows, tmp_path)
    assert [path.name for path in pngs] == ["fid_over_steps_res.png", "fid_over_steps_res_atn.png", "fid_minima.png"]
    check_pictures(tmp_path, pngs)
    written = texts(tmp_path / "fid_over_steps_res_atn.svg")
    assert {"res_atn: FID over the training", "clean protocol, 10,000 to 50,000 images"} <= set(written)
    # 300 / k + k has its minimum at 17
    assert {"DDIM, 50 steps: 34.65 at 17,000", "DDIM, 50 steps, eta 1: 39.65 at 17,000"} <= set(written)
    assert {"34.65", "39.65", "training (optimizer steps)", "FID (lower is better)"} <= set(written)


@pytest.mark.parametrize(("count", "written_values"), [(5, 5), (6, 1), (12, 1)])
def test_charts_of_trainings_under_many_samplers(tmp_path, count, written_values):
    """All minima lie at one step, where the values of many would be in each other's way."""
    samplers = [Sampler(num_inference_steps=10 * number) for number in range(1, count + 1)]
    rows = [
        row("runs/res", 100 * k, sampler, 40 / k + 0.3 * number)
        for number, sampler in enumerate(samplers)
        for k in (1, 2, 3)
    ]
    pngs = draw_sweep_charts(rows, tmp_path)
    check_pictures(tmp_path, pngs)
    written = texts(tmp_path / "fid_over_steps_res.svg")
    values = [f"{40 / 3 + 0.3 * n:.2f}" for n in range(count)]
    assert [value for value in values if value in written] == values[:written_values]
    legend = {f"{sampler.title()}: {value} at 300" for sampler, value in zip(samplers, values, strict=True)}
    assert legend <= set(written)
    # where nobody has chosen a scheduler, none is named
    assert "res, step\N{NO-BREAK SPACE}300 (eta 0)" in texts(tmp_path / "trade_offs.svg")


def test_charts_of_one_checkpoint_with_a_grid(tmp_path):
    rows = [guided(scale, steps) for scale in (1.0, 1.5, 2.0, 4.0) for steps in (20, 50, 250)]
    pngs = draw_sweep_charts(rows, tmp_path)
    assert [path.name for path in pngs] == ["fid_minima.png", "trade_offs.png"]
    check_pictures(tmp_path, pngs)
    written = texts(tmp_path / "trade_offs.svg")
    expected = {
        "denoising steps",
        "20 steps",
        "no guidance",
        "guidance 1.5",
        "res, step\N{NO-BREAK SPACE}1,000 (DDIM, eta 0)",
    }
    assert expected <= set(written)


def test_charts_of_one_sampler_and_many_families(tmp_path):
    pngs = draw_sweep_charts([row(f"hub/model-{k}", None, DDIM, 10.0 + k) for k in range(5)], tmp_path)
    assert [path.name for path in pngs] == ["fid_minima.png"]
    assert {"model-3", "DDIM, 100 steps: FID", "13.00"} <= set(texts(tmp_path / "fid_minima.svg"))


def test_charts_of_many_samplers_and_families(tmp_path):
    """With more samplers than colours each bar has its name beside it."""
    samplers = [Sampler("DDIM", num_inference_steps=10 * k) for k in range(1, 10)]
    rows = [row(f"runs/{k}", 7, sampler, 9.0 + k) for k in range(2) for sampler in samplers]
    check_pictures(tmp_path, draw_sweep_charts(rows, tmp_path))
    assert texts(tmp_path / "fid_minima.svg").count("DDIM, 90 steps") == 2


@pytest.mark.parametrize("rows", [[], [row("a", 1, DDIM, 3.0)], [row("a", k, DDIM, math.nan) for k in range(3)]])
def test_nothing_to_draw(tmp_path, rows):
    assert draw_sweep_charts(rows, tmp_path) == []
    assert names_in(tmp_path) == []


def test_older_charts_are_replaced(tmp_path):
    old = [row("runs/res", step, DDIM, 9.0 - step) for step in (1, 2)]
    new = [*old, row("runs/res", 3, DDIM, 5.5)]
    (file,) = draw_sweep_charts(old, tmp_path)
    before = [file.read_bytes(), file.with_suffix(".svg").read_bytes()]
    draw_sweep_charts(new, tmp_path)
    assert "DDIM, 100 steps: 5.50 at 3" in texts(file.with_suffix(".svg"))
    assert draw_sweep_charts(old, tmp_path) == [file]
    assert [file.read_bytes(), file.with_suffix(".svg").read_bytes()] == before
    check_pictures(tmp_path, [file])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "fids",
    [(0.0, 0.0, 0.0), (-1e-6, 2e-6, 0.5), (1e-3, 1.0, 5e5), (7.0, 7.0, 7.0)],
    ids=["zero", "negative", "many decades", "equal"],
)
def test_unusual_values(tmp_path, fids):
    samplers = [Sampler(num_inference_steps=steps) for steps in (5, 50)]
    rows = [row("$runs/_a$&<b>", k, sampler, fid) for k, fid in enumerate(fids) for sampler in samplers]
    pngs = draw_sweep_charts(rows, tmp_path)
    assert len(pngs) == 3
    check_pictures(tmp_path, pngs)
