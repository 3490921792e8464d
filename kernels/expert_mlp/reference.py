"""The oracle: each kept row on its own expert, differentiated by autograd. Dropped rows are never read."""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sort_by_expert import ExpertOrder
from .kind import Kind

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
    kind: Kind,
    recompute: bool,
) -> Tensor:
    """Autograd keeps what it needs, so ``recompute`` changes nothing."""
    wide = torch.float64 if x_SD.dtype == torch.float64 else torch.float32
    x, weights, gate_up, down = (t.to(wide) for t in (x_SD, weights_SK, gate_up_EFD, down_EDF))
    activation, width = _FUNCTIONS[kind.activation], down_EDF.shape[2]
    choices = weights_SK.shape[1]
    y_SD = x.new_zeros(x.shape)
    bounds = order.offsets_E.tolist()
    for expert, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        flat = order.order_R[start:stop]
        source = flat // max(choices, 1)
        pre = x[source] @ gate_up[expert].T
        h = activation(pre[:, :width]) * (pre[:, width:] if kind.gated else 1)
        rows = h @ down[expert].T
        y_SD = y_SD.index_add(0, source, rows * weights.reshape(-1)[flat, None])
    return y_SD.to(x_SD.dtype)
