"""The weighted activation between two matrix products, on the rows of one expert, in scratch that serves all experts.

16-bit rows are widened once and rounded once: PyTorch's 16-bit arithmetic converts in every operation, which costs
more than it saves once the rows are in cache.
"""

# N rows, F expert width, U width of the pre-activation: 2F (gate and up) or F.

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import empty
from .kind import Kind

_aten = torch.ops.aten


class Function(NamedTuple):
    """An activation. Both write to ``out``, a keyword, which may share no memory with what they read."""

    #: act(z)
    value: Callable[..., Tensor]
    #: dy * act'(z), from dy and z
    gradient: Callable[..., Tensor]


def _silu_gradient(dy: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(dy, z, grad_input=out)


def _gelu_gradient(dy: Tensor, z: Tensor, out: Tensor, approximate: str) -> Tensor:
    return _aten.gelu_backward.grad_input(dy, z, approximate=approximate, grad_input=out)


def _relu2(z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(z, min=0, out=out).square_()


def _relu2_gradient(dy: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(z, min=0, out=out).mul_(dy).mul_(2)


def _gelu(approximate: str) -> Function:
    return Function(partial(_aten.gelu.out, approximate=approximate), partial(_gelu_gradient, approximate=approximate))


FUNCTIONS = {
    "silu": Function(_aten.silu.out, _silu_gradient),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu2": Function(_relu2, _relu2_gradient),
}


class Activation:
    """``h = w * act(gate) * up``, or ``w * act(up)``, and its gradients, for at most ``rows`` rows at a time.

    What a method returns is overwritten by the next call.
    """

    def __init__(self, kind: Kind, rows: int, width: int, like: Tensor) -> None:
        self.function, self.gated, self.width = FUNCTIONS[kind.activation], kind.gated, width
        self.narrow = like.element_size() == 2
        wide = torch.float32 if self.narrow else like.dtype
        both = 2 * width if kind.gated else width

        def new(columns: int, dtype: torch.dtype = wide) -> Tensor:
            return empty(rows, columns, like=like, dtype=dtype)

        self.s, self.h, self.dh, self.t = (new(width) for _ in range(4))
        self.dpre = new(both, like.dtype)
        if self.narrow:
            self.pre, self.h_narrow = new(both), new(width, like.dtype)

    def _halves(self, pre_NU: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the activation, and the factor that a gated expert multiplies its value by (else empty)."""
        if self.narrow:
            pre_NU = self.pre[: pre_NU.shape[0]].copy_(pre_NU)
        return pre_NU[:, : self.width], pre_NU[:, self.width :]

    def _rounded(self, h_NF: Tensor) -> Tensor:
        return self.h_narrow[: h_NF.shape[0]].copy_(h_NF) if self.narrow else h_NF

    def forward(self, pre_NU: Tensor, w_N1: Tensor) -> Tensor:
        """h [N, F] from the pre-activation."""
        z_NF, up_NF = self._halves(pre_NU)
        h_NF = self.function.value(z_NF, out=self.h[: pre_NU.shape[0]])
        if self.gated:
            h_NF.mul_(up_NF)
        return self._rounded(h_NF.mul_(w_N1))

    def backward(self, pre_NU: Tensor, w_N1: Tensor, dh_NF: Tensor, dw_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """h [N, F] again and the gradient of the pre-activation; that of w is written to ``dw_N``."""
        size = pre_NU.shape[0]
        z_NF, up_NF = self._halves(pre_NU)
        s_NF = self.function.value(z_NF, out=self.s[:size])
        h_NF = torch.mul(s_NF, up_NF, out=self.h[:size]) if self.gated else s_NF
        out_NF = self._rounded(torch.mul(h_NF, w_N1, out=self.t[:size]))
        dh_NF = self.dh[:size].copy_(dh_NF) if self.narrow else dh_NF
        if dw_N is not None:
            torch.sum(h_NF.mul_(dh_NF), 1, out=dw_N)
        dpre_NU = self.dpre[:size]
        dz_NF, dup_NF = dpre_NU[:, : self.width], dpre_NU[:, self.width :]
        dh_NF.mul_(w_N1)
        if self.gated:
            if self.narrow:
                dup_NF.copy_(s_NF.mul_(dh_NF))
            else:
                torch.mul(dh_NF, s_NF, out=dup_NF)
            dh_NF.mul_(up_NF)
        if self.narrow:
            dz_NF.copy_(self.function.gradient(dh_NF, z_NF, out=self.h[:size]))
        else:
            self.function.gradient(dh_NF, z_NF, out=dz_NF)
        return out_NF, dpre_NU
