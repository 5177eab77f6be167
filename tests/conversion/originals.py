"""Files of the original program for the tests of the conversion: its own, and bad ones."""

import gzip
import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import torch

from imagenet64_diffusion.conversion.original import build_empty_unet, original_layout
from imagenet64_diffusion.tests.components import FIXTURES


ORIGINALS = FIXTURES / "original"

# The recipes whose optimizer, next step and sampling runs are stored.
RECIPES_WITH_OPTIMIZER = ("res", "res_res_atn")

# A network that the original never trained: it begins with a ConvNeXt layer, on one channel.
SMALL_PARAMS = {
    "inCh": 1, "embCh": 4, "chMult": 1, "num_blocks": 1, "blk_types": ["conv", "res"], "T": 20,
    "beta_sched": "cosine", "t_dim": 4, "c_dim": 4, "num_classes": 3, "atn_resolution": 16, "epoch": 1, "step": 7,
}  # fmt: skip


def model_file(recipe: str) -> Path:
    return ORIGINALS / recipe / "model_3e_2s.pkl"


def params_file(recipe: str) -> Path:
    return ORIGINALS / recipe / "model_params_3e_2s.json"


def unpack_optimizer(recipe: str, folder: Path) -> Path:
    """The optimizer's file, which is stored compressed."""
    file = folder / "optim_3e_2s.pkl"
    file.write_bytes(gzip.decompress((ORIGINALS / recipe / "optim_3e_2s.pkl.gz").read_bytes()))
    return file


def original_weight_shapes(params: dict) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, _, shape in original_layout(build_empty_unet(params))}


def small_weights(**params) -> dict[str, torch.Tensor]:
    """Random weights for `SMALL_PARAMS` and changes to it."""
    generator = torch.Generator().manual_seed(0)
    shapes = original_weight_shapes({**SMALL_PARAMS, **params})
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def write_small(folder: Path, weights: dict[str, torch.Tensor] | None = None, legacy=False, **params) -> list[Path]:
    """A checkpoint of `SMALL_PARAMS` and changes to it: the model's file and its JSON."""
    folder.mkdir(exist_ok=True)
    files = [folder / "model_1e_7s.pkl", folder / "model_params_1e_7s.json"]
    weights = small_weights(**params) if weights is None else weights
    torch.save(weights, files[0], _use_new_zipfile_serialization=not legacy)
    files[1].write_text(json.dumps({**SMALL_PARAMS, **params}))
    return files


def as_archive(pickled: bytes, members: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED) -> bytes:
    """The zip format of torch.save around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in {"data.pkl": pickled, "version": b"3\n", **(members or {})}.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def as_legacy(pickled: bytes, storages: dict[str, tuple[int, bytes]] | None = None) -> bytes:
    """The older format of torch.save around a pickle; storages are key -> (length that is written, bytes)."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    content = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)) + pickled
    content += pickle.dumps(sorted(storages or {}), 2)
    for _, (length, data) in sorted((storages or {}).items()):
        content += struct.pack("<q", length) + data
    return content


def text(value: str) -> bytes:
    """The pickle opcode of a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """The pickle opcode of a whole number."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(key: str, length: int, shape: tuple[int, ...], stride: tuple[int, ...], kind="FloatStorage") -> bytes:
    """The opcodes with which torch.save describes a tensor."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(length) + b"tQ"
    lengths = [b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride)]
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + b"".join(lengths) + b"\x89" + hooks + b"tR"


def state_dict(**entries: bytes) -> bytes:
    """The pickle of a dict of such opcodes."""
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."
