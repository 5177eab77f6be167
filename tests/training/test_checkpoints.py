"""Checkpoints come back bit for bit, and a damaged one is never taken for a whole one."""

import json
import subprocess
import sys

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
    set_aside,
)


FILES = [
    "averaged_weights.safetensors",
    "model.safetensors",
    "optimizer.bin",
    "scheduler_config.json",
    "timestep_sampler.npz",
    "training_state.json",
    "unet_config.json",
]
PROGRESS = Progress(
    step=3,
    epoch=3 * 10 / 96,
    images_seen=30,
    num_processes=2,
    images_per_step=10,
    dataset="sha256:abc",
    began_from="somewhere",
    lr_scheduler_step=2,
    gradient_scaler={"scale": 65536.0, "_growth_tracker": 1},
    # float32 sums, which JSON must not round
    metrics=torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).tolist(),
)


@pytest.fixture(scope="module")
def trained():
    """A tiny network after three steps, and its optimizer."""
    unet = make_unet()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in unet.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return unet, optimizer


@pytest.fixture
def save(tmp_path, trained):
    """Writes a checkpoint of a step, by default with all that there may be."""

    def make(step=3, **changes):
        unet, optimizer = trained
        averaged = [parameter.detach() / 3 for parameter in unet.parameters()]
        arguments = {
            "progress": PROGRESS,
            "options": {"seed": 1, "layer_types": ["resnet"], "learning_rate": 0.1 + 0.2, "dropout": None},
            "averaged_weights": (averaged, 7),
            "timestep_sampler": {"history": np.random.default_rng(0).random((4, 10)), "counts": np.arange(4)},
        }
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        save_checkpoint(
            folder, unet=unet, optimizer=optimizer, scheduler=EtaDDIMScheduler(), **{**arguments, **changes}
        )
        return folder

    return make


def test_there_and_back(save, trained):
    unet, optimizer = trained
    folder = save()
    assert sorted(path.name for path in folder.iterdir()) == FILES
    checkpoint = load_checkpoint(folder)
    assert checkpoint.progress == PROGRESS
    assert checkpoint.options == {"seed": 1, "layer_types": ["resnet"], "learning_rate": 0.1 + 0.2, "dropout": None}
    assert checkpoint.unet_config["block_out_channels"] == [8, 16]
    assert checkpoint.scheduler_config["num_train_timesteps"] == 1000
    weights = unet.state_dict()
    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in checkpoint.weights.items())
    averaged, updates = checkpoint.averaged_weights
    assert updates == 7
    pairs = list(zip(averaged, unet.parameters(), strict=True))
    assert all(torch.equal(average, parameter / 3) for average, parameter in pairs)
    expected = optimizer.state_dict()
    assert checkpoint.optimizer["param_groups"] == expected["param_groups"]
    for index, state in expected["state"].items():
        assert all(torch.equal(checkpoint.optimizer["state"][index][name], value) for name, value in state.items())
    assert np.array_equal(checkpoint.timestep_sampler["history"], np.random.default_rng(0).random((4, 10)))
    assert checkpoint.timestep_sampler["counts"].tolist() == [0, 1, 2, 3]


def test_what_there_need_not_be(save):
    folder = save(averaged_weights=None, timestep_sampler={}, progress=Progress(step=3, epoch=1.5), options={})
    assert sorted(path.name for path in folder.iterdir()) == [
        name for name in FILES if name not in ("averaged_weights.safetensors", "timestep_sampler.npz")
    ]
    checkpoint = load_checkpoint(folder)
    assert checkpoint.averaged_weights is None
    assert checkpoint.timestep_sampler == {}
    assert checkpoint.progress == Progress(step=3, epoch=1.5)


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found(save, name):
    """A file that is missing, cut, longer, of zeros, or has one bit otherwise, wherever that is."""
    folder = save()
    file = folder / name
    whole = file.read_bytes()
    message = f"{folder} is not a whole checkpoint: .*{name}"
    contents = [None, b"", whole[:-1], whole[: len(whole) // 2], whole + b"\n", whole[:-50] + bytes(50)]
    for place in np.random.default_rng(0).integers(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        contents.append(bytes(flipped))
    for content in contents:
        file.unlink() if content is None else file.write_bytes(content)
        if name == STATE_NAME and content in (whole[:-1], whole + b"\n"):
            # an end of line more or less says nothing else
            continue
        with pytest.raises(DamagedCheckpointError, match=message):
            load_checkpoint(folder)
        file.write_bytes(whole)
    load_checkpoint(folder)


def test_every_number_of_the_state_is_checked(save):
    folder = save()
    state = json.loads((folder / STATE_NAME).read_text())
    for name, value in (("step", 4), ("images_seen", 31), ("options", {"seed": 2}), ("files", {}), ("sha256", None)):
        (folder / STATE_NAME).write_text(json.dumps({**state, name: value}))
        with pytest.raises(DamagedCheckpointError, match=f"{STATE_NAME} has changed since it was written"):
            load_checkpoint(folder)
    for text in ("[]", "null", "{}", '{"format_version": 2'):
        (folder / STATE_NAME).write_text(text)
        with pytest.raises(DamagedCheckpointError, match=f"{STATE_NAME} is not readable"):
            load_checkpoint(folder)


def test_another_version_is_not_damaged(save):
    """It is refused, and not set aside."""
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
    for name in ("checkpoint-", "checkpoint-4a", "damaged-checkpoint-1", "notes"):
        (folder / name).mkdir()
    (folder / "checkpoint-7").write_text("a file")
    assert [path.name for path in find_checkpoints(folder)] == [f"checkpoint-{step}" for step in (2, 9, 10, 100)]
    remove_old_checkpoints(folder, 2)
    assert [path.name for path in find_checkpoints(folder)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-1")) == [
        "checkpoint-",
        "checkpoint-4a",
        "checkpoint-7",
        "damaged-checkpoint-1",
        "notes",
    ]
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_set_aside_never_replaces(save):
    names = []
    for _ in range(3):
        names.append(set_aside(save()).name)
    assert names == ["damaged-checkpoint-3", "damaged-2-checkpoint-3", "damaged-3-checkpoint-3"]


def test_a_second_one_of_the_same_step(save):
    """The first stays until the second is whole."""
    folder = save()

    class FullDisk:
        def keys(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"could not write .*checkpoint-3 \(.*No space left .* are as they were"):
        save(timestep_sampler={"counts": np.arange(3)}, options=FullDisk())
    assert load_checkpoint(folder).progress == PROGRESS
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]
    save(progress=Progress(step=3, epoch=1))
    assert load_checkpoint(folder).progress == Progress(step=3, epoch=1)


def test_a_disk_that_fills(tmp_path):
    """Whichever file it is that does not fit, what was there is as it was."""
    program = (
        "import resource, sys\n"
        "import torch\n"
        "from imagenet64_diffusion import EtaDDIMScheduler\n"
        "from imagenet64_diffusion.training.checkpoints import Progress, load_checkpoint, save_checkpoint\n"
        "from tests.components import make_unet\n"
        "unet, folder = make_unet(), sys.argv[1]\n"
        "optimizer = torch.optim.AdamW(unet.parameters())\n"
        "for parameter in unet.parameters(): parameter.grad = torch.ones_like(parameter)\n"
        "optimizer.step()\n"
        "averaged = list(unet.parameters())\n"
        "def save(step):\n"
        "    save_checkpoint(folder, unet=unet, optimizer=optimizer, scheduler=EtaDDIMScheduler(),\n"
        "        progress=Progress(step=step, epoch=0), options={}, averaged_weights=(averaged, 1))\n"
        "save(0)\n"
        "for size in (0, 10, 1000, 100_000, 200_000, 300_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    try: save(1)\n"
        "    except OSError as error: sys.stderr.write(f'{error}\\n')\n"
        "    else: sys.exit('it was written')\n"
        "    assert load_checkpoint(folder).progress.step == 0\n"
    )
    folder = tmp_path / "checkpoints" / "checkpoint-0"
    finished = subprocess.run(
        [sys.executable, "-c", program, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stderr.splitlines()
    assert len(lines) == 6
    assert all(line.startswith(f"could not write {folder} (") for line in lines), lines
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-0"]
