"""The charts of a sweep: which there are, and what is in them."""

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import PIL.Image
import pytest

from imagenet64_diffusion.evaluation.charts import best, make_sweep_charts, over_steps, short_names, trade_offs
from imagenet64_diffusion.pipelines.generation_options import Sampler


DDIM, DDPM = Sampler("DDIM"), Sampler("DDPMScheduler", step_size=10, eta=1.0)


def row(family, step, sampler, fid, **values):
    settings = dataclasses.asdict(sampler)
    for name in ("guidance_interval", "scheduler_options"):
        settings[name] = " ".join(map(str, settings[name]))
    model = family if step is None else f"{family}/pipelines/step_{step:07}"
    common = {"model": model, "family": family, "step": step, "sampler": sampler.title(), **settings}
    return {**common, "num_images": 10_000, "protocol": "clean", "fid": fid, **values}


def guided(scale, steps=50, interval=(0.0, 1.0), **values):
    sampler = Sampler("DDIM", num_inference_steps=steps, guidance_scale=scale, guidance_interval=interval)
    return row("runs/res", 1000, sampler, 20 + (scale - 2) ** 2 + 100 / steps, **values)


def check(folder, rows, *names):
    """These charts are made and no others, each as a PNG that has something in it and as an SVG; gives their texts."""
    pngs = make_sweep_charts(rows, folder)
    assert [path.stem for path in pngs] == list(names)
    assert {path.name for path in folder.iterdir()} == {f"{name}.{end}" for name in names for end in ("png", "svg")}
    found = {}
    for path in pngs:
        with PIL.Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10
        elements = ElementTree.parse(path.with_suffix(".svg")).iter("{http://www.w3.org/2000/svg}text")
        found[path.stem] = {element.text for element in elements}
    return found


def test_lines_and_minima():
    rows = [row("a", 30, DDIM, 5.0), row("a", 10, DDIM, 9.0), row("a", 10, DDPM, 8.0), row("a", 30, DDIM, 4.0)]
    assert {name: [(each["step"], each["fid"]) for each in line] for name, line in over_steps(rows).items()} == {
        "DDIM, 100 steps: 4 at 30": [(10, 9.0), (30, 4.0)],
        "DDPM, step size 10, eta 1: 8 at 10": [(10, 8.0)],
    }
    rows += [row("b", step, DDIM, fid) for step, fid in [(30, 5.0), (20, 4.0), (10, 4.0)]]
    rows.append(row("c", None, DDPM, 1.0))
    minima = best(rows, "family", "sampler")
    found = [(family, sampler[:4], each["fid"], each["step"]) for (family, sampler), each in minima.items()]
    assert found == [("c", "DDPM", 1.0, None), ("b", "DDIM", 4.0, 10), ("a", "DDIM", 4.0, 30), ("a", "DDPM", 8.0, 10)]
    expected = {"a/b/res": "b/res", "a/c/res": "c/res", "/a/d": "d", "e/": "e", ".": "."}
    assert short_names(expected) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [guided(scale, steps) for steps in (20, 50) for scale in (3.0, 1.0)],
            {"guidance_scale": [[1.0, 3.0]] * 2, "num_inference_steps": [[20, 50]] * 2},
        ),
        # no guidance begins the line of each interval
        (
            [guided(1.0), guided(2.0), *(guided(scale, interval=(0.2, 0.8)) for scale in (2.0, 3.0))],
            {"guidance_scale": [[1.0, 2.0], [1.0, 2.0, 3.0]]},
        ),
    ],
)
def test_trade_offs_are_lines_along_which_one_setting_changes(rows, expected):
    """Of the best checkpoint that has any: in the better one here two settings change."""
    samplers = [
        Sampler("DDIM", num_inference_steps=steps, guidance_scale=scale)
        for steps, scale in ((20, 1.0), (50, 1.0), (20, 2.0))
    ]
    worse = [row("runs/res", 2000, sampler, 90.0) for sampler in samplers]
    better = [row("runs/res", 3000, sampler, 1.0) for sampler in samplers[1:]]
    panels = trade_offs([*worse, *rows, *better], "res")
    assert {title for title, *_ in panels} == {"res, step 1,000"}
    found = {x: sorted([each[x] for each in line] for line in lines.values()) for _, x, _, lines in panels}
    assert found == expected


def test_charts_of_trainings(tmp_path):
    samplers = [Sampler("DDIM", num_inference_steps=50, eta=eta) for eta in (0.0, 1.0)]
    rows = [
        row(family, 1000 * k, sampler, 300 / k + k + 5 * number, num_images=10_000 * (1 + number))
        for family in ("runs/res large", "runs/Res-large")
        for number, sampler in enumerate(samplers)
        for k in (16, 17, 18)
    ]
    rows += [row("runs/once", 1000, samplers[0], 12.0), row("runs/unknown", None, samplers[0], math.nan)]
    texts = check(tmp_path, rows, "fid_over_steps_res-large", "fid_over_steps_Res-large-2", "fid_minima")
    # 300 / k + k has its minimum at 17
    expected = {"res large: FID over the training", "clean protocol, 10,000 to 20,000 images", "FID (lower is better)"}
    assert texts["fid_over_steps_res-large"] >= {*expected, "DDIM, 50 steps: 34.65 at 17,000"}
    assert "34.65 at step 17,000" in texts["fid_minima"]


def test_charts_of_one_checkpoint_with_a_grid(tmp_path):
    rows = [guided(scale, steps, precision=0.6, recall=0.7) for scale in (1.0, 2.0) for steps in (20, 50)]
    texts = check(tmp_path / "once", rows, "fid_minima", "trade_offs")
    expected = {"denoising steps", "guidance scale (1: none)", "res, step 1,000", "precision (higher is better)"}
    assert texts["trade_offs"] >= expected
    # the same rows make the same files
    make_sweep_charts(rows, tmp_path / "again")
    for file in (tmp_path / "once").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


# not all: what other tests have left to be collected may end here
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
@pytest.mark.parametrize("fids", [(0.0, 0.0), (-1e-6, 2e-6), (1e-3, 5e5)])
def test_unusual_values(tmp_path, fids):
    rows = [row("$runs/_a$&<b>", k, Sampler(), fid) for k, fid in enumerate(fids)] + [row("b", None, DDIM, fids[0])]
    assert len(make_sweep_charts(rows, tmp_path)) == 2
    assert make_sweep_charts([row("a", k, DDIM, math.nan) for k in range(3)], tmp_path) == []
