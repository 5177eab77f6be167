"""The log of a run becomes a chart."""

import json
import math

import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.training.metrics import METRICS, QUARTERS, draw_loss_chart, read_metrics, smooth


def entry(step, **values):
    quarters = {name: 0.4 / number for number, name in enumerate(QUARTERS, start=1)}
    return {"step": step, "loss": 0.2, **quarters, "gradient_norm": 0.5, "lr": 1e-4, **values}


@pytest.fixture
def log(tmp_path):
    """Writes entries, and text after them, to a log."""

    def write(entries, end=""):
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(values) + "\n" for values in entries) + end, encoding="utf-8")
        return file

    return write


def test_what_is_read(log):
    metrics = read_metrics(log([entry(10), entry(20, loss=0.1, loss_quarter_3=None), {"step": 30, "loss": 0.3}]))
    assert tuple(metrics) == METRICS
    assert all(values.dtype == np.float64 and values.shape == (3,) for values in metrics.values())
    np.testing.assert_array_equal(metrics["step"], [10, 20, 30])
    np.testing.assert_array_equal(metrics["loss"], [0.2, 0.1, 0.3])
    np.testing.assert_array_equal(metrics["loss_quarter_3"], [0.4 / 3, np.nan, np.nan])
    for end in ('{"step": 20, "lo', '{"loss": 0.1}\n', "[1, 2]\n", "3\n", '{"step": null}\n', "\n"):
        np.testing.assert_array_equal(read_metrics(log([entry(10)], end))["step"], [10])


@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_smoothing(count):
    """Against the sum that the recursion stands for: each value with its weight, after all that follow."""
    values = np.random.default_rng(0).standard_normal(count)
    rates = [1 / max(1, min(math.sqrt(count), k / 5)) for k in range(1, count + 1)]
    averages = smooth(values)
    for k in {0, count // 2, count - 1}:
        weights = [rates[j] * math.prod(1 - rate for rate in rates[j + 1 : k + 1]) for j in range(k + 1)]
        assert averages[k] == pytest.approx(math.fsum(w * v for w, v in zip(weights, values[: k + 1], strict=True)))
    # what is not finite is passed over
    gaps = smooth(np.concatenate([[np.nan, np.inf], values, [-np.inf]]))
    np.testing.assert_array_equal(gaps, [np.nan, np.nan, *averages, averages[-1]])


@pytest.mark.parametrize(
    "entries",
    [
        [entry(k, loss=50.0 if k == 1 else 0.05 + 0.5 / math.sqrt(k), lr=1e-6 * k) for k in range(1, 100)],
        [{"step": 10}],
        [entry(10), entry(20, loss=math.nan, gradient_norm=math.inf), entry(30)],
        [entry(10, loss=-0.1, gradient_norm=0.0, lr=0.0), entry(20, loss=0.0, **dict.fromkeys(QUARTERS))],
        [entry(10, loss=1e-8), *(entry(k, loss=10.0**k) for k in range(20, 30))],
        [],
    ],
    ids=["usual", "only a step", "gaps", "not positive", "many decades", "empty"],
)
# not all: what other tests have left to be collected may end here
@pytest.mark.filterwarnings("error::UserWarning", "error::RuntimeWarning")
def test_chart(log, tmp_path, entries):
    log(entries, '{"step": 1')
    draw_loss_chart(tmp_path)
    assert (tmp_path / "loss_chart.png").exists() == bool(entries)
    if entries:
        with PIL.Image.open(tmp_path / "loss_chart.png") as image:
            colours = image.convert("RGB").getcolors(image.width * image.height)
            assert (image.format, image.size, len(colours) > 10) == ("PNG", (1200, 1000), True)
