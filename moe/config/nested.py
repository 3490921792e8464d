"""Nested settings by the dotted names of their fields."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any


def dotted(values: Mapping[str, Any], whole: Collection[str] = (), prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the name and value of every field, such as ``("moe.top_k", 2)``; dicts called ``whole`` are values."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in whole:
            yield from dotted(value, whole, f"{prefix}{name}.")
        else:
            yield prefix + name, value
