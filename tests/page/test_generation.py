"""Drawing for the page: the same images as generate_images.py, for several people at once, leaving nothing behind."""

import io
import json
import re
import shutil
import tempfile
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from imagenet64_diffusion.generate_images import main as generate_main
from imagenet64_diffusion.page.generation import Generation, generate
from imagenet64_diffusion.page.model_cache import ModelCache
from imagenet64_diffusion.page.request import OWN_SCHEDULER, TWO_SCALES, TWO_SCHEDULERS, read_form
from imagenet64_diffusion.tests.components import make_pipeline
from imagenet64_diffusion.tests.page.forms import form, generate_all


def pixels_of(content):
    """(frames, height, width, 3) of an image file."""
    with Image.open(io.BytesIO(content)) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


def archived(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def without_places(manifest):
    """A manifest without where it was drawn and written to."""
    options = {name: value for name, value in manifest["options"].items() if name not in ("device", "output_dir")}
    return {**manifest, "options": options}


@pytest.mark.parametrize(
    ("changes", "arguments"),
    [
        (
            {"scheduler": OWN_SCHEDULER, "eta": 0.5, "guidance_begin": 0.25, "guidance_end": 0.75, "steps": 8},
            ["--eta", "0.5", "--guidance_interval", "0.25", "0.75", "--num_inference_steps", "8"],
        ),
        (
            {"scheduler": "DPMSolverMultistepScheduler", "guidance_scale": 1, "eta": 0.3},
            ["--scheduler", "DPMSolverMultistepScheduler", "--guidance_scale", "1", "--num_inference_steps", "4"],
        ),
        (
            {"scheduler": "HeunDiscreteScheduler", "classes": ["all"]},
            ["--scheduler", "HeunDiscreteScheduler", "--class_labels", "all", "--num_inference_steps", "4"],
        ),
    ],
)
def test_what_generate_images_draws(models, limits, tmp_path, changes, arguments):
    """Bit for bit, and the same files."""
    _, files = generate_all(form(models, **changes), models, limits)
    common = ["--model", models.names[0], "--class_labels", "0", "goldfish", "null", "--num_images_per_label", "2"]
    common += ["--seed", "7", "--guidance_scale", "2.5", "--output_dir", str(tmp_path / "out")]
    assert generate_main([*common, *arguments]) == 0
    expected = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    archive = archived(files["everything.zip"])
    assert archive.keys() == expected.keys()
    assert len(archive) == 9
    for name in archive:
        if name != "manifest.json":
            assert np.array_equal(pixels_of(archive[name]), pixels_of(expected[name])), name
    assert np.array_equal(pixels_of(files["grid.png"]), pixels_of(expected["grid.png"]))
    assert np.array_equal(pixels_of(files["denoising.gif"]), pixels_of(expected["denoising.gif"]))
    manifest, drawn = json.loads(expected["manifest.json"]), json.loads(files["manifest.json"])
    assert without_places(drawn) == without_places(manifest)
    assert json.loads(archive["manifest.json"]) == drawn


def test_the_command_line_that_is_shown(models, limits, tmp_path):
    """It draws the images again, with a shell's rules for its words."""
    import html
    import shlex

    views, files = generate_all(form(models, classes=["tabby, tabby cat", "2"], eta=0.25), models, limits)
    [line] = re.findall("<pre>(.*)</pre>", views[-1].status)
    program, *arguments = shlex.split(html.unescape(line))
    assert program == "imagenet64-generate"
    assert generate_main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    for name, content in archived(files["everything.zip"]).items():
        if name.endswith("png"):
            assert np.array_equal(pixels_of(content), pixels_of((tmp_path / "out" / name).read_bytes()))


def test_pictures_come_while_it_draws(models, limits, monkeypatch):
    monkeypatch.setattr("imagenet64_diffusion.page.generation._SECONDS_BETWEEN_IMAGES", 0)
    views, _ = generate_all(form(models, steps=5), models, limits)
    drawn = [view for view in views if view.images is not None]
    assert [re.search(r"step \d of 5", view.status)[0] for view in drawn[:5]] == [
        f"step {i} of 5" for i in range(1, 6)
    ]
    assert len({view.images for view in drawn}) == 6  # the last one with full quality
    assert drawn[-1].images.count("<img ") == 6
    assert 'alt="goldfish, seed 9"' in drawn[-1].images
    assert 'alt="no class, seed 12"' in drawn[-1].images
    assert "6 images in " in views[-1].status


def test_two_schedulers_beside_each_other(models, limits):
    views, files = generate_all(form(models, compare=TWO_SCHEDULERS, eta=0.5), models, limits)
    assert views[-2].images.count('class="side"') == 2
    archive = archived(files["everything.zip"])
    sides = {}
    for side, scheduler in (("left", OWN_SCHEDULER), ("right", "DPMSolverMultistepScheduler")):
        _, alone = generate_all(form(models, scheduler=scheduler, eta=0.5), models, limits)
        for name, content in archived(alone["everything.zip"]).items():
            if name.endswith("json"):
                assert json.loads(archive[f"{side}/{name}"]) == json.loads(content)
                sides[side] = json.loads(content)
            else:
                assert np.array_equal(pixels_of(archive[f"{side}/{name}"]), pixels_of(content))
    assert json.loads(files["manifest.json"]) == sides
    # both grids, unchanged, in one picture
    whole = pixels_of(files["grid.png"])[0]
    grid = pixels_of(archive["left/grid.png"])[0]
    height, width = grid.shape[:2]
    assert np.array_equal(whole[26 : 26 + height, 12 : 12 + width], grid)
    assert len(pixels_of(files["denoising.gif"])) == 4


def test_two_guidance_scales_with_a_scheduler_of_second_order(models, limits):
    _, files = generate_all(form(models, compare=TWO_SCALES, scheduler="HeunDiscreteScheduler"), models, limits)
    archive = archived(files["everything.zip"])
    assert not np.array_equal(pixels_of(archive["left/00000.png"]), pixels_of(archive["right/00000.png"]))
    # guidance has no effect on images without class
    assert np.array_equal(pixels_of(archive["left/00004.png"]), pixels_of(archive["right/00004.png"]))
    assert len(pixels_of(files["denoising.gif"])) == 7


def test_an_animation_of_many_steps_has_the_last_one(models, limits, monkeypatch):
    monkeypatch.setattr("imagenet64_diffusion.page.generation._MAX_FRAMES", 4)
    [request] = read_form(form(models, classes=["0"], images_per_class=1, steps=11), models, limits)
    drawing = Generation(request)
    steps = list(drawing.steps())
    assert [step.number for step in steps] == list(range(1, 12))
    expected = [steps[index].pixels for index in (1, 4, 7, 10)]
    assert np.array_equal(np.stack(drawing.frames), np.stack(expected))


def test_a_network_without_classes(tmp_path, limits):
    make_pipeline(num_class_embeds=None, layer_types=("resnet",)).save_pretrained(tmp_path / "plain")
    models = ModelCache([str(tmp_path / "plain")])
    _, files = generate_all(form(models, classes=None), models, limits)
    assert [image["class_label"] for image in json.loads(files["manifest.json"])["images"]] == [None, None]


def test_requests_at_the_same_time_do_not_see_each_other(models, limits):
    """Different schedulers, steps, clipping and batch shapes on one network."""
    requests = [
        form(models, steps=12, eta=0.7),
        form(models, scheduler="DPMSolverMultistepScheduler", steps=9, images_per_class=1),
        form(models, scheduler="EulerDiscreteScheduler", steps=15, classes=["null"], images_per_class=5),
        form(models, compare=TWO_SCHEDULERS, other_scheduler="LearnedVarianceDDPMScheduler", steps=7),
    ]
    alone = [archived(generate_all(filled, models, limits)[1]["everything.zip"]) for filled in requests]
    together: dict[int, dict] = {}

    def run(number):
        views, files = generate_all(requests[number], models, limits)
        together[number] = archived(files["everything.zip"]) if files else views[-1].status

    threads = [threading.Thread(target=run, args=[number]) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        assert together[number] == expected


class TestStopping:
    @pytest.fixture
    def request_of_many_steps(self, models):
        from imagenet64_diffusion.page.app_options import AppOptions

        [request] = read_form(form(models, steps=500), models, AppOptions())
        return request

    @staticmethod
    def wait_for_the_end():
        for thread in threading.enumerate():
            if thread.name == "generation":
                thread.join(timeout=30)
                assert not thread.is_alive()

    def test_the_work_ends(self, request_of_many_steps):
        calls = []
        hook = request_of_many_steps.pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
        steps = Generation(request_of_many_steps).steps()
        for _ in range(3):
            next(steps)
        steps.close()
        self.wait_for_the_end()
        hook.remove()
        # one in the queue, one waiting, one that was under way
        assert 3 <= len(calls) <= 6

    def test_the_work_waits_for_who_takes_it_and_ends_with_a_dropped_iterator(self, request_of_many_steps):
        calls, third, fourth = [], threading.Event(), threading.Event()

        def count(*_):
            calls.append(1)
            if len(calls) >= 3:
                (third if len(calls) == 3 else fourth).set()

        hook = request_of_many_steps.pipeline.unet.register_forward_pre_hook(count)
        steps = Generation(request_of_many_steps).steps()
        next(steps)
        assert third.wait(timeout=30)
        assert not fourth.wait(timeout=0.5)
        del steps
        self.wait_for_the_end()
        hook.remove()
        assert len(calls) == 3

    def test_weights_are_not_kept_afterwards(self, request_of_many_steps):
        unet = request_of_many_steps.pipeline.unet
        steps = Generation(request_of_many_steps).steps()
        next(steps)
        assert unet.conv_in.cached is not None
        steps.close()
        self.wait_for_the_end()
        assert unet.conv_in.cached is None


class TestNothingIsLeft:
    @pytest.fixture
    def temporary(self, tmp_path, monkeypatch):
        folder = tmp_path / "temporary"
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.chdir(folder)
        return folder

    def test_after_the_end(self, models, limits, temporary):
        _, files = generate_all(form(models), models, limits)
        assert files.keys() == {"grid.png", "denoising.gif", "manifest.json", "everything.zip"}
        assert list(temporary.iterdir()) == []

    @pytest.mark.parametrize("number", [1, 2, -1])
    def test_when_it_is_stopped_at_a_view(self, models, limits, temporary, number):
        views = generate(form(models), models, limits)
        view = next(views)
        while number > 1 or (number < 0 and not view.files):
            view, number = next(views), number - 1
        assert number == 1 or view.files[0].exists()
        views.close()
        TestStopping.wait_for_the_end()
        assert list(temporary.iterdir()) == []


class TestErrors:
    def test_are_shown(self, models, limits):
        views, files = generate_all(form(models, classes=["tabbi"]), models, limits)
        assert 'class="problem" role="alert">there is no class named &#x27;tabbi&#x27;' in views[-1].status
        assert files == {}

    def test_of_the_pipeline_are_shown(self, models, limits):
        """A number of steps that this scheduler refuses when it draws."""
        views, _ = generate_all(form(models, scheduler="PNDMScheduler", steps=2), models, limits)
        assert 'class="problem"' in views[-1].status
        # and the next request is drawn
        assert generate_all(form(models), models, limits)[1]

    def test_that_nobody_thought_of_are_told_without_their_text(self, tmp_path, tiny_model, limits, capsys):
        """A damaged file, whose place on the server is nobody's affair."""
        broken = shutil.copytree(tiny_model, tmp_path / "broken")
        [weights] = (broken / "unet").glob("*.safetensors")
        weights.write_bytes(b"\x00" * 100)
        models = ModelCache([str(tiny_model), str(broken)])
        views, _ = generate_all(form(models, model=str(broken)), models, limits)
        assert 'class="problem"' in views[-1].status
        assert generate_all(form(models), models, limits)[1]

    def test_markup_in_what_is_typed_is_text(self, models, limits):
        views, _ = generate_all(form(models, classes=["<img src=x onerror=alert(1)>"]), models, limits)
        assert "<img" not in views[-1].status
