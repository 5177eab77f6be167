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
from imagenet64_diffusion.data.dataset import PreparedImages
from imagenet64_diffusion.evaluate_models import main
from imagenet64_diffusion.evaluation.evaluating import Evaluation
from imagenet64_diffusion.generate_images import main as generate
from imagenet64_diffusion.tests.commands.evaluation_runs import (  # noqa: F401 - fixtures among them
    PIXELS,
    assert_same_numbers,
    error_of,
    evaluate,
    files,
    model_fixture,
    reference_fixture,
    run_fixture,
    start,
    to_arguments,
)
from imagenet64_diffusion.tests.commands.processes import snapshot, wait_until
from imagenet64_diffusion.tests.components import make_pipeline, make_unet


COUNT = 24
# eta 1, so that every step adds noise of its own
SAMPLING = {**PIXELS, "num_images": COUNT, "num_inference_steps": 2, "eta": 1.0, "seed": 100}
EVALUATED = ["features.npy", "indices.npy", "labels.npy", "statistics.npz"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, model) -> Path:
    """An evaluation that nothing has happened to, in one batch, which keeps its images."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluated"
    assert evaluate("model", model=model, output_dir=folder, keep_images="npz", **SAMPLING) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, prepared) -> Path:
    """A small network that knows the prepared images."""
    folder = tmp_path_factory.mktemp("classifier") / "classifier"
    assert evaluate("classifier", train_data_dir=prepared, output_dir=folder, batch_size=16, epochs=8) == 0
    return folder


def assert_evaluation(folder: Path, images: np.ndarray) -> Evaluation:
    """An evaluation of uint8 (images, height, width), by hand in float64; features once for each of three channels."""
    boxes = images.reshape(len(images), 8, 2, 8, 2).mean(axis=(2, 4)) / 255
    features = np.tile(boxes.reshape(len(images), -1), 3)
    found = Evaluation.load(folder)
    assert found.statistics.count == len(features)
    np.testing.assert_allclose(found.statistics.mean, features.mean(axis=0), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.statistics.covariance, np.cov(features.T), rtol=0, atol=1e-7)
    np.testing.assert_allclose(found.features, features[np.load(folder / "indices.npy")], atol=1e-6)
    return found


def parts(folder: Path) -> list[str]:
    return sorted(file.name for file in (folder / "parts").glob("[0-9]*.npz"))


def test_killed_at_random_moments_and_resumed(model, evaluated, tmp_path):
    """With other batches and another number of ranks each time, none of which matters."""
    rng, folder = random.Random(0), tmp_path / "room" / "out"
    common = {"model": model, "output_dir": folder, **SAMPLING}
    for batch_size, ranks in ((3, 1), (2, 2), (1, 1)):
        before = parts(folder)
        processes = start(tmp_path / f"{batch_size}", "model", ranks=ranks, batch_size=batch_size, **common)
        wait_until(lambda before=before: len(parts(folder)) > len(before), processes[0])
        time.sleep(rng.uniform(0, 0.01))
        for process in processes:
            process.send(signal.SIGKILL)
        assert {process.end() for process in processes} == {-signal.SIGKILL}, processes[0].output()
        assert not (folder / "statistics.npz").exists()
    processes = start(tmp_path / "end", "model", ranks=2, batch_size=5, **common)
    assert [process.end() for process in processes] == [0, 0], processes[0].output()
    assert [process.output().count(f"evaluated {COUNT} images with pixels") for process in processes] == [1, 0]
    assert_same_numbers(folder, evaluated)
    # nothing of the killed ones is left
    assert [name for name in files(folder.parent) if name != ".out.lock"] == [f"out/{name}" for name in EVALUATED]


def test_kept_images_are_those_of_generate_images_bit_for_bit(model, evaluated, tmp_path):
    sampling = {"num_inference_steps": 3, "eta": 0.5, "guidance_scale": 2.0, "seed": 7, "device": "cpu"}
    common = {"model": model, "class_labels": ["goldfish", "null", "0", "goldfish", "2"], **sampling}
    assert generate(to_arguments("", output_dir=tmp_path / "generated", **common)[1:]) == 0
    for kept in ("png", "npz"):
        asked = {"output_dir": tmp_path / kept, "keep_images": kept, "num_images": 5, **PIXELS, **common}
        assert evaluate("model", **asked) == 0
    names = [f"{number:05d}.png" for number in range(5)]
    assert files(tmp_path / "png" / "images") == names
    folders = (tmp_path / "generated", tmp_path / "png" / "images")
    generated, kept = ([Image.open(folder / name) for name in names] for folder in folders)
    assert {image.mode for image in kept} == {"L"}
    np.testing.assert_array_equal(np.stack(kept), np.stack(generated))
    with np.load(tmp_path / "npz" / "images.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], np.stack(generated)[..., None], strict=True)
        assert arrays["arr_1"].tolist() == [1, -1, 0, 1, 2]
    assert assert_evaluation(tmp_path / "npz", np.stack(generated)).labels.tolist() == [1, -1, 0, 1, 2]
    assert Evaluation.load(evaluated).labels.tolist() == [0, 1, 2] * 8
    # evaluated as files they give the same numbers again
    for folder, kept in ((tmp_path / "png", "images"), (evaluated, "images.npz")):
        again = tmp_path / f"{kept}_again"
        assert evaluate("reference", source=folder / kept, output_dir=again, **PIXELS) == 0
        assert_same_numbers(again, folder, rounding=1e-12, most_steps=0)
    # a model without classes has no labels
    make_pipeline(num_class_embeds=None, layer_types=("resnet",)).save_pretrained(tmp_path / "model")
    bare = {"output_dir": tmp_path / "bare", "num_images": 3, "keep_images": "npz", "model": tmp_path / "model"}
    assert evaluate("model", **SAMPLING | bare) == 0
    with np.load(tmp_path / "bare" / "images.npz") as arrays:
        assert sorted(arrays) == ["arr_0"]
    assert Evaluation.load(tmp_path / "bare").labels is None


def test_a_finished_evaluation_is_found_again(model, evaluated, capsys, tmp_path):
    before = snapshot(evaluated)
    # left by a call that was killed at its very end
    (evaluated / "parts").mkdir()
    (evaluated / "parts" / "000000000-000000024.npz").write_bytes(b"whatever")
    # the same model by another name, and options from a file
    shutil.copytree(model, tmp_path / "elsewhere")
    common = {**SAMPLING, "model": str(tmp_path / "elsewhere"), "output_dir": str(evaluated)}
    (tmp_path / "options.yaml").write_text(json.dumps(common))
    assert main(["model", "--config", str(tmp_path / "options.yaml"), "--batch_size", "5"]) == 0
    assert evaluate("model", keep_images="npz", **common) == 0
    assert capsys.readouterr().out.count("evaluated already") == 2

    # and everything that would give other numbers, or more than there is, is refused
    pipeline = make_pipeline()
    next(pipeline.unet.parameters()).data.add_(1e-3)
    pipeline.save_pretrained(tmp_path / "changed")
    for changes, entry in (
        ({"seed": 101}, "seed 100, not 101"),
        ({"num_images": 46}, f"num_images {COUNT}, not 46"),
        ({"eta": 0.0}, "eta 1.0, not 0.0"),
        ({"class_labels": "null"}, 'class_labels ["uniform"], not ["null"]'),
        ({"scheduler": "DDIM"}, 'scheduler "EtaDDIMScheduler", not "DDIMScheduler"'),
        ({"model": tmp_path / "changed"}, 'weights_sha256 "'),
        ({"keep_images": "png"}, 'kept images "npz", not "png"'),
    ):
        assert evaluate("model", **{**common, **changes}) == 2
        error = capsys.readouterr().err
        assert f"error: {evaluated} has an evaluation" in error
        assert entry in error
    assert snapshot(evaluated) == before


def test_stopped_refused_and_resumed(model, evaluated, tmp_path, capsys):
    """A second run beside the first, other settings after it was interrupted, and then the same command."""
    folder = tmp_path / "outer" / "out"
    common = {**SAMPLING, "model": model, "output_dir": folder}
    (process,) = start(tmp_path / "log", "model", batch_size=1, **common)
    wait_until(lambda: len(parts(folder)) >= 2, process)
    # it holds its place and takes its time
    process.send(signal.SIGSTOP)
    assert evaluate("model", **common) == 2
    assert "another process is writing to it now" in capsys.readouterr().err
    process.send(signal.SIGINT)
    process.send(signal.SIGCONT)
    assert process.end() == 130, process.output()
    assert process.output().rstrip().endswith("interrupted")
    left = snapshot(folder.parent)
    assert sorted(left) == [*(f"out/parts/{name}" for name in parts(folder)), "out/parts/settings.json"]

    for changes, entry in (({"seed": 3}, "seed 100, not 3"), ({"keep_images": "png"}, 'kept images null, not "png"')):
        assert evaluate("model", **{**common, **changes}) == 2
        assert f"{folder} has an unfinished evaluation of {model} with {entry}" in capsys.readouterr().err
    assert snapshot(folder.parent) == left
    # how many rows are kept is of no account before the end
    fewer = tmp_path / "fewer"
    shutil.copytree(folder, fewer)
    assert evaluate("model", batch_size=20, **common) == 0
    assert evaluate("model", **{**common, "output_dir": fewer, "num_features": 5}) == 0
    assert_same_numbers(folder, evaluated)
    assert np.load(fewer / "indices.npy").tolist() == [0, 6, 12, 17, 23]
    assert Evaluation.load(fewer).features.shape == (5, 192)


def test_a_full_disk(model, evaluated, tmp_path):
    folder = tmp_path / "out"
    common = {**SAMPLING, "model": model, "output_dir": folder}
    # a part of 9 images has 7.6 kB; then the parts fit, and what they are put together to does not
    for batch_size, largest_file, file, kept in ((9, 6000, "000000009.npz", 0), (3, 10_000, "features.npy", 8)):
        log = tmp_path / f"{batch_size}"
        (process,) = start(log, "model", largest_file=largest_file, batch_size=batch_size, **common)
        assert process.end() == 2
        error = error_of(process)
        assert error.startswith(f"error: could not write {folder}")
        assert file in error
        assert error.endswith("what has been evaluated stays, and the same call resumes")
        assert len(parts(folder)) == kept
        assert not [name for name in files(tmp_path) if "writing" in name]
    assert evaluate("model", **common) == 0
    assert_same_numbers(folder, evaluated)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere/at/all"}, "nowhere/at/all is not a folder"),
        ({"class_labels": "frequencies"}, "class_labels is frequencies, which needs train_data_dir"),
        ({"train_data_dir": "x"}, "train_data_dir is for class_labels frequencies"),
        # found out at the first step
        ({"eta": 2.0}, "eta is 2.0"),
        ({"extractor_dtype": "float16"}, "extractor_dtype is float16, but the protocol pixels is"),
        ({"protocol": "classifier"}, "the protocol classifier needs weights"),
        ({"protocol": "clean"}, "HF_HUB_OFFLINE is set"),
        ({"model": "{}"}, "{} generates image 0 with values that are not finite, under EtaDDIMScheduler"),
    ],
)
def test_wrong_options_of_model(model, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    if changes == {"model": "{}"}:
        pipeline = make_pipeline()
        pipeline.unet.head.conv.bias.data.fill_(float("nan"))
        pipeline.save_pretrained(tmp_path / "model")
        changes = {"model": tmp_path / "model"}
    assert evaluate("model", **{**SAMPLING, "model": model, "output_dir": tmp_path / "out", **changes}) == 2
    assert message.format(tmp_path / "model") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mine", ["images/mine.png", "parts/mine.txt", "parts/000000000-000000004.npz"])
def test_a_folder_with_other_files_is_left_alone(model, tmp_path, capsys, mine):
    folder = tmp_path / "out"
    (folder / mine).parent.mkdir(parents=True)
    (folder / mine).write_text("keep")
    assert evaluate("model", **SAMPLING, model=model, output_dir=folder) == 2
    assert f"output_dir is {folder}, which holds other files" in capsys.readouterr().err
    assert files(folder) == [mine]


def test_every_kind_of_source(prepared, reference, tmp_path):
    """A prepared folder, the dataset that it was prepared from, and its images as files and as an .npz."""
    images = PreparedImages(prepared)
    pixels = images[range(len(images))]["pixel_values"].numpy().squeeze(1)
    found = assert_evaluation(reference, pixels)
    assert found.header["images"]["fingerprint"] == images.fingerprint
    np.testing.assert_array_equal(found.labels, images.labels())

    np.savez(tmp_path / "images.npz", arr_0=pixels[..., None])
    (tmp_path / "files").mkdir()
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{number}.png")
    for number, source in enumerate((tmp_path / "images.npz", tmp_path / "files", prepared.parent / "images")):
        folder = tmp_path / str(number)
        assert evaluate("reference", batch_size=7, source=source, output_dir=folder, **PIXELS) == 0
        assert assert_evaluation(folder, pixels).header["images"]["source"] == str(source)


def test_some_images_evenly_spread(prepared, tmp_path, capsys):
    chosen = PreparedImages(prepared)[np.linspace(0, 95, 20).round().astype(int)]["pixel_values"].numpy()
    common = {"source": prepared, "output_dir": tmp_path / "out", "max_images": 20, **PIXELS}
    assert evaluate("reference", num_features=4, batch_size=6, **common) == 0
    found = assert_evaluation(tmp_path / "out", chosen.squeeze(1))
    assert np.load(tmp_path / "out" / "indices.npy").tolist() == [0, 6, 13, 19]
    assert (found.header["images"]["num_images"], found.header["images"]["of"]) == (20, 96)
    # fewer features than were kept are there, and more are not
    assert evaluate("reference", num_features=3, **common) == 0
    assert evaluate("reference", num_features=5, **common) == 2
    assert "with kept features 4, not 5" in capsys.readouterr().err


@pytest.fixture
def broken(tmp_path) -> Path:
    """Folders of images that cannot be evaluated, for this reason or that."""
    for folder, sizes in (("empty", ()), ("small", (4,)), ("sizes", (16, 20)), ("unreadable", (16,))):
        (tmp_path / folder).mkdir()
        for size in sizes:
            Image.new("L", (size, size)).save(tmp_path / folder / f"{size}.png")
    (tmp_path / "unreadable" / "17.png").symlink_to("/proc/self/mem")
    return tmp_path


def test_wrong_references_and_scores(prepared, reference, evaluated, broken, capsys):
    given = {"reference": PIXELS, "score": {"reference": reference, "model": evaluated}}
    outputs = {"reference": "output_dir", "score": "output"}
    for command, changes, message in (
        ("reference", {"source": broken / "empty"}, "holds nothing, but must hold images"),
        ("reference", {"source": broken / "sizes"}, "is 20x20 pixels (width x height), but the first image"),
        ("reference", {"source": broken / "small"}, "the images have 4x4 pixels, too few to be averaged to 8x8"),
        ("reference", {"source": prepared, "resolution": 8}, "resolution is 8, but"),
        ("reference", {"source": prepared, "max_images": 0}, "max_images is 0, but must be at least 1"),
        ("reference", {"source": ""}, "source is empty"),
        ("score", {"metrics": ["fid", "inception_score"]}, f"inception_score cannot be computed: {evaluated} has no"),
        ("score", {"metrics": "beauty"}, "metrics is 'beauty', but must be one of all, fid, kid"),
        ("score", {"reference": prepared}, f"{prepared} is not an evaluation: give a folder with statistics.npz"),
    ):
        assert evaluate(command, **{**given[command], outputs[command]: broken / "out", **changes}) == 2
        assert message in capsys.readouterr().err
        assert not (broken / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file that opens and cannot be read")
@pytest.mark.parametrize(
    ("source", "batch_size", "message"),
    [
        ("sizes", 1, "error: process 1 of 2: {}/sizes/20.png is 20x20 pixels"),
        ("unreadable", 2, "error: {}/unreadable/17.png cannot be read (Input/output error)"),
    ],
)
def test_two_ranks_say_it_once(broken, source, batch_size, message):
    """Whichever of them finds it out and when."""
    common = {"output_dir": broken / "out", "batch_size": batch_size, **PIXELS}
    processes = start(broken / "log", "reference", ranks=2, source=broken / source, **common)
    assert [process.end() for process in processes] == [2, 2]
    assert error_of(processes[0]).startswith(message.format(broken))
    assert "error" not in processes[1].output()
    # only what the other rank may have evaluated by then is kept
    assert (broken / "out").exists() == bool(parts(broken / "out"))


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="nothing counts what a process reads")
def test_one_rank_reads_a_folder_for_all(tmp_path):
    """Its fingerprint is of all that is in its files, which here is much more than their images."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        file = tmp_path / "images" / f"{number}.png"
        Image.new("L", (16, 16), 60 * number).save(file)
        with file.open("r+b") as opened:
            opened.truncate(25_000_000)
    common = {"source": tmp_path / "images", "output_dir": tmp_path / "two", **PIXELS}
    processes = start(tmp_path / "log", "reference", ranks=2, program="tests.commands.evaluation_runs", **common)
    assert [process.end() for process in processes] == [0, 0], processes[0].output()
    main_process, other = (int(process.output().split()[-1]) for process in processes)
    assert main_process > 100e6
    assert other < main_process - 75e6
    assert len(Evaluation.load(tmp_path / "two").header["images"]["fingerprint"]) == 64


def test_features_that_are_not_finite(prepared, classifier, tmp_path, capsys):
    """Of a network that overflows in float16, and of one that does so in float32."""
    tensors = load_file(classifier / "model.safetensors")
    name = next(name for name in tensors if name.endswith("convolution.weight"))
    weights = shutil.copytree(classifier, tmp_path / "weights")
    common = {**PIXELS, "source": prepared, "protocol": "classifier", "weights": weights}
    for size, dtype, hint in ((-1e6, "float16", "; try extractor_dtype float32"), (-3e38, "float32", "")):
        tensors[name].fill_(size)
        save_file(tensors, weights / "model.safetensors", metadata={"format": "pt"})
        assert evaluate("reference", extractor_dtype=dtype, output_dir=tmp_path / "out", **common) == 2
        error = capsys.readouterr().err.rstrip().splitlines()[-1]
        assert error == f"error: classifier in {dtype} gives features that are not finite for image 0{hint}"
        assert not (tmp_path / "out").exists()


def test_score_writes_what_the_number_depends_on(reference, evaluated, tmp_path, capsys):
    file = tmp_path / "new" / "scores.json"
    assert evaluate("score", reference=reference, model=evaluated, output=file) == 0
    shown = capsys.readouterr().out
    scores = json.loads(file.read_text())
    assert f"fid                  {scores['metrics']['fid']:.6g}" in shown
    assert f"{COUNT} images for 192 features: its covariance is singular" in shown
    assert f"with its protocol in {file}" in shown
    assert sorted(scores["metrics"]) == ["coverage", "density", "fid", "kid", "precision", "recall"]
    expected = {"num_images": COUNT, "count": COUNT, "seed": 100, "eta": 1.0, "guidance_scale": 1.0}
    expected |= {"num_inference_steps": 2, "scheduler": "EtaDDIMScheduler", "class_labels": ["uniform"]}
    assert scores["model"].items() >= expected.items()
    assert scores["model"]["scheduler_config"]["prediction_type"] == "v_prediction"
    assert scores["protocol"]["protocol"] == "pixels"
    assert scores["versions"]["model"]["torch"] == torch.__version__
    assert scores["reference"].items() >= Evaluation.load(reference).header["images"].items()
    assert evaluate("score", reference=reference, model=evaluated, output=file, metrics=["kid", "fid"]) == 0
    assert list(json.loads(file.read_text())["metrics"]) == ["kid", "fid"]


def test_evaluating_by_a_classifier(classifier, prepared, tmp_path, capsys):
    """Images of a model, and a dataset whose classes the network knows."""
    pipeline = ClassConditionalPipeline(make_unet(), EtaDDIMScheduler(), {0: "dark", 1: "grey", 2: "light"})
    pipeline.save_pretrained(tmp_path / "model")
    reference, folder, half = tmp_path / "reference", tmp_path / "evaluated", tmp_path / "half"
    by_classifier = {"protocol": "classifier", "weights": classifier, "device": "cpu"}
    real_images = {"source": prepared, **by_classifier}
    assert evaluate("reference", output_dir=reference, **real_images) == 0
    sampling = {"model": tmp_path / "model", "num_images": 12, "num_inference_steps": 2}
    sampling |= {"class_labels": "frequencies", "train_data_dir": prepared, **by_classifier}
    assert evaluate("model", output_dir=folder, batch_size=5, **sampling) == 0
    assert evaluate("score", reference=reference, model=folder) == 0
    scores = json.loads((folder / "scores.json").read_text())
    found, real = Evaluation.load(folder), Evaluation.load(reference)
    accuracy = (found.probabilities.argmax(axis=1) == found.labels).mean()
    assert scores["metrics"]["class_accuracy"] == pytest.approx(accuracy)
    assert 1 <= scores["metrics"]["inception_score"]["mean"] <= 3
    assert scores["model"]["class_counts"] == [32, 32, 32]
    # of the images that it was trained on it reads nearly all right
    assert (real.probabilities.argmax(axis=1) == real.labels).mean() > 0.9
    # its dtype is part of the protocol
    capsys.readouterr()
    assert evaluate("reference", output_dir=reference, extractor_dtype="bfloat16", **real_images) == 2
    assert f'{reference} has an evaluation of {prepared} with dtype "float32", not' in capsys.readouterr().err
    assert evaluate("reference", output_dir=half, extractor_dtype="bfloat16", **real_images) == 0
    features, others = (np.asarray(Evaluation.load(each).features) for each in (reference, half))
    assert 1e-4 < np.linalg.norm(others - features) / np.linalg.norm(features) < 2e-2
    assert evaluate("score", reference=reference, model=half) == 2
    assert f"dtype is float32 in {reference} and bfloat16 in {half}" in capsys.readouterr().err
