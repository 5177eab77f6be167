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


def test_folder_takes_the_place_of_the_old_one(tmp_path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "deep" / "model") as writing:
            (writing / "sub").mkdir()
            (writing / "sub" / "file").write_text(content)
            (writing / content).write_text("")
        assert (tmp_path / "deep" / "model" / "sub" / "file").read_text() == content
        assert names(tmp_path / "deep") == ["model"]
    assert names(tmp_path / "deep" / "model") == ["second", "sub"]


@pytest.mark.skipif(os.name == "nt", reason="permissions are those of POSIX")
def test_files_have_the_usual_permissions(tmp_path):
    usual = tmp_path / "usual"
    usual.write_text("")
    with atomic_folder(tmp_path / "model") as writing:
        (writing / "sub").mkdir()
        save_file({"weight": torch.zeros(2)}, writing / "sub" / "weights.safetensors")
        script = writing / "script.sh"
        script.write_text("")
        script.chmod(0o700)
    mode = (tmp_path / "model" / "sub" / "weights.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == stat.S_IMODE(usual.stat().st_mode)
    # what is more stays
    assert stat.S_IMODE((tmp_path / "model" / "script.sh").stat().st_mode) & 0o700 == 0o700


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    (tmp_path / "file.txt").write_text("old")

    def fail_in_folder():
        with atomic_folder(tmp_path / "model") as writing:
            (writing / "new").write_text("new")
            raise ZeroDivisionError

    def fail_in_file():
        with atomic_file(tmp_path / "file.txt") as writing:
            writing.write_text("new")
            raise ZeroDivisionError

    for fail in (fail_in_folder, fail_in_file):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert names(tmp_path) == ["file.txt", "model"]
    assert names(tmp_path / "model") == ["old"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_file_keeps_its_ending(tmp_path):
    with atomic_file(tmp_path / "deep" / "a.png") as writing:
        assert writing.suffix == ".png"
        writing.write_bytes(b"x")
    assert names(tmp_path / "deep") == ["a.png"]


def test_kill_while_writing(tmp_path):
    """The old folder stays, and the next call clears up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    program = (
        "import sys, time; from imagenet64_diffusion.utils.atomic_write import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as writing:\n"
        "    (writing / 'new').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "model")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert names(tmp_path / "model") == ["old"]
    with atomic_folder(tmp_path / "model") as writing:
        assert names(writing) == []
        (writing / "new").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new"]


def test_kill_between_the_two_renames(tmp_path):
    """The moment in which the new folder is not yet in place: the old one is put back."""
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "model"):
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    begin = time.monotonic()
    with pytest.raises(OSError, match="file"), atomic_folder(tmp_path / "file" / "model"):
        pass
    assert time.monotonic() - begin < 10
    assert names(tmp_path) == ["file"]


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
        "import os, signal, sys; from pathlib import Path\n"
        "from imagenet64_diffusion.utils.atomic_write import atomic_folder\n"
        "left = int(sys.argv[2])\n"
        "def die(event, arguments):\n"
        "    global left\n"
        "    if event in ('os.rename', 'os.mkdir', 'open', 'shutil.rmtree', 'os.remove', 'os.rmdir', 'os.scandir'):\n"
        "        left -= 1\n"
        "        if left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(die)\n"
        "with atomic_folder(sys.argv[1]) as writing:\n"
        "    for name in 'ab': (writing / name).write_text('new')\n"
        "print(left)\n"
    )

    def write(calls):
        return subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "model"), str(calls)], capture_output=True, text=True
        )

    found = set()
    for calls in range(1, 100):
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        (tmp_path / "model").mkdir()
        for name in "ab":
            (tmp_path / "model" / name).write_text("old")
        finished = write(calls)
        settle_folder(tmp_path)
        assert names(tmp_path) == ["model"], calls
        assert names(tmp_path / "model") == ["a", "b"], calls
        contents = {(tmp_path / "model" / name).read_text() for name in "ab"}
        assert len(contents) == 1, calls
        found |= contents
        if finished.returncode == 0:
            break
        assert finished.returncode == -signal.SIGKILL, finished.stderr
    assert finished.returncode == 0
    assert calls > 10
    assert found == {"old", "new"}


def test_one_writer_at_a_time(tmp_path, monkeypatch):
    """By whatever name the folder is called; when it ends or is killed, the next one may write."""
    program = (
        "import sys, time; from imagenet64_diffusion.utils.atomic_write import only_writer\n"
        "with only_writer(sys.argv[1]): print('writing', flush=True); sys.stdin.read()\n"
    )
    folder = tmp_path / "deep" / "out"
    for end in ("kill", "finish"):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
        )
        assert process.stdout.readline() == b"writing\n"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        for name in (folder, ".", "../out"):
            with pytest.raises(OSError, match="another process is writing to it now"), only_writer(name):
                pass
        begin = time.monotonic()
        with pytest.raises(OSError, match="another process"), only_writer(folder, waiting_seconds=0.5):
            pass
        assert 0.4 < time.monotonic() - begin < 10
        if end == "kill":
            process.kill()
        else:
            process.stdin.close()
        process.wait()
        process.stdout.close()
        with only_writer(folder):
            assert ".out.lock" in names(folder.parent)
        assert names(folder.parent) == ["out"]


def test_no_writer_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(NotADirectoryError, match="file is a file, but must be a folder"),
        only_writer(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OSError, match="file/out cannot be written to"), only_writer(tmp_path / "file" / "out"):
        pass
    assert names(tmp_path) == ["file"]
