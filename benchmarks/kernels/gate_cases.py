"""The op calls whose launches the compile gate compiles: every shipped tile, at every kind of size.

Triton specialises a kernel for integer arguments that are 1 or a multiple of 16, so one size represents all sizes of
its kind. Values do not matter, because nothing runs.
"""

# S source rows, K choices per row, D hidden, F expert width, E experts, R = S*K routed rows.

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from equimoe.kernels.activations.triton_ops import activate_rows, differentiate_rows
from equimoe.kernels.empty_experts.triton_ops import zero_without_rows
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_wgrad
from equimoe.kernels.matmul_tiles import BUCKETS, MANY_ROWS
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.router_logits import router_logits
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.kernels.topk_gate import topk_gate

Work = Callable[[], object]


class Size(NamedTuple):
    """One kind of size. Tensors start ``shift`` elements after an aligned address."""

    D: int
    F: int
    E: int
    K: int
    shift: int = 0


#: even: multiples of 16 and of every tile; tail: multiples of 16, but not of a tile's depth; odd: multiples of neither;
#: single: one expert and one choice; shifted: even sizes at an unaligned address, like a view into a flat buffer
SIZES = {
    "even": Size(256, 384, 16, 8),
    "tail": Size(208, 144, 16, 4),
    "odd": Size(133, 101, 3, 3),
    "single": Size(256, 384, 1, 1),
    "shifted": Size(256, 384, 2, 2, shift=1),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
#: total number of rows in the bucket "few"
_FEW = 16


def _random(size: Size, dtype: torch.dtype, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.zeros(count + size.shift, dtype=dtype)[size.shift :].view(shape).requires_grad_()


def _order(size: Size, bucket: str) -> tuple[int, Tensor]:
    """Return the number of source rows, and their expert ids."""
    rows = MANY_ROWS * size.E if bucket == "many" else _FEW
    sources = -(-rows // size.K)
    return sources, torch.arange(sources * size.K).remainder(size.E).view(sources, size.K)


def mlp(dtype: torch.dtype, size: Size, bucket: str, activation: str, gated: bool, recompute: bool = False) -> None:
    """Run the experts forward and backward: both products, their gradients, and the sums over k."""
    sources, ids_SK = _order(size, bucket)
    order = sort_by_expert(ids_SK, size.E, backend="reference")
    x_SD, weights_SK = _random(size, dtype, sources, size.D), _random(size, torch.float32, sources, size.K)
    gate_up = _random(size, dtype, size.E, (1 + gated) * size.F, size.D)
    down = _random(size, dtype, size.E, size.D, size.F)
    y_SD = expert_mlp(
        x_SD, weights_SK, order, gate_up, down, "triton", activation=activation, gated=gated, recompute=recompute
    )
    torch.autograd.grad(y_SD, (x_SD, weights_SK, gate_up, down), torch.zeros_like(y_SD))


def products(dtype: torch.dtype, size: Size, bucket: str) -> None:
    """Run the grouped products with and without a row index, and one that adds to an fp32 gradient."""
    sources, ids_SK = _order(size, bucket)
    order = sort_by_expert(ids_SK, size.E, backend="reference")
    index_R = order.order_R // size.K
    weight = _random(size, dtype, size.E, size.F, size.D)
    rows_RD, x_SD = _random(size, dtype, index_R.numel(), size.D), _random(size, dtype, sources, size.D)
    for rows, index in ((rows_RD, None), (x_SD, index_R)):
        y_RF = grouped_gemm(rows, weight, order.offsets_E, index, backend="triton")
        torch.autograd.grad(y_RF, (rows, weight), torch.zeros_like(y_RF))
    out = torch.zeros(size.E, size.F, size.D)
    dy_RF = torch.zeros(index_R.numel(), size.F, dtype=dtype)
    grouped_gemm_wgrad(dy_RF, x_SD, order.offsets_E, index_R=index_R, out=out, backend="triton")


def activation(dtype: torch.dtype, size: Size, gated: bool) -> None:
    """Run the activation and its gradient as kernels between two products."""
    rows, form = 16 * size.K, ("silu", gated)
    dh_RF, pre_RU = (_random(size, dtype, rows, width).detach() for width in (size.F, (1 + gated) * size.F))
    weights_SK, order_R = torch.zeros(16, size.K), torch.arange(rows)
    activate_rows(pre_RU, weights_SK, order_R, *form)
    differentiate_rows(dh_RF, pre_RU, weights_SK, order_R, *form)


def empty(dtype: torch.dtype, size: Size) -> None:
    """Zero the weight gradients of experts without rows."""
    zero_without_rows(torch.zeros(size.E, size.F, size.D, dtype=dtype), torch.zeros(size.E + 1, dtype=torch.int64))


def gate(experts: int, k: int, dtype: torch.dtype, bias: bool, mask: bool, given: bool, **method: object) -> None:
    tokens = 2
    topk_gate_like = {
        "bias_E": torch.zeros(experts) if bias else None,
        "mask_T": torch.ones(tokens, dtype=torch.bool) if mask else None,
        "ids_TK": torch.arange(k).repeat(tokens, 1) if given else None,
    }
    logits_TE = torch.zeros(tokens, experts, dtype=dtype, requires_grad=True)
    found = topk_gate(logits_TE, k, backend="triton", **topk_gate_like, **method)  # type: ignore[arg-type]
    (found.weights_TK.sum() + found.prob_sums_BE.sum()).backward()


def logits(x_dtype: torch.dtype, weight_dtype: torch.dtype, size: Size) -> None:
    """Run the router's product and its gradients. Tokens are cut into chunks for the weight's gradient."""
    x_TD, weight_ED = _random(size, x_dtype, MANY_ROWS, size.D), _random(size, weight_dtype, 8 * size.E, size.D)
    y_TE = router_logits(x_TD, weight_ED, backend="triton")
    torch.autograd.grad(y_TE, (x_TD, weight_ED), torch.zeros_like(y_TE))


def move(dtype: torch.dtype, hidden: int, k: int) -> None:
    order = sort_by_expert(torch.zeros(3, k, dtype=torch.int64), 1, backend="reference")
    permute(torch.zeros(3, hidden, dtype=dtype), order, backend="triton")
    combine(torch.zeros(3 * k, hidden, dtype=dtype), order, backend="triton")


def sort(experts: int) -> None:
    sort_by_expert(torch.zeros(3, 2, dtype=torch.int64), experts, backend="triton")


#: at least one case for every tile of topk_gate: experts, k, dtype of the logits, bias, mask, method
GATES: tuple[tuple[int, int, str, bool, bool, dict[str, object]], ...] = (
    (1, 1, "fp32", False, False, {}),
    (8, 2, "bf16", False, True, {"softmax_after_topk": True}),
    (60, 4, "fp32", False, True, {"normalize": False}),
    (64, 6, "fp16", True, False, {"score": "sigmoid"}),
    (128, 8, "fp32", False, False, {}),
    (160, 6, "fp32", False, True, {"groups": 8, "kept_groups": 3, "normalize": False}),
    (256, 8, "fp32", True, True, {"score": "sigmoid", "groups": 8, "kept_groups": 4}),
    (512, 10, "fp32", True, False, {"score": "sigmoid"}),
    (1024, 16, "bf16", False, False, {"softmax_after_topk": True}),
    (2048, 32, "fp32", True, True, {"score": "sigmoid", "groups": 16, "kept_groups": 4}),
    (4096, 64, "fp32", False, False, {}),
    (4092, 64, "fp32", True, True, {"score": "sigmoid", "groups": 33, "kept_groups": 9}),
)


#: dtypes of hidden states and of the router's weight, and the kind of size
LOGITS = (
    ("bf16", "fp32", "even"),
    ("bf16", "fp32", "odd"),
    ("bf16", "fp32", "shifted"),
    ("fp32", "fp32", "even"),
    ("fp32", "fp32", "odd"),
    ("bf16", "bf16", "even"),
    ("bf16", "bf16", "odd"),
)


def _mlps() -> Iterator[tuple[str, Work]]:
    """Yield the default experts in every dtype, bucket and kind of size, and other variants in bf16."""

    def one(dtype: str, bucket: str, size: str, activation: str, gated: bool, again: bool) -> tuple[str, Work]:
        words = [dtype, bucket, size, activation, *["plain"] * (not gated), *["recompute"] * again]
        return " ".join(words), partial(mlp, DTYPES[dtype], SIZES[size], bucket, activation, gated, again)

    for bucket in BUCKETS:
        for size in SIZES:
            yield one("bf16", bucket, size, "silu", True, False)
        for dtype in ("fp16", "fp32") if bucket == "many" else ("fp16",):  # fp32 has one tile
            for size in ("even", "odd"):
                yield one(dtype, bucket, size, "silu", True, False)
        for size in ("even", "odd"):
            yield one("bf16", bucket, size, "silu", True, True)
            yield one("bf16", bucket, size, "gelu_tanh", False, False)
        yield one("bf16", bucket, "odd", "gelu", True, False)
        yield one("bf16", bucket, "tail", "relu2", False, False)
    yield one("fp32", "many", "odd", "gelu_tanh", False, False)


def works() -> Iterator[tuple[str, Work]]:
    """Yield every call with its name."""
    yield from _mlps()
    for dtype, bucket in (("bf16", "few"), ("bf16", "many"), ("fp16", "many"), ("fp32", "many")):
        for size in ("even", "tail", "odd") if dtype == "bf16" else ("even", "odd"):
            yield f"{dtype} {bucket} {size}", partial(products, DTYPES[dtype], SIZES[size], bucket)
    for size in ("even", "tail", "odd"):
        for gated in (True, False):
            yield f"bf16 {size} silu{' plain' * (not gated)}", partial(activation, torch.bfloat16, SIZES[size], gated)
        yield f"bf16 {size} empty", partial(empty, torch.bfloat16, SIZES[size])
    for experts, k, dtype, bias, mask, method in GATES:
        for given in (False, True):
            name = f"E{experts} K{k} {dtype} {method.get('score', 'softmax')}{' given' * given}"
            yield name, partial(gate, experts, k, DTYPES[dtype], bias, mask, given, **method)
    for x_dtype, weight_dtype, size in LOGITS:
        yield f"{x_dtype} {weight_dtype} {size}", partial(logits, DTYPES[x_dtype], DTYPES[weight_dtype], SIZES[size])
    for name, dtype in DTYPES.items():
        for hidden in (16, 100, 2048):
            yield f"D{hidden} {name}", partial(move, dtype, hidden, 6)
    for experts in (512, 513):
        yield f"E{experts}", partial(sort, experts)
