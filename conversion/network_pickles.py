"""Pickles of EDM and EDM2 read as data, as `pickle_reader` reads files of torch.save.

They hold a network with the source text of its classes, which is not looked at, and each tensor as the bytes of a file
of torch.save, which stay in the file, mapped.
"""

import pickle
import re
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from .pickle_reader import (
    DAMAGED,
    GLOBALS,
    CheckpointError,
    Handlers,
    Reader,
    StateDict,
    Storage,
    StoredTensor,
    read_legacy,
    require,
)


# What the options of a network are made of, which of them may lack their names, and how deep its modules lie at most.
_OPTION_TYPES = (bool, int, float, str, type(None))
_FIRST_OPTIONS = ("img_resolution", "img_channels", "label_dim")
# Every tensor is known by the names of all modules around it, which could be endlessly long.
_DEEPEST, _NAME = 8, re.compile(r"\w{1,40}")
# The beginning of torch.save's format before 1.6.
_LEGACY = re.compile(rb"\x80.{1,10}?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL)


@dataclass(eq=False)
class PickledObject:
    """An object as a pickle describes it: the name of its class, which is not looked up, and its attributes."""

    class_name: str
    state: Any = None


class PickledNetwork(NamedTuple):
    """A network as a pickle describes it: its class, its constructor's arguments, its tensors as in a state dict."""

    class_name: str
    options: dict[str, Any]
    tensors: dict[str, StoredTensor]


class _Bytes(NamedTuple):
    start: int
    content: memoryview


def _rebuild_object(described: Any) -> PickledObject:
    match described:
        case {"type": "class", "class_name": str(class_name), "state": StateDict() as state}:
            return PickledObject(class_name[:80], state)
    raise CheckpointError("describes an object as torch_utils.persistence does not")


_NEW: dict[tuple[str, str], Any] = {
    ("torch.nn.modules.container", "ModuleDict"): lambda: PickledObject("ModuleDict"),
    ("dnnlib.util", "EasyDict"): lambda: StateDict(),
}


class _NetworkReader(Reader):
    """Python's pickle machine for objects and storages; of a numpy number nothing is read, as networks need none."""

    globals = GLOBALS | {
        **_NEW,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): _rebuild_object,
        ("numpy", "dtype"): lambda name, align, copy: PickledObject("dtype"),
        ("numpy.core.multiarray", "scalar"): lambda dtype, content: PickledObject("scalar"),
        ("numpy._core.multiarray", "scalar"): lambda dtype, content: PickledObject("scalar"),
    }

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self.globals = self.globals | {("torch.storage", "_load_from_bytes"): self.load_storage}
        self.loaded: set[int] = set()

    def load_storage(self, saved: Any) -> Storage:
        once = type(saved) is _Bytes and saved.start not in self.loaded
        require(once, "has a storage that is not stored, or that several tensors share")
        self.loaded.add(saved.start)
        storage = read_legacy(saved.content)
        require(type(storage) is Storage, f"has a {type(storage).__name__} where a storage must be")
        return storage

    def load_bytes(self, size_format: str) -> None:
        (length,) = struct.unpack(size_format, self.read(struct.calcsize(size_format)))
        start, content = self.file.position, self.file.skip(length)
        require(len(content) == length, f"ends within the {length:,} bytes of a tensor: {DAMAGED}")
        self.append(_Bytes(start, content))

    def load_newobj(self) -> None:
        arguments, make = self.stack.pop(), self.stack.pop()
        known = make in _NEW.values() and arguments == ()
        require(known, "uses the pickle opcode NEWOBJ for what networks do not need: nothing of it was run")
        self.append(make())

    def load_build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        require(type(made) is PickledObject and made.state is None, "sets the state of something that is not new")
        made.state = state

    dispatch = Handlers(
        Reader.usual
        | {
            pickle.BINBYTES[0]: lambda self: self.load_bytes("<I"),
            pickle.SHORT_BINBYTES[0]: lambda self: self.load_bytes("<B"),
            # the one set of a module names the buffers that are no weights, of which these networks have none
            pickle.EMPTY_SET[0]: Reader.usual[pickle.EMPTY_TUPLE[0]],
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BUILD[0]: load_build,
        }
    )


def read_pickle(memory: memoryview) -> Any:
    """A pickle of EDM or EDM2, with `PickledObject` for objects, or a file of torch.save in the older format."""
    return read_legacy(memory) if _LEGACY.match(memory) else _NetworkReader(memory).load()


def read_network(name: str, found: Any) -> PickledNetwork:
    """The network, of its moving average, that a file of that name holds."""
    network: Any = found.get("ema") if type(found) is StateDict else None
    require(isinstance(network, PickledObject), f"{name} holds no network of EDM or EDM2, which is under 'ema'")
    unnamed = _attribute(name, network, "_init_args", tuple)
    first = dict(zip(_FIRST_OPTIONS, unnamed, strict=False))
    require(len(first) == len(unnamed), f"{name} does not name the options of its network after {_FIRST_OPTIONS}")
    options = first | _attribute(name, network, "_init_kwargs", StateDict)
    for option, value in options.items():
        values = value if type(value) in (list, tuple) else [value]
        texts = [str(element) for element in values if type(element) in _OPTION_TYPES]
        plain = type(option) is str and len(values) == len(texts) <= 40 and all(len(text) <= 40 for text in texts)
        require(plain, f"{name}: {option!s:.40} is no number, text or list that a network takes")
    tensors: dict[str, Any] = {}
    modules: list[tuple[str, Any]] = [("", network)]
    places: set[PickledObject] = set()
    while modules:
        prefix, module = modules.pop()
        # a module in two places could stand for any number of them, and one within itself would never end
        alone = isinstance(module, PickledObject) and module not in places and prefix.count(".") <= _DEEPEST
        require(alone, f"{name}: {prefix[:-1]} is no module, lies in two places, or too deep")
        places.add(module)
        for kind in ("_parameters", "_buffers", "_modules"):
            for part, value in _attribute(name, module, kind, StateDict).items():
                require(_NAME.fullmatch(str(part)), f"{name}: {part!r:.40} in {prefix[:-1]} is no name of a network's")
                if kind == "_modules":
                    modules += [(f"{prefix}{part}.", value)] if value is not None else []
                elif value is not None:
                    tensors[f"{prefix}{part}"] = value
    return PickledNetwork(network.class_name, options, tensors)


def _attribute(name: str, described: PickledObject, attribute: str, kind: type) -> Any:
    value = described.state.get(attribute) if type(described.state) is StateDict else None
    require(type(value) is kind, f"{name}: a {described.class_name} has no {attribute} as a network has")
    return value
