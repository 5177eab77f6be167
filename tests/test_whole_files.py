"""Files and folders appear whole or not at all."""

import os
import signal
import subprocess
import sys
import time

import pytest

from imagenet64_diffusion.whole_files import replacing_file, replacing_folder


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_takes_the_place_of_the_old_one(tmp_path):
    for content in ("first", "second"):
        with replacing_folder(tmp_path / "deep" / "model") as writing:
            (writing / "sub").mkdir()
            (writing / "sub" / "file").write_text(content)
            (writing / content).write_text("")
        assert (tmp_path / "deep" / "model" / "sub" / "file").read_text() == content
        assert names(tmp_path / "deep") == ["model"]
    assert names(tmp_path / "deep" / "model") == ["second", "sub"]


def test_an_error_leaves_what_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    (tmp_path / "file.txt").write_text("old")

    def fail_in_folder():
        with replacing_folder(tmp_path / "model") as writing:
            (writing / "new").write_text("new")
            raise ZeroDivisionError

    def fail_in_file():
        with replacing_file(tmp_path / "file.txt") as writing:
            writing.write_text("new")
            raise ZeroDivisionError

    for fail in (fail_in_folder, fail_in_file):
        with pytest.raises(ZeroDivisionError):
            fail()
    assert names(tmp_path) == ["file.txt", "model"]
    assert names(tmp_path / "model") == ["old"]
    assert (tmp_path / "file.txt").read_text() == "old"


def test_file_keeps_its_ending(tmp_path):
    with replacing_file(tmp_path / "deep" / "a.png") as writing:
        assert writing.suffix == ".png"
        writing.write_bytes(b"x")
    assert names(tmp_path / "deep") == ["a.png"]


def test_kill_while_writing(tmp_path):
    """The old folder stays, and the next call clears up."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    program = (
        "import sys, time; from imagenet64_diffusion.whole_files import replacing_folder\n"
        "with replacing_folder(sys.argv[1]) as writing:\n"
        "    (writing / 'new').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "model")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert names(tmp_path / "model") == ["old"]
    with replacing_folder(tmp_path / "model") as writing:
        assert names(writing) == []
        (writing / "new").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["new"]


def test_kill_between_the_two_renames(tmp_path):
    """The moment in which the new folder is not yet in place: the old one is put back."""
    (tmp_path / ".model.replaced").mkdir()
    (tmp_path / ".model.replaced" / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing_folder(tmp_path / "model"):
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["old"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    begin = time.monotonic()
    with pytest.raises(OSError, match="file"), replacing_folder(tmp_path / "file" / "model"):
        pass
    assert time.monotonic() - begin < 10
    assert names(tmp_path) == ["file"]
