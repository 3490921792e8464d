"""What is on the wire: a record of it, and the formats that rows travel in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .axes import Axis


class Traffic(NamedTuple):
    """One collective as this rank took part in it."""

    verb: str
    axis: str
    #: ranks of the axis
    size: int
    #: bytes that this rank sent to other ranks
    sent: int


_record: list[Traffic] | None = None


@contextmanager
def record_traffic() -> Iterator[list[Traffic]]:
    """Within it, every collective of a layer is noted in the list, those of backward passes too."""
    global _record
    before, _record = _record, []  # not a context variable: backward passes run in threads of their own
    try:
        yield _record
    finally:
        _record = before


def note(verb: str, axis: Axis, sent: int) -> None:
    """Put a collective on the record, if there is one."""
    if _record is not None:
        _record.append(Traffic(verb, axis.name, axis.size, sent))


class Codec(Protocol):
    """How rows look on the wire: [S, ...] to a payload [S, ...] and back."""

    def encode(self, rows: Tensor) -> Tensor: ...

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor: ...


class Plain:
    """Rows travel as they are."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        return payload


class Wire(NamedTuple):
    """The formats of rows and of their gradients."""

    forward: Codec = Plain()
    backward: Codec = Plain()


PLAIN = Wire()
