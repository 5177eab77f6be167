"""The charts of a sweep: which there are, and what is in them."""

import dataclasses
import math
import xml.etree.ElementTree as ElementTree

import PIL.Image
import pytest

from imagenet64_diffusion.evaluation.charts import (
    conditions,
    lines_over_steps,
    lowest,
    make_sweep_charts,
    short_names,
    slugs,
    trade_offs,
)
from imagenet64_diffusion.pipelines.sampler import Sampler


DDIM, DDPM = Sampler("DDIM"), Sampler("DDPMScheduler", step_size=10, eta=1.0)


def row(family, step, sampler, fid, **values):
    settings = dataclasses.asdict(sampler)
    settings["guidance_interval"] = " ".join(map(str, sampler.guidance_interval))
    model = family if step is None else f"{family}/pipelines/step_{step:07}"
    common = {"model": model, "family": family, "step": step, "sampler": sampler.title(), **settings}
    return {**common, "num_images": 10_000, "protocol": "clean", "fid": fid, **values}


def guided(scale, steps=50, interval=(0.0, 1.0), **values):
    sampler = Sampler("DDIM", num_inference_steps=steps, guidance_scale=scale, guidance_interval=interval)
    return row("runs/res", 1000, sampler, 20 + (scale - 2) ** 2 + 100 / steps, **values)


def texts(file):
    return [element.text for element in ElementTree.parse(file).iter("{http://www.w3.org/2000/svg}text")]


def check(folder, pngs, *names):
    """These charts and no others, each as a PNG that has something in it and as an SVG."""
    assert [path.stem for path in pngs] == list(names)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{n}.{end}" for n in names for end in ("png", "svg")
    )
    for path in pngs:
        with PIL.Image.open(path) as image:
            assert image.width == 1200
            assert len(image.convert("RGB").getcolors(image.width * image.height)) > 10


def test_lines_and_minima():
    rows = [row("a", 30, DDIM, 5.0), row("a", 10, DDIM, 9.0), row("a", 10, DDPM, 8.0), row("a", 30, DDIM, 4.0)]
    assert lines_over_steps(rows) == {
        "DDIM, 100 steps": [(10, 9.0), (30, 4.0)],
        "DDPM, step size 10, eta 1": [(10, 8.0)],
    }
    rows += [row("b", step, DDIM, fid) for step, fid in [(30, 5.0), (20, 4.0), (10, 4.0)]] + [
        row("c", None, DDPM, 1.0)
    ]
    assert lowest(rows) == {
        ("a", "DDIM, 100 steps"): (4.0, 30),
        ("a", "DDPM, step size 10, eta 1"): (8.0, 10),
        ("b", "DDIM, 100 steps"): (4.0, 10),
        ("c", "DDPM, step size 10, eta 1"): (1.0, None),
    }


def shown(lines, setting):
    return [[each[setting] for each in line] for line in lines[setting].values()]


def test_trade_offs_are_lines_along_which_one_setting_changes():
    lines = trade_offs([guided(scale, steps) for steps in (20, 50) for scale in (3.0, 1.0)], "runs/res")
    assert shown(lines, "guidance_scale") == [[1.0, 3.0]] * 2
    assert shown(lines, "num_inference_steps") == [[20, 50]] * 2
    assert trade_offs([guided(1.0)], "runs/res") == {}
    assert trade_offs([guided(1.0, 50), guided(2.0, 20)], "runs/res") == {}
    # no guidance begins the line of each interval
    lines = trade_offs(
        [guided(1.0), guided(2.0), guided(2.0, interval=(0.2, 0.8)), guided(3.0, interval=(0.2, 0.8))], "runs/res"
    )
    assert sorted(shown(lines, "guidance_scale")) == [[1.0, 2.0], [1.0, 2.0, 3.0]]


def test_trade_offs_are_of_the_best_checkpoint_that_has_any():
    samplers = [Sampler(num_inference_steps=steps) for steps in (20, 50)]
    fids = {10: (9.0, 8.0), 20: (7.5, 7.0), 30: (7.8, 7.2), 40: (5.0,)}
    rows = [row("a", step, *each) for step, of in fids.items() for each in zip(samplers, of, strict=False)]
    (line,) = trade_offs(rows, "a")["num_inference_steps"].values()
    assert [(each["step"], each["fid"]) for each in line] == [(20, 7.5), (20, 7.0)]


def test_names():
    assert short_names(["a/b/res", "a/c/res", "d", "."]) == {
        "a/b/res": "b/res",
        "a/c/res": "c/res",
        "d": "d",
        ".": ".",
    }
    assert slugs(["a/Res", "b/res", "runs/res large", "."]) == {
        "a/Res": "Res", "b/res": "res-2", "runs/res large": "res-large", ".": "family"
    }  # fmt: skip
    assert conditions([row("a", 1, DDIM, 1, num_images=n) for n in (50_000, 10_000, 20_000)]) == (
        "clean protocol, 10,000 to 50,000 images"
    )


def test_charts_of_trainings(tmp_path):
    samplers = [Sampler("DDIM", num_inference_steps=50, eta=eta) for eta in (0.0, 1.0)]
    rows = [
        row(family, 1000 * k, sampler, 300 / k + k + 5 * number)
        for family in ("runs/res", "runs/res_atn")
        for number, sampler in enumerate(samplers)
        for k in range(1, 21)
    ]
    rows += [row("runs/once", 1000, samplers[0], 12.0), row("runs/unknown", None, samplers[0], math.nan)]
    pngs = make_sweep_charts(rows, tmp_path)
    check(tmp_path, pngs, "fid_over_steps_res", "fid_over_steps_res_atn", "fid_minima")
    written = texts(tmp_path / "fid_over_steps_res_atn.svg")
    # 300 / k + k has its minimum at 17
    assert {"res_atn: FID over the training", "DDIM, 50 steps: 34.65 at 17,000", "FID (lower is better)"} <= set(
        written
    )
    assert "34.65 at step 17,000" in texts(tmp_path / "fid_minima.svg")
    before = (tmp_path / "fid_minima.svg").read_bytes()
    make_sweep_charts(rows, tmp_path)
    assert (tmp_path / "fid_minima.svg").read_bytes() == before


def test_charts_of_one_checkpoint_with_a_grid(tmp_path):
    metrics = {"precision": 0.6, "recall": 0.7}
    rows = [guided(scale, steps, **metrics) for scale in (1.0, 2.0, 4.0) for steps in (20, 50)]
    check(tmp_path, make_sweep_charts(rows, tmp_path), "fid_minima", "trade_offs")
    written = set(texts(tmp_path / "trade_offs.svg"))
    assert {
        "denoising steps",
        "guidance scale (1: none)",
        "res, step 1,000",
        "precision (higher is better)",
    } <= written


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fids", [(0.0, 0.0, 0.0), (-1e-6, 2e-6, 0.5), (1e-3, 1.0, 5e5), (7.0, 7.0, 7.0)])
def test_unusual_values(tmp_path, fids):
    samplers = [Sampler(num_inference_steps=steps) for steps in (5, 50)]
    rows = [row("$runs/_a$&<b>", k, sampler, fid) for k, fid in enumerate(fids) for sampler in samplers]
    assert len(make_sweep_charts(rows, tmp_path)) == 3
    assert make_sweep_charts([row("a", k, DDIM, math.nan) for k in range(3)], tmp_path) == []
