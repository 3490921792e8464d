"""The weighted SwiGLU between two matrix products, on the rows of one expert, in scratch that serves all experts.

16-bit rows are widened once and rounded once: PyTorch's 16-bit arithmetic converts in every operation, which costs
more than it saves once the rows are in cache.
"""

# N rows, F expert width.

from __future__ import annotations

import torch
from torch import Tensor

from ..memory import empty

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


class SwiGLU:
    """``h = w * silu(gate) * up`` and its gradients, for at most ``rows`` rows at a time.

    What a method returns is overwritten by the next call.
    """

    def __init__(self, rows: int, width: int, like: Tensor) -> None:
        self.width = width
        self.narrow = like.element_size() == 2
        wide = torch.float32 if self.narrow else like.dtype

        def new(columns: int, dtype: torch.dtype = wide) -> Tensor:
            return empty(rows, columns, like=like, dtype=dtype)

        self.s, self.h, self.dh, self.t = (new(width) for _ in range(4))
        self.dpre = new(2 * width, like.dtype)
        if self.narrow:
            self.pre, self.h_narrow = new(2 * width), new(width, like.dtype)

    def _halves(self, pre_NF: Tensor) -> tuple[Tensor, Tensor]:
        if self.narrow:
            pre_NF = self.pre[: pre_NF.shape[0]].copy_(pre_NF)
        return pre_NF[:, : self.width], pre_NF[:, self.width :]

    def _rounded(self, h_NF: Tensor) -> Tensor:
        return self.h_narrow[: h_NF.shape[0]].copy_(h_NF) if self.narrow else h_NF

    def forward(self, pre_NF: Tensor, w_N1: Tensor) -> Tensor:
        """h [N, F] from the pre-activation [N, 2F]."""
        gate_NF, up_NF = self._halves(pre_NF)
        h_NF = _silu(gate_NF, out=self.h[: pre_NF.shape[0]])
        return self._rounded(h_NF.mul_(up_NF).mul_(w_N1))

    def backward(self, pre_NF: Tensor, w_N1: Tensor, dh_NF: Tensor, dw_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """h [N, F] again and the gradient of the pre-activation [N, 2F]; that of w is written to ``dw_N``."""
        size = pre_NF.shape[0]
        gate_NF, up_NF = self._halves(pre_NF)
        s_NF = _silu(gate_NF, out=self.s[:size])
        h_NF = torch.mul(s_NF, up_NF, out=self.h[:size])
        out_NF = self._rounded(torch.mul(h_NF, w_N1, out=self.t[:size]))
        dh_NF = self.dh[:size].copy_(dh_NF) if self.narrow else dh_NF
        if dw_N is not None:
            torch.sum(h_NF.mul_(dh_NF), 1, out=dw_N)
        dpre_NF = self.dpre[:size]
        dgate_NF, dup_NF = dpre_NF[:, : self.width], dpre_NF[:, self.width :]
        dh_NF.mul_(w_N1)
        if self.narrow:
            dup_NF.copy_(s_NF.mul_(dh_NF))
            dgate_NF.copy_(_silu_backward(dh_NF.mul_(up_NF), gate_NF, grad_input=h_NF))
        else:
            torch.mul(dh_NF, s_NF, out=dup_NF)
            _silu_backward(dh_NF.mul_(up_NF), gate_NF, grad_input=dgate_NF)
        return out_NF, dpre_NF
