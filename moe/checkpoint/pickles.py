"""Follows the opcodes of a pickle and builds inert values: imports nothing, calls nothing.

:func:`interpret` refuses everything that torch does not write into files of tensors.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

from .manifest import short


@dataclass(frozen=True)
class Name:
    """A global name in a pickle. It is never imported."""

    module: str
    name: str


@dataclass(eq=False, repr=False)
class Record:
    """Stands for the object that unpickling would create by calling ``of``."""

    of: Name
    arguments: tuple[Any, ...]
    state: Any = None


#: stands for the storage that a tensor's pickle refers to
STORAGE = Name("", "storage")
#: a dict that remembers the order of its keys, which becomes a dict
ORDERED = Name("collections", "OrderedDict")


def interpret(pickled: bytes, names: set[Name]) -> Any:
    """Return the value of a pickle as inert data. Imports and calls nothing.

    The data are tuples, lists, dicts, strings, numbers, :class:`Name` and :class:`Record`. Raises ValueError for an
    opcode that torch's files do not have, or a name that is not in ``names``.
    """
    machine = _Machine(names)
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "STOP":
            value = machine.pop()
            if machine.stack:
                raise ValueError("the pickle leaves more than one value")
            return value
        machine.do(opcode.name, argument)
    raise ValueError("the pickle has no end")


class _Machine:
    """Interprets the opcodes of a pickle with a stack and a memo of inert values."""

    MARK = object()

    def __init__(self, names: set[Name]) -> None:
        self.names = names
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def do(self, opcode: str, argument: Any) -> None:
        push, pop = self.stack.append, self.pop
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "MARK":
                push(self.MARK)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode[-1]) if opcode[-1].isdigit() else 0)]
                push(tuple(reversed(items)))
            case "TUPLE":
                push(tuple(self.pop_to_mark()))
            case "EMPTY_LIST":
                push([])
            case "APPEND" | "APPENDS":
                values = self.pop_to_mark() if opcode == "APPENDS" else [pop()]
                self.top(list).extend(values)
            case "EMPTY_DICT":
                push({})
            case "SETITEM" | "SETITEMS":
                values = self.pop_to_mark() if opcode == "SETITEMS" else [pop(), pop()][::-1]
                self.update(self.top(dict), values[::2], values[1::2])
            case "GLOBAL":
                push(self.known(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                push(self.known(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, of = typed(pop(), tuple), typed(pop(), Name)
                push({} if (of, arguments) == (ORDERED, ()) else Record(of, arguments))
            case "BUILD":
                state = pop()
                if not isinstance(self.top(object), dict):  # which torch gives an attribute that says nothing here
                    self.build(self.top(Record), state)
            case "BINPERSID":
                push(Record(self.known(STORAGE.module, STORAGE.name), typed(pop(), tuple)))
            case _:
                raise ValueError(f"the pickle has the opcode {opcode}, which such files do not have")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is self.MARK:
            raise ValueError("the pickle's stack is empty")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not self.MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("the pickle has no mark")
        self.stack.pop()
        return items[::-1]

    def top(self, kind: type) -> Any:
        self.stack.append(self.pop())
        return typed(self.stack[-1], kind)

    def known(self, module: Any, name: Any) -> Name:
        found = Name(typed(module, str), typed(name, str))
        if found not in self.names:
            raise ValueError(f"the pickle names {found.module}.{found.name}, which such files do not have")
        return found

    @staticmethod
    def update(into: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
        for key, value in zip(keys, values, strict=True):
            if not isinstance(key, (str, int, Record)) or key in into:
                raise ValueError("the pickle has a key that is repeated, or is no string, number or record")
            into[key] = value

    @staticmethod
    def build(record: Record, state: Any) -> None:
        if record.state is not None:
            raise ValueError("the pickle sets the state of a record twice")
        record.state = state


def made(value: Any, name: str) -> Record:
    record: Record = typed(value, Record)
    if record.of.name != name:
        raise ValueError(f"found a {record.of.name} instead of a {name}")
    return record


def state(value: Any, name: str, kind: type) -> Any:
    return typed(made(value, name).state, kind)


def fields(value: Any, name: str) -> dict[Any, Any]:
    fields: dict[Any, Any] = state(value, name, dict)
    return fields


def torch_size(value: Any) -> tuple[int, ...]:
    (sizes,) = made(value, "Size").arguments
    return tuple(map(size, typed(sizes, tuple)))


def size(value: Any) -> int:
    size: int = typed(value, int)
    if not 0 <= size < 2**63:
        raise ValueError(f"{short(size)} is not a size")
    return size


def typed(value: Any, kind: type) -> Any:
    """Return ``value`` if it is a ``kind``, else raise ValueError. A bool is not an int."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"found a {type(value).__name__} instead of a {kind.__name__}")
    return value
