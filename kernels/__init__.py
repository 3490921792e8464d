"""The compute-heavy ops of a Mixture-of-Experts layer, one folder each.

Every op has three backends: ``reference`` (slow, obvious, the oracle of the tests), ``torch`` (fast, portable) and
``triton``. It takes ``backend="auto" | "torch" | "triton" | "reference"``. Nothing in here knows of layers or
meshes.

All backends of an op keep to the same rules:

* Tensors are on one device and may have any strides.
* Autocast changes no dtype that an op's docstring states, in the forward and in the backward pass. ``expert_mlp`` alone
  takes part in it, as a layer does.
* Products of fp32 tensors follow torch's setting: full fp32 unless the user permits less, as TF32 with
  ``torch.backends.cuda.matmul.fp32_precision`` or ``torch.set_float32_matmul_precision``. 16-bit products are added up
  in fp32. The reference computes in fp64 where it multiplies matrices.
* Shapes, dtypes and devices are checked everywhere; ids, indices and offsets, whose values are data, on the CPU only.
  An accelerator would have to wait for the check. There a wrong value makes the result undefined, or torch stops with
  an assertion of the device, but no op reads or writes memory outside its tensors.
* Tensors without values (meta, ``FakeTensorMode``) give results of the right shape, dtype and device. The reference,
  which reads values, does as torch does there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor

from ._autocast import autocast_dtype, without_autocast

_Op = TypeVar("_Op", bound=Callable[..., object])


def pick(op: str, backends: Mapping[str, _Op], backend: str) -> _Op:
    """The implementation of ``op`` called ``backend``, out of autocast's reach; ``"auto"`` is ``"torch"``."""
    chosen = backends.get("torch" if backend == "auto" else backend)
    if chosen is None:
        raise ValueError(f"backend={backend!r}: {op} has {', '.join(map(repr, ('auto', *backends)))}; use one of these")

    def run(first: Tensor, *rest: Any) -> object:
        if autocast_dtype(first.device) is None:
            return chosen(first, *rest)
        with without_autocast(first.device):
            return chosen(first, *rest)

    return cast(_Op, run)
