"""The reference: every kept row through its expert, differentiated by autograd. Dropped rows are never read."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows, N kept rows.

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grouped_gemm import grouped_gemm
from ..sort_by_expert import ExpertOrder
from .types import MLPOptions

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu2": lambda z: F.relu(z).square(),
}


def expert_mlp(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EFD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    recompute: bool,
) -> Tensor:
    """``recompute`` has no effect here: autograd decides what is kept."""
    wide = torch.float64 if x_SD.dtype == torch.float64 else torch.float32
    x, weights, gate_up, down = (t.to(wide) for t in (x_SD, weights_SK, gate_up_EFD, down_EDF))
    width, offsets_E = down_EDF.shape[2], order.offsets_E
    flat_N = order.order_R[: int(offsets_E[-1])]
    source_N = flat_N // max(weights_SK.shape[1], 1)
    pre = grouped_gemm(x[source_N], gate_up, offsets_E, backend="reference")
    h = _FUNCTIONS[options.activation](pre[:, :width]) * (pre[:, width:] if options.gated else 1)
    rows = grouped_gemm(h, down, offsets_E, backend="reference") * weights.reshape(-1)[flat_N, None]
    return torch.zeros_like(x).index_add(0, source_N, rows).to(x_SD.dtype)
