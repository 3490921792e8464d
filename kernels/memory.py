"""Large CPU buffers that keep their pages.

The C library returns large blocks to the kernel, which then maps them again page by page on the next touch. Training
steps allocate the same sizes again and again, so for them this costs more than writing the buffers, and much more in a
virtual machine. Buffers from here ask for huge pages, and return to a pool when their tensor dies.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from .values import readable

_HUGE_PAGE = 1 << 21
#: a pooled block goes back to the kernel when so many later requests had no use for it
_PATIENCE = 4096


class _Pool:
    """Anonymous memory mappings, lent as buffers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[int, mmap.mmap]] = []
        # filled by finalizers, which may run at any moment, so without the lock
        self._returned: deque[mmap.mmap] = deque()
        self._requests = 0

    def lend(self, size: int) -> memoryview:
        """A writable buffer of ``size`` bytes; its block returns when the last reference to it dies."""
        with self._lock:
            self._requests += 1
            while self._returned:
                self._free.append((self._requests, self._returned.popleft()))
            fitting = [entry for entry in self._free if size <= len(entry[1]) <= 2 * size]
            if fitting:
                chosen = min(fitting, key=lambda entry: len(entry[1]))
                self._free.remove(chosen)
                block = chosen[1]
            else:
                block = _map(size)
            self._free = [entry for entry in self._free if self._requests - entry[0] < _PATIENCE]
        buffer = memoryview(block)[:size]
        weakref.finalize(buffer, self._returned.append, block).atexit = False
        return buffer


def _map(size: int) -> mmap.mmap:
    step = max(_HUGE_PAGE, 1 << max(size.bit_length() - 4, 0))  # so that sizes which differ a little share blocks
    block = mmap.mmap(-1, -(-size // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_pool = _Pool() if hasattr(mmap, "MAP_ANONYMOUS") else None


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty`` on ``like``'s device, and in its dtype unless ``dtype`` is given."""
    dtype = dtype or like.dtype
    size = dtype.itemsize
    for length in shape:
        size *= length
    if not readable(like) or size < _HUGE_PAGE or _pool is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return torch.frombuffer(_pool.lend(size), dtype=dtype).view(shape)
