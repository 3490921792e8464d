"""Compares a backend with the reference on one small input, forward and backward."""

# S source rows, K choices per row, D hidden, F expert width, E experts.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .expert_mlp import expert_mlp
from .permute import combine, permute
from .router_logits import router_logits
from .sort_by_expert import ExpertOrder, sort_by_expert
from .topk_gate import topk_gate

S, K, D, F, E = 320, 2, 80, 96, 4
#: of the gate, whose reference chooses token by token
TOKENS, GATE_EXPERTS = 40, 24
#: largest relative error: of exact ops, and of sums and products by the dtype of rows
LARGEST = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}
#: the same of a router's logits, which are fp32 for 16-bit rows too. A sum may be rounded to the next 16-bit number.
LARGEST_OF_LOGITS = 3e-4
#: the same of the experts, if the user permits TF32 for products of fp32 tensors: it keeps 10 bits of their factors
LARGEST_OF_TF32 = 1e-2


def error_of(op: str, backend: str, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Return the largest relative error of the op's results and gradients, and what is permitted."""
    check, largest = _CHECKS[op], _largest(op, dtype)
    generator = torch.Generator().manual_seed(0)
    ids_SK = torch.randint(0, E - 1, (S, K), generator=generator, device="cpu")  # the last expert gets no row
    ids_SK[:200, 0] = 1
    ids_SK[7:30, 1] = -1
    with torch.autocast(device.type, enabled=False):
        found, expected = (
            [t.detach().double().cpu() for t in check(name, ids_SK.to(device), dtype, torch.Generator().manual_seed(1))]
            for name in (backend, "reference")
        )
    errors = [(a - b).norm() / b.norm().clamp(min=1e-30) for a, b in zip(found, expected, strict=True)]
    worst = torch.stack(errors).max().item()
    return (worst if worst == worst else float("inf")), largest


def _largest(op: str, dtype: torch.dtype) -> float:
    if op == "router_logits":
        return LARGEST_OF_LOGITS
    if op == "expert_mlp" and dtype == torch.float32:
        from .grouped_gemm.triton_ops import precision  # imported late, because it imports triton

        if precision(dtype) == "tf32":
            return LARGEST_OF_TF32
    return LARGEST.get(dtype, 0.0)


def _random(generator: torch.Generator, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    values = _normal(generator, *shape) / shape[-1] ** 0.5
    return values.to(like.device, dtype).requires_grad_()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return the same numbers on the host, whatever torch's default dtype and device are."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _order(ids_SK: Tensor) -> ExpertOrder:
    return sort_by_expert(ids_SK, E, backend="torch")


def _sort(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    return list(sort_by_expert(ids_SK, E, backend=backend))


def _permute(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    x_SD = _random(generator, ids_SK, dtype, S, D)
    rows_RD = permute(x_SD, _order(ids_SK), backend=backend)
    return [rows_RD, *torch.autograd.grad(rows_RD, x_SD, rows_RD.detach().cos())]


def _combine(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    rows_RD = _random(generator, ids_SK, dtype, S * K, D)
    y_SD = combine(rows_RD, _order(ids_SK), backend=backend)
    return [y_SD, *torch.autograd.grad(y_SD, rows_RD, torch.ones_like(y_SD))]


def _mlp(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    leaves = [
        _random(generator, ids_SK, dtype, S, D),
        _random(generator, ids_SK, torch.float32, S, K),
        _random(generator, ids_SK, dtype, E, 2 * F, D),
        _random(generator, ids_SK, dtype, E, D, F),
    ]
    y_SD = expert_mlp(leaves[0], leaves[1], _order(ids_SK), leaves[2], leaves[3], backend)
    dy_SD = _normal(generator, *y_SD.shape).to(y_SD)
    return [y_SD, *torch.autograd.grad(y_SD, leaves, dy_SD)]


def _logits(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    x_SD, weight_ED = _random(generator, ids_SK, dtype, S, D), _random(generator, ids_SK, torch.float32, E, D)
    y_SE = router_logits(x_SD, weight_ED, backend=backend)
    dy_SE = _normal(generator, *y_SE.shape).to(y_SE)
    return [y_SE, *torch.autograd.grad(y_SE, (x_SD, weight_ED), dy_SE)]


def _gate(backend: str, ids_SK: Tensor, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    mask_T = torch.arange(TOKENS, device=ids_SK.device) % 5 != 2
    bias_E = torch.linspace(-0.2, 0.2, GATE_EXPERTS, dtype=torch.float32, device=ids_SK.device)
    found: list[Tensor] = []
    ways: list[dict[str, Any]] = [{}, {"score": "sigmoid", "bias_E": bias_E, "groups": 4, "kept_groups": 2}]
    for how in ways:
        logits_TE = _random(generator, ids_SK, dtype, TOKENS, GATE_EXPERTS)
        gate = topk_gate(logits_TE, K, mask_T=mask_T, sequences=2, backend=backend, **how)
        ends = (gate.weights_TK, gate.prob_sums_BE, gate.z_sum)
        # not a function of the ends: that of the large z_sum would turn its rounding into a large difference
        dends = [_normal(generator, *end.shape).to(end) for end in ends]
        found += [*gate, *torch.autograd.grad(ends, logits_TE, dends)]
    return found


_Check = Callable[[str, Tensor, torch.dtype, torch.Generator], list[Tensor]]
_CHECKS: dict[str, _Check] = {
    "sort_by_expert": _sort,
    "permute": _permute,
    "combine": _combine,
    "expert_mlp": _mlp,
    "router_logits": _logits,
    "topk_gate": _gate,
}
