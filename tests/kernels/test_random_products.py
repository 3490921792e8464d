"""Random shapes, strides, dtypes and ids for the matrix ops: forward and backward against fp64.

R sorted rows, S source rows, K choices per row or in width, N out width, D hidden, F expert width, E experts.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equimoe.kernels.expert_mlp import ACTIVATIONS, expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.sort_by_expert import ExpertOrder, sort_by_expert

#: permitted relative error by norm, of one product and of a whole expert
TOLERANCE = {torch.float64: (1e-14, 1e-12), torch.float32: (2e-6, 2e-5)}
TOLERANCE |= {torch.bfloat16: (1e-2, 4e-2), torch.float16: (1.5e-3, 5e-3)}


def dtypes(backend: str) -> list[torch.dtype]:
    return [dtype for dtype in TOLERANCE if dtype != torch.float64 or backend != "triton"]


def scattered(t: Tensor, layout: str) -> Tensor:
    """Return the values of ``t`` with unusual strides, surrounded by poison that a wrong read would return."""
    poison = float("nan") if t.is_floating_point() else -(1 << 40)
    if layout == "turned":
        return t.mT.contiguous().mT if t.dim() > 1 else t.clone()
    if layout == "a column of a table":
        return torch.stack((torch.full_like(t, poison), t, torch.full_like(t, poison)), -1)[..., 1]
    if layout == "shifted":
        return torch.cat((t.new_full((3,), poison), t.reshape(-1), t.new_full((3,), poison)))[3:-3].view(t.shape)
    if layout == "expanded" and t.shape[0]:
        return t[:1].expand(t.shape)  # this changes the values
    return t.clone()


LAYOUTS = ("dense", "turned", "a column of a table", "shifted")


class Draw:
    """Draws random values from one seed."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def layout(self, t: Tensor, *more: str) -> Tensor:
        return scattered(t, self.random.choice([*LAYOUTS, *more]))

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return self.layout(values.to(dtype), "expanded")

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def width(self) -> int:
        """Draw a width. More than half of all pairs fit torch's grouped product in bf16."""
        return self.random.choice((8, 16, 24, self.random.randint(1, 21)))


def close(found: Tensor, want: Tensor, dtype: torch.dtype, tolerance: float, what: object) -> None:
    assert found.shape == want.shape and found.dtype == dtype, what
    error = (found.double() - want).norm()
    # a sum of few terms may cancel, so the error is also compared with unit scale
    assert error <= tolerance * (want.norm() + want.numel() ** 0.5), (what, float(error), float(want.norm()))


def product(rows: Tensor, weight_ENK: Tensor, offsets: list[int], index_R: Tensor | None) -> Tensor:
    """Multiply row by row."""
    rows_RK = rows if index_R is None else rows[index_R]
    expert_R = [e for e, (a, b) in enumerate(pairwise(offsets)) for _ in range(a, b)]
    out_RN = torch.einsum("rk,rnk->rn", rows_RK[: len(expert_R)], weight_ENK[expert_R])
    return F.pad(out_RN, (0, 0, 0, rows_RK.shape[0] - len(expert_R)))


@pytest.mark.parametrize("seed", range(6))
def test_grouped_gemm(seed: int, backend: str) -> None:
    for dtype in dtypes(backend):
        draw = Draw(seed)
        experts, n, k, sources = draw.random.randint(1, 5), draw.width(), draw.width(), draw.random.randint(1, 12)
        counts = [draw.random.choice((0, 1, draw.random.randint(2, 20))) for _ in range(experts)]
        offsets = torch.tensor([0, *counts]).cumsum(0)
        num_rows = sum(counts) + draw.random.choice((0, 3))
        gathered = draw.random.random() < 0.6
        index_R = draw.layout(draw.integers(0, sources, num_rows), "expanded") if gathered else None
        offsets_E = draw.layout(offsets)
        rows = draw.normal(sources if gathered else num_rows, k, dtype=dtype).requires_grad_()
        weight = draw.normal(experts, n, k, dtype=dtype, scale=k**-0.5).requires_grad_()
        dy = draw.normal(num_rows, n, dtype=dtype)
        wide = [t.detach().double().requires_grad_() for t in (rows, weight)]
        want = product(*wide, offsets.tolist(), index_R)
        wants = torch.autograd.grad(want, wide, dy.double())
        found = grouped_gemm(rows, weight, offsets_E, index_R, backend=backend)
        grads = torch.autograd.grad(found, [rows, weight], dy)
        tolerance = TOLERANCE[dtype][0]
        for what, got, expected in zip(("out", "rows", "weight"), (found, *grads), (want, *wants), strict=True):
            close(got, expected, dtype, tolerance, (dtype, what))
        drows = grouped_gemm_dgrad(dy, weight, offsets_E, backend=backend)
        close(drows, product(dy.double(), wide[1].mT, offsets.tolist(), None), dtype, tolerance, (dtype, "dgrad"))
        if dtype != torch.float64:
            before = torch.randn(experts, n, k, generator=draw.generator)
            out = before.clone()
            dy_index_R = draw.layout(torch.arange(num_rows)) if draw.random.random() < 0.5 else None
            assert grouped_gemm_wgrad(dy, rows, offsets_E, dy_index_R, index_R, out, backend=backend) is out
            close(out, wants[1] + before, torch.float32, TOLERANCE[torch.float32][0], (dtype, "added"))


def chain(
    x: Tensor, weights: Tensor, ids_SK: Tensor, gate_up: Tensor, down: Tensor, activation: str, gated: bool
) -> Tensor:
    """Compute choice by choice from the ids, without order and offsets."""
    act = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda z: F.relu(z).square()}
    act["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")
    pre = torch.einsum("sd,skud->sku", x, gate_up[ids_SK.clamp(min=0)])
    z, up = pre.chunk(2, -1) if gated else (pre, 1)
    y = torch.einsum("skf,skdf->skd", act[activation](z) * up, down[ids_SK.clamp(min=0)])
    return torch.where((ids_SK >= 0)[..., None], y * weights[..., None], 0).sum(1)


@pytest.mark.parametrize("seed", range(6))
def test_expert_mlp(seed: int, backend: str) -> None:
    for dtype in dtypes(backend):
        draw = Draw(seed)
        sources, choices, experts = draw.random.randint(0, 10), draw.random.randint(1, 3), draw.random.randint(1, 4)
        hidden, width, gated = draw.width(), draw.width(), draw.random.random() < 0.5
        activation, recompute = draw.random.choice(list(ACTIVATIONS)), draw.random.random() < 0.5
        lowest = draw.random.choice((0, -1, -2))  # no, some or many choices are dropped
        ids_SK = draw.integers(lowest, experts, sources, choices).clamp(min=-1)
        dense = sort_by_expert(ids_SK, experts, backend="torch")
        order = ExpertOrder(*(draw.layout(t) for t in dense))
        inputs = [
            draw.normal(sources, hidden, dtype=dtype),
            draw.normal(sources, choices, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
            draw.normal(experts, width * (1 + gated), hidden, dtype=dtype, scale=hidden**-0.5),
            draw.normal(experts, hidden, width, dtype=dtype, scale=width**-0.5),
        ]
        dy = draw.normal(sources, hidden, dtype=dtype)
        wide = [t.double().requires_grad_() for t in inputs]
        want = chain(wide[0], wide[1], ids_SK, wide[2], wide[3], activation, gated)
        wants = torch.autograd.grad(want, wide, dy.double())
        x, weights, gate_up, down = leaves = [t.requires_grad_() for t in inputs]
        options = {"activation": activation, "gated": gated, "recompute": recompute}
        found = expert_mlp(x, weights, order, gate_up, down, backend=backend, **options)
        grads = torch.autograd.grad(found, leaves, dy)
        for what, got, expected in zip(("y", *"xwud"), (found, *grads), (want, *wants), strict=True):
            kind = weights.dtype if what == "w" else dtype
            close(got, expected, kind, TOLERANCE[dtype][1], (dtype, what, options))
