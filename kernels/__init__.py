"""The compute-heavy ops of a Mixture-of-Experts layer, one folder each.

Every op has a ``reference`` backend (slow, obvious, the oracle of the tests), a ``torch`` backend (fast, portable) and
a ``triton`` backend, and takes ``backend="auto" | "torch" | "triton" | "reference"``. On tensors without values (meta,
FakeTensorMode) it returns shapes; there the reference, which reads values, does as torch does. Nothing in here knows
of layers or meshes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

_Op = TypeVar("_Op", bound=Callable[..., object])


def pick(op: str, backends: Mapping[str, _Op], backend: str) -> _Op:
    """The implementation of ``op`` called ``backend``; ``"auto"`` is ``"torch"``."""
    chosen = backends.get("torch" if backend == "auto" else backend)
    if chosen is None:
        raise ValueError(f"backend={backend!r}: {op} has {', '.join(map(repr, ('auto', *backends)))}; use one of these")
    return chosen
