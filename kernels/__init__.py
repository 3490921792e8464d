"""The compute-heavy ops of a Mixture-of-Experts layer, one folder each.

Every op has three backends: ``reference`` (slow and obvious; the tests compare the others with it), ``torch`` (fast and
portable) and ``triton``. Each op takes ``backend="auto" | "torch" | "triton" | "reference"``. The ops know nothing of
layers or meshes. ``cpu/`` holds what the torch backend does only on a CPU.
``"auto"`` is torch on a CPU; on a GPU :mod:`.auto` chooses.

All backends of an op follow the same rules:

* All tensors of a call are on one device. They may have any strides.
* Autocast does not change the dtypes that an op's docstring states, in the forward or the backward pass. Only
  ``expert_mlp`` takes part in autocast, as a layer does.
* Products of fp32 tensors use full fp32, unless the user permits TF32 with
  ``torch.backends.cuda.matmul.fp32_precision`` or ``torch.set_float32_matmul_precision``. Products of 16-bit tensors
  accumulate in fp32. The reference multiplies matrices in fp64.
* Shapes, dtypes and devices are checked on every device. Ids, indices and offsets are data, so they are checked on the
  CPU only: on an accelerator the check would have to wait. There, invalid values make the result undefined, or torch
  stops with a device-side assertion, but no op reads or writes memory outside its tensors.
* Tensors without values (on the meta device or under ``FakeTensorMode``) give results of the right shape, dtype and
  device. The reference has to read values, so for such tensors the torch backend takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ._autocast import autocast_dtype, without_autocast

__all__ = ["autocast_dtype", "pick"]

_Op = TypeVar("_Op", bound=Callable[..., object])


def pick(op: str, backends: Mapping[str, _Op], backend: str) -> _Op:
    """Return the implementation of ``op`` for ``backend``, to run at once and without autocast.

    An op whose "auto" has not been resolved by :func:`.auto.automatic` has only been tried in torch.
    """
    chosen = backends.get("torch" if backend == "auto" else backend)
    if chosen is None:
        raise ValueError(f"backend={backend!r}: {op} has {', '.join(map(repr, ('auto', *backends)))}; use one of these")

    if not torch._C._is_any_autocast_enabled():  # nearly always
        return chosen

    def run(first: Tensor, *rest: Any) -> object:
        with without_autocast(first.device):
            return chosen(first, *rest)

    return cast(_Op, run)
