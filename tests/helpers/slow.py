"""Chooses which parameters of a test `make test` runs, and which only `make test-slow` runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_but(fast: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Return pytest parameters for ``values``, in order; all that are not in ``fast`` are marked slow.

    A tuple holds the values of several arguments.
    """
    values, fast = list(values), list(fast)
    unknown = [value for value in fast if value not in values]
    assert not unknown, f"{unknown} are not among the values"
    arguments = [value if isinstance(value, tuple) else (value,) for value in values]
    marks = [() if value in fast else pytest.mark.slow for value in values]
    return [pytest.param(*values, marks=mark) for values, mark in zip(arguments, marks, strict=True)]
