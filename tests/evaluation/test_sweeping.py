"""What a sweep evaluates: models, their trainings and steps, and the grid of samplers."""

import re

import pytest

from imagenet64_diffusion.evaluation.options import SweepOptions
from imagenet64_diffusion.evaluation.sweeping import find_models, sampler_grid
from imagenet64_diffusion.pipelines.generation_options import Sampler


def grid(**changes) -> list[Sampler]:
    return sampler_grid(
        SweepOptions(**{"output_dir": "out", "reference": "reference", "models": ["model"], **changes})
    )


def test_a_folder_stands_for_the_pipelines_in_it(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    inside = ("pipelines/step_0001000", "pipelines/step_0000500", "model", "pipelines/.step_2.writing")
    others = ("469e_600000s", "23e_30000s", "checkpoint-7", "best")
    for folder in (*map(run.joinpath, inside), *map(other.joinpath, others)):
        folder.mkdir(parents=True)
        (folder / "model_index.json").write_text("{}")
    found = find_models([str(run), str(other / "best"), str(other), "me/on-the-hub"])
    assert found == [
        (f"{other}/checkpoint-7", str(other), 7),
        (f"{other}/23e_30000s", str(other), 30_000),
        (f"{other}/469e_600000s", str(other), 600_000),
        (f"{other}/best", f"{other}/best", None),
        (f"{run}/pipelines/step_0000500", str(run), 500),
        (f"{run}/pipelines/step_0001000", str(run), 1000),
        (f"{run}/model", str(run), None),
        ("me/on-the-hub", "me/on-the-hub", None),
    ]
    # one that is a pipeline itself stands for itself alone
    (run / "model_index.json").write_text("{}")
    assert find_models([str(run)]) == [(str(run), str(run), None)]
    for name in ("./run", "run", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="which is neither a folder nor a Hub id"):
            find_models([name])


def test_the_product_of_the_options():
    found = grid(scheduler=["own", "DDIM"], num_inference_steps=[50], step_size=[10, 1], guidance_scale=[1, 2.0, 2.0])
    assert found == [
        Sampler(scheduler=scheduler, guidance_scale=guidance, **step)
        for scheduler in (None, "DDIM")
        for step in ({"num_inference_steps": 50}, {"step_size": 10}, {"step_size": 1})
        for guidance in (1, 2.0)
    ]
    assert grid() == [Sampler()]
    # where nothing is guided, the interval is no setting
    assert grid(guidance_scale=[1.0, 3.0], guidance_interval=[0.2, 0.5], eta=[0.0, 1.0]) == [
        Sampler(guidance_scale=scale, guidance_interval=interval, eta=eta)
        for scale, interval in ((1.0, (0.0, 1.0)), (3.0, (0.2, 0.5)))
        for eta in (0.0, 1.0)
    ]


def test_a_grid_file(tmp_path):
    for text in (
        '[{"step_size": 10, "guidance_interval": [0.1, 0.9], "guidance_scale": 2}, {"scheduler": "own"}, {}]',
        "- step_size: 10\n  guidance_interval: [0.1, 0.9]\n  guidance_scale: 2\n- scheduler: own\n- {}\n",
    ):
        (tmp_path / "grid").write_text(text)
        listed = Sampler(step_size=10, guidance_scale=2, guidance_interval=(0.1, 0.9))
        assert grid(grid=str(tmp_path / "grid")) == [listed, Sampler()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "expected the node content"),
        *((text, "samplers must be a list, each with names and values") for text in ("{}", "[]", "[1]")),
        ("- {steps: 3}", "names 'steps', but must be made of scheduler, scheduler_options"),
        ("- {num_inference_steps: ten}", "num_inference_steps is 'ten', but must be a whole number"),
        ("- {guidance_interval: [1]}", "guidance_interval is [1], but must be 2 numbers"),
        ("- {guidance_interval: 1}", "guidance_interval is 1, but must be 2 numbers"),
    ],
)
def test_wrong_grid_files(tmp_path, text, message):
    file = tmp_path / "grid.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"grid is {file}") + ".*" + re.escape(message)):
        grid(grid=str(file))
