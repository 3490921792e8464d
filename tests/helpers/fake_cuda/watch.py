"""Records, op by op, where the host waits for the device and where tensors of both meet."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROOT = Path(__file__).resolve().parents[3]
_FOLDERS = tuple(f"{_ROOT / name}{'/'}" for name in ("moe", "kernels", "launch"))

#: ops whose result, or its size, only the device knows
_WAIT = {
    "aten._local_scalar_dense",
    "aten.allclose",
    "aten.bincount",
    "aten.equal",
    "aten.is_nonzero",
    "aten.item",
    "aten.masked_select",
    "aten.nonzero",
    "aten.unique_consecutive",
    "aten.unique_dim",
    "aten._unique2",
}
#: ops that belong to these if they are given a mask
_BY_MASK = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_"}
_COPY = {"aten._to_copy", "aten.copy_", "aten.copy", "aten._copy_from"}


class Watch(TorchDispatchMode):
    """Records every op on device tensors while it is active. Enter it inside FakeTensorMode.

    - ``waits``: places where the host waits for the device to learn a value or a size, one entry per wait;
    - ``copies``: places where a host tensor is copied to the device and the host waits for that: from memory that is
      not pinned, or not with ``non_blocking``;
    - ``sent``: the same for copies that the host does not wait for;
    - ``mixed``: ops that would fail, or read addresses of the wrong side, because their tensors are on different
      devices. torch's kernels accept host scalars; fused, foreach and our own kernels do not.

    A place is "file:function" in the package, or "?" outside it. Fake tensors have no values, so every integer that the
    host reads is ``reads``.
    """

    def __init__(self, reads: int = 1) -> None:
        super().__init__()
        self.reads = reads
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.sent: list[str] = []
        self.mixed: list[str] = []
        #: how often each op ran on a device
        self.ops: Counter[str] = Counter()
        #: bytes of the tensors that these ops read or write; one that an op changes counts once
        self.bytes = 0
        self._waiting = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name.startswith("prim.") or not given:
            return func(*args, **kwargs)
        on_device = any(not t.is_cpu for t in given)
        if name == "aten._local_scalar_dense" and (on_device or isinstance(given[0], FakeTensor)):
            if on_device:
                self._wait()
            dtype = given[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else self.reads
        if on_device and self._waits(name, args, kwargs):
            self._wait()
        if name not in _COPY:
            self._check(name, given)
        result = func(*args, **kwargs)
        if name in _COPY:
            self._copied(args, kwargs, result)
        if on_device and not func.is_view:
            self.ops[name] += 1
            touched = {id(t): t for t in (*given, *tree_leaves(result)) if isinstance(t, Tensor)}
            self.bytes += sum(t.numel() * t.element_size() for t in touched.values())
            self._waiting = name in _WAIT
        return result

    def counts(self) -> dict[str, Any]:
        """Return what was counted so far, and begin again.

        ``exchanges`` are the collectives.
        """
        found = {
            "kernels": self.ops.total(),
            "bytes": self.bytes,
            "waits": list(self.waits),
            "copies": list(self.copies),
            "sent": len(self.sent),
            "exchanges": sum(count for op, count in self.ops.items() if op.startswith("c10d.")),
            "mixed": list(self.mixed),
        }
        for seen in (self.waits, self.copies, self.sent, self.mixed, self.ops):
            seen.clear()
        self.bytes = 0
        return found

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        if name == "aten.repeat_interleave":
            return kwargs.get("output_size") is None and len(args) < 2
        if name in _BY_MASK:
            by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in tree_leaves(args[1]))
            filled = len(args) > 2 and args[2].is_cpu and args[2].dim() == 0  # filled without counting the mask
            return by_mask and not filled
        return name in _WAIT

    def _wait(self) -> None:
        if not self._waiting:  # reading several numbers of one tensor is one wait
            self.waits.append(_place())
        self._waiting = True

    def _check(self, name: str, given: list[Tensor]) -> None:
        strict = not name.startswith("aten.") or name.startswith(("aten._fused", "aten._foreach"))
        devices = {t.device for t in given if strict or t.dim() or not t.is_cpu}
        if len(devices) > 1:
            self.mixed.append(f"{name} at {_place()}")

    def _copied(self, args: Any, kwargs: Any, result: Tensor) -> None:
        source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        flags = [value for value in (*args[2:], *kwargs.values()) if isinstance(value, bool)]
        goes_on = any(flags) and getattr(source if source.is_cpu else result, "pinned", False)
        if result.is_cpu and not source.is_cpu and not goes_on:
            self._wait()
        elif source.is_cpu and not result.is_cpu:
            (self.sent if goes_on else self.copies).append(_place())

    def __enter__(self) -> Any:
        _active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)


#: watches that have been entered
_active: list[Watch] = []


class Stream:
    """Stands for a stream of the device."""

    def synchronize(self) -> None:
        for watch in _active:
            watch._wait()
            watch._waiting = False  # the next read is another wait

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(f"the fake device has no Stream.{name}")


class Event(Stream):
    """Stands for an event of the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._recorded = False

    def record(self, *_: Any) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        if self._recorded:
            super().synchronize()


def _place() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_FOLDERS) and not file.endswith("/moe/transfer.py"):  # say who wants the copy
            return f"{Path(file).relative_to(_ROOT).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
