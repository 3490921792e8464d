"""Runs code on CUDA tensors without memory, on machines without a GPU, and records what would go wrong on a GPU.

Tensors are torch's fake tensors: shapes, dtypes and devices are exact, values do not exist. A small library
(device.cpp) makes torch believe in a device. Backwards need it, both in CPU builds and in CUDA builds without a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import cpp_extension

from tests.helpers.fake_cuda.watch import Event, Stream, Watch
from tests.helpers.fork import run_ranks

__all__ = ["Watch", "needs_fake_cuda", "on_fake_cuda", "real_tensors"]

_SOURCE = Path(__file__).with_name("device.cpp")


def _obstacle() -> str:
    """Say why a fake device is impossible here; empty if it is possible."""
    if torch.cuda.is_available():
        return "this machine has a GPU, whose place a fake one cannot take"
    if _compiler() is None:
        return "needs a C++ compiler (g++ or clang++) to build the fake CUDA device"
    return ""


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


#: for ``pytestmark``
needs_fake_cuda = [pytest.mark.fake_cuda, pytest.mark.skipif(bool(_obstacle()), reason=_obstacle())]


#: context in which a body creates ordinary host tensors, with values
real_tensors = unset_fake_temporarily


def on_fake_cuda(body: Callable[[], Any], timeout: float = 60.0) -> Any:
    """Call ``body`` under FakeTensorMode in a forked process that believes in one CUDA device; return its result.

    The result must be picklable, so not a fake tensor. An exception fails the test with its traceback.
    """
    library, mode = _build(), _Mode()  # a process's first mode takes a second to create: create it once, before forking

    def run(_rank: int, _world: int) -> Any:
        dist.destroy_process_group()  # the body creates a fake process group, of ranks that do not exist
        ctypes.CDLL(str(library)).pretend()
        _believe()
        with mode:
            _check_autograd()
            return body()

    return run_ranks(run, 1, timeout=timeout)[0]


def _check_autograd() -> None:
    try:
        torch.ones((), device="cuda", requires_grad=True).backward()
    except RuntimeError as error:
        raise RuntimeError(
            "a backward pass has run in the parent process, so this one has no device: mark the test "
            "`needs_fake_cuda`, which lets it run before others"
        ) from error


class _Mode(FakeTensorMode):
    """Creates constants of the device on the host and copies them, as if torch had no device to initialize.

    Fake tensors know no pinned memory, so it marks them: their attribute ``pinned`` is True.
    """

    avoid_device_init = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pins = kwargs.pop("pin_memory", False)
        if func is torch.ops.aten._pin_memory.default:
            func, args, pins = torch.ops.aten.clone.default, args[:1], True
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if pins:
            assert result.is_cpu, "only the host's memory can be pinned"
            result.pinned = True
        return result


def _build() -> Path:
    """Build the library for this torch once, and keep it in torch's folder for extensions."""
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    library = root / "equimoe_fake_cuda" / f"{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    where = cpp_extension.TORCH_LIB_PATH
    links = [f"-L{where}", f"-Wl,-rpath,{where}", "-ltorch_cpu", "-lc10"]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # other test runs may build it too
        made = Path(folder, library.name)
        command = [str(_compiler()), "-O0", "-std=c++20", "-shared", "-fPIC", *includes, str(_SOURCE), "-o", str(made)]
        done = subprocess.run([*command, *links], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"the fake device does not build with torch {torch.__version__}:\n{done.stderr}"
        made.replace(library)
    return library


def _believe() -> None:
    """Make the Python half of torch.cuda believe in the device too, and let modules of fake tensors move to it."""
    stream = Stream()
    stand_ins: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: "fake",
        "get_device_capability": lambda *_: (9, 0),
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": lambda *_: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *_: None,
        "current_stream": lambda *_: stream,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda *_: Stream().synchronize(),
        "Event": Event,
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)
    fake_tensor.init_gpu_context = lambda device: None  # in some builds it allocates on the device
    for kernel in ("flash", "mem_efficient", "cudnn"):  # torch's choice of them reads properties of the device
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(False)
    torch.nn.Module._apply = _apply  # type: ignore[method-assign]


def _apply(self: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Move parameters by replacing them; torch's own method swaps their content, which fake tensors refuse."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    for name, parameter in self._parameters.items():
        if parameter is not None:
            self._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = fn(buffer)
    return self
