"""Experts shared out among threads, each of which works alone.

Inside one product or one activation all threads would have to meet at its end; there are hundreds of those in a
layer, and on a machine that does anything else besides each can cost a time slice. Experts need each other only at
the very end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

_T = TypeVar("_T")
#: more workers than this would wait for Python's interpreter lock
_MOST = 8
#: how much longer than its fair share the busiest worker may take
_SLACK = 1.2


class _Workers:
    """Threads in which every operation of PyTorch is single-threaded."""

    def __init__(self, count: int) -> None:
        self.pool = ThreadPoolExecutor(count, thread_name_prefix="expert")
        started = threading.Barrier(count + 1)

        def start() -> None:
            torch.get_num_threads()  # a thread's first parallel operation would undo the next line
            torch.set_num_threads(1)
            started.wait()

        threads = torch.get_num_threads()
        for _ in range(count):
            self.pool.submit(start)
        started.wait()
        torch.set_num_threads(threads)  # the workers' setting is also the default of threads to come


_workers: dict[int, _Workers] = {}
_making = threading.Lock()
if hasattr(os, "register_at_fork"):  # a forked child has the pools but not their threads
    os.register_at_fork(after_in_child=_workers.clear)


def _threads() -> int:
    return torch.get_num_threads()


def share_out(items: Sequence[_T], sizes: Sequence[int], count: int) -> list[list[_T]] | None:
    """The items in ``count`` lists of about equal total size, None where the largest items forbid it."""
    lists: list[list[_T]] = [[] for _ in range(count)]
    loads = [0] * count
    for index in sorted(range(len(items)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        lists[least].append(items[index])
        loads[least] += sizes[index]
    return lists if max(loads) * count <= _SLACK * sum(loads) else None


def each(items: Sequence[_T], sizes: Sequence[int], work: Callable[[Sequence[_T]], None]) -> None:
    """``work`` on all items: in several threads with a part of them each where that pays, else here in one go.

    The parts must write to different memory; their results must not depend on who does them.
    """
    count = _threads()
    parts = share_out(items, sizes, count) if 1 < count <= min(_MOST, len(items)) else None
    if parts is None or _get_current_dispatch_mode() is not None:  # which would not see other threads
        work(items)
        return
    with _making:
        workers = _workers.get(count) or _workers.setdefault(count, _Workers(count))
    inference = torch.is_inference_mode_enabled()

    def call(part: Sequence[_T]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(part)

    futures = [workers.pool.submit(call, part) for part in parts]
    wait(futures)  # all of them, for they write to memory that an error would free
    for future in futures:
        future.result()
