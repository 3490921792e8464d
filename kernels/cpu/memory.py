"""Large CPU buffers whose memory stays mapped after they are freed.

The C library returns large blocks to the operating system, which then has to map and clear every page again when the
next buffer touches it. A training step allocates the same sizes as the step before, and for it this costs more than
writing the buffers does. Buffers from here ask for huge pages, and their memory goes to a pool when the last tensor
that uses it dies. benchmarks/NOTES.md has the measurements.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from ..checks import readable

_HUGE_PAGE = 1 << 21
#: the pool gives up a block that none of so many further requests has used
_PATIENCE = 4096


class _Pool:
    """Anonymous memory mappings that are lent as buffers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: the request at which each block came back, and the block
        self._free: list[tuple[int, mmap.mmap]] = []
        #: filled by finalizers, which may run at any moment, and so without the lock
        self._returned: deque[mmap.mmap] = deque()
        self._requests = 0

    def lend(self, size: int) -> memoryview:
        """Return a writable buffer of ``size`` bytes. Its block comes back when the last reference to it dies."""
        with self._lock:
            self._requests += 1
            while self._returned:
                self._free.append((self._requests, self._returned.popleft()))
            fitting = [entry for entry in self._free if size <= len(entry[1]) <= 2 * size]
            chosen = min(fitting, key=lambda entry: len(entry[1]), default=None)
            self._free = [
                entry for entry in self._free if entry is not chosen and self._requests - entry[0] < _PATIENCE
            ]
        block = _map(size) if chosen is None else chosen[1]
        buffer = memoryview(block)[:size]
        weakref.finalize(buffer, self._returned.append, block).atexit = False
        return buffer


def _map(size: int) -> mmap.mmap:
    step = max(_HUGE_PAGE, 1 << max(size.bit_length() - 4, 0))  # so that sizes that differ a little share blocks
    block = mmap.mmap(-1, -(-size // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_pool = _Pool() if hasattr(mmap, "MAP_ANONYMOUS") else None


def _start_anew() -> None:
    """Give a forked child its own pool, because another thread of its parent may have held the lock."""
    global _pool
    _pool = None if _pool is None else _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def empty(*shape: int, like: Tensor) -> Tensor:
    """Like ``like.new_empty(shape)``; large CPU tensors come from the pool."""
    size = like.element_size()
    for length in shape:
        size *= length
    if not readable(like) or size < _HUGE_PAGE or _pool is None:
        return like.new_empty(shape)
    return torch.frombuffer(_pool.lend(size), dtype=like.dtype).view(shape)
