"""imagenet64-evaluate, as its users run it."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler
from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.evaluation_folder import Evaluation
from imagenet64_diffusion.generate_images import main as generate
from imagenet64_diffusion.tests.commands.evaluation_runs import (  # noqa: F401 - fixtures among them
    CountingProcess,
    EvaluationProcess,
    assert_same_numbers,
    classifier_fixture,
    evaluate,
    files,
    model_fixture,
    reference_fixture,
    run_fixture,
    to_arguments,
    together,
)
from imagenet64_diffusion.tests.commands.processes import run_command, snapshot, wait_until
from imagenet64_diffusion.tests.components import make_pipeline, make_unet


# eta 1, so that every step adds noise of its own
SAMPLING = {"protocol": "pixels", "num_images": 45, "num_inference_steps": 2, "eta": 1.0, "seed": 100, "device": "cpu"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model) -> Path:
    """An evaluation that nothing has happened to, in one batch, which keeps its images."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluated"
    assert evaluate("model", model=model, output_dir=folder, batch_size=64, keep_images="npz", **SAMPLING) == 0
    return folder


def generate_by_hand(model: Path) -> np.ndarray:
    """The images of `SAMPLING` one at a time, uint8 (images, height, width)."""
    pipeline = ClassConditionalPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for number in range(SAMPLING["num_images"]):
        generated = pipeline(
            number % 3,
            guidance_scale=1.0,
            num_inference_steps=2,
            eta=1.0,
            generator=torch.Generator().manual_seed(100 + number),
        )
        images.append(np.asarray(generated.images[0]))
    return np.stack(images)


def features_by_hand(images: np.ndarray) -> np.ndarray:
    """Means of 2x2 pixels in float64, once for each of three equal channels."""
    boxes = images.reshape(len(images), 8, 2, 8, 2).mean(axis=(2, 4)) / 255
    return np.tile(boxes.reshape(len(images), -1), 3)


def assert_statistics(evaluation: Evaluation, features: np.ndarray) -> None:
    """Mean and covariance are those of features in float64."""
    for found, expected in (
        (evaluation.statistics.mean, features.mean(axis=0)),
        (evaluation.statistics.covariance, np.cov(features.T)),
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def parts(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "parts").glob("[0-9]*.npz"))


# ---------------------------------------------------------------------- model


def test_what_is_evaluated_is_what_the_pipeline_generates(model, evaluated):
    images = generate_by_hand(model)
    with np.load(evaluated / "images.npz") as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (45, 16, 16, 1)
        # in batches of one rounding in the network may differ
        assert np.abs(arrays["arr_0"].squeeze(3).astype(int) - images).max() <= 1
        assert arrays["arr_1"].tolist() == [number % 3 for number in range(45)]
        images = arrays["arr_0"].squeeze(3)
    features = features_by_hand(images)
    found = Evaluation.load(evaluated)
    np.testing.assert_allclose(found.features, features, atol=1e-6)
    assert_statistics(found, features)
    assert found.labels.tolist() == [number % 3 for number in range(45)]
    assert found.statistics.count == 45


def test_batches_and_ranks_do_not_matter(model, evaluated, tmp_path):
    common = {"model": model, "batch_size": 7, **SAMPLING}
    assert evaluate("model", output_dir=tmp_path / "seven", keep_images="npz", **common) == 0
    assert_same_numbers(tmp_path / "seven", evaluated)
    folder = tmp_path / "two"
    processes = together(to_arguments("model", output_dir=folder, **common), 2, tmp_path / "log")
    assert [process.end() for process in processes] == [0, 0], processes[0].output()
    assert [process.output().count("evaluated 45 images with pixels") for process in processes] == [1, 0]
    assert_same_numbers(folder, evaluated)
    left = ["features.npy", "indices.npy", "labels.npy", "statistics.npz"]
    assert sorted(path.name for path in folder.iterdir()) == left


def test_killed_five_times_and_resumed(model, evaluated, tmp_path):
    """At random moments, with other batches and other numbers of processes each time."""
    rng, folder = random.Random(0), tmp_path / "out"
    for number, (batch_size, processes) in enumerate(((3, 1), (2, 2), (1, 1), (4, 1), (1, 2))):
        arguments = to_arguments("model", model=model, output_dir=folder, batch_size=batch_size, **SAMPLING)
        before = parts(folder)
        processes = together(arguments, processes, tmp_path / f"{number}")
        wait_until(lambda before=before: len(parts(folder)) > len(before), processes[0])
        time.sleep(rng.uniform(0, 0.03))
        for process in processes:
            process.send(signal.SIGKILL)
        assert {process.end() for process in processes} == {-signal.SIGKILL}, processes[0].output()
        assert not (folder / "statistics.npz").exists()
    assert len(parts(folder)) >= 5
    assert evaluate("model", model=model, output_dir=folder, batch_size=64, **SAMPLING) == 0
    assert_same_numbers(folder, evaluated)
    # nothing of the killed ones is left
    assert [name for name in files(folder) if name.startswith("out/")] == [
        "out/features.npy",
        "out/indices.npy",
        "out/labels.npy",
        "out/statistics.npz",
    ]


def test_kept_images_are_those_of_generate_images_bit_for_bit(model, tmp_path):
    sampling = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0, "seed": 7, "device": "cpu"}
    classes = ["goldfish", "null", "0", "goldfish", "2"]
    common = {"model": model, "class_labels": classes, **sampling}
    assert generate(to_arguments("", output_dir=tmp_path / "generated", **common)[1:]) == 0
    common = {"num_images": 5, "protocol": "pixels", **common}
    for kept in ("png", "npz"):
        assert evaluate("model", output_dir=tmp_path / kept, keep_images=kept, **common) == 0
    generated = []
    for number in range(5):
        with Image.open(tmp_path / "generated" / f"{number:05d}.png") as image:
            generated.append(np.asarray(image))
        with Image.open(tmp_path / "png" / "images" / f"{number:05d}.png") as image:
            assert image.mode == "L"
            np.testing.assert_array_equal(np.asarray(image), generated[-1])
    with np.load(tmp_path / "npz" / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"].squeeze(3), generated)
        assert arrays["arr_1"].tolist() == [1, -1, 0, 1, 2]
    assert len(list((tmp_path / "png" / "images").iterdir())) == 5

    # evaluated as files they give the same numbers again
    folder, source = tmp_path / "again", tmp_path / "png" / "images"
    assert evaluate("reference", source=source, output_dir=folder, protocol="pixels", device="cpu") == 0
    assert_same_numbers(folder, tmp_path / "png", relative=1e-12, most_steps=0)


def test_an_npz_of_kept_images_is_a_reference(evaluated, tmp_path):
    folder = tmp_path / "again"
    source = evaluated / "images.npz"
    assert evaluate("reference", source=source, output_dir=folder, protocol="pixels", device="cpu") == 0
    assert_same_numbers(folder, evaluated, relative=1e-12, most_steps=0)
    header = Evaluation.load(folder).header["images"]
    assert header["source"] == str(source)
    assert header["num_images"] == header["of"] == 45
    assert header["image_size"] == [1, 16, 16]


def test_a_model_without_classes(tmp_path):
    pipeline = make_pipeline(num_class_embeds=None, layer_types=("resnet",))
    pipeline.save_pretrained(tmp_path / "model")
    common = {**SAMPLING, "model": tmp_path / "model", "output_dir": tmp_path / "out", "num_images": 3}
    assert evaluate("model", keep_images="npz", **common) == 0
    with np.load(tmp_path / "out" / "images.npz") as arrays:
        assert sorted(arrays) == ["arr_0"]
    assert Evaluation.load(tmp_path / "out").labels is None


def test_a_finished_evaluation_is_found_again(model, evaluated, capsys, tmp_path):
    before = snapshot(evaluated)
    common = {**SAMPLING, "model": model, "output_dir": evaluated}
    # left by a call that was killed at its very end
    (evaluated / "parts").mkdir()
    (evaluated / "parts" / "000000000-000000045.npz").write_bytes(b"whatever")
    assert evaluate("model", batch_size=5, **common) == 0
    assert "evaluated already" in capsys.readouterr().out
    # the same model by another name
    shutil.copytree(model, tmp_path / "elsewhere")
    assert evaluate("model", keep_images="npz", **{**common, "model": tmp_path / "elsewhere"}) == 0
    assert "evaluated already" in capsys.readouterr().out

    # and everything that would give other numbers, or more than there is, is refused
    other = make_pipeline()
    with torch.no_grad():
        next(other.unet.parameters()).add_(1e-3)
    other.save_pretrained(tmp_path / "elsewhere")
    for changes, entry in (
        ({"seed": 101}, "seed 100, not 101"),
        ({"num_images": 46}, "num_images 45, not 46"),
        ({"eta": 0.0}, "eta 1.0, not 0.0"),
        ({"class_labels": "null"}, 'class_labels ["uniform"], not ["null"]'),
        ({"guidance_scale": 2.0}, "guidance_scale 1.0, not 2.0"),
        ({"scheduler": "DDIM"}, 'scheduler "EtaDDIMScheduler", not "DDIMScheduler"'),
        ({"model": tmp_path / "elsewhere"}, 'weights_sha256 "'),
        ({"keep_images": "png"}, "without its images as png"),
    ):
        assert evaluate("model", **{**common, **changes}) == 2
        error = capsys.readouterr().err
        assert f"error: {evaluated} has an evaluation" in error
        assert entry in error
        assert error.rstrip().endswith("give another output_dir, or remove it")
    assert snapshot(evaluated) == before


def test_stopped_refused_and_resumed(model, evaluated, tmp_path, capsys):
    """A second run beside the first, other settings after it was interrupted, and then the same command."""
    folder = tmp_path / "outer" / "out"
    common = {**SAMPLING, "model": model, "output_dir": folder}
    process = EvaluationProcess(to_arguments("model", batch_size=1, **common), tmp_path / "log.txt")
    wait_until(lambda: len(parts(folder)) >= 2, process)
    # it holds its place and takes its time
    process.send(signal.SIGSTOP)
    assert evaluate("model", **common) == 2
    assert "another process is writing to it now" in capsys.readouterr().err
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.end() == 130, process.output()
    assert process.output().rstrip().endswith("interrupted")
    assert "Traceback" not in process.output()
    left = snapshot(folder.parent)
    assert sorted(left) == [*(f"out/parts/{name}" for name in parts(folder)), "out/parts/settings.json"]

    assert evaluate("model", **{**common, "seed": 3}) == 2
    assert f"{folder} has an unfinished evaluation of {model} with seed 100, not 3" in capsys.readouterr().err
    assert evaluate("model", keep_images="png", **common) == 2
    assert "begun with keep_images None, not png" in capsys.readouterr().err
    assert snapshot(folder.parent) == left
    # how many rows are kept is of no account before the end
    shutil.copytree(folder, tmp_path / "fewer")
    fewer = {**common, "output_dir": tmp_path / "fewer", "num_features": 10}
    for options in (common, fewer):
        assert evaluate("model", batch_size=20, **options) == 0
    assert_same_numbers(folder, evaluated)
    indices = np.load(tmp_path / "fewer" / "indices.npy")
    assert indices.tolist() == [0, 5, 10, 15, 20, 24, 29, 34, 39, 44]
    rows = Evaluation.load(tmp_path / "fewer").features
    np.testing.assert_array_equal(rows, Evaluation.load(folder).features[indices])


def test_a_full_disk(model, evaluated, tmp_path):
    folder = tmp_path / "out"
    common = {**SAMPLING, "model": model, "output_dir": folder}
    # a part of 1 image has 1.3 kB and one of 9 images 7.6 kB
    process = EvaluationProcess(to_arguments("model", batch_size=1, **common), tmp_path / "begun.txt")
    wait_until(lambda: len(parts(folder)) >= 1, process)
    process.send(signal.SIGKILL)
    process.end()
    begun = parts(folder)
    process = EvaluationProcess(
        to_arguments("model", batch_size=9, **common), tmp_path / "full.txt", largest_file=6000
    )
    assert process.end() == 2
    (error,) = [line for line in process.errors() if line.startswith("error")]
    assert error.startswith("error: could not write ")
    assert error.endswith(".npz (File too large); what has been evaluated stays, and the same call resumes")
    assert "Traceback" not in process.output()
    assert parts(folder) == begun
    # the parts fit, and what they are put together to does not
    process = EvaluationProcess(
        to_arguments("model", batch_size=3, **common), tmp_path / "later.txt", largest_file=20_000
    )
    assert process.end() == 2
    (error,) = [line for line in process.errors() if line.startswith("error")]
    assert error.startswith(f"error: could not write {folder}")
    assert error.endswith("(File too large); what has been evaluated stays, and the same call resumes")
    assert not [name for name in files(folder) if "writing" in name or "rows" in name]
    process = EvaluationProcess(to_arguments("model", batch_size=9, **common), tmp_path / "room.txt")
    assert process.end() == 0
    assert_same_numbers(folder, evaluated)


def test_images_that_are_not_finite(tmp_path, capsys):
    pipeline = make_pipeline()
    with torch.no_grad():
        pipeline.unet.head.conv.bias.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "model")
    common = {**SAMPLING, "model": tmp_path / "model", "output_dir": tmp_path / "new" / "out"}
    assert evaluate("model", **common) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'model'} generates image 0 with values that are not finite, under EtaDDIMScheduler" in error
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all is not a folder"),
        ({"class_labels": "7"}, "class label 7 is out of range"),
        ({"class_labels": ["uniform", "1"]}, "class_labels names 'uniform' among others, but it must stand alone"),
        ({"class_labels": "frequencies"}, "class_labels is frequencies, which needs train_data_dir"),
        ({"train_data_dir": "x"}, "train_data_dir is for class_labels frequencies"),
        ({"scheduler": "Magic"}, "there is no scheduler named 'Magic'"),
        ({"scheduler": "UniPCMultistep"}, "eta is 1, but UniPCMultistepScheduler takes none"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0, but must be at least 1"),
        ({"step_size": 10}, "num_inference_steps and step_size both say the number of steps"),
        ({"guidance_interval": [0.5, 0.4]}, "guidance_interval is (0.5, 0.4), but must be two fractions"),
        # found out at the first step
        ({"eta": 2.0}, "eta is 2.0"),
        ({"num_images": 0}, "num_images is 0, but must be at least 1"),
        ({"extractor_dtype": "float16"}, "extractor_dtype is float16, but the protocol pixels is"),
        ({"extractor_dtype": "bfloat16", "protocol": "clean"}, "extractor_dtype is bfloat16, but the prot"),
        ({"protocol": "classifier"}, "the protocol classifier needs weights"),
        ({"weights": "somewhere"}, "the protocol pixels has no network, but weights is somewhere"),
        ({"protocol": "clean", "weights": "somewhere"}, "weights somewhere: no such file"),
        ({"protocol": "clean"}, "HF_HUB_OFFLINE is set"),
    ],
)
def test_wrong_options_of_model(model, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    assert evaluate("model", **{**SAMPLING, "model": model, "output_dir": folder, **changes}) == 2
    assert message in capsys.readouterr().err
    assert not [name for name in files(folder) if name.startswith("out")]
    assert not folder.exists()


def test_a_folder_with_other_files_is_left_alone(model, tmp_path, capsys):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "mine.png").write_text("keep")
    assert evaluate("model", **{**SAMPLING, "model": model, "output_dir": tmp_path / "out"}) == 2
    assert f"output_dir is {tmp_path / 'out'}, which holds other files" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["out/images/mine.png"]


# ---------------------------------------------------------------------- reference


def test_every_kind_of_source(prepared, reference, tmp_path):
    """A prepared folder, the dataset that it was prepared from, and its images as files and as an .npz."""
    from imagenet64_diffusion.data.dataset import PreparedImages

    images = PreparedImages(prepared)
    pixels = images[range(len(images))]["pixel_values"].numpy()
    features = features_by_hand(pixels.squeeze(1))
    found = Evaluation.load(reference)
    assert_statistics(found, features)
    assert found.header["images"]["fingerprint"] == images.fingerprint
    np.testing.assert_array_equal(found.labels, images.labels())

    np.savez(tmp_path / "images.npz", arr_0=pixels.transpose(0, 2, 3, 1))
    (tmp_path / "files").mkdir()
    for number, image in enumerate(pixels.squeeze(1)):
        Image.fromarray(image).save(tmp_path / "files" / f"{number}.png")
    for number, source in enumerate((tmp_path / "images.npz", tmp_path / "files", prepared.parent / "images")):
        folder = tmp_path / str(number)
        common = {"source": source, "output_dir": folder, "protocol": "pixels", "device": "cpu"}
        assert evaluate("reference", batch_size=7, **common) == 0
        assert_statistics(Evaluation.load(folder), features)
        assert Evaluation.load(folder).statistics.count == 96
        assert evaluate("reference", batch_size=8, **common) == 0  # found again


def test_some_images_evenly_spread(prepared, tmp_path, capsys):
    from imagenet64_diffusion.data.dataset import PreparedImages

    images = PreparedImages(prepared)
    pixels = images[np.linspace(0, 95, 20).round().astype(int)]["pixel_values"].numpy()
    common = {"source": prepared, "output_dir": tmp_path / "out", "protocol": "pixels", "device": "cpu"}
    assert evaluate("reference", max_images=20, num_features=4, batch_size=6, **common) == 0
    found = Evaluation.load(tmp_path / "out")
    features = features_by_hand(pixels.squeeze(1))
    assert_statistics(found, features)
    np.testing.assert_allclose(found.features, features[[0, 6, 13, 19]], atol=1e-6)
    assert found.header["images"]["num_images"] == 20
    assert found.header["images"]["of"] == 96
    # fewer features than were kept are there, and more are not
    assert evaluate("reference", max_images=20, num_features=3, **common) == 0
    assert evaluate("reference", max_images=20, num_features=5, **common) == 2
    assert "with features of 4 images, not of 5" in capsys.readouterr().err


def test_wrong_references(prepared, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "small" / "4.png")
    (tmp_path / "sizes").mkdir()
    for size in (16, 20):
        Image.new("L", (size, size)).save(tmp_path / "sizes" / f"{size}.png")
    common = {"output_dir": tmp_path / "out", "protocol": "pixels", "device": "cpu"}
    for changes, message in (
        ({"source": tmp_path / "empty"}, "holds nothing, but must hold images"),
        ({"source": tmp_path / "sizes"}, "is 20x20 pixels (width x height), but the first image"),
        ({"source": tmp_path / "small"}, "the images have 4x4 pixels, too few to be averaged to 8x8"),
        ({"source": tmp_path / "none" / "at" / "all"}, "no such file or folder"),
        ({"source": prepared, "resolution": 8}, "resolution is 8, but"),
        ({"source": prepared, "max_images": 0}, "max_images is 0, but must be at least 1"),
        ({"source": ""}, "source is empty"),
    ):
        assert evaluate("reference", **{**common, **changes}) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    # two processes say it once, whichever of them finds it out and when
    wrong = f"process 1 of 2: {tmp_path}/sizes/20.png is 20x20 pixels"
    for name, message in (("empty", "holds nothing"), ("sizes", wrong)):
        arguments = to_arguments("reference", source=tmp_path / name, batch_size=1, **common)
        processes = together(arguments, 2, tmp_path / f"log_{name}")
        assert [process.end() for process in processes] == [2, 2]
        assert [process.output().count("error: ") for process in processes] == [1, 0]
        assert message in processes[0].output()
    # what the other process may have evaluated by then is of images that have changed now
    Image.new("L", (16, 16)).save(tmp_path / "sizes" / "20.png")
    was_begun = bool(parts(tmp_path / "out"))
    assert was_begun == (tmp_path / "out").exists()
    assert evaluate("reference", source=tmp_path / "sizes", **common) == (2 if was_begun else 0)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts what a process reads")
def test_one_rank_reads_a_folder_for_all(tmp_path):
    """Its fingerprint is of all that is in its files, which here is much more than their images."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        file = tmp_path / "images" / f"{number}.png"
        Image.new("L", (16, 16), 60 * number).save(file)
        with file.open("r+b") as opened:
            opened.truncate(25_000_000)
    common = {"source": tmp_path / "images", "protocol": "pixels", "device": "cpu"}
    arguments = to_arguments("reference", output_dir=tmp_path / "two", **common)
    processes = together(arguments, 2, tmp_path / "log", CountingProcess)
    assert [process.end() for process in processes] == [0, 0], processes[0].output()
    main_process, other = (int(process.output().split()[-1]) for process in processes)
    assert main_process > 100e6
    assert other < main_process - 75e6
    assert evaluate("reference", output_dir=tmp_path / "one", **common) == 0
    headers = [Evaluation.load(tmp_path / name).header["images"] for name in ("one", "two")]
    assert headers[0] == headers[1]
    assert len(headers[0]["fingerprint"]) == 64


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that opens and cannot be read")
def test_a_file_that_cannot_be_read_is_said_once(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "1.png").symlink_to("/proc/self/mem")
    common = {"output_dir": tmp_path / "out", "protocol": "pixels", "device": "cpu"}
    processes = together(to_arguments("reference", source=tmp_path / "images", **common), 2, tmp_path / "log")
    assert [process.end() for process in processes] == [2, 2]
    assert [[line for line in process.errors() if "error" in line] for process in processes] == [
        [f"error: {tmp_path}/images/1.png cannot be read (Input/output error)"],
        [],
    ]
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite(prepared, classifier, tmp_path, capsys):
    """Of a network that overflows in float16, and of one that does so in float32."""
    names = load_file(classifier / "model.safetensors")
    name = next(name for name in names if name.endswith("convolution.weight"))
    common = {"source": prepared, "protocol": "classifier", "device": "cpu", "max_images": 6}
    for size, works_in_float32 in ((-1e6, True), (-3e38, False)):
        weights = tmp_path / f"{size:g}"
        shutil.copytree(classifier, weights)
        tensors = load_file(weights / "model.safetensors")
        tensors[name].fill_(size)
        save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
        folder = tmp_path / f"{size:g}_evaluated"
        asked = {**common, "weights": weights, "output_dir": folder}
        assert evaluate("reference", extractor_dtype="float16", **asked) == 2
        error = capsys.readouterr().err.rstrip().splitlines()[-1]
        sentence = "error: classifier in {} gives features that are not finite for image 0"
        assert error == f"{sentence.format('float16')}; try extractor_dtype float32"
        assert not folder.exists()
        assert evaluate("reference", **asked) == (0 if works_in_float32 else 2)
        if not works_in_float32:
            error = capsys.readouterr().err.rstrip().splitlines()[-1]
            assert error == sentence.format("float32")
            assert not folder.exists()


def test_the_dtype_of_the_extractor_is_part_of_the_protocol(prepared, classifier, model, tmp_path, capsys):
    common = {"protocol": "classifier", "weights": classifier, "device": "cpu"}
    full, half, generated = (tmp_path / name for name in ("full", "half", "generated"))
    assert evaluate("reference", source=prepared, output_dir=full, **common) == 0
    assert evaluate("reference", source=prepared, output_dir=full, extractor_dtype="float32", **common) == 0
    assert f"evaluated already: {full}" in capsys.readouterr().out
    assert evaluate("reference", source=prepared, output_dir=full, extractor_dtype="bfloat16", **common) == 2
    error = capsys.readouterr().err
    assert f'{full} has an evaluation of {prepared} with dtype "float32", not "bfloat16"' in error
    assert evaluate("reference", source=prepared, output_dir=half, extractor_dtype="bfloat16", **common) == 0
    sampling = {"model": model, "num_images": 6, "num_inference_steps": 1, "extractor_dtype": "bfloat16"}
    assert evaluate("model", output_dir=generated, **sampling, **common) == 0

    found = {folder: Evaluation.load(folder) for folder in (full, half, generated)}
    dtypes = [each.header["protocol"]["dtype"] for each in found.values()]
    assert dtypes == ["float32", "bfloat16", "bfloat16"]
    # the network that generates has a dtype of its own
    assert found[generated].header["images"]["dtype"] == "float32"
    features = np.asarray(found[full].features)
    error = np.linalg.norm(found[half].features - features) / np.linalg.norm(features)
    assert 1e-4 < error < 2e-2

    assert evaluate("score", reference=full, model=generated) == 2
    error = capsys.readouterr().err
    assert f"cannot be compared: dtype is float32 in {full} and bfloat16 in {generated}" in error
    assert not (generated / "scores.json").exists()
    assert evaluate("score", reference=half, model=generated) == 0


# ---------------------------------------------------------------------- score


def test_score_writes_what_the_number_depends_on(reference, evaluated, tmp_path, capsys):
    file = tmp_path / "new" / "scores.json"
    assert evaluate("score", reference=reference, model=evaluated, output=file) == 0
    shown = capsys.readouterr().out
    scores = json.loads(file.read_text())
    assert f"fid                  {scores['metrics']['fid']:.6g}" in shown
    assert "45 images for 192 features: its covariance is singular" in shown
    assert sorted(scores["metrics"]) == ["coverage", "density", "fid", "kid", "precision", "recall"]
    model = scores["model"]
    for name, value in {
        "num_images": 45,
        "count": 45,
        "seed": 100,
        "eta": 1.0,
        "guidance_scale": 1.0,
        "guidance_interval": [0.0, 1.0],
        "num_inference_steps": 2,
        "scheduler": "EtaDDIMScheduler",
        "class_labels": ["uniform"],
        "dtype": "float32",
    }.items():
        assert model[name] == value
    assert len(model["weights_sha256"]) == 64
    assert model["scheduler_config"]["prediction_type"] == "v_prediction"
    assert scores["protocol"]["protocol"] == "pixels"
    assert scores["versions"]["model"]["torch"] == torch.__version__
    assert scores["reference"]["fingerprint"] == Evaluation.load(reference).header["images"]["fingerprint"]


def test_scores_that_cannot_be(reference, evaluated, prepared, classifier, tmp_path, capsys):
    assert evaluate("score", reference=reference, model=evaluated, metrics=["fid", "inception_score"]) == 2
    assert f"inception_score cannot be computed: {evaluated} has no probabilities" in capsys.readouterr().err
    assert evaluate("score", reference=reference, model=evaluated, metrics="beauty") == 2
    assert "metrics names 'beauty', but must be all, or some of fid, kid" in capsys.readouterr().err
    assert evaluate("score", reference=prepared, model=evaluated) == 2
    assert f"{prepared} is not an evaluation: give a folder with statistics.npz" in capsys.readouterr().err
    other = {"source": prepared, "output_dir": tmp_path / "other", "protocol": "classifier", "weights": classifier}
    assert evaluate("reference", device="cpu", **other) == 0
    assert evaluate("score", reference=tmp_path / "other", model=evaluated) == 2
    error = capsys.readouterr().err
    assert "features of different protocols cannot be compared" in error
    assert f"protocol is classifier in {tmp_path / 'other'} and pixels in {evaluated}" in error
    assert not (evaluated / "scores.json").exists()


@pytest.mark.parametrize(
    ("count", "metrics", "message"),
    [
        (1, "all", "fid cannot be computed: {folder} has statistics of 1 images, but at least 2 are needed"),
        (4, "recall", "recall cannot be computed: {folder} has features of 4 images, but at least 6 are needed"),
    ],
)
def test_scores_of_too_few_images(prepared, reference, tmp_path, capsys, count, metrics, message):
    folder = tmp_path / "few"
    common = {"source": prepared, "output_dir": folder, "protocol": "pixels", "device": "cpu"}
    assert evaluate("reference", max_images=count, **common) == 0
    before = snapshot(folder)
    for sides in ({"reference": reference, "model": folder}, {"reference": folder, "model": reference}):
        output = tmp_path / "scores.json"
        assert evaluate("score", metrics=metrics, output=output, **sides) == 2
        assert capsys.readouterr().err.rstrip().endswith(f"error: {message.format(folder=folder)}")
        assert not output.exists()
    assert snapshot(folder) == before


# ---------------------------------------------------------------------- classifier


def test_evaluating_by_a_classifier(classifier, prepared, tmp_path, capsys):
    """Images of a model, and a dataset whose classes the network knows."""
    unet = make_unet()
    pipeline = ClassConditionalPipeline(unet, EtaDDIMScheduler(), {0: "dark", 1: "grey", 2: "light"})
    pipeline.save_pretrained(tmp_path / "model")
    by_classifier = {"protocol": "classifier", "weights": classifier, "device": "cpu"}
    assert evaluate("reference", source=prepared, output_dir=tmp_path / "reference", **by_classifier) == 0
    sampling = {"model": tmp_path / "model", "num_images": 12, "num_inference_steps": 2, **by_classifier}
    counts = {"class_labels": "frequencies", "train_data_dir": prepared}
    for name, batch_size in (("model", 64), ("batches", 5)):
        folder = tmp_path / f"{name}_evaluated"
        assert evaluate("model", output_dir=folder, batch_size=batch_size, **counts, **sampling) == 0
    assert_same_numbers(tmp_path / "batches_evaluated", tmp_path / "model_evaluated", most_steps=0)
    common = {"reference": tmp_path / "reference", "model": tmp_path / "model_evaluated"}
    assert evaluate("score", **common) == 0
    scores = json.loads((tmp_path / "model_evaluated" / "scores.json").read_text())
    found = Evaluation.load(tmp_path / "model_evaluated")
    right = [row.argmax() == label for row, label in zip(found.probabilities, found.labels, strict=True)]
    assert scores["metrics"]["class_accuracy"] == pytest.approx(sum(right) / 12)
    assert 1 <= scores["metrics"]["inception_score"]["mean"] <= 3
    assert scores["model"]["class_counts"] == [32, 32, 32]
    assert len(scores["protocol"]["weights_sha256"]) == 64
    # of the images that it was trained on it reads nearly all right
    real = Evaluation.load(tmp_path / "reference")
    assert (real.probabilities.argmax(axis=1) == real.labels).mean() > 0.9


# ---------------------------------------------------------------------- the command line


def test_a_file_of_options(model, evaluated, tmp_path, capsys):
    options = {**SAMPLING, "model": str(model), "output_dir": str(evaluated)}
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    assert main(["model", "--config", str(tmp_path / "options.yaml")]) == 0
    assert "evaluated already" in capsys.readouterr().out
    assert main(["model", "--config", str(tmp_path / "options.yaml"), "--seed", "3"]) == 2
    assert "with seed 100, not 3" in capsys.readouterr().err


def test_a_wrong_command_as_a_process(tmp_path):
    finished = run_command("evaluate_models", "modle", directory=tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: there is no 'modle', perhaps model: take one of reference, model")
