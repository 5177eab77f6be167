import pathlib
import pickle
import struct

import numpy as np
import pytest

from imagenet64_diffusion.data.errors import DataError
from imagenet64_diffusion.data.stored_arrays import read_pickle


def read(path: pathlib.Path, content: bytes) -> dict:
    path.write_bytes(content)
    with path.open("rb") as file:
        return read_pickle(file, "the batch")


# 192 bytes and 200 kB, rows and columns, memory of its own and another's
@pytest.mark.parametrize("shape", [(3, 64), (200, 1024)])
@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_the_arrays(tmp_path, protocol, shape):
    data = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    arrays = {"data": data, "mean": data.mean(0), "columns": np.asfortranarray(data)}
    arrays |= {"shared": np.frombuffer(data.tobytes(), np.uint8)}
    arrays |= {dtype: np.array([1, 2, 100], dtype) for dtype in ("u1", "<i2", ">i4", "<i8", ">u8")}
    content = {"labels": [1, 1000, 70_000], "note": "é", "more": (None, True, 1.5)}
    scalars = {"scalars": [np.int64(7), np.array([300], ">i2")[0]]}
    result = read(tmp_path / "batch", pickle.dumps({**arrays, **content, **scalars}, protocol))
    for name, array in arrays.items():
        np.testing.assert_array_equal(result.pop(name), array, strict=True)
    assert result == {**content, "scalars": [7, 300]}
    assert all(type(label) is int for label in result["scalars"])


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
    np.testing.assert_array_equal(result["data"], data)
    assert result["labels"] == [7]


def test_python_2_strings_are_bytes(tmp_path):
    data = bytes(range(256)) * 300
    content = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b"
        b"\x87R(K\x01K\x64M\x00\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff"
        b"\xff\xffK\x00tb\x89T" + struct.pack("<i", len(data)) + data + b"tbU\x06labels]K\x05au."
    )
    result = read(tmp_path / "batch", content)
    assert result["labels"] == [5]
    assert result["data"].shape == (100, 768)
    assert result["data"].tobytes() == data


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
        "another numpy function": (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00a\x85R.", "numpy.load", False),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n)\x81.", "subprocess.Popen", False),
        "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\nK\x05\x85}\x92.", "type object", False),
        # what is allowed makes nothing but values
        "REDUCE of ndarray": (b"\x80\x02cnumpy\nndarray\nK\x05\x85R.", "holds a NoneType", False),
        "a codec": (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.", "a bytes", False),
        "an attribute": (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "ndarray.tofile", False),
        "EXT1": (b"\x80\x02\x82\x01.", "extension code", False),
        "PERSID": (b"Pname\n.", "persistent", False),
        "NEXT_BUFFER": (b"\x80\x05\x97.", "buffer", False),
    }


@pytest.mark.parametrize("name", list(attacks(pathlib.Path("marker"))))
def test_attacks_are_refused_by_name_and_nothing_runs(tmp_path, name):
    marker = tmp_path / "marker"
    content, named, works = attacks(marker)[name]
    if works:
        # what follows would prove nothing with pickles that do not work
        pickle.loads(content)
        marker.unlink()
    with pytest.raises(DataError, match=f"the batch.*{named}"):
        read(tmp_path / "batch", content)
    assert not marker.exists()


def test_what_numpy_would_believe_of_memory_is_refused(tmp_path):
    whole = pickle.dumps({"data": np.zeros((3, 64), np.uint8), "text": np.array(["a"], object)}, 4)
    with pytest.raises(DataError, match="the batch holds a list instead of a dict"):
        read(tmp_path / "batch", pickle.dumps([1, 2]))
    # arrays of objects come as None, whatever bytes are said to be their pointers
    assert read(tmp_path / "batch", whole)["text"] is None
    assert read(tmp_path / "batch", whole.replace(b"u1", b"O8", 1))["data"] is None
    for shape in (b"K\x04K@\x86", b"J\xff\xff\xff\x7fK@\x86"):
        with pytest.raises(DataError, match="the batch cannot be read"):
            read(tmp_path / "batch", whole.replace(b"K\x03K@\x86", shape, 1))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]\x8b\xff\xff\xff\x7f1111111111.",  # a number of 2 GB
        b"\x80\x04\x8e" + b"\xff" * 8 + b"abc.",  # bytes without end
        b"\x80\x02T\xff\xff\xff\xff.",  # a negative length
        b"\x80\x02c" + b"a" * 100_000 + b"\n.",  # a name of 100 kB
        b"\x80\x63.",  # protocol 99
        b"\x80\x02R.",  # nothing on the stack
        b"\x80\x02h\x05.",  # a memo entry that is not there
        b"PK\x03\x04",  # a zip
        b"\x80\x02\xfe.",  # no opcode
        b"\x80\x02cnumpy\ndtype\nK\x01\x85RK\x01\x86b.",
        b"\n<!DOCTYPE html><html>",
    ],
)
def test_nonsense_is_an_error(tmp_path, content):
    with pytest.raises(DataError, match="the batch cannot be read"):
        read(tmp_path / "batch", content)
