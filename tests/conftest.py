"""What every test gets: one thread, a fixed seed, and on request memory that is poisoned instead of empty."""

from __future__ import annotations

import gc
import os
import random

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # read when the libraries load, so before numpy and torch
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the launcher has it
if not os.path.exists("/dev/nvidiactl") and not os.path.exists("/dev/kfd"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton loads: without a GPU, its kernels run on numpy

from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed._functional_collectives  # noqa: E402, F401  (forked ranks inherit it)

torch.set_num_threads(1)  # forking a process whose OpenMP threads have run hangs the child


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a GPU come last: once autograd has run on one, a forked rank can no longer run a backward pass.

    Those on a fake GPU come first: autograd counts devices in a process's first backward pass, and forks keep that.
    """
    items.sort(key=lambda item: bool(item.get_closest_marker("gpu")) - bool(item.get_closest_marker("fake_cuda")))


def pytest_collection_finish() -> None:
    """Keep what is imported and collected out of every later garbage collection, of which training runs some itself."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # as libraries expect at exit, where some report what is left


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what a later read cannot miss: NaN, the smallest integer, True."""
    with torch.no_grad():
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.Tensor], torch.Tensor]:
    """Make ``torch.empty``, ``torch.empty_like`` and ``Tensor.new_empty`` return poisoned memory.

    Uninitialised memory is zero more often than not, so code that reads it passes its tests by luck. Returns the
    function that poisons one tensor in place.
    """

    def poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = real(*args, **kwargs)
            return tensor if tensor.is_meta else poison_(tensor)

        return allocate

    with torch.device("cpu"):
        torch.empty(0)  # at the first call under a device, torch lists for good the functions that make tensors
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    return poison_
