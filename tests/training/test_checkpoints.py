"""Checkpoints come back bit for bit, and a damaged one is never taken for a whole one."""

import json
import resource

import numpy as np
import pytest
import torch

from imagenet64_diffusion import EtaDDIMScheduler
from imagenet64_diffusion.tests.components import make_unet
from imagenet64_diffusion.training.checkpoints import (
    STATE_NAME,
    DamagedCheckpointError,
    Progress,
    find_checkpoints,
    load_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
)


OPTIONAL_FILES = ["averaged_weights.safetensors", "timestep_sampler.npz"]
FILES = ["model.safetensors", "optimizer.bin", "scheduler_config.json", "training_state.json", "unet_config.json"]
PROGRESS = Progress(
    step=3,
    epoch=3 * 10 / 96,
    images_seen=30,
    num_processes=2,
    dataset="sha256:abc",
    began_from="somewhere",
    gradient_scaler={"scale": 65536.0, "_growth_tracker": 1},
    # float32 sums, which JSON must not round
    metrics=torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).tolist(),
)
OPTIONS = {"seed": 1, "layer_types": ["resnet"], "learning_rate": 0.1 + 0.2, "dropout": None}
SAMPLER = {"history": np.random.default_rng(0).random((4, 10)), "counts": np.arange(4)}


@pytest.fixture(scope="module")
def trained():
    """A tiny network after three steps, and its optimizer."""
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(3):
        for parameter in unet.parameters():
            parameter.grad = torch.rand_like(parameter)
        optimizer.step()
    return unet, optimizer


@pytest.fixture
def save(tmp_path, trained):
    """Writes a checkpoint of a step, by default with all that there may be."""

    def make(step=3, **changes):
        unet, optimizer = trained
        averaged = ([parameter.detach() / 3 for parameter in unet.parameters()], 7)
        arguments = {"progress": PROGRESS, "options": OPTIONS, "averaged_weights": averaged}
        arguments |= {"timestep_sampler": SAMPLER, "scheduler": EtaDDIMScheduler()}
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        save_checkpoint(folder, unet=unet, optimizer=optimizer, **{**arguments, **changes})
        return folder

    return make


def test_there_and_back(save, trained):
    unet, optimizer = trained
    folder = save()
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES + OPTIONAL_FILES)
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.progress, checkpoint.options) == (PROGRESS, OPTIONS)
    configs = checkpoint.unet_config["block_out_channels"], checkpoint.scheduler_config["num_train_timesteps"]
    assert configs == ([8, 16], 1000)
    averaged = ([parameter.detach() / 3 for parameter in unet.parameters()], 7)
    expected = (dict(unet.state_dict()), averaged, optimizer.state_dict(), SAMPLER)
    found = (checkpoint.weights, checkpoint.averaged_weights, checkpoint.optimizer, checkpoint.timestep_sampler)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

    progress = Progress(step=3, epoch=1.5)
    folder = save(averaged_weights=None, timestep_sampler={}, progress=progress, options={})
    assert sorted(path.name for path in folder.iterdir()) == FILES
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.averaged_weights, checkpoint.timestep_sampler, checkpoint.progress) == (None, {}, progress)


@pytest.mark.parametrize("name", FILES + OPTIONAL_FILES)
def test_every_damage_is_found(save, name):
    """A file that is missing, cut, longer, of zeros, or has one bit otherwise, wherever that is."""
    folder = save()
    file = folder / name
    whole = file.read_bytes()
    contents = [None, b"", whole[: len(whole) // 2], whole[:-50] + bytes(50)]
    if name == STATE_NAME:
        state = json.loads(whole)
        changes = {"step": 4, "images_seen": 31, "options": {"seed": 2}, "files": {}, "sha256": None}
        contents += [json.dumps({**state, key: value}).encode() for key, value in changes.items()]
        contents += [b"[]", b"null", b"{}"]
    else:
        # in the state an end of line more or less says nothing else
        contents += [whole[:-1], whole + b"\n"]
    for place in np.random.default_rng(0).integers(0, len(whole), 10):
        contents.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for content in contents:
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=f"{folder} is not a whole checkpoint: .*{name}"):
            load_checkpoint(folder)
        file.write_bytes(whole)
    load_checkpoint(folder)


def test_another_version_is_refused_but_not_damaged(save):
    folder = save()
    (folder / STATE_NAME).write_text(json.dumps({"format_version": 1, "step": 3}))
    with pytest.raises(ValueError, match="has format_version 1, but this version reads 2") as caught:
        load_checkpoint(folder)
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_the_latest_are_kept(save, tmp_path):
    """By their steps, not by their names; what is none of them stays."""
    folder = tmp_path / "checkpoints"
    for step in (9, 10, 100, 2):
        save(step)
    others = ["checkpoint-", "checkpoint-4a", "damaged-checkpoint-1", "notes"]
    for name in others:
        (folder / name).mkdir()
    (folder / "checkpoint-7").write_text("a file")
    assert [path.name for path in find_checkpoints(folder)] == [f"checkpoint-{step}" for step in (2, 9, 10, 100)]
    remove_old_checkpoints(folder, 2)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(["checkpoint-10", "checkpoint-100", "checkpoint-7", *others])
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_a_disk_that_fills(save):
    """Whichever file it is that does not fit, what was there is as it was, until another one is whole."""
    folder = save()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 10, 1000, 100_000, 200_000, 300_000):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match=rf"^could not write {folder} \(.*\); the checkpoints .* as they were"):
                save(progress=Progress(step=3, epoch=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load_checkpoint(folder).progress == PROGRESS
        assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]
    save(progress=Progress(step=3, epoch=1))
    assert load_checkpoint(folder).progress == Progress(step=3, epoch=1)
