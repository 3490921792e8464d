"""The torch backend of the matrix ops under torch.compile: one graph.

S source rows, K choices per row, D hidden, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm
from equimoe.kernels.sort_by_expert import sort_by_expert

from .paths import on

Op = Callable[..., Tensor]
S, K, D, F, E = 10, 2, 8, 16, 3


def expert_op(backend: str, dtype: torch.dtype, gated: bool = True) -> tuple[Op, list[Tensor]]:
    order = sort_by_expert(torch.randint(-1, E, (S, K)), E)
    width = 2 * F if gated else F
    weights = [torch.randn(E, width, D).to(dtype), torch.randn(E, D, F).to(dtype)]
    leaves = [torch.randn(S, D).to(dtype), torch.rand(S, K), *weights]

    def op(x: Tensor, weights_SK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return expert_mlp(x, weights_SK, order, gate_up, down, backend, gated=gated)

    return op, leaves


def plain_expert_op(backend: str, dtype: torch.dtype) -> tuple[Op, list[Tensor]]:
    return expert_op(backend, dtype, gated=False)


def gemm_op(backend: str, dtype: torch.dtype) -> tuple[Op, list[Tensor]]:
    offsets_E, index_R = torch.tensor([0, 4, 4, 9]), torch.randint(0, S, (S,))

    def op(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_gemm(rows, weight, offsets_E, index_R, backend)

    return op, [torch.randn(S, D).to(dtype), torch.randn(E, F, D).to(dtype)]


def outputs(op: Op, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y).cos())]


@pytest.fixture(autouse=True)
def _poison_everywhere() -> None:
    """Dynamo cannot trace the functions that poison memory."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # these take different row layouts
@pytest.mark.parametrize("make", [expert_op, plain_expert_op, gemm_op])
def test_one_graph_on_an_accelerator(make: Callable[..., tuple[Op, list[Tensor]]], dtype: torch.dtype) -> None:
    with on("accelerator") as backend:
        op, leaves = make(backend, dtype)
        want = outputs(op, leaves)
        found = outputs(torch.compile(op, fullgraph=True, backend="aot_eager"), leaves)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [expert_op, plain_expert_op, gemm_op])
def test_one_graph_on_a_cpu(make: Callable[..., tuple[Op, list[Tensor]]], dtype: torch.dtype) -> None:
    op, leaves = make("torch", dtype)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs(compiled, leaves), outputs(op, leaves), strict=True):
        torch.testing.assert_close(a, b)  # a few rows are multiplied in another order outside a graph
