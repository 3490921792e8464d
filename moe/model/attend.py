"""Causal attention given queries, keys and values: over whole sequences, windows, and documents of packed sequences.

B sequences, S positions, N query heads, M key/value heads, G = N / M, H width of a query or key head, W width of a
value head.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .documents import Documents

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def causal_attention(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents | None = None) -> Tensor:
    """Softmax attention in which each position attends to itself and to earlier ones, of its own document if given.

    Query head n uses key/value head n // (N / M).
    """
    if documents is not None:
        return attention_within(q_BNSH, k_BMSH, v_BMSW, documents)
    grouped = q_BNSH.shape[1] != k_BMSH.shape[1]
    return F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BMSW, is_causal=True, enable_gqa=grouped)


def windowed_attention(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents | None = None, *, window: int
) -> Tensor:
    """Like :func:`causal_attention`, but each position attends to itself and the ``window - 1`` positions before it.

    Without documents, it computes all pairs of positions, with a mask [S, S].
    """
    if documents is not None:
        return attention_within(q_BNSH, k_BMSH, v_BMSW, documents, window)
    length = q_BNSH.shape[2]
    seen_SS = q_BNSH.new_ones((length, length), dtype=torch.bool).tril().triu(1 - window)
    return _masked(q_BNSH, k_BMSH, v_BMSW, seen_SS)


def attention_within(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents, window: int | None = None
) -> Tensor:
    """Attention in which each position attends to itself and earlier positions of its document, in the fastest way."""
    return WITHIN[_way(q_BNSH, v_BMSW)](q_BNSH, k_BMSH, v_BMSW, documents, window)


def reference(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents, window: int | None = None
) -> Tensor:
    """Compute :func:`attention_within` query by query: slow and obvious."""
    count, heads, length, width = q_BNSH.shape
    groups = heads // k_BMSH.shape[1]
    sequences = []
    for b in range(count):
        queries = []
        for s in range(length):
            first = int(documents.starts_BS[b, s])
            first = first if window is None else max(first, s - window + 1)
            keys, values = (t[b, :, first : s + 1].repeat_interleave(groups, 0) for t in (k_BMSH, v_BMSW))
            scores_NL = torch.einsum("nh,nlh->nl", q_BNSH[b, :, s], keys) / math.sqrt(width)
            queries.append(torch.einsum("nl,nlw->nw", scores_NL.softmax(-1), values))
        sequences.append(torch.stack(queries, 1))
    return torch.stack(sequences)


def one_by_one(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents, window: int | None = None
) -> Tensor:
    """Attend in one document after the other, as in sequences of their own."""
    if len(documents.lengths) == len(q_BNSH):
        return _whole(q_BNSH, k_BMSH, v_BMSW, window)

    def split(t_BNSX: Tensor) -> tuple[Tensor, ...]:
        return t_BNSX.transpose(0, 1).flatten(1, 2)[None].split(documents.lengths, dim=2)

    parts = zip(split(q_BNSH), split(k_BMSH), split(v_BMSW), strict=True)
    found = [_whole(q, k, v, window) for q, k, v in parts]
    return torch.cat(found, dim=2)[0].unflatten(1, (q_BNSH.shape[0], -1)).transpose(0, 1)


def by_mask(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """Attend with a mask [B, 1, S, S]: computes all pairs of positions, but runs everywhere and never waits."""
    return _masked(q_BNSH, k_BMSH, v_BMSW, documents.seen(window))


def by_blocks(
    q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, documents: Documents, window: int | None = None
) -> Tensor:
    """Attend with FlexAttention (arXiv 2412.05496), which leaves out the blocks of pairs that no position sees."""
    q, k, v = (autocast(t) for t in (q_BNSH, k_BMSH, v_BMSW))
    return _flex(q.is_cuda)(q, k, v, block_mask=documents.block_mask(window), enable_gqa=q.shape[1] != k.shape[1])


#: ways to compute :func:`attention_within`
WITHIN: dict[str, Callable[[Tensor, Tensor, Tensor, Documents, int | None], Tensor]] = {
    "reference": reference,
    "one_by_one": one_by_one,
    "mask": by_mask,
    "blocks": by_blocks,
}


def _way(q: Tensor, v: Tensor) -> str:
    """Choose a way: on a CPU, where lengths can be read without waiting, documents one by one are the fastest."""
    if not q.is_cuda:
        return "mask" if torch.compiler.is_compiling() else "one_by_one"  # no graph can read lengths
    fits = min(q.shape[-1], v.shape[-1]) >= 16 and q.dtype != torch.float64  # as the kernels of FlexAttention need it
    return "blocks" if fits and _HAS_TRITON else "mask"


def _whole(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    if window is None or window >= q.shape[2]:
        return causal_attention(q, k, v)
    return windowed_attention(q, k, v, window=window)


def _masked(q_BNSH: Tensor, k_BMSH: Tensor, v_BMSW: Tensor, seen: Tensor) -> Tensor:
    groups = q_BNSH.shape[1] // k_BMSH.shape[1]
    if groups > 1:  # fused kernels with a mask need equal numbers of heads
        k_BMSH, v_BMSW = k_BMSH.repeat_interleave(groups, 1), v_BMSW.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q_BNSH, k_BMSH, v_BMSW, attn_mask=seen)


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # imported late: it imports torch's compiler

    plain: Callable[..., Any] = flex_attention
    return torch.compile(plain) if compiled else plain


def autocast(t: Tensor) -> Tensor:
    """Cast as autocast casts the arguments of scaled_dot_product_attention."""
    device = t.device.type
    wanted = torch.is_autocast_enabled(device) and t.dtype != torch.float64
    return t.to(torch.get_autocast_dtype(device)) if wanted else t
