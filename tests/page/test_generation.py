"""Sampling for the page: the same images as generate_images.py, for several people at once, leaving nothing behind."""

import html
import io
import json
import re
import shlex
import tempfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageSequence

from imagenet64_diffusion.generate_images import main as generate_main
from imagenet64_diffusion.page import generation, request
from imagenet64_diffusion.page.app_options import AppOptions
from imagenet64_diffusion.page.generation import generate
from imagenet64_diffusion.page.model_cache import ModelCache
from imagenet64_diffusion.page.request import OWN_SCHEDULER, TWO_SCHEDULERS, read_form
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.page.forms import form, generate_all


def pixels_of(content):
    """(frames, height, width, 3) of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


def comparable(name, content):
    """Images as pixels, a manifest without where it was sampled and written to."""
    if not name.endswith("json"):
        return pixels_of(content).shape, pixels_of(content).tobytes()
    manifest = json.loads(content)
    for option in ("device", "output_dir"):
        del manifest["options"][option]
    return manifest


def archived(files):
    """What is in everything.zip."""
    with zipfile.ZipFile(io.BytesIO(files["everything.zip"])) as archive:
        return {name: comparable(name, archive.read(name)) for name in archive.namelist()}


@pytest.mark.parametrize(
    "changes",
    [
        {"eta": 0.5, "guidance_begin": 0.25, "guidance_end": 0.75, "class_labels": ["tabby, tabby cat", "2"]},
        {"scheduler": "DPMSolverMultistepScheduler", "guidance_scale": 1, "eta": 0.3},
        {"scheduler": "HeunDiscreteScheduler", "class_labels": ["all"]},
    ],
)
def test_the_command_line_that_is_shown(models, tmp_path, changes):
    """It writes the same files, bit for bit, with a shell's rules for its words."""
    views, files = generate_all(form(models, **changes), models)
    [line] = re.findall("<pre>(.*)</pre>", views[-1].status)
    program, *arguments = shlex.split(html.unescape(line))
    assert program == "imagenet64-generate"
    assert generate_main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    expected = {file.name: comparable(file.name, file.read_bytes()) for file in (tmp_path / "out").iterdir()}
    assert archived(files) == expected
    for name in ("grid.png", "denoising.gif", "manifest.json"):
        assert comparable(name, files[name]) == expected[name]


def test_images_come_while_it_samples(models, monkeypatch):
    monkeypatch.setattr(generation, "_SECONDS_BETWEEN_IMAGES", 0)
    *steps, last = generate_all(form(models, num_inference_steps=5), models)[0]
    assert [re.search(r"step \d of 5", view.status)[0] for view in steps] == [f"step {i} of 5" for i in range(1, 6)]
    assert len({view.images for view in [*steps, last]}) == 6  # the last one with full quality
    assert last.images.count("<img ") == 6
    assert 'alt="goldfish, seed 9"' in last.images
    assert 'alt="no class, seed 12"' in last.images
    assert "6 images in " in last.status


def test_two_schedulers_beside_each_other(models):
    """The second one is of second order, so it takes seven steps where the first one takes four."""
    heun = "HeunDiscreteScheduler"
    views, files = generate_all(form(models, compare=TWO_SCHEDULERS, other_scheduler=heun, eta=0.5), models)
    assert views[-1].images.count('class="side"') == 2
    both, sides = archived(files), {}
    for side, scheduler in (("left", OWN_SCHEDULER), ("right", heun)):
        sides[side] = archived(generate_all(form(models, scheduler=scheduler, eta=0.5), models)[1])
        assert {name: both[f"{side}/{name}"] for name in sides[side]} == sides[side]
    assert len(both) == 2 * len(sides["left"]) == 18
    assert json.loads(files["manifest.json"]).keys() == {"left", "right"}
    # both grids, unchanged, in one image
    whole = pixels_of(files["grid.png"])[0]
    for side, left in (("left", 2), ("right", whole.shape[1] // 2 + 1)):
        shape, content = sides[side]["grid.png"]
        [grid] = np.frombuffer(content, np.uint8).reshape(shape)
        assert np.array_equal(whole[2 : 2 + grid.shape[0], left : left + grid.shape[1]], grid)
    assert len(pixels_of(files["denoising.gif"])) == 7


def test_an_animation_of_many_steps_has_the_last_one(models, monkeypatch):
    monkeypatch.setattr(request, "_MAX_FRAMES", 4)
    [sampled] = read_form(form(models, num_inference_steps=11), models)
    steps = list(sampled.steps())
    assert [number for number, _, _ in steps] == list(range(1, 12))
    assert np.array_equal(np.stack(sampled.frames), np.stack([steps[index][2] for index in (1, 4, 7, 10)]))


def test_a_network_without_classes(tmp_path):
    make_pipeline(num_class_embeds=None, layer_types=("resnet",)).save_pretrained(tmp_path / "plain")
    models = ModelCache(AppOptions(model=[str(tmp_path / "plain")]))
    _, files = generate_all(form(models, class_labels=None), models)
    assert [image["class_label"] for image in json.loads(files["manifest.json"])["images"]] == [None, None]


def test_requests_at_the_same_time_do_not_see_each_other(models):
    """Different schedulers, steps, clipping and batch shapes on one network."""
    requests = [
        form(models, num_inference_steps=6, eta=0.7),
        form(models, scheduler="EulerDiscreteScheduler", class_labels=["null"], num_images_per_label=5),
        form(models, compare=TWO_SCHEDULERS, other_scheduler="LearnedVarianceDDPMScheduler", num_inference_steps=3),
    ]

    def run(filled):
        return archived(generate_all(filled, models)[1])

    alone = list(map(run, requests))
    with ThreadPoolExecutor(3) as people:
        assert list(people.map(run, requests)) == alone


class TestStopping:
    @pytest.fixture
    def sampled(self, models):
        """A request of many steps, and an event for each evaluation of the network."""
        [asked] = read_form(form(models, num_inference_steps=30), models)
        calls = [threading.Event() for _ in range(30)]
        waiting = iter(calls)
        hook = asked.pipeline.unet.register_forward_pre_hook(lambda *_: next(waiting).set())
        yield asked, calls
        hook.remove()
        request.end_all()  # a test that fails would leave its thread waiting, and the process with it

    @staticmethod
    def wait_for_the_end():
        for thread in [thread for thread in threading.enumerate() if thread.name == "generation"]:
            thread.join(timeout=60)
            assert not thread.is_alive()

    @pytest.mark.parametrize("end", ["close", "drop"])
    def test_the_work_waits_for_who_takes_it_and_ends_with_the_iterator(self, sampled, end):
        asked, calls = sampled
        unet, steps = asked.pipeline.unet, asked.steps()
        next(steps)
        assert "forward" in vars(unet.conv_in)  # of `cached_weights`
        assert calls[2].wait(timeout=60)
        assert not calls[3].wait(timeout=0.5)
        if end == "close":
            steps.close()
        del steps
        self.wait_for_the_end()
        assert not calls[3].is_set()
        assert "forward" not in vars(unet.conv_in)

    @pytest.mark.parametrize("taken", ["one view", "the files", "everything"])
    def test_nothing_is_left(self, models, tmp_path, monkeypatch, taken):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        views = generate(form(models), models)
        view = next(views)
        while taken != "one view" and not view.files:
            view = next(views)
        names = [] if taken == "one view" else ["grid.png", "denoising.gif", "manifest.json", "everything.zip"]
        assert [file.name for file in view.files if file.exists()] == names
        assert taken != "everything" or list(views) == []
        views.close()
        self.wait_for_the_end()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_labels": ["tabbi"]}, 'class="problem" role="alert">there is no class named &#x27;tabbi&#x27;'),
        # of the pipeline
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 2}, 'class="problem"'),
        ({"class_labels": ["<img src=x onerror=alert(1)>"]}, "&lt;img src=x"),
    ],
)
def test_errors_are_shown_as_text(models, changes, said):
    views, files = generate_all(form(models, **changes), models)
    assert said in views[-1].status
    assert "<img" not in views[-1].status
    assert files == {}


def test_errors_that_nobody_thought_of_are_told_without_their_text(models, monkeypatch, capsys):
    monkeypatch.setattr(request, "to_pixels", lambda *_: {}["of nobody's concern"])
    views, _ = generate_all(form(models), models)
    assert "Sampling failed (KeyError): whoever serves this page finds more in its log" in views[-1].status
    assert "of nobody's concern" in capsys.readouterr().err
    monkeypatch.undo()
    assert generate_all(form(models), models)[1]
