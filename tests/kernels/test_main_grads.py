"""Weight gradients of expert_mlp that are added to fp32 tensors over micro-batches, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from equimoe.kernels.expert_mlp import expert_mlp  # noqa: E402
from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from tests.kernels.mlp_cases import TOLERANCE, make  # noqa: E402

BF16, FP32 = torch.bfloat16, torch.float32
WEIGHTS = ("gate_up", "down")


def backward(
    backend: str,
    dtype: torch.dtype,
    micro_batches: int,
    main_grads: Any,
    sizes: tuple[int, int] = (9, 6),
    **options: Any,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run micro-batches with the same weights; return the gradients of the rows, and autograd's of the weights."""
    hidden, width = sizes
    cases = [make(sources=7 + 4 * m, hidden=hidden, width=width, experts=3, ids="random") for m in range(micro_batches)]
    leaves = [cases[0].inputs[name].to(dtype).requires_grad_() for name in WEIGHTS]
    rows = []
    for case in cases:
        x_SD = case.inputs["x"].to(BF16).to(dtype).requires_grad_()
        weights_SK = case.inputs["weights"].to(torch.float64 if dtype == torch.float64 else FP32)
        order = sort_by_expert(case.ids_SK.clamp(max=1), 3)  # the last expert gets no row
        y_SD = expert_mlp(x_SD, weights_SK, order, *leaves, backend, main_grads=main_grads, **options)
        y_SD.backward(case.dy_SD.to(BF16).to(dtype))
        rows.append(x_SD.grad)
    return rows, [leaf.grad for leaf in leaves]


ROWS = [("triton", BF16, 2, False), ("triton", FP32, 3, True), ("torch", BF16, 3, False)]
MORE = [("reference", BF16, 2, False), ("triton", BF16, 3, True), ("torch", FP32, 2, True), ("hybrid", BF16, 2, False)]


@pytest.mark.parametrize(
    ("backend", "dtype", "micro_batches", "recompute"),
    [*ROWS, *(pytest.param(*row, marks=pytest.mark.slow) for row in MORE)],
)
def test_gradients_are_added_in_fp32(backend: str, dtype: torch.dtype, micro_batches: int, recompute: bool) -> None:
    hidden, width = sizes = (16, 8) if backend == "hybrid" else (9, 6)  # torch's grouped products read 16 bytes at once
    start = [torch.randn(3, 2 * width, hidden), torch.randn(3, hidden, width)]
    main_grads = tuple(t.clone() for t in start)
    rows, none = backward(backend, dtype, micro_batches, main_grads, sizes, recompute=recompute)
    assert none == [None, None]
    plain_rows, _ = backward(backend, dtype, micro_batches, (None, None), sizes, recompute=recompute)
    assert all(torch.equal(a, b) for a, b in zip(rows, plain_rows, strict=True)), "gradients of x"
    _, wanted = backward("reference", torch.float64, micro_batches, (None, None), sizes)
    for found, before, want in zip(main_grads, start, wanted, strict=True):
        added = found.double() - before.double()
        assert found.dtype == FP32 and (added - want).norm() <= TOLERANCE[dtype][0] * want.norm()
        assert torch.equal(found[2], before[2]), "an expert without rows"


def test_one_weight_can_have_its_own() -> None:
    down = torch.zeros(3, 9, 6)
    _, (gate_up, none) = backward("triton", BF16, 1, (None, down))
    _, plain = backward("triton", FP32, 1, (None, None))
    assert none is None and gate_up.dtype == BF16
    for found, want in ((gate_up, plain[0]), (down, plain[1])):
        assert (found.float() - want).norm() < 0.02 * want.norm()


def test_mistakes() -> None:
    for wrong in (torch.zeros(3, 9, 5), torch.zeros(3, 9, 6).bfloat16(), torch.zeros(3, 6, 9).mT):
        with pytest.raises(ValueError, match=r"main_grads=.* of down: must be contiguous fp32 \[3, 9, 6\]"):
            backward("torch", BF16, 1, (None, wrong))
