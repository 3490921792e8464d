"""Large CPU buffers without a page fault for every 4 KiB."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache

import torch
from torch import Tensor

_HUGE_PAGE = 1 << 21


@cache
def _madvise() -> ctypes._CFuncPtr | None:
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    madvise.restype = ctypes.c_int
    return madvise


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty`` on ``like``'s device, and in its dtype unless ``dtype`` is given.

    Memory fresh from the kernel is mapped one page at a time on first touch, which costs more than writing it; on
    Linux the buffer therefore asks for huge pages. That is a hint: where it is not honoured nothing is lost.
    """
    buffer = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    size = buffer.numel() * buffer.element_size()
    if buffer.device.type == "cpu" and size >= 2 * _HUGE_PAGE and (madvise := _madvise()) is not None:
        start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (buffer.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, stop - start, mmap.MADV_HUGEPAGE)
    return buffer
