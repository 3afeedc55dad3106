"""Bytes of a weights file to tensors by name; nothing in the file is executed."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from featcache.display import say
from featcache.errors import UserError, listed, shown
from featcache.tensor_files import State

# Wrappers that training scripts put around a state dict, outermost first. Of one level the first
# counts: weights as trained before their moving averages, DINO's teacher before its student.
STATE_DICT_KEYS = (
    *("state_dict", "model_state_dict", "model", "net", "network", "module", "backbone", "encoder"),
    *("teacher", "student", "state_dict_ema", "model_ema_state_dict", "ema_state_dict"),
    *("model_ema", "ema_model", "ema", "params", "params_ema"),
)
# A small archive may unpack to anything; a checkpoint is stored, not compressed.
MAX_UNPACK_RATIO = 4
MAX_DEPTH = 100
"""Tuples inside tuples: hashing them recurses, and a deep chain would overflow the C stack."""
MAX_STEPS = 10_000_000
"""Objects that unpickling may hash or convert; a densenet161 with Adam's state takes 125,000."""
# What torch.save writes around tensors. Of other modules a message names the objects.
_TENSOR_MODULES = {
    *("collections", "builtins", "__builtin__", "_codecs", "torch", "torch._utils"),
    *("torch._tensor", "torch.storage", "torch.nn.parameter"),
}


def parse_checkpoint(data: bytes, name: str) -> State:
    """The state dict in the bytes of a file that torch.save wrote.

    Args:
        data: The whole file.
        name: What messages call it.

    Raises:
        UserError: It is not a state dict, or is built to keep the program busy.
    """
    import torch

    pickles = Pickles(name)
    try:
        _check_pickles(data, pickles)
        if any(module.startswith("__torch__") for module, _ in pickles.globals):
            raise UserError(
                f"{name} is a TorchScript archive; save its tensors alone in Python: "
                f"torch.save(torch.jit.load({name!r}).state_dict(), 'tensors.pth')"
            )
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # every library error here means: not a usable weights file
        if foreign := pickles.foreign():
            raise UserError(_not_tensors(foreign, pickles.texts, name)) from error
        reason = shown(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise UserError(
            f"{name} cannot be read as weights ({reason}); "
            "give a .safetensors file or a state dict that torch.save wrote"
        ) from error
    return _unwrapped(loaded, name)


def _not_tensors(foreign: Sequence[str], texts: set[str], name: str) -> str:
    key = next((key for key in STATE_DICT_KEYS if key in texts), None)
    part = f"[{key!r}]" if key else ".state_dict()"
    return (
        f"{name} holds objects that are not tensors and are not loaded: "
        f"{listed([shown(item, 80) for item in foreign], 3)}; if you trust the file, save its "
        f"tensors alone in Python: c = torch.load({name!r}, weights_only=False); "
        f"torch.save(c{part}, 'tensors.pth')"
    )


def _unwrapped(loaded: object, name: str) -> State:
    import torch

    while isinstance(loaded, Mapping):
        inner = [key for key in STATE_DICT_KEYS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            break
        if len(inner) > 1:
            say(f"{name} holds {' and '.join(inner)}: took {inner[0]}")
        loaded = loaded[inner[0]]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{name} holds a {type(loaded).__name__}, not a state dict")
    state = {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not state:
        keys = listed([shown(str(key), 60) for key in loaded], 5)
        raise UserError(f"{name} holds no tensors, its keys are {keys}; give a state dict")
    return state


def _check_pickles(data: bytes, pickles: Pickles) -> None:
    """Scan the pickles that torch.load would execute, found the way torch finds them."""
    import torch

    if data[:4] != b"PK\3\4":  # the format of before torch 1.6: five pickles, then tensors
        file = io.BytesIO(data)
        for _ in range(5):
            pickles.scan(file)
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(item.file_size for item in archive.infolist())
    if unpacked > MAX_UNPACK_RATIO * len(data) + 2**20:
        raise UserError(
            f"{pickles.name} unpacks to {unpacked} bytes, far above its size; not loaded"
        )
    # torch's own reader: another one could find another record of that name.
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    pickles.scan(io.BytesIO(reader.get_record("data.pkl")))


class _Node:
    """A container while a pickle is scanned; everything else is a string or None."""

    __slots__ = ("depth", "items")

    def __init__(self, items: Iterable[Any] = (), depth: int = 0) -> None:
        self.items, self.depth = list(items), depth


_MARK = object()
# Opcodes that take objects without hashing or converting them.
_FREE = ("LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "POP", "POP_MARK", "STOP")


class Pickles:
    """Follows a pickle's opcodes without executing any, and adds up what executing would cost.

    Sixty tuples, each containing the one before twice, take a few hundred bytes, but hashing the
    last as a key takes 2**60 steps, which nothing can interrupt.

    Attributes:
        name: What messages call the file.
        globals: Modules and names of classes and functions, in the order met.
        texts: Short texts.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.globals: dict[tuple[str, str], None] = {}
        self.texts: set[str] = set()
        self._steps = 0
        self._stack: list[Any] = []
        self._memo: dict[Any, Any] = {}

    def foreign(self) -> list[str]:
        """Names of classes and functions other than tensors and plain containers."""
        return [".".join(item) for item in self.globals if item[0] not in _TENSOR_MODULES]

    def scan(self, file: BinaryIO) -> None:
        """Follow one pickle to its end.

        Raises:
            UserError: Executing it would take too long.
            ValueError: It is not a pickle.
        """
        self._stack, self._memo = [], {}
        for opcode, arg, _ in pickletools.genops(file):
            name = opcode.name
            if name in ("GET", "BINGET", "LONG_BINGET"):
                self._stack.append(self._memo.get(arg))
            elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
                self._memo[len(self._memo) if name == "MEMOIZE" else arg] = self._top()
            elif name == "DUP":
                self._stack.append(self._top())
            elif name == "MARK":
                self._stack.append(_MARK)
            else:
                self._step(name, arg, self._taken(opcode), bool(opcode.stack_after))

    def _top(self) -> Any:
        return self._stack[-1] if self._stack else None

    def _taken(self, opcode: pickletools.OpcodeInfo) -> list[Any]:
        """Pop what an opcode consumes, without its mark."""
        before, taken = opcode.stack_before, list[Any]()
        if pickletools.markobject in before:
            while self._stack and (item := self._stack.pop()) is not _MARK:
                taken.append(item)
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            taken.append(self._stack.pop() if self._stack else None)
        return taken[::-1]

    def _step(self, name: str, arg: Any, taken: list[Any], has_result: bool) -> None:
        result: Any = arg if isinstance(arg, str) else None
        if name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            parts = taken if name == "STACK_GLOBAL" else str(arg).split(" ", 1)
            self.globals[(str(parts[0]), str(parts[-1]))] = None
            result = _Node(taken)
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            if name not in ("APPEND", "APPENDS"):
                self._spend(taken[1::2] if name.startswith("SET") else taken[1:])
            result = taken[0]
            if isinstance(result, _Node):
                result.items += taken[1:]
        elif taken:
            if name not in _FREE:
                self._spend(taken)
            depth = 1 + max((t.depth for t in taken if isinstance(t, _Node)), default=0)
            result = _Node(taken, depth if "TUPLE" in name or name == "FROZENSET" else 0)
            if depth > MAX_DEPTH:
                raise self._refusal()
        elif name.startswith("EMPTY_"):
            result = _Node()
        elif result is not None and len(result) < 100:
            self.texts.add(result)
        if has_result:
            self._stack.append(result)

    def _spend(self, objects: Iterable[Any]) -> None:
        """Count objects and all inside them, as often as hashing or converting meets them."""
        todo = list(objects)
        while todo:
            self._steps += 1
            node = todo.pop()
            if isinstance(node, _Node):
                self._steps += len(node.items)
                if self._steps > MAX_STEPS:
                    raise self._refusal()
                todo += node.items

    def _refusal(self) -> UserError:
        return UserError(
            f"{self.name} is built to keep the program busy (keys nested in keys): not loaded; "
            "give a state dict that torch.save wrote"
        )
