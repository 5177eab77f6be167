"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Gives an empty folder to write to, which takes the place of ``folder`` when the block ends without an error.

    A process that is killed leaves the old folder or the new one, or the old one hidden beside its place, which the
    next call puts back.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = folder.with_name(f".{folder.name}.writing")
    replaced = folder.with_name(f".{folder.name}.replaced")
    _settle(folder, replaced)
    if writing.exists():
        shutil.rmtree(writing)
    writing.mkdir()
    try:
        yield writing
        # whoever may read the folder may read its files; safetensors keeps those that it writes for their owner
        usual = writing.stat().st_mode & 0o666
        for path in sorted(writing.rglob("*"), reverse=True):
            if path.is_file() and not path.is_symlink():
                path.chmod(path.stat().st_mode | usual)
            _sync(path)
        _sync(writing)
        if folder.exists():
            folder.rename(replaced)
        writing.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
        _settle(folder, replaced)


@contextlib.contextmanager
def atomic_file(file: str | Path) -> Iterator[Path]:
    """Gives a path to write to, which takes the place of ``file`` when the block ends without an error."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    # the ending stays, because libraries choose the format by it
    writing = file.with_name(f".writing.{file.name}")
    try:
        yield writing
        _sync(writing)
        writing.replace(file)
        _sync(file.parent)
    except OSError as error:
        # what a full disk says does not say where
        if error.filename is None:
            raise OSError(f"could not write {file} ({error.strerror or error})") from error
        raise
    finally:
        writing.unlink(missing_ok=True)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    with atomic_file(file) as writing:
        writing.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def lock_path(folder: Path) -> Path:
    """The lock of whoever writes a folder; it may outlive a process that was killed."""
    # "." has a name too, and one folder one lock, by whatever way it is reached
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def only_writer(folder: str | Path, waiting_seconds: float = 0.0) -> Iterator[None]:
    """Keeps others from writing the folder, which is an OSError there; the system drops a killed one's lock."""
    import filelock

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, but must be a folder")
    path = lock_path(folder)
    lock = filelock.FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=waiting_seconds)
    except filelock.Timeout as error:
        raise OSError(f"{folder}: another process is writing to it now") from error
    except OSError as error:
        raise OSError(f"{folder} cannot be written to ({error.strerror})") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def settle_folder(parent: str | Path) -> None:
    """Clears up what killed writers left in a folder: half-written ones go, replaced ones come back or go."""
    parent = Path(parent)
    for path in list(parent.glob(".*.replaced")):
        _settle(parent / path.name.removeprefix(".").removesuffix(".replaced"), path)
    for path in list(parent.glob(".*.writing")):
        shutil.rmtree(path)


def _settle(folder: Path, replaced: Path) -> None:
    """Removes the replaced folder when the new one is in its place, and puts it back when it is not."""
    if replaced.exists() and folder.exists():
        shutil.rmtree(replaced)
    elif replaced.exists():
        replaced.rename(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
