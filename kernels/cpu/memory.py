"""Large CPU buffers whose memory stays mapped after they are freed.

The C library returns large blocks to the operating system, which then has to map and clear every page again when the
next buffer touches it. A training step allocates the same sizes as the step before, and for it this costs more than
writing the buffers does. Buffers from here ask for huge pages, and their memory goes to a pool when the last tensor
that uses it dies. benchmarks/NOTES.md has the measurements.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from ..checks import readable

HUGE_PAGE = 1 << 21


class _Pool:
    """Anonymous memory mappings that are lent as buffers.

    It keeps at most as many free bytes as were ever lent at the same time in the last :data:`_PATIENCE` requests.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: blocks that nobody uses, the one that came back last at the end
        self._free: list[mmap.mmap] = []
        #: filled by finalizers, which may run at any moment, and so without the lock
        self._returned: deque[mmap.mmap] = deque()
        #: bytes lent now, and the most in this period of requests and in the one before
        self._lent, self._peak, self._previous_peak, self._requests = 0, 0, 0, 0

    def lend(self, size: int) -> memoryview:
        """Return a writable buffer of ``size`` bytes. Its block comes back when the last reference to it dies."""
        with self._lock:
            self._take_back()
            chosen = min((b for b in self._free if size <= len(b) <= 2 * size), key=len, default=None)
            if chosen is not None:
                self._free = [block for block in self._free if block is not chosen]
            block = self._new(size) if chosen is None else chosen
            self._lent += len(block)
            self._peak = max(self._peak, self._lent)
            self._shrink(max(self._peak, self._previous_peak) - self._lent)
        buffer = memoryview(block)[:size]
        weakref.finalize(buffer, self._returned.append, block).atexit = False
        return buffer

    def _take_back(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self._lent -= len(block)
            self._free.append(block)
        self._requests += 1
        if self._requests % _PATIENCE == 0:
            self._previous_peak, self._peak = self._peak, self._lent

    def _new(self, size: int) -> mmap.mmap:
        try:
            return _map(size)
        except OSError:  # out of memory: give the free blocks up first
            self._free = []
            return _map(size)

    def _shrink(self, most: int) -> None:
        """Give up the blocks that have been free for longest until at most ``most`` bytes are free."""
        free = sum(map(len, self._free))
        while self._free and free > most:
            free -= len(self._free.pop(0))


#: number of requests in a period
_PATIENCE = 4096


def _map(size: int) -> mmap.mmap:
    step = max(HUGE_PAGE, 1 << max(size.bit_length() - 4, 0))  # so that sizes that differ a little share blocks
    block = mmap.mmap(-1, -(-size // step) * step, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
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
    """Like ``like.new_empty(shape)``; large CPU tensors come from the pool, and their storage cannot be resized."""
    size = like.element_size()
    for length in shape:
        size *= length
    if not readable(like) or size < HUGE_PAGE or _pool is None:
        return like.new_empty(shape)
    try:
        return torch.frombuffer(_pool.lend(size), dtype=like.dtype).view(shape)
    except OSError:
        return like.new_empty(shape)  # which says what is missing
