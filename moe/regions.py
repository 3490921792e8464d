"""Names the stages of a layer in profiler traces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING = nullcontext()


def region(name: str) -> AbstractContextManager[Any]:
    """Return a context that a running torch profiler shows under ``name``; without one, it does nothing.

    It does nothing in compiled code either, where torch names the parts.
    """
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return _NOTHING
    return record_function(name)
