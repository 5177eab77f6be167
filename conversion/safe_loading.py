"""Loading the original's files so that nothing in them can run, fill the memory or pass for what it is not.

Three looks, each at what the one before has let through: the file as a container (`_Archive`, `_LegacyFile`), the
pickle in it (`pickle_contents`), and the names, shapes and types that it describes, against what the network needs.
Only then ``torch.load(weights_only=True)`` makes tensors, without reading them where the format allows.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import CheckpointError
from .pickle_contents import FLOATING_TYPES, LARGEST_PICKLE, PickleContent, StoredTensor, follow_pickle


# What wraps a module puts its name before those of the weights.
_PREFIXES = ("module.", "_orig_mod.")

# The first pickles of the format that torch.save wrote before version 1.6.
_LEGACY_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_ZIP_START, _ZIP_END, _ZIP64_END = b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06"
_LARGEST_ZIP_DIRECTORY = 8 << 20
_ZIP_RECORDS = {"data.pkl", "version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
_READ_AT_ONCE = 4 << 20

# How files of other kinds begin, in lower case, and what they are.
_OTHER_KINDS = (
    (b"<!doctype html", "is a web page: a file host's download page, or an error. Download the file itself"),
    (b"<html", "is a web page: a file host's download page, or an error. Download the file itself"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the file: fetch it with git lfs pull"),
    (b"\x1f\x8b", "is gzip-compressed: unpack it first"),
    (b"\xfd7zxz", "is xz-compressed: unpack it first"),
    (b"bzh", "is bzip2-compressed: unpack it first"),
    (b"\x93numpy", "is a numpy array, but must be a state dict written by torch.save"),
    (b"\x89hdf", "is an HDF5 file, but must be a state dict written by torch.save"),
    (b"{", "is a JSON file: the model and its parameters may be mistaken for each other"),
)


def load_weights(file: str | Path, shapes: Mapping[str, tuple[int, ...]], params_name: str) -> dict[str, torch.Tensor]:
    """Loads a state dict of the original that has exactly the weights of a network.

    Args:
        file: The ``model_*.pkl`` file, in either format of torch.save.
        shapes: Name -> shape of every weight.
        params_name: What errors call the JSON file that the shapes come from.

    Returns:
        Name -> tensor in the order of ``shapes``, without prefixes. Tensors of the zip format lie in the file, which
        must stay as it is while they are used.

    Raises:
        CheckpointError: If the file is of another kind, damaged, unsafe, or holds other weights.
    """
    file = Path(file)

    def check(described: Any) -> None:
        _check_weights(described, shapes, file.name, params_name)

    loaded = _load(file, check)
    tensors = [value.detach() for value in loaded.values()]
    weights = dict(zip(_without_prefixes(loaded), tensors, strict=True))
    for name, tensor in weights.items():
        _check_finite(tensor, f"{file.name}: {name}")
    return {name: weights[name] for name in shapes}


def load_optimizer(file: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Loads the state of the original's AdamW over the weights of a network.

    Args:
        file: The ``optim_*.pkl`` file, in either format of torch.save.
        shapes: Name -> shape of every weight in the order of the original's parameters.

    Returns:
        The state dict of the optimizer.

    Raises:
        CheckpointError: If the file is of another kind, damaged, unsafe, or of another network's optimizer.
    """
    file = Path(file)

    def check(described: Any) -> None:
        _check_optimizer(described, shapes, file.name)

    state_dict = _load(file, check)
    for index, entry in state_dict["state"].items():
        for kind in ("exp_avg", "exp_avg_sq"):
            _check_finite(entry[kind], f"{file.name}: {kind} of parameter {index}")
        if entry["exp_avg_sq"].min() < 0:
            raise CheckpointError(
                f"{file.name}: exp_avg_sq of parameter {index} is negative, but is a mean of squares"
            )
        step = float(entry["step"])
        if not math.isfinite(step) or step < 1:
            raise CheckpointError(f"{file.name}: step of parameter {index} is {step}, but must be at least 1")
    return state_dict


def _load(file: Path, check: Callable[[Any], None]) -> Any:
    """What the file holds, after `check` has let pass what its pickle describes."""
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, but must be a file written by torch.save")
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}")
    with file.open("rb") as opened:
        container = _open_container(opened, file.name)
        content = container.read_pickle()
        # what is missing or of another shape is said before gigabytes are read
        check(content.value)
        container.check_storages(content)
    try:
        value = torch.load(str(file), map_location="cpu", weights_only=True, mmap=container.can_be_mapped)
    except Exception as error:
        # torch has no common class for what its readers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file.name} cannot be read: {reason}") from error
    if not _agree(content.value, value):
        raise CheckpointError(f"{file.name} reads differently the second time: refused")
    return value


def _agree(described: Any, value: Any) -> bool:
    """Whether what torch has made is what its pickle describes; only names, shapes and types are compared."""
    if isinstance(described, StoredTensor):
        is_tensor = type(value) in (torch.Tensor, torch.nn.Parameter)
        return is_tensor and tuple(value.shape) == described.shape and str(value.dtype) == f"torch.{described.dtype}"
    if isinstance(described, dict):
        return (
            isinstance(value, dict)
            and list(described) == list(value)
            and all(map(_agree, described.values(), value.values()))
        )
    return type(described) is type(value)


# ---------------------------------------------------------------------- the file as a container


def _open_container(file: BinaryIO, name: str) -> "_Archive | _LegacyFile":
    """Tells by the first bytes what a file is.

    Raises:
        CheckpointError: If it is nothing that torch.save writes.
    """
    start = file.read(512)
    size = file.seek(0, 2)
    if not start:
        raise CheckpointError(f"{name} is empty: download or copy it again")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in _OTHER_KINDS:
        if text.startswith(beginning):
            raise CheckpointError(f"{name} {what}")
    if len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < size:
        raise CheckpointError(
            f"{name} is a safetensors file, but must be a state dict that the original wrote with torch.save"
        )
    if start.startswith(_ZIP_START):
        return _Archive(file, size, name)
    if start[257:262] == b"ustar":
        raise CheckpointError(
            f"{name} is a tar archive (torch before 0.1.10 wrote them): save it again with torch.save"
        )
    if start[:1] != b"\x80":
        raise CheckpointError(
            f"{name} is no file of torch.save, which begins with PK or byte 80: it begins {start[:8]!r}"
        )
    return _LegacyFile(file, size, name)


class _Archive:
    """The zip format of torch.save: members stored as they are, ``data.pkl`` and one for each storage."""

    can_be_mapped = True

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        self._check_directory_size()
        try:
            self.archive = zipfile.ZipFile(file)
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, NotImplementedError) as error:
            raise CheckpointError(f"{name} is a damaged zip file ({error}): download or copy it again") from error
        self.members = self._check_members(self.archive.infolist())

    def _check_directory_size(self) -> None:
        """Looks at the end of the file, because zipfile makes objects of whatever directory there is."""
        tail_length = min(self.size, 65_536 + 22)
        self.file.seek(self.size - tail_length)
        tail = self.file.read(tail_length)
        end = tail.rfind(_ZIP_END)
        if end < 0 or len(tail) < end + 22:
            raise CheckpointError(f"{self.name} is cut off (its zip directory is missing): download or copy it again")
        directory_size = struct.unpack("<I", tail[end + 12 : end + 16])[0]
        wide = tail.rfind(_ZIP64_END, 0, end)
        if directory_size == 0xFFFFFFFF and 0 <= wide <= len(tail) - 48:
            directory_size = struct.unpack("<Q", tail[wide + 40 : wide + 48])[0]
        if directory_size > _LARGEST_ZIP_DIRECTORY:
            raise CheckpointError(
                f"{self.name} has a zip directory of {directory_size:,} bytes, but that of a checkpoint is far"
                " smaller: refused"
            )

    def _check_members(self, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        """Sees to it that members are stored, apart from one another, and named as torch.save names them."""
        members: dict[str, zipfile.ZipInfo] = {}
        end = 0
        roots = {info.filename.partition("/")[0] for info in infos}
        if len(roots) != 1 or not any(info.filename.endswith("/data.pkl") for info in infos):
            raise CheckpointError(
                f"{self.name} is a zip file, but no checkpoint: it must hold data.pkl in one folder, as torch.save"
                " writes it. Give the .pkl file itself"
            )
        for info in sorted(infos, key=lambda info: info.header_offset):
            record = info.filename.partition("/")[2]
            key = record.removeprefix("data/")
            if record.startswith("code/") or record in ("constants.pkl", "model.json"):
                raise CheckpointError(
                    f"{self.name} is a TorchScript archive, which holds code: refused. Save model.state_dict() with"
                    " torch.save"
                )
            if record not in _ZIP_RECORDS and (key == record or not key or "/" in key or len(key) > 80):
                raise CheckpointError(f"{self.name} holds {record!r:.80}, which torch.save does not write: refused")
            if record in members:
                raise CheckpointError(f"{self.name} holds {record} twice: refused")
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
                raise CheckpointError(
                    f"{self.name} holds {record} compressed or encrypted ({info.file_size:,} bytes of"
                    f" {info.compress_size:,}), which torch.save never does: refused as a possible zip bomb"
                )
            begin = self._data_offset(info)
            if info.header_offset < end or begin + info.file_size > self.size:
                raise CheckpointError(f"{self.name} holds members that overlap or reach past its end: refused")
            end = begin + info.file_size
            members[record] = info
        if members["data.pkl"].file_size > LARGEST_PICKLE:
            raise CheckpointError(
                f"{self.name} holds a pickle of {members['data.pkl'].file_size:,} bytes, but that of a checkpoint has"
                f" at most {LARGEST_PICKLE:,}: refused"
            )
        return members

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        self.file.seek(info.header_offset)
        header = self.file.read(30)
        if len(header) < 30 or not header.startswith(_ZIP_START):
            raise CheckpointError(f"{self.name} is a damaged zip file (no header for {info.filename}): copy it again")
        return info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))

    def _chunks(self, record: str) -> Iterator[bytes]:
        """The bytes of a member; their checksum is compared at the end."""
        info = self.members[record]
        self.file.seek(self._data_offset(info))
        left, checksum = info.file_size, 0
        while left:
            chunk = self.file.read(min(left, _READ_AT_ONCE))
            left -= len(chunk)
            checksum = zlib.crc32(chunk, checksum)
            yield chunk
        if checksum != info.CRC:
            raise CheckpointError(f"{self.name} is damaged (wrong checksum of {record}): download or copy it again")

    def read_pickle(self) -> PickleContent:
        if self.members.get("byteorder") is not None and b"".join(self._chunks("byteorder")).strip() != b"little":
            raise CheckpointError(
                f"{self.name} was written on a big-endian machine: save it again on a little-endian one"
            )
        data = b"".join(self._chunks("data.pkl"))
        content = follow_pickle(data, self.name)
        if content.length != len(data):
            raise CheckpointError(f"{self.name} holds a pickle with something after its end: refused")
        return content

    def check_storages(self, content: PickleContent) -> None:
        for key, storage in content.storages.items():
            member = self.members.get(f"data/{key}")
            if member is None:
                raise CheckpointError(f"{self.name} lacks the data of storage {key!r:.80}: download or copy it again")
            if member.file_size != storage.num_bytes:
                raise CheckpointError(
                    f"{self.name} says that storage {key!r:.80} has {storage.num_bytes:,} bytes, but holds"
                    f" {member.file_size:,}: refused"
                )
        for record in self.members:
            for _ in self._chunks(record):
                pass


class _LegacyFile:
    """The format of torch.save before version 1.6: pickles one after another, then the storages."""

    can_be_mapped = False

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        self.position = 0

    def _next_pickle(self) -> PickleContent:
        self.file.seek(self.position)
        content = follow_pickle(self.file.read(LARGEST_PICKLE), self.name)
        self.position += content.length
        return content

    def read_pickle(self) -> PickleContent:
        first = self._next_pickle().value
        if first != _LEGACY_MAGIC_NUMBER or type(first) is not int:
            raise CheckpointError(
                f"{self.name} is a pickle, but torch.save did not write it: save the state dict with torch.save"
            )
        protocol, system = self._next_pickle().value, self._next_pickle().value
        if type(protocol) is not int or protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
            raise CheckpointError(f"{self.name} is of an unknown version of torch.save's old format: save it again")
        if system.get("little_endian") is not True:
            raise CheckpointError(
                f"{self.name} was written on a big-endian machine: save it again on a little-endian one"
            )
        return self._next_pickle()

    def check_storages(self, content: PickleContent) -> None:
        keys = self._next_pickle().value
        if (
            type(keys) is not list
            or any(type(key) is not str for key in keys)
            or sorted(keys) != sorted(content.storages)
        ):
            raise CheckpointError(f"{self.name} lists other storages than its tensors need: refused")
        for key in keys:
            storage = content.storages[key]
            self.file.seek(self.position)
            header = self.file.read(8)
            self.position += 8 + storage.num_bytes
            # torch makes room for what the pickle claims before it looks for the bytes
            if len(header) < 8 or self.position > self.size:
                raise CheckpointError(
                    f"{self.name} is cut off (storage {key!r:.80} of {storage.num_bytes:,} bytes is not all there):"
                    " download or copy it again"
                )
            if struct.unpack("<q", header)[0] != storage.length:
                raise CheckpointError(f"{self.name} states two lengths for storage {key!r:.80}: refused")


# ---------------------------------------------------------------------- what the pickle describes


def _without_prefixes(names: Mapping[str, Any]) -> list[str]:
    """The names without what DistributedDataParallel and torch.compile put before them, in either order."""
    stripped = list(names)
    while stripped:
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in stripped)), None)
        if prefix is None:
            break
        stripped = [name.removeprefix(prefix) for name in stripped]
    return stripped


def _check_weights(described: Any, shapes: Mapping[str, tuple[int, ...]], name: str, params_name: str) -> None:
    if not isinstance(described, dict):
        raise CheckpointError(f"{name} holds a {type(described).__name__}, but must hold a state dict")
    if set(described) == {"state", "param_groups"}:
        raise CheckpointError(f"{name} holds an optimizer's state, but must hold a model's: give it as the optimizer")
    for key, value in described.items():
        if type(key) is not str or not isinstance(value, StoredTensor):
            what = f"a {type(value).__name__}" if isinstance(key, str) else "not under a name"
            raise CheckpointError(
                f"{name} holds {key!r:.80}, which is {what}, but must hold tensors alone: save model.state_dict()"
            )
        if value.dtype not in FLOATING_TYPES:
            raise CheckpointError(
                f"{name}: {key} has {value.dtype} elements, but must have {' or '.join(FLOATING_TYPES)}"
            )
    found = dict(zip(_without_prefixes(described), described.values(), strict=True))
    fit = f"{name} does not belong to {params_name}"
    missing = [key for key in shapes if key not in found]
    extra = [key for key in found if key not in shapes]
    if missing:
        raise CheckpointError(
            f"{fit}, or is not whole: {_some(missing)} missing" + (f", {_some(extra)} unknown" if extra else "")
        )
    if extra:
        raise CheckpointError(f"{fit}, or is of another program: {_some(extra)} unknown")
    for key, shape in shapes.items():
        if found[key].shape != shape:
            raise CheckpointError(f"{fit}: {key} has shape {found[key].shape}, but must have {shape}")
    _check_unshared(list(found.values()), name)


def _check_unshared(values: list[Any], name: str) -> None:
    """Sees to it that tensors do not share elements: a small file could describe a network of any size so."""
    tensors = [value for value in values if isinstance(value, StoredTensor)]
    stored = sum({tensor.storage.key: tensor.storage.length for tensor in tensors}.values())
    described = sum(math.prod(tensor.shape) for tensor in tensors)
    if described > stored:
        raise CheckpointError(
            f"{name} describes {described:,} numbers and stores {stored:,}: its tensors share memory, which those of"
            " the original do not"
        )


def _some(names: list[str]) -> str:
    shown = f"{names[0]:.80}" if len(names) == 1 else f"{names[0]:.80} and {len(names) - 1} more weights"
    return shown + (" is" if len(names) == 1 else " are")


def _check_optimizer(described: Any, shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    if not isinstance(described, dict) or set(described) != {"state", "param_groups"}:
        raise CheckpointError(
            f"{name} does not hold an optimizer's state, which has state and param_groups: give the optim_*.pkl file"
        )
    groups, state = described["param_groups"], described["state"]
    if type(groups) is not list or len(groups) != 1 or not isinstance(groups[0], dict) or not isinstance(state, dict):
        raise CheckpointError(f"{name} must hold the state of an AdamW with one group of parameters, but does not")
    group = groups[0]
    count = len(group["params"]) if type(group.get("params")) is list else 0
    if count != len(shapes) or group["params"] != list(range(count)):
        raise CheckpointError(
            f"{name} is the optimizer of another network: it has {count} parameters, the model {len(shapes)}"
        )
    _check_hyperparameters(group, name)
    expected = list(shapes.items())
    for index, entry in state.items():
        if not isinstance(index, int) or index >= count:
            raise CheckpointError(f"{name} holds the state of parameter {index!r:.80}, but there are {count}")
        if not isinstance(entry, dict) or set(entry) != {"step", "exp_avg", "exp_avg_sq"}:
            raise CheckpointError(f"{name}: the state of parameter {index} must be step, exp_avg and exp_avg_sq")
        key, shape = expected[index]
        for kind in ("exp_avg", "exp_avg_sq"):
            value = entry[kind]
            if not isinstance(value, StoredTensor) or value.shape != shape or value.dtype not in FLOATING_TYPES:
                found = f"{value.dtype} {value.shape}" if isinstance(value, StoredTensor) else type(value).__name__
                raise CheckpointError(
                    f"{name} is the optimizer of another network: {kind} of parameter {index} is {found}, but {key}"
                    f" has shape {shape}"
                )
        step = entry["step"]
        if not (isinstance(step, StoredTensor) and step.shape == ()) and type(step) is not int:
            raise CheckpointError(f"{name}: step of parameter {index} must be a number")
    _check_unshared([value for entry in state.values() for value in entry.values()], name)


def _check_hyperparameters(group: Mapping[str, Any], name: str) -> None:
    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    if group.get("amsgrad"):
        raise CheckpointError(f"{name}: amsgrad is on, but the original's AdamW has it off")
    for key in ("lr", "eps", "weight_decay"):
        if not is_number(group.get(key)) or group[key] < 0:
            raise CheckpointError(f"{name}: {key} of its group must be a number of at least 0, but is not")
    betas = group.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise CheckpointError(f"{name}: betas must be two numbers in [0, 1), but are not")
    for key, value in group.items():
        if key not in ("params", "betas") and value is not None and type(value) not in (bool, int, float):
            raise CheckpointError(f"{name}: {key!r:.80} is a {type(value).__name__}, which AdamW does not know")


def _check_finite(tensor: torch.Tensor, what: str) -> None:
    # fifty times as fast as isfinite().all(); NaN passes into both
    lowest, highest = torch.aminmax(tensor)
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        kind = "NaN" if bool(torch.isnan(lowest)) else "infinite numbers"
        raise CheckpointError(
            f"{what} holds {kind}, but must be finite: the training had failed, take another checkpoint"
        )
