"""What a recomputation need not communicate again."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

V = TypeVar("V")


class Kept:
    """What the exchanges of a region brought when it ran first; its recomputation takes them from here."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next: int | None = None


#: set while a region runs whose exchanges are kept
keeping: ContextVar[Kept | None] = ContextVar("equimoe_kept_exchanges", default=None)


def once(make: Callable[[], V]) -> V:
    """What ``make`` brings from other ranks; in a recomputation that keeps exchanges, what it brought before."""
    kept = keeping.get()
    if kept is None:
        return make()
    if kept.next is None:
        kept.values.append(make())
        return kept.values[-1]
    kept.next += 1
    return kept.values[kept.next - 1]
