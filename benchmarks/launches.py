"""Records what the ops launch, on the CPU and without running it, and compiles each launch as the JIT would on a chip.

Nothing is declared by hand: the op's own code makes the arguments, and Triton's own JIT turns them into a signature,
constants and attributes (an integer that is 1 is a constant, a multiple of 16 is known to be one, a pointer is known to
be aligned or not). So what is compiled here is what a launch of those sizes gets.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Launch(NamedTuple):
    """One launch of a kernel with its arguments, of which pointers are tensors of the host."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Driver:
    """Stands for the driver of a GPU that is not there. Triton keeps what it compiled by device, so each has a name."""

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
    """Triton compiles for ``target``; the kernels take host tensors, and the tiles of ``name``."""
    triton.runtime.driver.set_active(_Driver(name, target))  # type: ignore[arg-type]
    stand_ins = {"launch_on": lambda tensor: nullcontext(), "arch_of": lambda device: name}
    with ExitStack() as stack:
        for module in [module for key, module in sys.modules.items() if key.startswith("equimoe.kernels.")]:
            for attribute, stand_in in stand_ins.items():
                if hasattr(module, attribute):
                    stack.enter_context(mock.patch.object(module, attribute, stand_in))
        yield


def recorded(work: Callable[[], object]) -> list[Launch]:
    """The launches of ``work``, in order; none of them runs, so what kernels write is undefined."""
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(self, args, options))

    with mock.patch.object(JITFunction, "run", run):
        work()
    return found


def compiled(launch: Launch) -> Any:
    """What the JIT compiles for ``launch`` under :func:`on_chip`; the same object for launches that share it."""
    return launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
