"""The chart of a run's losses: what is read, how it is smoothed, and that there is a chart."""

import json
import math

import numpy as np
import PIL.Image
import pytest

from imagenet64_diffusion.training.metrics import METRICS, QUARTERS, draw_loss_chart, read_metrics, smooth


def entry(step, **values):
    quarters = {name: 0.4 / number for number, name in enumerate(QUARTERS, start=1)}
    common = {"loss": 0.2, **quarters, "gradient_norm": 0.5, "lr": 1e-4, "images_per_second": 150.0}
    return {"step": step, **common, **values}


@pytest.fixture
def log(tmp_path):
    """Writes entries, and text after them, to a log."""

    def write(entries, end=""):
        file = tmp_path / "metrics.jsonl"
        file.write_text("".join(json.dumps(values) + "\n" for values in entries) + end, encoding="utf-8")
        return file

    return write


def run(count, seed=0):
    """Entries of a run whose loss falls, after a spike."""
    noise = np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))
    losses = (0.05 + 0.5 / np.sqrt(np.arange(count) + 1)) * noise
    losses[0] = 50.0
    return [entry(10 * (k + 1), loss=loss, lr=1e-4 * min(1, k / 50)) for k, loss in enumerate(losses.tolist())]


def is_chart(file):
    with PIL.Image.open(file) as picture:
        colours = picture.convert("RGB").getcolors(picture.width * picture.height)
        return picture.format == "PNG" and picture.size == (1200, 1000) and len(colours) > 10


def test_what_is_read(log):
    metrics = read_metrics(log([entry(10), entry(20, loss=0.1, loss_quarter_3=None), {"step": 30, "loss": 0.3}]))
    assert tuple(metrics) == METRICS
    assert all(values.dtype == np.float64 and values.shape == (3,) for values in metrics.values())
    np.testing.assert_array_equal(metrics["step"], [10, 20, 30])
    np.testing.assert_array_equal(metrics["loss"], [0.2, 0.1, 0.3])
    np.testing.assert_array_equal(metrics["loss_quarter_3"], [0.4 / 3, np.nan, np.nan])
    np.testing.assert_array_equal(metrics["lr"], [1e-4, 1e-4, np.nan])


@pytest.mark.parametrize("end", ['{"step": 20, "lo', '{"loss": 0.1}\n', "[1, 2]\n", "3\n", '{"step": null}\n', "\n"])
def test_lines_that_are_no_entries(log, end):
    np.testing.assert_array_equal(read_metrics(log([entry(10)], end))["step"], [10])


def test_a_long_log_is_thinned_evenly(log):
    step = read_metrics(log(entry(k) for k in range(1, 1001)), max_entries=300)["step"]
    np.testing.assert_array_equal(step, np.arange(4, 1001, 4))


@pytest.mark.parametrize("count", [1, 2, 30, 400])
def test_smoothing(count):
    """Against the sum that the recursion stands for: each value with its weight, after all that follow."""
    values = np.random.default_rng(0).standard_normal(count)
    rates = [1 / max(1, min(math.sqrt(count), k / 5)) for k in range(1, count + 1)]
    averages = smooth(values)
    for k in {0, count // 2, count - 1}:
        weights = [rates[j] * math.prod(1 - rate for rate in rates[j + 1 : k + 1]) for j in range(k + 1)]
        assert sum(weights) == pytest.approx(1)
        assert averages[k] == pytest.approx(math.fsum(w * v for w, v in zip(weights, values[: k + 1], strict=True)))


def test_smoothing_passes_over_what_is_not_finite():
    values = np.random.default_rng(0).random(50)
    gaps = np.concatenate([[np.nan, np.inf], values[:20], [np.nan] * 3, values[20:], [-np.inf]])
    expected, averages = smooth(values), smooth(gaps)
    assert np.isnan(averages[:2]).all()
    np.testing.assert_array_equal(averages[2:22], expected[:20])
    np.testing.assert_array_equal(averages[22:25], np.full(3, expected[19]))
    np.testing.assert_array_equal(averages[25:], [*expected[20:], expected[-1]])
    assert smooth(np.array([])).shape == (0,)
    assert np.isnan(smooth(np.full(3, np.nan))).all()


def test_an_early_spike_is_forgotten():
    values = np.full(1000, 0.1)
    values[:3] = 50.0
    np.testing.assert_allclose(smooth(values)[50:], 0.1, rtol=1e-2)


@pytest.mark.parametrize("count", [1, 40, 500])
def test_chart(log, tmp_path, count):
    draw_loss_chart(log(run(count)), tmp_path / "loss.png", "res_res on ImageNet 64x64")
    assert is_chart(tmp_path / "loss.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


@pytest.mark.parametrize(
    "entries",
    [
        [{"step": 10, "loss": 0.3}, {"step": 20, "loss": 0.2}],
        [{"step": 10}],
        [entry(10), entry(20, loss=math.nan, gradient_norm=math.inf), entry(30)],
        [entry(10, loss=math.nan), entry(20, loss=math.nan)],
        [entry(10, loss=-0.1, gradient_norm=0.0, lr=0.0), entry(20, loss=0.0), entry(30, loss=5.0)],
        [entry(10, **dict.fromkeys(QUARTERS)), entry(20, loss_quarter_2=None)],
        [entry(10, loss=1e-8), *(entry(k, loss=10.0**k) for k in range(20, 30))],
    ],
    ids=["older", "empty", "gaps", "nothing finite", "not positive", "quarters missing", "many decades"],
)
@pytest.mark.filterwarnings("error")
def test_chart_of_unusual_values(log, tmp_path, entries):
    draw_loss_chart(log(entries), tmp_path / "loss.png")
    assert is_chart(tmp_path / "loss.png")


def test_nothing_to_plot(log, tmp_path):
    draw_loss_chart(tmp_path / "none.jsonl", tmp_path / "loss.png")
    draw_loss_chart(log([]), tmp_path / "loss.png")
    draw_loss_chart(log([], end='{"step": 1'), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
