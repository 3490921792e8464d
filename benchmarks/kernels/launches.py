"""Records the kernel launches of an op on a CPU without running them, and compiles each one for a given GPU.

The op's own code creates the arguments, and Triton's own JIT derives the signature, the constants and the attributes
from them. (An integer argument of 1 becomes a constant, a multiple of 16 is marked as such, and pointers are marked as
aligned or not.) So each launch is compiled exactly as on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One kernel launch. Its pointer arguments are tensors."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def bytes(self) -> int:
        """Size of all tensors that the kernel reads or writes."""
        given = (one for one in (*self.args, *self.options.values()) if isinstance(one, torch.Tensor))
        return sum(one.numel() * one.element_size() for one in given)


class _Driver:
    """Replaces the driver of an absent GPU. Triton caches compiled kernels by device, so each chip has a name."""

    def __init__(self, name: str, target: GPUTarget) -> None:
        self.name, self.target = name, target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def on_chip(name: str, target: GPUTarget) -> Iterator[None]:
    """Make Triton compile for ``target``, and the ops accept CPU tensors and use the tiles of the chip ``name``."""
    triton.runtime.driver.set_active(_Driver(name, target))  # type: ignore[arg-type]
    stand_ins = {"launch_on": lambda tensor: nullcontext(), "arch_of": lambda device: name}
    with ExitStack() as stack:
        for module in [module for key, module in sys.modules.items() if key.startswith("equimoe.kernels.")]:
            for attribute, stand_in in stand_ins.items():
                if hasattr(module, attribute):
                    stack.enter_context(mock.patch.object(module, attribute, stand_in))
        yield


@contextmanager
def recording(launch: bool = False) -> Iterator[list[Launch]]:
    """Record all launches in order. Unless ``launch`` is set, none of them runs, and outputs are undefined."""
    found: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        found.append(Launch(self, args, options))
        return original(self, *args, grid=grid, warmup=warmup, **options) if launch else None

    with mock.patch.object(JITFunction, "run", run):
        yield found


def recorded(work: Callable[[], object]) -> list[Launch]:
    """Return the launches of ``work`` in order, without running them."""
    with recording() as found:
        work()
    return found


def compiled(launch: Launch) -> Any:
    """Compile ``launch`` under :func:`on_chip`. Launches that share a binary get the same object."""
    return launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
