"""The experts' MLPs on a CPU, one expert after the other over the sorted rows.

Matrix products run near the machine's peak, so the rest of the time is memory traffic. Products are written directly to
their place in the result, and the activation is computed while one expert's rows are in cache. It is computed in fp32
for 16-bit rows: PyTorch's 16-bit arithmetic converts in every operation, which costs more than it saves.
"""

# S source rows, K choices per row, D hidden, F expert width, U width of the pre-activation (2F or F), E experts,
# R kept rows in sorted order, P places (R, or more with padding), N places of one expert.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..permute.torch_ops import sum_rows
from ..sort_by_expert import ExpertOrder
from .grouped_gemm import rows_of_experts
from .memory import empty

if TYPE_CHECKING:
    from ..expert_mlp.types import MLPOptions


class Rows:
    """Which source rows the experts process, with what weights, and in which places of a buffer.

    For 16-bit products of many rows, each expert's rows are padded with zero rows to a multiple of 16: oneDNN, which
    computes them, compiles code for every number of rows that it meets, and a router produces new numbers in every
    step. With fewer than 16 rows per expert, padding would more than double them.

    ``tensors`` are those of the same rows in the forward, if the backward is not to compute them again.
    """

    def __init__(self, x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder, tensors: Sequence[Any] = ()) -> None:
        bounds = order.offsets_E.tolist()
        kept, experts = bounds[-1], len(bounds) - 1
        #: the places of expert e are ``offsets[e]:offsets[e + 1]``
        self.offsets = _padded(bounds) if x_SD.element_size() == 2 and kept >= 16 * experts else bounds
        self.size = self.offsets[-1]
        self.all_kept, self.padded = kept == order.order_R.shape[0], self.size > kept
        self.flat_R = order.order_R if self.all_kept else order.order_R[:kept]
        self.tensors: tuple[Tensor, Tensor, Tensor, Tensor | None]
        self.tensors = tuple(tensors) or self._compute(x_SD, weights_SK, order)
        self.source_P, self.weights_P1, self.inverse_SK, self.place_R = self.tensors

    def _compute(
        self, x_SD: Tensor, weights_SK: Tensor, order: ExpertOrder
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return the source row and the weight of each place, and the place of each choice and of each kept row."""
        source_R = self.flat_R.floor_divide(max(weights_SK.shape[1], 1))
        weights_R = weights_SK.take(self.flat_R)
        if not self.padded:
            return source_R, weights_R[:, None], order.inverse_SK, None
        shift_E = (torch.tensor(self.offsets, device=x_SD.device) - order.offsets_E)[:-1]
        shift_R = shift_E.repeat_interleave(order.offsets_E.diff())
        place_R = torch.arange(len(shift_R), device=x_SD.device) + shift_R
        inverse_SK = torch.where(order.inverse_SK < 0, -1, place_R[order.inverse_SK])
        source_P = source_R.new_full((self.size,), x_SD.shape[0]).index_copy_(0, place_R, source_R)
        weights_P = weights_R.new_zeros(self.size).index_copy_(0, place_R, weights_R)
        return source_P, weights_P[:, None], inverse_SK, place_R

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert that has rows, and the slice of its places."""
        return rows_of_experts(self.offsets)

    def sources(self, x_SD: Tensor) -> Tensor:
        """What ``source_P`` points into: the source rows and, for the padding, a row of zeros."""
        return F.pad(x_SD, (0, 0, 0, 1)) if self.padded else x_SD

    def sum(self, rows_PD: Tensor) -> Tensor:
        """[S, D] the sum over each source row's kept rows."""
        return sum_rows(rows_PD, self.inverse_SK, all_kept=self.all_kept)

    def unsort(self, values_P: Tensor) -> Tensor:
        """[S, K] one value per choice from one value per place; zero for dropped choices."""
        if self.all_kept:
            return values_P[self.inverse_SK]
        out_SK = values_P.new_zeros(self.inverse_SK.shape)
        out_SK.view(-1)[self.flat_R] = values_P if self.place_R is None else values_P[self.place_R]
        return out_SK

    def new_gradient(self, weight: Tensor) -> Tensor:
        """Memory for the gradient of a stacked weight; zero for experts without rows, else undefined."""
        grad = empty(*weight.shape, like=weight)
        for expert in set(range(weight.shape[0])) - {expert for expert, _ in self.spans()}:
            grad[expert].zero_()
        return grad


def _padded(bounds: list[int]) -> list[int]:
    """Round each expert's rows up to a multiple of 16."""
    return list(accumulate((-(-(stop - start) // 16) * 16 for start, stop in pairwise(bounds)), initial=0))


def widen(rows: Tensor) -> Tensor:
    return rows.float() if rows.element_size() == 2 else rows


def activate(pre_NU: Tensor, options: MLPOptions) -> tuple[Tensor, Tensor, Tensor | None]:
    """z, act(z) and, for gated experts, the factor up, [N, F] each; fp32 for 16-bit rows."""
    z_NF, up_NF = widen(pre_NU).chunk(2, 1) if options.gated else (widen(pre_NU), None)
    return z_NF, ACTIVATIONS[options.activation].value(z_NF, out=None), up_NF


def differentiate(
    dh_NF: Tensor, z_NF: Tensor, s_NF: Tensor, up_NF: Tensor | None, options: MLPOptions, dpre_NU: Tensor
) -> Tensor:
    """Write the gradient of the pre-activation to ``dpre_NU``. Overwrites ``dh_NF`` and ``s_NF``."""
    dz_NF = dpre_NU
    if up_NF is not None:
        dz_NF, dup_NF = dpre_NU.chunk(2, 1)
        torch.mul(s_NF, dh_NF, out=dup_NF)
        dh_NF.mul_(up_NF)
    gradient = ACTIVATIONS[options.activation].gradient
    if dz_NF.dtype == s_NF.dtype:
        gradient(dh_NF, z_NF, out=dz_NF)
    else:
        dz_NF.copy_(gradient(dh_NF, z_NF, out=s_NF))
    return dpre_NU


def forward(
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the output [S, D] and, if ``keep``, the pre-activations [P, U]."""
    rows = Rows(x_SD, weights_SK, order)
    out_PD = empty(rows.size, x_SD.shape[1], like=x_SD)
    pre_PU = empty(rows.size, gate_up_EUD.shape[1], like=x_SD) if keep else None
    source_SD = rows.sources(x_SD)
    for expert, span in rows.spans():
        x_ND = source_SD.index_select(0, rows.source_P[span])
        pre_NU = torch.mm(x_ND, gate_up_EUD[expert].T, out=None if pre_PU is None else pre_PU[span])
        _, h_NF, up_NF = activate(pre_NU, options)
        if up_NF is not None:
            h_NF.mul_(up_NF)
        h_NF.mul_(rows.weights_P1[span])  # in fp32, before rounding to 16 bits
        torch.mm(h_NF.to(x_SD.dtype), down_EDF[expert].T, out=out_PD[span])
    return rows.sum(out_PD), () if pre_PU is None else (pre_PU,)


def backward(
    dy_SD: Tensor,
    kept: Sequence[Tensor],
    x_SD: Tensor,
    weights_SK: Tensor,
    order: ExpertOrder,
    gate_up_EUD: Tensor,
    down_EDF: Tensor,
    options: MLPOptions,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weights, gate_up and down; None where ``needs`` is False.

    ``kept`` is what the forward kept. If that is nothing, recompute the pre-activations expert by expert.
    """
    rows = Rows(x_SD, weights_SK, order)
    needs_x, needs_weights, needs_gate_up, needs_down = needs
    dx_PD = empty(rows.size, x_SD.shape[1], like=x_SD) if needs_x else None
    dweights_P = weights_SK.new_empty(rows.size) if needs_weights else None
    dgate_up_EUD = rows.new_gradient(gate_up_EUD) if needs_gate_up else None
    ddown_EDF = rows.new_gradient(down_EDF) if needs_down else None
    x_SD, dy_SD = rows.sources(x_SD), rows.sources(dy_SD)
    for expert, span in rows.spans():
        index_N, w_N1 = rows.source_P[span], rows.weights_P1[span]
        x_ND, dy_ND = x_SD.index_select(0, index_N), dy_SD.index_select(0, index_N)
        pre_NU = kept[0][span] if kept else torch.mm(x_ND, gate_up_EUD[expert].T)
        z_NF, s_NF, up_NF = activate(pre_NU, options)
        h_NF = s_NF if up_NF is None else s_NF * up_NF
        dh_NF = widen(torch.mm(dy_ND, down_EDF[expert]))
        if ddown_EDF is not None:
            torch.mm(dy_ND.T, (h_NF * w_N1).to(x_SD.dtype), out=ddown_EDF[expert])
        if dweights_P is not None:
            torch.sum(h_NF * dh_NF, 1, out=dweights_P[span])
        if dgate_up_EUD is None and dx_PD is None:
            continue
        dpre_NU = differentiate(dh_NF.mul_(w_N1), z_NF, s_NF, up_NF, options, torch.empty_like(pre_NU))
        if dgate_up_EUD is not None:
            torch.mm(dpre_NU.T, x_ND, out=dgate_up_EUD[expert])
        if dx_PD is not None:
            torch.mm(dpre_NU, gate_up_EUD[expert], out=dx_PD[span])
    dx_SD = None if dx_PD is None else rows.sum(dx_PD)
    dweights_SK = None if dweights_P is None else rows.unsort(dweights_P)
    return dx_SD, dweights_SK, dgate_up_EUD, ddown_EDF
