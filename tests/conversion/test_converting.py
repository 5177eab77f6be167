"""Converted checkpoints give the original's answers and come back bit for bit; what is written is whole."""

import json
import math
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from imagenet64_diffusion import ClassConditionalPipeline, ClassConditionalUNet2DModel, EtaDDIMScheduler
from imagenet64_diffusion.conversion.original import map_original_weights, original_scheduler, write_original
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint
from imagenet64_diffusion.data.class_names import class_names, imagenet64_names
from imagenet64_diffusion.schedulers.original_schedule import original_timesteps
from imagenet64_diffusion.tests.components import FIXTURES, seeded
from imagenet64_diffusion.tests.conversion import originals
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS, small_weights, write_small


@pytest.fixture
def small(tmp_path):
    """A small checkpoint in a folder of its own: the model's file and its JSON."""
    return write_small(tmp_path / "small")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(
        one[name].dtype == tensor.dtype and torch.equal(one[name], tensor) for name, tensor in other.items()
    )


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(folder, message, function, *arguments, **options):
    """A call fails with this message, and leaves nothing behind."""
    before = tree(folder)
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
    assert tree(folder) == before


def test_there_and_back(original_checkpoint, tmp_path):
    """The network whose answers tests/models compares with the original's, and the original's files again."""
    recipe, params, state_dict = (getattr(original_checkpoint, name) for name in ("recipe", "params", "state_dict"))
    unet = convert_checkpoint(originals.model_file(recipe), originals.params_file(recipe), tmp_path / "ours").unet
    torch.testing.assert_close(dict(unet.state_dict()), map_original_weights(state_dict, params), atol=0, rtol=0)
    written = write_original(tmp_path / "ours", tmp_path / "new" / "theirs")
    assert tree(tmp_path / "new") == ["theirs", "theirs/model_3e_2s.pkl", "theirs/model_params_3e_2s.json"]
    assert same(torch.load(written[0], weights_only=True), state_dict)
    assert json.loads(written[1].read_text()) == params


@pytest.fixture(scope="module", params=originals.RECIPES_WITH_OPTIMIZER)
def converted(request, tmp_path_factory):
    """A converted pipeline and the images that the original sampled."""
    recipe, folder = request.param, tmp_path_factory.mktemp("converted")
    pipeline = convert_checkpoint(originals.model_file(recipe), originals.params_file(recipe), folder / recipe)
    return pipeline, load_file(originals.ORIGINALS / recipe / "samples.safetensors")


@pytest.mark.parametrize("run", sorted(load_file(originals.ORIGINALS / "res" / "samples.safetensors")))
def test_sampling(converted, run, monkeypatch):
    pipeline, images = converted
    found = re.fullmatch(r"sample\.step(\d+)_scale(.+)_w(.+)_corrected(\d)_class(.+)", run)
    step_size, class_label = int(found[1]), int(found[5])
    noises = load_file(originals.ORIGINALS / "sample_noises.safetensors")[f"step{step_size}"]
    step, remaining = EtaDDIMScheduler.step, iter(noises[1:])

    def step_with_given_noise(self, model_output, timestep, sample, eta=0.0):
        return step(self, model_output, timestep, sample, eta, variance_noise=next(remaining)[None] if eta else None)

    monkeypatch.setattr(EtaDDIMScheduler, "step", step_with_given_noise)
    sampled = pipeline(
        class_label if class_label >= 0 else None,
        guidance_scale=1 + float(found[3]),
        timesteps=original_timesteps(1000, step_size),
        eta=math.sqrt(float(found[2])),
        clip_sample=found[4] == "1",
        latents=noises[:1],
        output_type="latent",
    ).images
    assert (sampled - images[run]).abs().max() / images[run].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "finish", "last"), [("cosine", False, 0.999), ("cosine", True, 1), ("linear", False, 1)]
)
def test_schedules(kind, finish, last):
    scheduler = original_scheduler({"T": 1000, "beta_sched": kind}, finish)
    expected = load_file(FIXTURES / "schedules.safetensors")[f"{kind}.T1000.step1.a_bar_t"].double()
    torch.testing.assert_close(scheduler.alphas_cumprod, expected.sort(descending=True).values, atol=5e-7, rtol=0)
    assert scheduler.final_alpha_cumprod == pytest.approx(last, abs=1e-9)


def test_everything_it_writes(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    pipeline = convert_checkpoint(str(originals.model_file("res")), str(originals.params_file("res")), str(out))
    scheduler, config = pipeline.scheduler.config, pipeline.unet.config
    assert (scheduler.prediction_type, scheduler.variance_type) == ("epsilon", "learned_range")
    assert (scheduler.set_alpha_to_one, scheduler.max_beta, scheduler.clip_sample) == (False, 0.999, False)
    assert (pipeline.config.guide_variance, config.time_embedding_type) == (True, "original_sine")
    assert (config.class_attention_type, config.output_head_type) == ("identity", "original")
    assert {"model_index.json", "original_params.json", "original_unused_weights.safetensors"} <= set(tree(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    printed = capsys.readouterr().out
    for words in (
        "124,449 parameters, layers res, clsAtn, chnAtn (stem 8, levels 16, 32)",
        "epoch 3, step 2",
        "10, named 0, ..., 9",
        "original's cosine, 1000 timesteps, last step leaves noise of 0.03, as the original's does",
        "all 228 weights",
    ):
        assert words in printed


def test_loads_where_the_package_is_not_used(small, tmp_path):
    """The pipeline stays what it is when its checkpoint and its folder go."""
    pipeline = convert_checkpoint(*small, tmp_path / "out")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    convert_checkpoint(*write_small(tmp_path / "other", c_dim=8), tmp_path / "out")
    small[0].write_bytes(bytes(small[0].stat().st_size))
    one, other = (
        each(1, num_inference_steps=2, generator=seeded(0), output_type="np").images for each in (pipeline, stock)
    )
    assert (one == other).all()


@pytest.mark.parametrize(
    ("source", "dtype", "variant"),
    [("float32", "float16", "fp16"), ("float64", "bfloat16", None), ("bfloat16", "float32", None)],
)
def test_dtypes_and_variants(tmp_path, source, dtype, variant):
    weights = {name: tensor.to(getattr(torch, source)) for name, tensor in small_weights().items()}
    files = write_small(tmp_path / "small", weights)
    pipeline = convert_checkpoint(*files, tmp_path / "ours", dtype=dtype, variant=variant)
    assert pipeline.unet.dtype == getattr(torch, dtype)
    name = f"diffusion_pytorch_model{f'.{variant}' if variant else ''}.safetensors"
    stored = load_file(tmp_path / "ours" / "unet" / name)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    # the original has float32 only
    model, _ = write_original(tmp_path / "ours", tmp_path / "theirs", variant=variant)
    expected = {name: tensor.float().to(getattr(torch, dtype)).float() for name, tensor in weights.items()}
    assert same(torch.load(model, weights_only=True), expected)


def test_names_of_classes(tmp_path):
    assert class_names("imagenet64", 1000) == dict(enumerate(imagenet64_names()))
    assert class_names("imagenet64", 2) == class_names("numbers", 2) == class_names(None, 2) == {0: "0", 1: "1"}
    files = {"a.json": '["cat", "dog"]', "b.json": '{"1": "dog", "0": "cat"}', "c.txt": "cat\r\ndog\n\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content, newline="")
        assert class_names(str(tmp_path / name), 2) == {0: "cat", 1: "dog"}
    assert class_names({0: "cat", 1: "dog"}, 2) == class_names(["cat", "dog"], 2) == {0: "cat", 1: "dog"}
    assert class_names("imagenet64", None) is class_names(None, None) is None


def test_wrong_names(tmp_path):
    file = tmp_path / "names.json"
    for content in ("[", '["cat"]', '{"0": "cat", "2": "dog"}', '["cat", 1]', '["cat", " "]', '"ab"', "2"):
        file.write_text(content)
        message = "cannot be read" if content == "[" else "must have a name for each class of the network, 0 to 1"
        refused(tmp_path, message, class_names, file, 2)
    refused(tmp_path, "must be auto, imagenet64, imagenet, numbers or a file", class_names, "cifar10", 2)
    refused(tmp_path, "the network has none", class_names, ["cat"], None)


def test_wrong_options_leave_nothing(small, tmp_path):
    usual = {"checkpoint": small[0], "params": small[1], "output_dir": tmp_path / "new" / "out"}
    for message, options in {
        "time_embedding is 'sinusoidal', but must be one of original_sine": {"time_embedding": "sinusoidal"},
        r"output_dir is \., but must be the name of a new folder": {"output_dir": "."},
        "dtype is 'int8', but must be one of float32": {"dtype": "int8"},
        "variant is '../x'": {"variant": "../x"},
        "model_3e_2s.pkl does not belong to model_params_1e_7s.json": {"checkpoint": originals.model_file("res")},
    }.items():
        refused(tmp_path, message, convert_checkpoint, **{**usual, **options})


def test_wrong_content_leaves_nothing(tmp_path):
    weights, out = small_weights(), tmp_path / "out"
    weights["unet.out.bias"][0] = 1e6
    files = write_small(tmp_path / "small", weights)
    refused(tmp_path, "bias holds numbers too large", convert_checkpoint, *files, out, dtype="float16")
    weights["unet.out.bias"][0] = 3e38
    weights["unet.out.weight"] *= 1e38
    refused(tmp_path, "is not finite", convert_checkpoint, *write_small(tmp_path / "small", weights), out)
    # an optimizer needs to know the step
    files[1].write_text(json.dumps({name: value for name, value in SMALL_PARAMS.items() if name != "step"}))
    refused(tmp_path, "lacks epoch or step", convert_checkpoint, *files, out, files[0])


def test_replaces_its_own_and_nothing_else(small, tmp_path):
    out = tmp_path / "out"
    convert_checkpoint(*small, out)
    convert_checkpoint(*small, out, id2label=["a", "b", "c"])
    assert ClassConditionalPipeline.from_pretrained(out).labels == {"a": 0, "b": 1, "c": 2}
    (out / "checkpoints" / "checkpoint-900").mkdir(parents=True)
    refused(tmp_path, "which holds checkpoints/checkpoint-900, but must be new", convert_checkpoint, *small, out)
    (out / "checkpoints" / "checkpoint-900").rmdir()
    (out / "thesis.tex").write_text("keep")
    refused(tmp_path, "which holds thesis.tex, but must be new", convert_checkpoint, *small, out)
    refused(tmp_path, "but must be new", convert_checkpoint, *small, small[0].parent)
    refused(tmp_path, "but must be the name of a new folder", convert_checkpoint, *small, small[0])


@pytest.mark.parametrize(
    ("legacy", "params"),
    [
        (False, {"blk_types": ["conv", "clsAtn", "atn"]}),
        (True, {"blk_types": ["conv", "atn", "clsAtn"], "num_blocks": 2, "chMult": 2, "inCh": 3, "atn_resolution": 8}),
        (False, {"blk_types": ["res", "conv", "chnAtn"], "c_dim": None}),
        (False, {"c_dim": None, "num_classes": None}),
        (False, {"beta_sched": "linear"}),
    ],
)
def test_there_and_back_with_other_networks(tmp_path, legacy, params):
    pipeline = convert_checkpoint(*write_small(tmp_path / "small", legacy=legacy, **params), tmp_path / "ours")
    model, written = write_original(tmp_path / "ours", tmp_path / "theirs")
    before = small_weights(**params)
    assert same(torch.load(model, weights_only=True), before)
    assert json.loads(written.read_text()) == {**SMALL_PARAMS, **params}
    # trained further, with the weights without effect that the conversion kept, under another step
    with torch.no_grad():
        pipeline.unet.conv_in.weight += 1
    pipeline.unet.save_pretrained(tmp_path / "ours" / "unet")
    model, _ = write_original(tmp_path / "ours", tmp_path / "theirs", epoch=2, step=900)
    assert model.name == "model_2e_900s.pkl"
    after = torch.load(model, weights_only=True)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"unet.inConv.weight"}


def faithful(folder, scheduler=None, **options):
    """A pipeline folder with a small network of the original's form that was not converted."""
    usual = {"in_channels": 1, "stem_channels": 4, "block_out_channels": (8, 16), "num_class_embeds": 3}
    usual |= {"layer_types": ("resnet", "class_attention"), "time_embed_dim": 4, "class_embed_dim": 4}
    usual |= {"time_embedding_type": "original_interleaved", "class_attention_type": "identity"}
    unet = ClassConditionalUNet2DModel(**{**usual, "output_head_type": "original", **options})
    scheduler = original_scheduler({"T": 1000, "beta_sched": "cosine"}) if scheduler is None else scheduler
    ClassConditionalPipeline(unet, scheduler).save_pretrained(folder)
    return unet


def test_a_network_that_was_trained_here(tmp_path):
    unet = faithful(tmp_path / "ours")
    model, written = write_original(tmp_path / "ours", tmp_path / "theirs", epoch=4, step=800)
    state_dict, params = torch.load(model, weights_only=True), json.loads(written.read_text())
    assert params == {
        "inCh": 1, "embCh": 4, "chMult": 1, "num_blocks": 2, "blk_types": ["res", "clsAtn"], "T": 1000,
        "beta_sched": "cosine", "t_dim": 4, "c_dim": 4, "num_classes": 3, "atn_resolution": 16,
        "epoch": 4, "step": 800,
    }  # fmt: skip
    shapes = originals.original_weight_shapes(params)
    assert {name: tuple(tensor.shape) for name, tensor in state_dict.items()} == shapes
    assert not any(tensor.any() for name, tensor in state_dict.items() if "Q_emb" in name or "K_emb" in name)
    again = convert_checkpoint(model, written, tmp_path / "again", time_embedding="original_interleaved")
    assert same(again.unet.state_dict(), unet.state_dict())
    # without class attention its type says nothing
    faithful(tmp_path / "other", layer_types=("convnext",), class_attention_type="channel")
    assert write_original(tmp_path / "other", tmp_path / "theirs", epoch=1, step=1)[0].is_file()


def test_what_cannot_go_back(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    kept = ours / "original_unused_weights.safetensors"

    def stays(message, folder=ours, epoch=1, step=1):
        refused(tmp_path, message, write_original, folder, theirs, epoch, step)

    for message, options in {
        "time_embedding_type sinusoidal": {"time_embedding_type": "sinusoidal"},
        "class_attention_type channel": {"class_attention_type": "channel"},
        "output_head_type conv": {"output_head_type": "conv"},
        r"block_out_channels \(8, 12\), but": {"block_out_channels": (8, 12)},
        r"block_out_channels \(2, 4\), but": {"block_out_channels": (2, 4)},
        "prediction_type v_prediction": {"scheduler": EtaDDIMScheduler(prediction_type="v_prediction")},
        "another noise schedule": {"scheduler": EtaDDIMScheduler(beta_schedule="squaredcos_cap_v2")},
    }.items():
        faithful(ours, **options)
        stays(message)
    unet = faithful(ours)
    stays("epoch is None, but must be given", epoch=None)
    stays("step is -1, but must be given, and be at least 0", step=-1)
    stays("must be a pipeline folder", tmp_path / "nothing")
    stays("holds no pipeline", tmp_path / "ours" / "unet")
    save_file({"unet.out.bias": torch.zeros(2)}, kept)
    stays("not those without effect")
    kept.write_bytes(b"x" * 100)
    stays("cannot be read")
    kept.unlink()
    with torch.no_grad():
        unet.class_embedding.weight[-1] = 1
    unet.save_pretrained(ours / "unet")
    stays(r"the null class of .* is not zero")
    (ours / "original_params.json").write_text(json.dumps(SMALL_PARAMS))
    stays("but original_params.json or the original has")
