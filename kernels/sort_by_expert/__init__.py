"""The op that sorts routed rows by expert."""

# S source rows, K choices per row, R = S*K routed rows, E experts.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from ..auto import automatic
from ..checks import backend_without_values, readable
from . import reference, torch_ops
from .types import ExpertOrder, check_range

__all__ = ["ExpertOrder", "sort_by_expert"]


def _triton(ids_SK: Tensor, num_experts: int) -> ExpertOrder:
    from . import triton_ops  # imported late, because the other backends do not need triton

    return triton_ops.sort_by_expert(ids_SK, num_experts)


_BACKENDS = {"reference": reference.sort_by_expert, "torch": torch_ops.sort_by_expert, "triton": _triton}


def sort_by_expert(ids_SK: Tensor, num_experts: int, backend: str = "auto") -> ExpertOrder:
    """Sort the S*K routed rows by expert. The sort is stable: rows of one expert keep the order s*K + k.

    ``ids_SK`` is int64 [S, K]: the expert of each choice in [0, num_experts), or -1 for a dropped or masked choice.
    Raises ValueError for another dtype or shape and, on the CPU, for ids out of range. On an accelerator the values are
    not checked, and ids out of range count as dropped.
    """
    if ids_SK.dtype != torch.int64 or ids_SK.dim() != 2:
        raise ValueError(f"ids_SK={ids_SK.dtype}{list(ids_SK.shape)}: give int64 expert ids of shape [S, K]")
    if num_experts < 1:
        raise ValueError(f"num_experts={num_experts}: must be at least 1")
    if backend == "auto":
        backend = automatic("sort_by_expert", ids_SK, ids_SK.numel(), num_experts)
    backend = backend_without_values(backend, ids_SK)
    if backend != "torch" and readable(ids_SK) and ids_SK.numel():  # torch looks at the sorted ids
        low, high = ids_SK.aminmax()
        check_range(int(low), int(high), num_experts)
    return pick("sort_by_expert", _BACKENDS, backend)(ids_SK, num_experts)
