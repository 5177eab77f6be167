"""The original's JSON file, the shapes of its weights, and its optimizer, with which our training resumes."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalUNet2DModel, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.conversion import original
from imagenet64_diffusion.conversion.pickle_reader import CheckpointError, load_optimizer
from imagenet64_diffusion.convert_checkpoints import convert_checkpoint
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas
from imagenet64_diffusion.tests.components import OriginalCheckpoint
from imagenet64_diffusion.tests.conversion import originals
from imagenet64_diffusion.tests.conversion.originals import SMALL_PARAMS, write_small
from imagenet64_diffusion.training.checkpoints import find_checkpoints, load_checkpoint
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions


def read(tmp_path, content):
    file = tmp_path / "model_params.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return original.read_params(file)


def test_other_right_files(tmp_path):
    """Without classes, which are written in several ways, and by older and newer programs."""
    for class_dim, num_classes in itertools.product((None, -1), (None, 3)):
        params = read(tmp_path, {**SMALL_PARAMS, "c_dim": class_dim, "num_classes": num_classes})
        assert params["c_dim"] is None
        assert not [name for name in originals.original_weight_shapes(params) if "c_emb" in name or "clsProj" in name]
    older = {name: value for name, value in SMALL_PARAMS.items() if name not in ("atn_resolution", "epoch", "step")}
    assert read(tmp_path, {**older, "remark": "x"}) == {**older, "remark": "x"}
    assert original.original_unet_config(older)["attention_patch_size"] == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"T": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b" " * (1 << 21), "has 2,097,152 bytes"),
        ([], "holds a list"),
        ({}, "lacks inCh, embCh"),
        ({name: value for name, value in SMALL_PARAMS.items() if name != "T"}, "lacks T"),
        *(
            ({**SMALL_PARAMS, **wrong}, message)
            for wrong, message in (
                ({"embCh": "128"}, "embCh is '128', but must be a whole number"),
                ({"embCh": True}, "embCh is True"),
                ({"num_classes": None}, "num_classes is None"),
                ({"inCh": 0}, "inCh is 0, but must be a whole number in"),
                ({"T": 10**9}, "T is 1000000000"),
                ({"T": float("inf")}, "T is inf"),
                ({"embCh": 16_384, "num_blocks": 6}, "makes 1,048,576 channels"),
                ({"c_dim": "none"}, "c_dim is 'none'"),
                ({"blk_types": "res"}, "must be a list"),
                ({"blk_types": ["res"] * 65}, "must be a list"),
                ({"blk_types": ["res", "swin"]}, "blk_types is 'swin', but must be one of res, conv"),
                ({"blk_types": ["res", {}]}, "blk_types is {}"),
                ({"beta_sched": "sigmoid"}, "beta_sched is 'sigmoid', but must be one of cosine, linear"),
                ({"beta_sched": ["x" * 500]}, r"\.\.\.x+'\], but must be one of"),
                ({"blk_types": ["chnAtn"]}, "describes no network: .*begins with 'channel_attention'"),
                ({"blk_types": ["res", "clsAtn"], "c_dim": None}, "describes no network: .*which needs classes"),
                ({"blk_types": ["res", "atn"], "atn_resolution": 24}, "attention_patch_size is 24"),
            )
        ),
    ],
)
def test_wrong_files(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        original.build_empty_unet(read(tmp_path, content), params_name="model_params.json")
    assert "model_params.json" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("recipe", originals.RECIPES_WITH_OPTIMIZER)
def test_the_next_step_is_the_originals(tmp_path, recipe):
    """From the checkpoint that the conversion writes, which has the options of the original's training too."""
    checkpoint, out = OriginalCheckpoint(recipe), tmp_path / "out"
    optimizer_file = originals.unpack_optimizer(recipe, tmp_path)
    files = originals.model_file(recipe), originals.params_file(recipe), out, optimizer_file
    convert_checkpoint(*files, "original_interleaved")
    folder = find_checkpoints(out / "checkpoints")[-1]
    stored = load_checkpoint(folder)
    assert (folder.name, stored.progress.step, stored.progress.epoch) == ("checkpoint-2", 2, 3)
    assert EtaDDIMScheduler(**stored.scheduler_config).alphas_cumprod.max() == pytest.approx(0.999, abs=1e-9)
    expected = {"prediction_type": "epsilon", "beta_schedule": "original_cosine", "learning_rate": 3e-4}
    expected |= {"adam_epsilon": 1e-4, "use_ema": False, "class_dropout_prob": 0.2, "lr_scheduler": "constant"}
    assert vars(TrainOptions(train_data_dir=str(tmp_path), **stored.options)).items() >= expected.items()

    unet = ClassConditionalUNet2DModel(**stored.unet_config).train()
    unet.load_state_dict(stored.weights)
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.load_state_dict(stored.optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.9, 0.999), 1e-4, 0.01)

    # a step on the batch of which the original's result is stored
    given = checkpoint.expected
    scheduler = {"trained_betas": original_cosine_betas(1000), "set_alpha_to_one": False, "max_beta": 0.999}
    timesteps = given["loss.timestep"] - 1
    output = unet(given["loss.x_t"], timesteps, checkpoint.labels("loss")).sample
    loss = HybridLoss(LearnedVarianceDDPMScheduler(**scheduler))
    loss(output, given["loss.x0"], given["loss.noise"], given["loss.x_t"], timesteps).total.mean().backward()
    optimizer.step()

    weights = original.map_to_original_weights(unet, {})
    stepped = load_file(originals.ORIGINALS / recipe / "resume.safetensors")
    assert len(stepped) == 3
    for name, tensor in stepped.items():
        name = name.removeprefix("resume.")
        name = name if name in weights else f"unet.{name}"
        # a step moves weights by 1e-4, and the tolerance is that of float32 itself
        assert (tensor - checkpoint.state_dict[name]).abs().max() > 5e-5
        torch.testing.assert_close(weights[name], tensor, atol=1e-7, rtol=0)
    assert unet.class_embedding.weight[-1].abs().max() == 0


@pytest.mark.parametrize("recipe", originals.RECIPES_WITH_OPTIMIZER)
def test_every_moment_has_its_place(tmp_path, recipe):
    params = OriginalCheckpoint(recipe).params
    shapes = originals.original_weight_shapes(params)
    stored = load_optimizer(originals.unpack_optimizer(recipe, tmp_path), shapes)
    unet = original.build_empty_unet(params)
    mapped = original.map_original_optimizer(stored, unet)
    for kind in ("exp_avg", "exp_avg_sq"):
        # as if the moments were the weights of a checkpoint
        as_weights = {name: stored["state"][index][kind] for index, name in enumerate(shapes)}
        expected = original.map_original_weights(as_weights, params)
        for index, (name, _) in enumerate(unet.named_parameters()):
            assert torch.equal(mapped["state"][index][kind], expected[name]), name
    steps = [entry["step"] for entry in mapped["state"].values()]
    assert all(step == 2 and step.dtype == torch.float32 for step in steps)
    assert len({step.data_ptr() for step in steps}) == len(steps)


def test_state_of_other_versions(tmp_path):
    """Steps as plain numbers, parameters that never had a gradient, and options that torch has gained or lost."""
    shapes = originals.original_weight_shapes(SMALL_PARAMS)
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes.values()]
    theirs = torch.optim.AdamW(parameters, betas=(0.9, 0.99))
    sum(parameter.sum() for parameter in parameters[::2]).backward()
    theirs.step()
    theirs.param_groups[0]["former_option"] = 1
    saved = theirs.state_dict()
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])
    torch.save(saved, tmp_path / "optim.pkl", _use_new_zipfile_serialization=False)
    convert_checkpoint(*write_small(tmp_path / "small"), tmp_path / "out", tmp_path / "optim.pkl")
    stored = load_checkpoint(tmp_path / "out" / "checkpoints" / "checkpoint-7").optimizer
    assert [entry["step"] for entry in stored["state"].values()] == [1] * len(parameters[::2])
    unet = ClassConditionalUNet2DModel(**original.original_unet_config(SMALL_PARAMS))
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.load_state_dict(stored)
    assert "former_option" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    sum(parameter.sum() for parameter in unet.parameters()).backward()
    optimizer.step()
