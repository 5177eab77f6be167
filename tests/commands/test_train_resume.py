"""Whatever happens to a run of imagenet64-train, the same command goes on as if nothing had."""

import json
import math
import re
import shutil
import signal

import pytest

from imagenet64_diffusion.tests.commands.processes import snapshot, wait_until
from imagenet64_diffusion.tests.commands.training_runs import assert_equal_runs
from imagenet64_diffusion.train_imagenet64 import main
from imagenet64_diffusion.training.checkpoints import load_checkpoint


def losses(run):
    return [entry["loss"] for entry in run.metrics()]


def test_killed_again_and_again(new_run, undisturbed):
    """In a step, in a checkpoint, in the removal of one, and in the final pipeline; with and without workers."""
    run = new_run()
    # 1. in a step, between two checkpoints
    process = run.start()
    wait_until(lambda: len(run.metrics()) == 2, process)
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    assert run.checkpoint_names() == ["checkpoint-6"]

    # 2. in a checkpoint
    process = run.start(dataloader_num_workers=2)
    wait_until((run.checkpoints / ".checkpoint-12.writing").exists, process)
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    assert run.checkpoint_names() == [".checkpoint-12.writing", "checkpoint-6"]

    # 3. in the removal of a checkpoint, which takes a while for so many files
    for number in range(5000):
        (run.checkpoints / "checkpoint-6" / str(number)).touch()
    process = run.start()
    wait_until(lambda: not (run.checkpoints / "checkpoint-6").exists(), process)
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    assert run.checkpoint_names() == [".checkpoint-6.writing", "checkpoint-12", "checkpoint-18"]

    # 4. in the final pipeline
    process = run.start(dataloader_num_workers=2)
    wait_until((run.output_dir / ".model.writing").exists, process)
    process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    assert run.checkpoint_names() == ["checkpoint-18", "checkpoint-20"]
    assert not (run.output_dir / "model").exists()

    process = run.finish()
    assert "all 20 steps have been taken already" in process.output()
    assert_equal_runs(run, undisturbed)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (cut, "model.safetensors", "model.safetensors has changed since it was written"),
        (cut, "training_state.json", "training_state.json is not readable"),
    ],
)
def test_a_damaged_checkpoint(killed_run, undisturbed, damage, name, message):
    """The one before it is used, and the damaged one is kept under another name."""
    damaged = killed_run.checkpoints / "checkpoint-12"
    damage(damaged / name)
    contents = snapshot(damaged)
    process = killed_run.finish()
    assert f"{damaged} is not a whole checkpoint: {message}" in process.output()
    assert f"from step 6 of {killed_run.checkpoints / 'checkpoint-6'}" in process.output()
    assert f"{damaged} is now damaged-checkpoint-12" in process.output()
    assert snapshot(killed_run.checkpoints / "damaged-checkpoint-12") == contents
    shutil.rmtree(killed_run.checkpoints / "damaged-checkpoint-12")
    assert_equal_runs(killed_run, undisturbed)


def test_what_a_power_cut_leaves(killed_run, undisturbed):
    """Half a checkpoint, one between its two names, and a log that ends in anything."""
    half = killed_run.checkpoints / ".checkpoint-30.writing"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    newest = killed_run.checkpoints / "checkpoint-12"
    newest.rename(newest.with_name(".checkpoint-12.replaced"))
    with (killed_run.output_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00\x00\n{"step": "many"}\n[]\n{"step": 13, "lo')
    process = killed_run.finish()
    assert f"from step 12 of {newest}" in process.output()
    assert_equal_runs(killed_run, undisturbed)


def refused(run, capsys, **changes) -> str:
    """The sentence with which the command is refused; nothing has changed then."""
    before = snapshot(run.folder)
    assert main(run.arguments(**changes)) == 2
    assert snapshot(run.folder) == before
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_all_checkpoints_damaged(killed_run, capsys):
    for name in ("checkpoint-6", "checkpoint-12"):
        flip_a_bit(killed_run.checkpoints / name / "model.safetensors")
    message = refused(killed_run, capsys)
    assert message.startswith(f"error: none of the checkpoints in {killed_run.checkpoints} is whole")
    assert "checkpoint-12 is not a whole checkpoint: model.safetensors has changed" in message


def test_what_may_not_change(killed_run, tmp_path, capsys):
    """A run that would not be a training of the same thing is refused, and nothing is touched."""
    newest = killed_run.checkpoints / "checkpoint-12"
    assert refused(killed_run, capsys, prediction_type="epsilon") == (
        f"error: prediction_type is epsilon, but {newest} was trained with v_prediction"
    )
    assert "the network has layer_types ['resnet'], but" in refused(killed_run, capsys, layer_types="res")
    assert "num_train_timesteps is 5, but" in refused(killed_run, capsys, num_train_timesteps=5)
    assert "max_train_steps is 11, but" in refused(killed_run, capsys, max_train_steps=11)
    assert "resume_from_checkpoint is never, but" in refused(killed_run, capsys, resume_from_checkpoint="never")
    older = killed_run.checkpoints / "checkpoint-6"
    assert f"{newest} is there already" in refused(killed_run, capsys, resume_from_checkpoint=older)
    message = refused(killed_run, capsys, resume_from_checkpoint=tmp_path / "elsewhere")
    assert "has checkpoints of a run that began from random weights, not from" in message
    other = shutil.copytree(killed_run.prepared, tmp_path / "other")
    record = json.loads((other / "preparation.json").read_text())
    (other / "preparation.json").write_text(json.dumps({**record, "fingerprint": "sha256:" + 64 * "0"}))
    message = refused(killed_run, capsys, train_data_dir=other)
    assert message.startswith(f"error: train_data_dir holds other images than {newest} was trained on")


def test_what_may_change(killed_run, undisturbed):
    """The run says what has changed and goes on with that."""
    process = killed_run.finish(max_train_steps=18, learning_rate=2e-3, seed=1, dropout=0.2)
    said = [line for line in process.errors() if line.startswith("warning: the run goes on otherwise")]
    for change in (
        "seed was 0 and is 1",
        "learning_rate was 0.001 and is 0.002",
        "dropout was 0.1 and is 0.2",
        "the learning-rate schedule ended at step 20 and ends at 18",
    ):
        assert any(line.endswith(change) for line in said), said
    assert len(said) == 4
    assert [entry["step"] for entry in killed_run.metrics()] == [4, 8, 12, 16, 18]
    assert losses(killed_run)[:3] == losses(undisturbed)[:3]
    assert losses(killed_run)[3] != losses(undisturbed)[3]
    # half a cosine from the peak at step 3 to the end
    expected = 2e-3 * 0.5 * (1 + math.cos(math.pi * (16 - 3) / (18 - 3)))
    assert killed_run.metrics()[3]["lr"] == pytest.approx(expected, rel=1e-12)


def test_another_batch_size(killed_run):
    """The images go on where they were, and each step has more of them."""
    process = killed_run.finish(max_train_steps=14, train_batch_size=8, checkpoints_total_limit=0)
    assert "a step had 10 images and has 16" in process.output()
    assert load_checkpoint(killed_run.checkpoints / "checkpoint-12").progress.images_seen == 120
    progress = load_checkpoint(killed_run.checkpoints / "checkpoint-14").progress
    assert progress.images_seen == 120 + 2 * 16
    assert progress.epoch == pytest.approx(152 / 96)
    assert killed_run.metrics()[-1]["epoch"] == pytest.approx(152 / 96)


def test_a_checkpoint_of_another_run(killed_run, new_run):
    """It is where a run begins; killed, the same command goes on from the run's own newest one."""
    run, start = new_run("other"), killed_run.checkpoints / "checkpoint-12"
    process = run.start(resume_from_checkpoint=start)
    wait_until((run.checkpoints / "checkpoint-18").exists, process)
    process.send(signal.SIGKILL)
    process.end()
    assert f"training from step 12 of {start}" in process.output()
    process = run.finish(resume_from_checkpoint=start)
    assert f"training from step 18 of {run.checkpoints / 'checkpoint-18'}" in process.output()
    assert load_checkpoint(run.checkpoints / "checkpoint-20").progress.began_from == str(start)
    killed_run.finish()
    for name in ("model/unet/diffusion_pytorch_model.safetensors", "checkpoints/checkpoint-20/optimizer.bin"):
        assert (run.output_dir / name).read_bytes() == (killed_run.output_dir / name).read_bytes()


def test_epochs_are_the_same_number_of_steps(new_run):
    """Sixteen images a step, 96 images: 1.25 epochs are 7.5 steps, so 8, from wherever the run goes on."""
    run = new_run(max_train_steps=None, num_train_epochs=1.25, train_batch_size=8, checkpointing_steps=3)
    process = run.start()
    wait_until((run.checkpoints / "checkpoint-3").exists, process)
    process.send(signal.SIGKILL)
    process.end()
    assert "8 steps of 16 images (1.3 epochs)" in process.output()
    process = run.finish()
    assert "8 steps of 16 images (1.3 epochs)" in process.output()
    assert run.checkpoint_names() == ["checkpoint-6", "checkpoint-8"]


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
    assert main(new_run().arguments(output_dir=tmp_path / place)) == 2
    captured = capsys.readouterr()
    assert str(tmp_path / place) in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.err
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("1e20", r"error: the loss is not finite at step \d+, timesteps \d.*; .*/checkpoint-\d is from before\. A sm"),
        ("1e39", r"error: the weights are not finite after step 1; there is no checkpoint from before\. A smaller"),
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
