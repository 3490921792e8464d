"""Costs of the operations in a dry run: bytes sent, floating-point operations, tensors saved for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# ---- collectives


def verb_of(op: str) -> str | None:
    """Return the name of the collective that a c10d or functional operation runs; None if it only waits."""
    words = {
        "all_gather": ("allgather", "all_gather"),
        "reduce_scatter": ("reduce_scatter",),
        "all_to_all": ("alltoall", "all_to_all"),
        "all_reduce": ("allreduce", "all_reduce"),
        "broadcast": ("broadcast",),
        "send": ("send",),
        "recv": ("recv",),
    }
    return next((verb for verb, starts in words.items() if op.strip("_").startswith(starts)), None)


def group_of(args: tuple[Any, ...]) -> Any:
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(arg)
            except RuntimeError:
                continue  # it is a ReduceOp
    name = next(arg for arg in reversed(args) if isinstance(arg, str) and arg not in ("sum", "avg"))
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)


def bytes_sent(verb: str, func: Any, args: tuple[Any, ...], size: int, rank: int) -> int:
    """Return the bytes that a rank sends to others in one collective, assuming ring algorithms.

    An all-reduce thus sends twice as much as a reduce-scatter.
    """
    schema = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    inputs = next(
        schema[name]
        for name in ("input_tensor", "inputs", "input", "tensors", "input_tensors", "self")
        if name in schema
    )
    data = sum(t.nbytes for t in tree_iter(inputs) if isinstance(t, Tensor))
    if verb == "recv":
        return 0
    if verb in ("send", "broadcast"):
        return data
    if verb == "all_gather":
        return data * (size - 1)
    if verb == "all_reduce":
        return 2 * data * (size - 1) // size
    splits = schema.get("input_split_sizes") or schema.get("input_split_sizes_")
    if verb == "all_to_all" and splits and sum(splits):
        return data * (sum(splits) - splits[rank]) // sum(splits)
    return data * (size - 1) // size


# ---- kernels and their products


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, enable_gqa: bool = False
) -> Tensor:
    """Replace F.scaled_dot_product_attention by the kernel that a GPU would use: flash, or "efficient" as fallback."""
    if attn_mask is not None:
        bias = q.new_zeros(attn_mask.shape).expand(*q.shape[:3], -1)
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, torch.is_grad_enabled())[0]
    if q.shape[-1] == v.shape[-1]:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    return aten._scaled_dot_product_efficient_attention(q, k, v, None, torch.is_grad_enabled(), 0.0, is_causal)[0]


class _FusedNorm(torch.autograd.Function):
    """Saves the same tensors as F.rms_norm on a GPU: x and one number per row. On a CPU it would save fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(x: Tensor, shape: Any, weight: Tensor, eps: float) -> Tensor:
    return _FusedNorm.apply(x, weight)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, products_of_q: int, products_of_v: int, mask: Tensor | None = None
) -> int:
    """Count causal attention: each product covers the S * (S + 1) / 2 visible pairs of positions; with a mask, all."""
    batch, heads, length, width = q.shape
    pairs = batch * heads * length * (length + 1) // 2 if mask is None else batch * heads * length * length
    return 2 * pairs * (products_of_q * width + products_of_v * v.shape[-1])


def _experts(x: Tensor, weights: Any, gate_up: Tensor, down: Tensor, order: Tensor, *_: Any, **__: Any) -> int:
    return 2 * order.numel() * x.shape[1] * (gate_up.shape[1] + down.shape[2])


def _experts_backward(
    dy: Tensor, pre: Tensor, x: Tensor, weights: Any, gate_up: Tensor, down: Tensor, order: Tensor, *rest: Any, out: Any
) -> int:
    keep, needs = rest[4:6]
    up = 2 * order.numel() * x.shape[1] * gate_up.shape[1]
    return up * (needs[0] + needs[2] + (not keep)) + 2 * order.numel() * x.shape[1] * down.shape[2] * (1 + needs[3])


def _torchs(formula: Callable[..., int]) -> Callable[..., int]:
    return lambda *args, out=None, **kwargs: formula(*args, **kwargs, out_val=out)


#: operation -> function that counts the floating-point operations of a call; a multiply-add counts as two
FLOPS: dict[str, Callable[..., int]] = {
    **{f"aten::{op}": _torchs(flop_registry[getattr(aten, op)]) for op in ("mm", "addmm", "bmm", "baddbmm")},
    "aten::_scaled_dot_product_flash_attention": lambda q, k, v, *_, **__: _attention(q, k, v, 1, 1),
    "aten::_scaled_dot_product_efficient_attention": lambda q, k, v, m, *_, **__: _attention(q, k, v, 1, 1, m),
    # 3 products of query width (recomputed scores, dq, dk) and 2 of value width (dp, dv)
    "aten::_scaled_dot_product_flash_attention_backward": lambda _, q, k, v, *a, **b: _attention(q, k, v, 3, 2),
    "aten::_scaled_dot_product_efficient_attention_backward": lambda _, q, k, v, m, *a, **b: _attention(
        q, k, v, 3, 2, m
    ),
    "equimoe::router_logits": lambda x, weight, *_, **__: 2 * x.numel() * weight.shape[0],
    "equimoe::router_logits_backward": lambda _, x, weight, needs, **__: sum(needs) * 2 * x.numel() * weight.shape[0],
    "equimoe::expert_mlp": _experts,
    "equimoe::expert_mlp_backward": _experts_backward,
}
