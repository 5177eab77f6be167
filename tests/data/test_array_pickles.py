import os
import pathlib
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from imagenet64_diffusion.data.array_pickles import StoredArray, read_pickle
from imagenet64_diffusion.data.errors import DataError


def read(path: pathlib.Path, content: bytes):
    path.write_bytes(content)
    return read_pickle(path, "the batch")


def as_numpy(array: StoredArray) -> np.ndarray:
    elements = np.concatenate([block.reshape(-1) for block in array.read_rows("the batch")])
    return elements.reshape(array.shape, order="F" if array.fortran_order else "C")


# 192 bytes stay in the pickle, 200 kB lie in the file
@pytest.mark.parametrize("shape", [(3, 64), (200, 1024)])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_the_arrays(tmp_path, protocol, shape):
    data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = {"data": data, "labels": [1, 1000, 70_000], "mean": data.mean(0), "note": "é", "more": (None, True, 1.5)}
    result = read(tmp_path / "batch", pickle.dumps(content, protocol))
    np.testing.assert_array_equal(as_numpy(result["data"]), data)
    np.testing.assert_array_equal(as_numpy(result["mean"]), data.mean(0))
    assert result["labels"] == [1, 1000, 70_000]
    assert (result["note"], result["more"]) == ("é", (None, True, 1.5))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_both_spellings_of_numpy_core(tmp_path, protocol, core):
    data = np.arange(192, dtype=np.uint8).reshape(1, 192)
    content = pickle.dumps({"data": data, "labels": [np.int64(7)]}, protocol)
    # numpy 1 and 2 write different module names; in protocols 4 and 5 the length stands before the name
    for module in (b".multiarray", b".numeric"):
        for written in (b"numpy.core", b"numpy._core"):
            old, new = written + module, core + module
            content = content.replace(bytes([0x8C, len(old)]) + old, bytes([0x8C, len(new)]) + new)
            content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
    assert core + b"." in content
    result = read(tmp_path / "batch", content)
    np.testing.assert_array_equal(as_numpy(result["data"]), data)
    assert result["labels"] == [7]


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<i8", ">u8"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_labels_as_numpy_numbers_and_arrays(tmp_path, protocol, dtype):
    labels = np.array([1, 2, 100], dtype)
    result = read(tmp_path / "batch", pickle.dumps({"array": labels, "list": list(labels)}, protocol))
    np.testing.assert_array_equal(as_numpy(result["array"]), labels)
    assert result["list"] == [1, 2, 100]
    assert all(type(label) is int for label in result["list"])


def test_arrays_of_readonly_memory_and_in_columns(tmp_path):
    data = np.frombuffer(bytes(range(192)), np.uint8).reshape(2, 96)
    for protocol in range(2, 6):
        result = read(tmp_path / "batch", pickle.dumps([data, np.asfortranarray(data)], protocol))
        np.testing.assert_array_equal(as_numpy(result[0]), data)
        np.testing.assert_array_equal(as_numpy(result[1]), data)


def test_python_2_strings_are_bytes(tmp_path):
    data = bytes(range(256)) * 300
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87R(K\x01K\x64M\x00\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89T" + struct.pack("<i", len(data)) + data + b"tbU\x06labels]K\x05au."
    )
    result = read(tmp_path / "batch", content)
    assert result[b"labels"] == [5]
    assert result[b"data"].shape == (100, 768)
    assert as_numpy(result[b"data"]).tobytes() == data


class Dangerous:
    """What an attacker pickles: anything that is called on loading."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(marker: pathlib.Path) -> dict[str, tuple[bytes, str, bool]]:
    """Name -> pickle, what the refusal must name, and whether the usual loader makes the marker."""
    command = f"touch {marker}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    short = b"\x8c" + bytes([len(command)]) + command
    return {
        "GLOBAL": (b"\x80\x02cposix\nsystem\n" + text + b"\x85R.", "posix.system", True),
        "STACK_GLOBAL": (b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + short + b"\x85R.", "posix.system", True),
        "INST": (b"(" + text + b"iposix\nsystem\n.", "posix.system", True),
        "OBJ": (b"(cposix\nsystem\n" + text + b"o.", "posix.system", True),
        "OBJ of an allowed type": (b"(cnumpy\nndarray\nK\x05o.", "calls numpy.ndarray", False),
        "nested": (
            pickle.dumps({"data": [({"labels": Dangerous(os.system, command.decode())},)]}, 4),
            "posix.system",
            True,
        ),
        "os by name": (b"\x80\x02cos\nsystem\n" + text + b"\x85R.", "os.system", True),
        "eval": (pickle.dumps(Dangerous(eval, f"open({str(marker)!r}, 'w')"), 2), "__builtin__.eval", True),
        "getattr": (pickle.dumps(Dangerous(getattr, "a", "upper"), 4), "builtins.getattr", False),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n)\x81.", "subprocess.Popen", False),
        "NEWOBJ of an allowed type": (b"\x80\x02cnumpy\nndarray\nK\x05\x85\x81.", "type object", False),
        "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\nK\x05\x85}\x92.", "type object", False),
        "REDUCE of a value": (b"\x80\x02K\x01K\x02\x85R.", "not callable", False),
        "REDUCE of ndarray": (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "numpy.ndarray", False),
        "another codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "rot13", False),
        "EXT1": (b"\x80\x02\x82\x01.", "extension code", False),
        "PERSID": (b"Pname\n.", "persistent", False),
        "BINPERSID": (b"\x80\x02K\x01Q.", "persistent", False),
        "NEXT_BUFFER": (b"\x80\x05\x97.", "buffer", False),
        "another numpy function": (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00a\x85R.", "numpy.load", False),
        "an attribute of an allowed one": (
            b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.tofile\x93.",
            "cannot be read",
            False,
        ),
    }


@pytest.mark.parametrize("name", list(attacks(pathlib.Path("marker"))))
def test_attacks_are_refused_by_name_and_nothing_runs(tmp_path, name):
    marker = tmp_path / "marker"
    content, named, works = attacks(marker)[name]
    if works:
        # what follows would prove nothing with pickles that do not work
        pickle.loads(content)
        marker.unlink()
    with pytest.raises(DataError, match="the batch") as caught:
        read(tmp_path / "batch", content)
    assert not marker.exists()
    assert named in str(caught.value)


def test_arrays_of_objects_stay_unopened(tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps(np.array([Dangerous(os.system, f"touch {marker}")], object), 4)
    with pytest.raises(DataError, match=r"posix\.system"):
        read(tmp_path / "batch", content)
    harmless = read(tmp_path / "batch", pickle.dumps(np.array(["a"], object), 4))
    assert harmless.dtype is None
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_truncated_anywhere(tmp_path, protocol):
    data = np.zeros((100, 768), np.uint8)
    whole = pickle.dumps({"data": data, "labels": list(range(100))}, protocol)
    for length in [0, 1, 2, 10, 50, 100, 150, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        with pytest.raises(DataError, match="the batch cannot be read"):
            read(tmp_path / "batch", whole[:length])


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]" + b"\x8b\xff\xff\xff\x7f" + b"1" * 10 + b".",  # a number of 2 GB
        b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",  # bytes without end
        b"\x80\x02T\xff\xff\xff\xff.",  # a negative length
        b"\x80\x02c" + b"a" * 100_000 + b"\n.",  # a name of 100 kB
        b"\x80\x63.",  # protocol 99
        b"\x80\x02R.",  # nothing on the stack
        b"\x80\x02h\x05.",  # a memo entry that is not there
        b"PK\x03\x04",  # a zip
        b"\x80\x02\xfe.",  # no opcode
        b"\x80\x02cnumpy\ndtype\nK\x01\x85RK\x01\x86b.",
    ],
)
def test_nonsense_is_an_error(tmp_path, content):
    with pytest.raises(DataError, match="the batch"):
        read(tmp_path / "batch", content)


def test_a_web_page_is_called_one(tmp_path):
    with pytest.raises(DataError, match="the batch is a web page"):
        read(tmp_path / "batch", b"\n<!DOCTYPE html><html>")


def test_memory_of_an_array_in_frames_is_not_used(tmp_path):
    # a frame as long as the file would make the usual reader fetch all of it
    content = pickle.dumps(np.zeros((1000, 12288), np.uint8), 4)
    (tmp_path / "batch").write_bytes(content[:2] + b"\x95" + struct.pack("<Q", len(content)) + content[2:])
    tracemalloc.start()
    result = read_pickle(tmp_path / "batch", "the batch")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.shape == (1000, 12288)
    assert peak < 1 << 20
