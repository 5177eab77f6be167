"""Files and folders appear whole or not at all."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from imagenet64_diffusion.utils.atomic_write import atomic_file, atomic_folder, only_writer, settle_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(tmp_path):
    """A folder that is to be replaced."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    return tmp_path / "model"


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_files_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.write_text("")
    with atomic_folder(tmp_path / "model") as writing:
        (writing / "sub").mkdir()
        save_file({"weight": torch.zeros(2)}, writing / "sub" / "weights.safetensors")
        (writing / "script.sh").touch(0o700)
    mode = (tmp_path / "model" / "sub" / "weights.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(usual.stat().st_mode)
    # what is more stays
    assert stat.S_IMODE((tmp_path / "model" / "script.sh").stat().st_mode) & 0o700 == 0o700


def test_an_error_leaves_what_was_there(old):
    with pytest.raises(AttributeError, match="nothing"), atomic_folder(old) as writing:
        (writing / "new").write_text("new").nothing()
    with pytest.raises(AttributeError, match="nothing"), atomic_file(old / "old") as writing:
        writing.write_text("new").nothing()
    assert names(old.parent) == ["model"]
    assert names(old) == ["old"]
    assert (old / "old").read_text() == "old"


def test_kill_between_the_two_renames(old):
    """The moment in which the new folder is not yet in place: the old one is put back, and halves are cleared up."""
    old.rename(old.with_name(".model.replaced"))
    (old.parent / ".model.writing" / "half").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^\[\]$"), atomic_folder(old) as writing:
        raise ValueError(names(writing))
    assert names(old.parent) == ["model"]
    assert names(old) == ["old"]


def test_settling_a_folder(tmp_path):
    """What killed writers left: halves go, and an old folder comes back unless the new one is there."""
    assert settle_folder(tmp_path / "nowhere") is None
    for name in (".a.writing", ".b.replaced", ".c.replaced", "c", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    settle_folder(tmp_path)
    assert names(tmp_path) == ["b", "c", "d"]
    assert names(tmp_path / "b") == [".b.replaced"]
    assert names(tmp_path / "c") == ["c"]


def test_killed_at_any_call(tmp_path):
    """A writer that dies at its k-th step, for every k: the old folder is there or the new one, never a half."""
    program = (
        "import os, signal, sys; from imagenet64_diffusion.utils.atomic_write import atomic_folder\n"
        "left = int(sys.argv[2])\n"
        "def die(event, arguments):\n"
        "    global left\n"
        "    if event in ('os.rename', 'os.mkdir', 'open', 'shutil.rmtree', 'os.remove', 'os.rmdir', 'os.scandir'):\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(die)\n"
        "with atomic_folder(sys.argv[1]) as writing:\n"
        "    for name in 'ab': (writing / name).write_text('new')\n"
    )
    model, found, calls, code = tmp_path / "model", set(), 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        for name in "ab":
            (model / name).write_text("old")
        calls += 1
        code = subprocess.run([sys.executable, "-c", program, str(model), str(calls)]).returncode
        settle_folder(tmp_path)
        assert (names(tmp_path), names(model)) == (["model"], ["a", "b"]), calls
        contents = {(model / name).read_text() for name in "ab"}
        assert len(contents) == 1, calls
        found |= contents
    assert code == 0
    assert calls > 10
    assert found == {"old", "new"}


@pytest.mark.parametrize("end", ["kill", "finish"])
def test_one_writer_at_a_time(tmp_path, monkeypatch, end):
    """By whatever name the folder is called; when it ends or is killed, the next one may write."""
    folder = tmp_path / "deep" / "out"
    program = (
        "import sys; from imagenet64_diffusion.utils.atomic_write import only_writer\n"
        "with only_writer(sys.argv[1]): print('writing', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        folder.mkdir()
        monkeypatch.chdir(folder)
        for name in (folder, ".", "../out"):
            with pytest.raises(OSError, match="another process is writing to it now"), only_writer(name):
                pass
        begin = time.monotonic()
        with pytest.raises(OSError, match="another process"), only_writer(folder, waiting_seconds=0.5):
            pass
        assert time.monotonic() - begin > 0.4
        if end == "kill":
            process.kill()
    with only_writer(folder):
        assert ".out.lock" in names(folder.parent)
    assert names(folder.parent) == ["out"]
