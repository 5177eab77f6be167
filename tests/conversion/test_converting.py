"""Converted checkpoints give the original's answers, and what is written is whole."""

import json
import math
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalPipeline, EtaDDIMScheduler
from imagenet64_diffusion.conversion.components import class_names, original_scheduler
from imagenet64_diffusion.conversion.converting import convert_files
from imagenet64_diffusion.conversion.errors import CheckpointError
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint
from imagenet64_diffusion.data.class_names import imagenet64_names
from imagenet64_diffusion.schedulers.original_schedule import original_timesteps
from imagenet64_diffusion.tests.components import FIXTURES, OriginalCheckpoint
from imagenet64_diffusion.tests.conversion.originals import (
    ORIGINALS,
    RECIPES_WITH_OPTIMIZER,
    model_file,
    params_file,
    small_weights,
    write_small,
)


def test_forward(original_checkpoint, converted_original):
    expected = original_checkpoint.expected
    pipeline = ClassConditionalPipeline.from_pretrained(converted_original)
    with torch.no_grad():
        labels = original_checkpoint.labels("forward")
        output = pipeline.unet(expected["forward.sample"], expected["forward.timestep"] - 1, labels).sample
    noise, variance = output.chunk(2, dim=1)
    torch.testing.assert_close(noise, expected["forward.released.noise"], atol=1e-5, rtol=0)
    torch.testing.assert_close((variance + 1) / 2, expected["forward.released.v"], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- whole sampling runs


def with_given_noise(scheduler: EtaDDIMScheduler, noises: torch.Tensor) -> EtaDDIMScheduler:
    """The scheduler with stored noise for each step in place of a generator's."""
    remaining = iter(noises)

    class GivenNoise(EtaDDIMScheduler):
        def step(self, model_output, timestep, sample, eta=0.0):
            noise = next(remaining)[None] if eta > 0 else None
            return super().step(model_output, timestep, sample, eta=eta, variance_noise=noise)

    return GivenNoise.from_config(scheduler.config)


RUNS = sorted(load_file(ORIGINALS / "res" / "samples.safetensors"))


@pytest.fixture(scope="module", params=RECIPES_WITH_OPTIMIZER)
def converted(request, tmp_path_factory):
    """A converted pipeline and the images that the original sampled."""
    recipe = request.param
    folder = tmp_path_factory.mktemp("converted") / recipe
    pipeline = convert_checkpoint(model_file(recipe), params_file(recipe), folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, load_file(ORIGINALS / recipe / "samples.safetensors")


@pytest.mark.parametrize("run", RUNS)
def test_sampling(converted, run):
    pipeline, images = converted
    found = re.fullmatch(r"sample\.step(\d+)_scale(.+)_w(.+)_corrected(\d)_class(.+)", run)
    step_size, class_label = int(found[1]), int(found[5])
    noises = load_file(ORIGINALS / "sample_noises.safetensors")[f"step{step_size}"]
    scheduler, pipeline.scheduler = pipeline.scheduler, with_given_noise(pipeline.scheduler, noises[1:])
    try:
        sampled = pipeline(
            class_label if class_label >= 0 else None,
            guidance_scale=1 + float(found[3]),
            timesteps=original_timesteps(1000, step_size),
            eta=math.sqrt(float(found[2])),
            clip_sample=found[4] == "1",
            latents=noises[:1],
            output_type="latent",
        ).images
    finally:
        pipeline.scheduler = scheduler
    scale = images[run].abs().max()
    assert (sampled - images[run]).abs().max() / scale < 1e-3


def test_finishing_the_denoising(converted):
    """It changes the last step alone: from the original's image to the image that it predicts there."""
    pipeline, _ = converted
    finishing = ClassConditionalPipeline(
        pipeline.unet,
        type(pipeline.scheduler).from_config(pipeline.scheduler.config, set_alpha_to_one=True),
        None,
        True,
    )
    finishing.set_progress_bar_config(disable=True)
    results = []
    for each in (pipeline, finishing):
        steps = []

        def remember(_, step, timestep, tensors, steps=steps):
            steps.append((tensors["latents"], tensors["pred_original_sample"]))

        latents = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        wanted = ("latents", "pred_original_sample")
        each(3, timesteps=original_timesteps(1000, 250), latents=latents, output_type="latent",
             callback_on_step_end=remember, callback_on_step_end_tensor_inputs=wanted)  # fmt: skip
        results.append(steps)
    faithful, finished = results
    for (before, _), (after, _) in zip(faithful[:-1], finished[:-1], strict=True):
        assert torch.equal(before, after)
    torch.testing.assert_close(finished[-1][0], faithful[-1][1])
    assert not torch.equal(finished[-1][0], faithful[-1][0])


@pytest.mark.parametrize(
    ("schedule", "finish", "last"), [("cosine", False, 0.999), ("cosine", True, 1), ("linear", False, 1)]
)
def test_where_the_denoising_ends(schedule, finish, last):
    scheduler = original_scheduler({"T": 1000, "beta_sched": schedule}, finish)
    assert scheduler.final_alpha_cumprod == pytest.approx(last, abs=1e-9)


# ---------------------------------------------------------------------- what is written


def test_everything_it_writes(tmp_path, capsys):
    pipeline = convert_checkpoint(str(model_file("res")), str(params_file("res")), str(tmp_path / "new" / "out"))
    out = tmp_path / "new" / "out"
    scheduler = pipeline.scheduler.config
    assert (scheduler.prediction_type, scheduler.variance_type) == ("epsilon", "learned_range")
    assert (scheduler.set_alpha_to_one, scheduler.max_beta, scheduler.clip_sample) == (False, 0.999, False)
    assert pipeline.config.guide_variance is True
    config = pipeline.unet.config
    assert (config.class_attention_type, config.output_head_type) == ("identity", "original")
    assert config.time_embedding_type == "original_sine"
    assert pipeline.config._name_or_path == str(out)
    assert {"model_index.json", "original_params.json", "original_unused_weights.safetensors"} <= {
        path.name for path in out.iterdir()
    }
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    printed = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    for words in (
        f"{parameters:,} parameters",
        "layers res, clsAtn, chnAtn (stem 8, levels 16, 32)",
        "epoch 3, step 2",
        "10, numbered, because ImageNet-64 has 1000",
        "original's cosine, 1000 timesteps",
        "all 228 weights",
        "one forward pass finite",
        "last step leaves noise of 0.03, as the original's does",
    ):
        assert words in printed


def test_loads_where_the_package_is_not_used(small, tmp_path):
    pipeline = convert_checkpoint(*small, tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for each in (pipeline, stock):
        each.set_progress_bar_config(disable=True)
    images = [
        each(1, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
        for each in (pipeline, stock)
    ]
    assert (images[0] == images[1]).all()


def test_the_checkpoint_may_go_afterwards(small, tmp_path):
    """Nothing of the pipeline lies in the checkpoint's file, nor in a folder that is replaced."""
    pipeline = convert_checkpoint(*small, tmp_path / "out")
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    convert_checkpoint(*write_small(tmp_path / "other", small_weights(c_dim=8), c_dim=8), tmp_path / "out")
    small[0].write_bytes(bytes(small[0].stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())


@pytest.mark.parametrize(("dtype", "variant"), [("float16", "fp16"), ("bfloat16", None)])
def test_dtype_and_variant(small, tmp_path, dtype, variant):
    pipeline = convert_checkpoint(*small, tmp_path / "out", dtype=dtype, variant=variant)
    assert pipeline.unet.dtype == getattr(torch, dtype)
    name = (
        "diffusion_pytorch_model.safetensors" if variant is None else f"diffusion_pytorch_model.{variant}.safetensors"
    )
    stored = load_file(tmp_path / "out" / "unet" / name)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    expected = small_weights()["unet.inConv.weight"].to(getattr(torch, dtype))
    assert torch.equal(stored["conv_in.weight"], expected)


def test_doubles_and_halves_become_float32(tmp_path):
    for index, dtype in enumerate((torch.float64, torch.bfloat16)):
        weights = {name: tensor.to(dtype) for name, tensor in small_weights().items()}
        pipeline = convert_checkpoint(*write_small(tmp_path / str(index), weights), tmp_path / f"out{index}")
        assert torch.equal(pipeline.unet.conv_in.weight, weights["unet.inConv.weight"].float())


@pytest.mark.parametrize(("layers", "legacy"), [(["conv", "atn", "clsAtn"], True), (["res", "conv", "chnAtn"], False)])
def test_other_networks(tmp_path, layers, legacy):
    params = {"blk_types": layers, "num_blocks": 2, "chMult": 2, "inCh": 3, "atn_resolution": 8}
    pipeline = convert_checkpoint(*write_small(tmp_path / "small", legacy=legacy, **params), tmp_path / "out")
    assert pipeline.unet.config.block_out_channels == (16, 64)
    assert len(pipeline.unet.state_dict()) == len(
        [name for name in small_weights(**params) if "Q_emb" not in name and "K_emb" not in name]
    )


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_schedules(kind):
    stored = load_file(FIXTURES / "schedules.safetensors")
    scheduler = original_scheduler({"T": 1000, "beta_sched": kind})
    expected = stored[f"{kind}.T1000.step1.a_bar_t"].double().sort(descending=True).values
    torch.testing.assert_close(scheduler.alphas_cumprod, expected, atol=5e-7, rtol=0)


# ---------------------------------------------------------------------- class names


def test_names_of_classes(tmp_path):
    assert class_names("imagenet64", 1000)[0] == dict(enumerate(imagenet64_names()))
    assert class_names("numbers", 2) == ({0: "0", 1: "1"}, "2, numbered")
    assert class_names("imagenet64", 2) == ({0: "0", 1: "1"}, "2, numbered, because ImageNet-64 has 1000")
    files = {"a.json": '["cat", "dog"]', "b.json": '{"1": "dog", "0": "cat"}', "c.txt": "cat\r\ndog\n\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, newline="")
        assert class_names(str(tmp_path / name), 2) == ({0: "cat", 1: "dog"}, f"2, named by {name}")
    assert class_names({0: "cat", 1: "dog"}, 2)[0] == class_names(["cat", "dog"], 2)[0] == {0: "cat", 1: "dog"}
    assert class_names(None, 2)[0] == {0: "0", 1: "1"}
    assert class_names("imagenet64", None) == class_names(None, None) == (None, "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["cat"]', "has 1 names, but must name each of the network's classes, 0 to 1"),
        ('{"0": "cat", "2": "dog"}', "must name each of the network's classes"),
        ('["cat", 1]', "the name of class 1 must be text"),
        ('["cat", " "]', "the name of class 1 must be text"),
        ('"cat"', "holds a str"),
        ("[", "cannot be read"),
    ],
)
def test_wrong_names(tmp_path, content, message):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        class_names(tmp_path / "names.json", 2)


def test_names_that_are_no_file():
    with pytest.raises(CheckpointError, match="must be imagenet64, numbers or a file of names"):
        class_names("imagenet", 2)
    with pytest.raises(CheckpointError, match="the network has none"):
        class_names(["cat"], None)


# ---------------------------------------------------------------------- failures


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_embedding": "sinusoidal"}, "time_embedding is 'sinusoidal', but must be one of original_sine"),
        ({"output_dir": "."}, "output_dir is ., but must end with the name of a folder"),
        ({"dtype": "int8"}, "dtype is 'int8', but must be one of float32"),
        ({"variant": "../x"}, "variant is '../x'"),
    ],
)
def test_wrong_options_leave_nothing(small, tmp_path, options, message):
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        convert_files(*small, **{"output_dir": tmp_path / "new" / "out", **options})
    assert tree(tmp_path) == before


def test_weights_that_fit_no_half_precision(tmp_path):
    weights = small_weights()
    weights["unet.out.bias"][0] = 1e6
    files = write_small(tmp_path / "small", weights)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"head.conv.bias holds numbers too large for torch.float16"):
        convert_files(*files, tmp_path / "out", dtype="float16")
    assert tree(tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_weights_that_compute_nothing(tmp_path):
    weights = small_weights()
    weights["unet.out.bias"][0] = 3e38
    weights["unet.out.weight"] *= 1e38
    with pytest.raises(CheckpointError, match="prediction is not finite"):
        convert_files(*write_small(tmp_path / "small", weights), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_optimizer_needs_to_know_the_step(small, tmp_path):
    params = json.loads(small[1].read_text())
    del params["step"]
    small[1].write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match="lacks epoch or step"):
        convert_files(*small, tmp_path / "out", small[0])


def test_replaces_its_own_and_nothing_else(small, tmp_path):
    out = tmp_path / "out"
    convert_files(*small, out)
    convert_files(*small, out, id2label=["a", "b", "c"])
    assert ClassConditionalPipeline.from_pretrained(out).labels == {"a": 0, "b": 1, "c": 2}

    (out / "checkpoints" / "checkpoint-900").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="which holds checkpoints/checkpoint-900, but must be new"):
        convert_files(*small, out)
    (out / "thesis.tex").write_text("keep")
    with pytest.raises(CheckpointError, match=r"which holds thesis.tex, but must be new"):
        convert_files(*small, out)
    with pytest.raises(CheckpointError, match="but must be new"):
        convert_files(*small, small[0].parent)
    with pytest.raises(CheckpointError, match="which is a file"):
        convert_files(*small, small[0])
    assert (out / "thesis.tex").read_text() == "keep"
    assert small[0].is_file()


def test_a_checkpoint_of_another_json(tmp_path):
    other = OriginalCheckpoint("res_res")
    assert other.params["blk_types"] == ["res", "res", "clsAtn", "chnAtn"]
    with pytest.raises(CheckpointError, match=r"model_3e_2s.pkl does not belong to model_params_3e_2s.json"):
        convert_files(model_file("res"), params_file("res_res"), tmp_path / "out")
    with pytest.raises(CheckpointError, match="weights unknown"):
        convert_files(model_file("res_res_atn"), params_file("res_res"), tmp_path / "out")
    assert tree(tmp_path) == []
