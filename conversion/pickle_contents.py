"""What a checkpoint's pickle describes, read without running it and without making a tensor.

``torch.load(weights_only=True)`` runs no code, but it trusts sizes: a small file can make it allocate whatever the
pickle claims, or spend its time on values that contain themselves. So the pickle is first followed here, opcode by
opcode, with records in place of tensors. What passes is a dict of plain values and of tensors whose sizes are known.
"""

import dataclasses
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import Any

from .errors import CheckpointError


# The pickle of a checkpoint holds names and shapes, less than 1 kB for each tensor; the weights lie beside it.
LARGEST_PICKLE = 8 << 20

_LARGEST_KEY = 1 << 20

# The element types that torch.save writes, by the name of their storage: torch's name for them, size in bytes.
_STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}
FLOATING_TYPES = ("float32", "float64", "float16", "bfloat16")

_FUNCTIONS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}

# Opcodes that import, call or build something. REDUCE, BUILD, GLOBAL and BINPERSID are in every checkpoint too, where
# they name nothing but the functions above.
_BUILDING_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


@dataclasses.dataclass(frozen=True)
class StoredStorage:
    """A run of elements that lies in the file.

    Attributes:
        key: Its name in the file.
        dtype: The type of its elements, as torch calls it.
        length: How many elements it has.
        num_bytes: How many bytes they take.
    """

    key: str
    dtype: str
    length: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the pickle describes it.

    Attributes:
        storage: Where its elements lie.
        shape: Its lengths.
    """

    storage: StoredStorage
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """The type of its elements, as torch calls it."""
        return self.storage.dtype


@dataclasses.dataclass(frozen=True)
class PickleContent:
    """The result of following a pickle.

    Attributes:
        value: Dicts, lists, tuples, numbers, strings and `StoredTensor`.
        storages: Every storage that it names, by key.
        length: How many bytes the pickle has.
    """

    value: Any
    storages: dict[str, StoredStorage]
    length: int


@dataclasses.dataclass(frozen=True)
class _Global:
    """Stands where the pickle names a function or type of torch."""

    module: str
    name: str


class _OrderedDict(dict):
    """Stands for a collections.OrderedDict, the one thing whose attributes a checkpoint sets."""


_MARK = object()


class _RefusedError(Exception):
    """What is wrong with a pickle, without the name of its file."""


def follow_pickle(data: bytes, name: str) -> PickleContent:
    """Follows the pickle at the beginning of some bytes. Nothing is imported or called.

    Args:
        data: The bytes; what comes after the pickle is not looked at.
        name: What errors call the file.

    Raises:
        CheckpointError: If it is no whole pickle, or does anything but describe plain values and tensors.
    """
    follower = _Follower(data)
    try:
        value = follower.run()
    except _RefusedError as error:
        raise CheckpointError(f"{name} {error}") from None
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise CheckpointError(
            f"{name} holds a broken pickle (at byte {follower.position:,}): download or copy it again"
        ) from error
    return PickleContent(value, follower.storages, follower.position)


class _Follower:
    """A pickle machine that knows the opcodes of torch.save and makes records."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StoredStorage] = {}

    def run(self) -> Any:
        while True:
            opcode = self.take(1)
            if opcode == b".":
                break
            handler = _HANDLERS.get(opcode)
            if handler is None:
                raise _RefusedError(_why_refused(opcode))
            handler(self)
        value = self.pop()
        if self.stack:
            raise _RefusedError("holds a pickle that leaves values over, as none of torch.save does: refused")
        return value

    # ------------------------------------------------------------------ bytes

    def take(self, length: int) -> bytes:
        piece = self.data[self.position : self.position + length]
        if len(piece) < length:
            raise _RefusedError("holds a pickle that ends early: the file is cut off, download or copy it again")
        self.position += length
        return piece

    def take_number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def take_line(self) -> str:
        end = self.data.find(b"\n", self.position, self.position + 1024)
        if end < 0:
            raise _RefusedError("holds a pickle that ends early: the file is cut off, download or copy it again")
        line = self.take(end + 1 - self.position)[:-1]
        return line.decode("utf-8")

    # ------------------------------------------------------------------ stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def pop_to_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise IndexError
        values = self.stack[index + 1 :]
        del self.stack[index:]
        return values

    def push_tuple(self, length: int) -> None:
        values = tuple(self.pop() for _ in range(length))[::-1]
        self.stack.append(values)

    def memoize(self, index: int) -> None:
        # the writer numbers what it remembers in order
        if self.stack[-1] is _MARK or index > len(self.memo):
            raise IndexError
        self.memo[index] = self.stack[-1]

    # ------------------------------------------------------------------ containers

    def append_items(self, values: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError
        self.stack[-1].extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2], strict=True):
            # a nested tuple as a key would be hashed, which a few bytes can make take for ever, as can whole numbers
            # that are chosen to meet in one slot of the dict
            if type(key) is not str and not (type(key) is int and 0 <= key < _LARGEST_KEY):
                raise _RefusedError("has a dict whose key is neither a name nor the number of a parameter: refused")
            if key in target:
                raise _RefusedError(f"names {key!r:.80} twice")
            target[key] = value

    # ------------------------------------------------------------------ what looks like code

    def find_global(self) -> None:
        module, name = self.take_line(), self.take_line()
        is_storage = module in ("torch", "torch.storage") and name in _STORAGES
        if not is_storage and (module, name) not in _FUNCTIONS:
            raise _RefusedError(
                f"wants {module}.{name}, which weights do not need: refused, and nothing of it was run. A checkpoint"
                " is the state dict alone, not a whole model: save model.state_dict()"
            )
        self.stack.append(_Global(module, name))

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise _RefusedError("calls something that is no tensor: refused, and nothing of it was run")
        if function.name == "OrderedDict" and arguments == ():
            self.stack.append(_OrderedDict())
        elif function.name == "_rebuild_tensor_v2" and len(arguments) == 6 and _is_plain(*arguments[4:]):
            self.stack.append(_described_tensor(*arguments[:4]))
        elif function.name == "_rebuild_parameter" and len(arguments) == 3 and _is_plain(*arguments[1:]):
            if not isinstance(arguments[0], StoredTensor):
                raise TypeError
            self.stack.append(arguments[0])
        else:
            raise _RefusedError(f"calls {function.name} in a way that torch.save does not: refused")

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        # a state dict carries the versions of its modules in this one attribute
        if type(target) is not _OrderedDict or type(state) is not dict or set(state) - {"_metadata"}:
            raise _RefusedError(
                "sets the state of something that is no state dict: refused, and nothing of it was run"
            )

    def load_storage(self) -> None:
        saved_id = self.pop()
        # the older format adds a view, which is None in everything written since 2017
        if type(saved_id) is tuple and len(saved_id) == 6 and saved_id[5] is None:
            saved_id = saved_id[:5]
        if type(saved_id) is not tuple or len(saved_id) != 5 or saved_id[0] != "storage":
            raise _RefusedError("refers to something that is no storage of a tensor: refused")
        _, kind, key, location, length = saved_id
        known = isinstance(kind, _Global) and kind.name in _STORAGES
        if not known or type(key) is not str or type(location) is not str or type(length) is not int or length < 0:
            raise _RefusedError("describes a storage in a way that torch.save does not: refused")
        dtype, size = _STORAGES[kind.name]
        storage = StoredStorage(key, dtype, length, length * size)
        if self.storages.setdefault(key, storage) != storage:
            raise _RefusedError(f"describes the storage {key!r:.80} twice and differently: refused")
        self.stack.append(storage)


def _is_plain(requires_grad: Any, hooks: Any) -> bool:
    """Whether a tensor has neither hooks nor anything else attached."""
    return type(requires_grad) is bool and type(hooks) is _OrderedDict and not hooks


def _described_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    def are_whole(values: Any) -> bool:
        return type(values) is tuple and len(values) <= 16 and all(type(n) is int and 0 <= n < 2**48 for n in values)

    if not isinstance(storage, StoredStorage) or not are_whole((offset,)) or not are_whole(shape):
        raise _RefusedError("describes a tensor in a way that torch.save does not: refused")
    if not are_whole(stride) or len(stride) != len(shape):
        raise _RefusedError("describes a tensor in a way that torch.save does not: refused")
    elements = math.prod(shape)
    last = (
        offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if elements else offset
    )
    # strides of zero would make a tensor of any size from one stored number
    if elements > storage.length or (elements and last >= storage.length):
        raise _RefusedError(
            f"describes a tensor of shape {shape}, but stores {storage.length:,} elements for it: refused"
        )
    return StoredTensor(storage, shape)


def _why_refused(opcode: bytes) -> str:
    # its table by codes is missing in the types of the standard library
    known = pickletools.code2op.get(opcode.decode("latin1"))  # type: ignore[attr-defined]
    if known is None:
        return f"is not a pickle of torch.save (byte {opcode!r} where an opcode belongs): download or copy it again"
    if known.name in _BUILDING_OPCODES:
        return (
            f"uses the pickle opcode {known.name}, which imports or builds objects and which weights do not need:"
            " refused, and nothing of it was run"
        )
    return (
        f"uses the pickle opcode {known.name}, which torch.save does not write: refused. Save the state dict again"
        " with torch.save and its default pickle_protocol"
    )


def _pushes(value: Any) -> Callable[[_Follower], None]:
    return lambda follower: follower.stack.append(value)


def _pushes_number(form: str) -> Callable[[_Follower], None]:
    return lambda follower: follower.stack.append(follower.take_number(form))


def _pushes_text(form: str) -> Callable[[_Follower], None]:
    return lambda follower: follower.stack.append(follower.take(follower.take_number(form)).decode("utf-8"))


def _pushes_long(follower: _Follower) -> None:
    follower.stack.append(pickle.decode_long(follower.take(follower.take_number("<B"))))


# Those of torch's own weights_only reader but two, NEWOBJ and EMPTY_SET, which no tensor needs.
_HANDLERS: dict[bytes, Callable[[_Follower], object]] = {
    pickle.PROTO: lambda follower: follower.take(1),
    pickle.MARK: _pushes(_MARK),
    pickle.NONE: _pushes(None),
    pickle.NEWTRUE: _pushes(True),
    pickle.NEWFALSE: _pushes(False),
    pickle.BININT: _pushes_number("<i"),
    pickle.BININT1: _pushes_number("<B"),
    pickle.BININT2: _pushes_number("<H"),
    pickle.LONG1: _pushes_long,
    pickle.BINFLOAT: _pushes_number(">d"),
    pickle.BINUNICODE: _pushes_text("<I"),
    pickle.SHORT_BINSTRING: _pushes_text("<B"),
    pickle.EMPTY_TUPLE: _pushes(()),
    pickle.EMPTY_LIST: lambda follower: follower.stack.append([]),
    pickle.EMPTY_DICT: lambda follower: follower.stack.append({}),
    pickle.TUPLE: lambda follower: follower.stack.append(tuple(follower.pop_to_mark())),
    pickle.TUPLE1: lambda follower: follower.push_tuple(1),
    pickle.TUPLE2: lambda follower: follower.push_tuple(2),
    pickle.TUPLE3: lambda follower: follower.push_tuple(3),
    pickle.APPEND: lambda follower: follower.append_items([follower.pop()]),
    pickle.APPENDS: lambda follower: follower.append_items(follower.pop_to_mark()),
    pickle.SETITEM: lambda follower: follower.set_items([follower.pop(), follower.pop()][::-1]),
    pickle.SETITEMS: lambda follower: follower.set_items(follower.pop_to_mark()),
    pickle.BINGET: lambda follower: follower.stack.append(follower.memo[follower.take_number("<B")]),
    pickle.LONG_BINGET: lambda follower: follower.stack.append(follower.memo[follower.take_number("<I")]),
    pickle.BINPUT: lambda follower: follower.memoize(follower.take_number("<B")),
    pickle.LONG_BINPUT: lambda follower: follower.memoize(follower.take_number("<I")),
    pickle.GLOBAL: _Follower.find_global,
    pickle.REDUCE: _Follower.reduce,
    pickle.BUILD: _Follower.build,
    pickle.BINPERSID: _Follower.load_storage,
}
