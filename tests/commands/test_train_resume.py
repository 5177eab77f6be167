"""Whatever happens to a run of imagenet64-train, the same command resumes as if nothing had."""

import json
import math
import re
import shutil

import pytest

from imagenet64_diffusion.tests.commands.processes import snapshot
from imagenet64_diffusion.tests.commands.training_runs import assert_equal_runs
from imagenet64_diffusion.training.checkpoints import load_checkpoint


def test_killed_again_and_again(new_run, undisturbed):
    """In a step, in a checkpoint, in the removal of one, and in the final pipeline; with and without workers."""
    run = new_run()
    run.kill_when(lambda: len(run.metrics()) == 2)
    assert run.checkpoint_names() == ["checkpoint-6"]

    run.kill_when((run.checkpoints / ".checkpoint-12.writing").exists, dataloader_num_workers=2)
    assert run.checkpoint_names() == [".checkpoint-12.writing", "checkpoint-6"]

    # the removal of a checkpoint takes a while for so many files
    for number in range(5000):
        (run.checkpoints / "checkpoint-6" / str(number)).touch()
    run.kill_when(lambda: not (run.checkpoints / "checkpoint-6").exists())
    assert run.checkpoint_names() == [".checkpoint-6.writing", "checkpoint-12", "checkpoint-18"]

    run.kill_when((run.output_dir / ".model.writing").exists, dataloader_num_workers=2)
    assert run.checkpoint_names() == ["checkpoint-18", "checkpoint-20"]
    assert not (run.output_dir / "model").exists()

    assert "training from step 20 of" in run.finish()
    assert_equal_runs(run, undisturbed)


def test_what_a_power_cut_leaves(killed_run, undisturbed):
    """A damaged checkpoint, half of one, one between its two names, and a log that ends in anything."""
    damaged, whole = (killed_run.checkpoints / name for name in ("checkpoint-12", "checkpoint-6"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-100])
    contents = snapshot(damaged)
    (killed_run.checkpoints / "damaged-checkpoint-12").mkdir()
    half = killed_run.checkpoints / ".checkpoint-30.writing"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    whole.rename(whole.with_name(".checkpoint-6.replaced"))
    with (killed_run.output_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00\x00\n{"step": "many"}\n[]\n{"step": 13, "lo')
    said = killed_run.finish()
    assert f"{damaged} is not a whole checkpoint: model.safetensors " in said
    assert f"from step 6 of {whole}" in said
    assert f"{damaged} is now damaged-2-checkpoint-12" in said
    assert snapshot(killed_run.checkpoints / "damaged-2-checkpoint-12") == contents
    for name in ("damaged-checkpoint-12", "damaged-2-checkpoint-12"):
        shutil.rmtree(killed_run.checkpoints / name)
    assert_equal_runs(killed_run, undisturbed)


def test_what_may_not_change(killed_run, tmp_path, capsys):
    """A run that would not be a training of the same thing is refused, and nothing is touched."""
    newest, older = (killed_run.checkpoints / f"checkpoint-{step}" for step in (12, 6))
    other = shutil.copytree(killed_run.prepared, tmp_path / "other")
    record = json.loads((other / "preparation.json").read_text())
    (other / "preparation.json").write_text(json.dumps({**record, "fingerprint": "sha256:" + 64 * "0"}))
    for name, value, message in (
        ("layer_types", "res", f"layer_types is ['resnet'], but {newest} was trained with ['resnet', 'class_"),
        ("max_train_steps", 11, "max_train_steps is 11, but"),
        ("resume_from_checkpoint", "never", f"resume_from_checkpoint is never, but {newest} is there already"),
        ("resume_from_checkpoint", older, f"{newest} is there already"),
        ("resume_from_checkpoint", tmp_path / "a", "of a run that began from random weights, not from"),
        ("train_data_dir", other, f"fingerprint is {'sha256:' + 64 * '0'}, but {newest} was trained with sha256:"),
    ):
        assert message in killed_run.refuse(capsys, **{name: value})
    for folder in (newest, older):
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (folder / "model.safetensors").write_bytes(content)
    message = killed_run.refuse(capsys)
    assert message.startswith(f"error: none of the checkpoints in {killed_run.checkpoints} is whole")
    assert "checkpoint-12 is not a whole checkpoint: model.safetensors " in message


def test_what_may_change(killed_run, undisturbed):
    """The run says what has changed and goes on with that, at its place among the images."""
    changes = {"max_train_steps": 16, "learning_rate": 2e-3, "seed": 1, "dropout": 0.2, "train_batch_size": 8}
    said = killed_run.finish(**changes, checkpoints_total_limit=0)
    for change in ("dropout was 0.1 and is 0.2", "images_per_step was 10 and is 16", "seed was 0 and is 1"):
        assert f"warning: the run goes on otherwise than it would have: {change}\n" in said
    losses, before = ([entry["loss"] for entry in run.metrics()] for run in (killed_run, undisturbed))
    assert (losses[:3], losses[3] == before[3]) == (before[:3], False)
    last = killed_run.metrics()[3]
    # half a cosine from the peak at step 3 to the end, which the log tells after the step
    assert last["step"] == 16
    assert last["lr"] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * (16 - 3) / (16 - 3))), abs=1e-12)
    progress = load_checkpoint(killed_run.checkpoints / "checkpoint-16").progress
    assert progress.images_seen == 120 + 4 * 16
    assert progress.epoch == last["epoch"] == pytest.approx(184 / 96)


def test_a_checkpoint_of_another_run(killed_run, new_run, undisturbed):
    """It is where a run begins; killed, the same command resumes the run's own newest one."""
    run, start = new_run("other"), killed_run.checkpoints / "checkpoint-12"
    said = run.kill_when((run.checkpoints / "checkpoint-18").exists, resume_from_checkpoint=start)
    assert f"training from step 12 of {start}" in said
    said = run.finish(resume_from_checkpoint=start)
    assert f"training from step 18 of {run.checkpoints / 'checkpoint-18'}" in said
    assert load_checkpoint(run.checkpoints / "checkpoint-20").progress.began_from == str(start)
    for name in ("model/unet/diffusion_pytorch_model.safetensors", "checkpoints/checkpoint-20/optimizer.bin"):
        assert (run.output_dir / name).read_bytes() == (undisturbed.output_dir / name).read_bytes()


def test_a_full_disk(killed_run, undisturbed):
    """No file may be so large as the optimizer's state is."""
    before = snapshot(killed_run.checkpoints)
    process = killed_run.start(largest_file=300_000)
    assert process.end() == 2, process.output()
    message = process.errors()[-1]
    assert message.startswith(f"error: could not write {killed_run.checkpoints / 'checkpoint-18'} (")
    assert message.endswith("; the checkpoints before it are as they were")
    assert "Traceback" not in process.output()
    assert snapshot(killed_run.checkpoints) == before
    killed_run.finish()
    assert_equal_runs(killed_run, undisturbed)


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_place_that_cannot_be_written(new_run, tmp_path, capsys, place):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / place) in new_run().refuse(capsys, output_dir=tmp_path / place)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e20", r"error: the loss is not finite at step \d+, timesteps \d.*; .*/checkpoint-\d is from before\. A sm"),
        ("1e39", r"error: the weights are not finite after step 1; no checkpoint is from before\. A smaller"),
    ],
)
def test_a_loss_that_is_no_number(new_run, rate, message):
    """The run says where, and checkpoints hold finite numbers only."""
    run = new_run(learning_rate=rate, lr_scheduler="constant", max_grad_norm=0, checkpointing_steps=1)
    process = run.start()
    assert process.end() == 2, process.output()
    assert re.match(message, process.errors()[-1]), process.errors()[-1]
    assert "Traceback" not in process.output()
    assert not (run.output_dir / "model").exists()
    for name in run.checkpoint_names():
        checkpoint = load_checkpoint(run.checkpoints / name)
        tensors = [*checkpoint.weights.values(), *checkpoint.averaged_weights[0]]
        assert all(tensor.isfinite().all() for tensor in tensors), name
