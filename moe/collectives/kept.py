"""Keeps results of exchanges, so that recomputation need not communicate again."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

V = TypeVar("V")


class Kept:
    """Results of the exchanges in a region's first run, in order; its recomputation reads them instead."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next: int | None = None


#: set while a region runs or is recomputed whose exchanges are kept
keeping: ContextVar[Kept | None] = ContextVar("equimoe_kept_exchanges", default=None)


def once(make: Callable[[], V]) -> V:
    """Run an exchange and return its result; in a recomputation that keeps exchanges, return the first run's result."""
    kept = keeping.get()
    if kept is None:
        return make()
    if kept.next is None:
        kept.values.append(make())
        return kept.values[-1]
    kept.next += 1
    return kept.values[kept.next - 1]
