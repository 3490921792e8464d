"""Sets up every test with one thread and a fixed seed, and provides memory that is poisoned instead of empty."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import sys

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when the libraries load, so set before they are imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the launcher sets the same value
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton loads; runs kernels on numpy without a GPU

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.trace_rules  # noqa: E402, F401  (records torch's functions before a test replaces some)
import torch.distributed._functional_collectives  # noqa: E402, F401  (forked ranks inherit it)

from tests.helpers.fork import PATIENCE  # noqa: E402

torch.set_num_threads(1)  # a forked child hangs if the parent has run OpenMP threads
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; ranks would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run GPU tests last and fake-GPU tests first.

    After autograd has run on a GPU, forked ranks can no longer run a backward. Autograd counts devices in a process's
    first backward, and forks inherit that count, so the fake GPU must come before any other backward.
    """
    items.sort(key=lambda item: bool(item.get_closest_marker("gpu")) - bool(item.get_closest_marker("fake_cuda")))
    for item in items if PATIENCE != 1 else ():
        given = item.get_closest_marker("timeout")
        limit = float(given.args[0] if given else config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(limit * PATIENCE), append=False)


def pytest_collection_finish() -> None:
    """Exclude all objects that exist after collection from later garbage collections, which training runs too."""
    gc.collect()
    gc.freeze()
    _use_huge_pages()


def _use_huge_pages() -> None:
    """Put this process's memory into huge pages: a fork copies the table of all pages, four times as fast then."""
    if sys.platform != "linux":
        return
    huge, collapse, libc = 2 << 20, 25, ctypes.CDLL(None)  # MADV_COLLAPSE; older kernels refuse it
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, access, *_, name = (*line.split(maxsplit=5), "")[:6]
        if access == "rw-p" and name in ("", "[heap]"):
            begin, end = (int(address, 16) for address in where.split("-"))
            begin, end = -(-begin // huge) * huge, end // huge * huge
            if begin < end:
                libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), collapse)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries expect this at exit, where some report leaked objects


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill a tensor with values that a later read cannot overlook: NaN, the smallest integer, True."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make ``torch.empty``, ``torch.empty_like``, ``Tensor.new_empty`` and ``torch.frombuffer`` return poisoned memory.

    Uninitialised memory is often zero, so code that reads it can pass its tests by luck. Returns the function that
    poisons one tensor in place.
    """

    def poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = real(*args, **kwargs)
            return tensor if tensor.is_meta else poison_(tensor)

        return allocate

    with torch.device("cpu"):
        torch.empty(0)  # torch caches the functions that create tensors on its first call under a device context
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "frombuffer", poisoned(torch.frombuffer))  # the CPU path's large buffers
    return poison_
