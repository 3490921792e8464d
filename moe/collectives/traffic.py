"""Records what the collectives of a layer send."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .axes import Axis


class Traffic(NamedTuple):
    """One collective that this rank took part in."""

    verb: str
    axis: str
    #: number of ranks of the axis
    size: int
    #: bytes that this rank sent to other ranks
    sent: int


_record: list[Traffic] | None = None


@contextmanager
def record_traffic() -> Iterator[list[Traffic]]:
    """Context that records every collective of a layer in the list that it yields, including those of backwards."""
    global _record
    before, _record = _record, []  # not a ContextVar, because autograd runs backwards in other threads
    try:
        yield _record
    finally:
        _record = before


def note(verb: str, axis: Axis, sent: int) -> None:
    """Record a collective if :func:`record_traffic` is active."""
    if _record is not None:
        _record.append(Traffic(verb, axis.name, axis.size, sent))
