"""Training goes on where the original stopped."""

import json

import pytest
import torch
from safetensors.torch import load_file

from imagenet64_diffusion import ClassConditionalUNet2DModel, EtaDDIMScheduler, LearnedVarianceDDPMScheduler
from imagenet64_diffusion.conversion.converting import convert_files
from imagenet64_diffusion.conversion.original_weights import (
    map_original_optimizer,
    map_original_weights,
    map_to_original_weights,
    original_unet_config,
    original_weight_shapes,
)
from imagenet64_diffusion.conversion.safe_loading import load_optimizer
from imagenet64_diffusion.schedulers.original_schedule import original_cosine_betas
from imagenet64_diffusion.tests.components import OriginalCheckpoint
from imagenet64_diffusion.tests.conversion.originals import (
    ORIGINALS,
    RECIPES_WITH_OPTIMIZER,
    SMALL_PARAMS,
    model_file,
    params_file,
    unpack_optimizer,
    write_small,
)
from imagenet64_diffusion.training.checkpoints import find_checkpoints, load_checkpoint
from imagenet64_diffusion.training.objectives import HybridLoss
from imagenet64_diffusion.training.options import TrainOptions


def take_a_step(unet: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: OriginalCheckpoint) -> None:
    """One AdamW step on the batch of which the original's result is stored."""
    expected = checkpoint.expected
    loss = HybridLoss(
        LearnedVarianceDDPMScheduler(trained_betas=original_cosine_betas(1000), set_alpha_to_one=False, max_beta=0.999)
    )
    timesteps = expected["loss.timestep"] - 1
    output = unet(expected["loss.x_t"], timesteps, checkpoint.labels("loss")).sample
    terms = loss(output, expected["loss.x0"], expected["loss.noise"], expected["loss.x_t"], timesteps)
    optimizer.zero_grad()
    terms.total.mean().backward()
    optimizer.step()


@pytest.mark.parametrize("recipe", RECIPES_WITH_OPTIMIZER)
def test_the_next_step_is_the_originals(tmp_path, recipe):
    """From the folder that the conversion writes for going on."""
    checkpoint = OriginalCheckpoint(recipe)
    optimizer_file = unpack_optimizer(recipe, tmp_path)
    out = tmp_path / "out"
    convert_files(model_file(recipe), params_file(recipe), out, optimizer_file, "original_interleaved")
    folder = find_checkpoints(out / "checkpoints")[-1]
    stored = load_checkpoint(folder)
    assert (folder.name, stored.progress.step, stored.progress.epoch) == ("checkpoint-2", 2, 3)
    assert EtaDDIMScheduler(**stored.scheduler_config).alphas_cumprod.max() == pytest.approx(0.999, abs=1e-9)

    unet = ClassConditionalUNet2DModel(**stored.unet_config).train()
    unet.load_state_dict(stored.weights)
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.load_state_dict(stored.optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.9, 0.999), 1e-4, 0.01)
    take_a_step(unet, optimizer, checkpoint)

    weights = map_to_original_weights(unet.state_dict(), checkpoint.params, {})
    expected = load_file(ORIGINALS / recipe / "resume.safetensors")
    assert len(expected) == 3
    for name, tensor in expected.items():
        name = name.removeprefix("resume.")
        name = name if name in weights else f"unet.{name}"
        # a step moves weights by 1e-4, and the tolerance is that of float32 itself
        assert (tensor - checkpoint.state_dict[name]).abs().max() > 5e-5
        torch.testing.assert_close(weights[name], tensor, atol=1e-7, rtol=0)
    assert weights["c_emb.weight"].shape == (24, 10)
    assert unet.class_embedding.weight[-1].abs().max() == 0


@pytest.mark.parametrize("recipe", RECIPES_WITH_OPTIMIZER)
def test_every_moment_has_its_place(tmp_path, recipe):
    checkpoint = OriginalCheckpoint(recipe)
    params, shapes = checkpoint.params, original_weight_shapes(checkpoint.params)
    original = load_optimizer(unpack_optimizer(recipe, tmp_path), shapes)
    unet = ClassConditionalUNet2DModel(**original_unet_config(params))
    mapped = map_original_optimizer(original, unet)

    names = [name for name, _ in unet.named_parameters()]
    assert list(mapped["state"]) == list(range(len(names)))
    assert mapped["param_groups"][0]["params"] == list(range(len(names)))
    for kind in ("exp_avg", "exp_avg_sq"):
        # as if the moments were the weights of a checkpoint
        as_weights = {name: original["state"][index][kind] for index, name in enumerate(shapes)}
        for name, tensor in map_original_weights(as_weights, params).items():
            assert torch.equal(mapped["state"][names.index(name)][kind], tensor), name
    index = names.index("class_embedding.weight")
    assert mapped["state"][index]["exp_avg"][-1].abs().max() == 0
    steps = [entry["step"] for entry in mapped["state"].values()]
    assert all(step == 2 and step.dtype == torch.float32 for step in steps)
    assert len({step.data_ptr() for step in steps}) == len(steps)


def test_state_of_other_versions(tmp_path):
    """Steps as plain numbers, parameters that never had a gradient, and options that torch has gained or lost."""
    shapes = original_weight_shapes(SMALL_PARAMS)
    unet = ClassConditionalUNet2DModel(**original_unet_config(SMALL_PARAMS))
    state = {
        index: {"step": 5, "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
        for index, shape in enumerate(shapes.values())
        if index % 2
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-4, "weight_decay": 0.0, "amsgrad": False, "former_option": 1}
    original = {"state": state, "param_groups": [{**group, "params": list(range(len(shapes)))}]}
    mapped = map_original_optimizer(original, unet)
    assert len(mapped["state"]) == len(state)

    files = write_small(tmp_path / "small")
    torch.save(original, tmp_path / "optim.pkl")
    convert_files(*files, tmp_path / "out", tmp_path / "optim.pkl")
    stored = load_checkpoint(tmp_path / "out" / "checkpoints" / "checkpoint-7").optimizer
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.load_state_dict(stored)
    assert "former_option" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    for parameter in unet.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_options_of_the_training(tmp_path):
    """Those of the original, under the names of our training."""
    recipe = "res"
    convert_files(model_file(recipe), params_file(recipe), tmp_path / "out", unpack_optimizer(recipe, tmp_path))
    stored = json.loads((tmp_path / "out" / "checkpoints" / "checkpoint-2" / "training_state.json").read_text())
    options = TrainOptions(train_data_dir=str(tmp_path), **stored["options"])
    assert (options.prediction_type, options.beta_schedule) == ("epsilon", "original_cosine")
    assert (options.learning_rate, options.adam_epsilon, options.use_ema) == (3e-4, 1e-4, False)
    assert (options.class_dropout_prob, options.max_grad_norm, options.lr_scheduler) == (0.2, 0.0, "constant")
