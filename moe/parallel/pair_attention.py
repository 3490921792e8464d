"""Attention of some queries to one chunk of keys, with the logsumexp of the scores, by which chunks are merged.

Each way is a pair of functions, for the forward and for the backward. Let a query's output over all keys be o and its
logsumexp l. The backward of one chunk needs only o and l, not those of the chunk (FlashAttention, arXiv 2205.14135).

B sequences, N query heads, M key/value heads, G = N / M, Q queries and C keys (Q = C if ``causal``), H width of a query
or key head, W width of a value head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

#: number of queries whose scores are in memory at a time, without a fused kernel
TILE = 512
#: the widest head of the fused kernels
WIDEST = 256
#: what the backward of a fused kernel wants to have back from its forward
Rest = tuple[Tensor, ...]
#: (q, k, v, causal, first) -> output [B, N, Q, W], logsumexp [B, N, Q], rest. ``causal``: query i sees the keys 0 to i.
#: ``first`` [B, Q] or None: the first key that a query sees; a query that sees none has output 0
Forward = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], tuple[Tensor, Tensor, Rest]]
#: (gradient of the output, q, k, v, output and logsumexp over all keys, causal, first, rest) -> gradients of q, k, v
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, Tensor | None, Rest], tuple[Tensor, Tensor, Tensor]
]


class PairAttention(NamedTuple):
    """A way to compute attention of one chunk of queries to one chunk of keys."""

    forward: Forward
    backward: Backward


def choose_pair_attention(q_BNSH: Tensor, v_BMSW: Tensor, documents: bool) -> PairAttention:
    """Choose the fused kernel, if there is one for these tensors."""
    device, widest = q_BNSH.device.type, max(q_BNSH.shape[-1], v_BMSW.shape[-1])
    fits = device == "cpu"
    if device == "cuda":
        fits = q_BNSH.element_size() == 2 and widest <= WIDEST and torch.backends.cuda.flash_sdp_enabled()
    return PAIR_ATTENTION["flash" if fits and not documents else "tiles"]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


# ---- in tiles of scores, on every device


def tiles(
    q_BNQH: Tensor, k_BMCH: Tensor, v_BMCW: Tensor, causal: bool, first_BQ: Tensor | None
) -> tuple[Tensor, Tensor, Rest]:
    """Compute in fp32 (fp64 for fp64), with the scores of ``TILE`` queries in memory at a time."""
    lowest = torch.finfo(wide(q_BNQH.dtype)).min
    outputs, sums = [], []
    for rows, scores_BMGQC in _scores(q_BNQH, k_BMCH, causal, first_BQ):
        most = scores_BMGQC.amax(-1, keepdim=True).clamp_min_(lowest)  # -inf for a query that sees no key
        p_BMGQC = scores_BMGQC.sub_(most).exp_()
        total = p_BMGQC.sum(-1, keepdim=True)
        seen = _seen(rows, k_BMCH.shape[2], causal)
        out = (p_BMGQC.flatten(2, 3) @ v_BMCW[:, :, seen].to(p_BMGQC.dtype)).unflatten(2, p_BMGQC.shape[2:4])
        outputs.append(out.div_(total.clamp_min(torch.finfo(total.dtype).tiny)).flatten(1, 2))
        sums.append((most + total.log()).clamp_min_(lowest).squeeze(-1).flatten(1, 2))
    return torch.cat(outputs, 2), torch.cat(sums, 2), ()


def tile_gradients(
    do_BNQW: Tensor,
    q_BNQH: Tensor,
    k_BMCH: Tensor,
    v_BMCW: Tensor,
    out_BNQW: Tensor,
    lse_BNQ: Tensor,
    causal: bool,
    first_BQ: Tensor | None,
    rest: Rest,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`tiles`, in the dtype of its sums."""
    heads, dtype = k_BMCH.shape[1], wide(q_BNQH.dtype)
    k_BMCH, v_BMCW = k_BMCH.to(dtype), v_BMCW.to(dtype)
    q_BMGQH, do_BMGQW, out_BMGQW, lse_BMGQ = (
        t.to(dtype).unflatten(1, (heads, -1)) for t in (q_BNQH, do_BNQW, out_BNQW, lse_BNQ)
    )
    delta_BMGQ = (do_BMGQW * out_BMGQW).sum(-1, keepdim=True)
    dq_BMGQH, dk_BMCH, dv_BMCW = (torch.zeros_like(t) for t in (q_BMGQH, k_BMCH, v_BMCW))
    for rows, scores_BMGQC in _scores(q_BNQH, k_BMCH, causal, first_BQ):
        seen = _seen(rows, k_BMCH.shape[2], causal)
        p = scores_BMGQC.sub_(lse_BMGQ[..., rows, None]).exp_().flatten(2, 3)
        q, do, delta = (t[..., rows, :].flatten(2, 3) for t in (q_BMGQH, do_BMGQW, delta_BMGQ))
        ds = (do @ v_BMCW[:, :, seen].mT).sub_(delta).mul_(p)
        dv_BMCW[:, :, seen] += p.mT @ do
        dk_BMCH[:, :, seen] += ds.mT @ q
        dq_BMGQH[..., rows, :] = (ds @ k_BMCH[:, :, seen]).unflatten(2, dq_BMGQH[..., rows, :].shape[2:4])
    scale = q_BNQH.shape[-1] ** -0.5
    return dq_BMGQH.mul_(scale).flatten(1, 2), dk_BMCH.mul_(scale), dv_BMCW


def _seen(rows: slice, keys: int, causal: bool) -> slice:
    """Return the keys that some of these queries see."""
    return slice(0, rows.stop if causal else keys)


def _scores(q_BNQH: Tensor, k_BMCH: Tensor, causal: bool, first_BQ: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield some queries at a time and their scores [B, M, G, Q, C]; -inf where a query does not see a key."""
    heads, dtype = k_BMCH.shape[1], wide(q_BNQH.dtype)
    q_BMGQH = (q_BNQH.to(dtype) * q_BNQH.shape[-1] ** -0.5).unflatten(1, (heads, -1))
    k_BMHC = k_BMCH.to(dtype).mT
    for start in range(0, q_BNQH.shape[2], TILE):
        rows = slice(start, min(start + TILE, q_BNQH.shape[2]))
        q_tile = q_BMGQH[..., rows, :]
        scores = (q_tile.flatten(2, 3) @ k_BMHC[..., _seen(rows, k_BMCH.shape[2], causal)]).unflatten(
            2, q_tile.shape[2:4]
        )
        key_C = torch.arange(scores.shape[-1], device=scores.device)
        if causal:
            query_Q = torch.arange(rows.start, rows.stop, device=scores.device)
            scores = scores.masked_fill_(key_C > query_Q[:, None], float("-inf"))
        if first_BQ is not None:
            scores = scores.masked_fill_((key_C < first_BQ[:, rows, None])[:, None, None], float("-inf"))
        yield rows, scores


# ---- with the kernels of scaled_dot_product_attention


def flash(
    q_BNQH: Tensor, k_BMCH: Tensor, v_BMCW: Tensor, causal: bool, first_BQ: Tensor | None
) -> tuple[Tensor, Tensor, Rest]:
    """Compute with torch's flash attention, which holds no scores in memory and returns the dtype of ``q``."""
    q, k, v = _equal_heads(q_BNQH, k_BMCH, v_BMCW)
    scale = q_BNQH.shape[-1] ** -0.5
    rest: Rest = ()
    if q.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        out, lse, rest = found[0], found[1], (found[6], found[7])  # the random states, which dropout would use
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out[..., : v_BMCW.shape[-1]], lse, rest


def flash_gradients(
    do_BNQW: Tensor,
    q_BNQH: Tensor,
    k_BMCH: Tensor,
    v_BMCW: Tensor,
    out_BNQW: Tensor,
    lse_BNQ: Tensor,
    causal: bool,
    first_BQ: Tensor | None,
    rest: Rest,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`flash`."""
    q, k, v = _equal_heads(q_BNQH, k_BMCH, v_BMCW)
    do, out = (_of_width(t.to(q.dtype), q.shape[-1]) for t in (do_BNQW, out_BNQW))
    lse, scale = lse_BNQ.contiguous(), q_BNQH.shape[-1] ** -0.5
    if q.is_cuda:
        lengths = (None, None, q.shape[2], k.shape[2])  # None: the sequences are equally long
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, out, lse, *lengths, 0.0, causal, *rest, scale=scale
        )
    else:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    width, heads = q_BNQH.shape[-1], k_BMCH.shape[1]
    dk, dv = (t.to(wide(t.dtype)).unflatten(1, (heads, -1)).sum(2) for t in (dk, dv))
    return dq[..., :width], dk[..., :width], dv[..., : v_BMCW.shape[-1]]


def _equal_heads(*qkv: Tensor) -> list[Tensor]:
    """Repeat heads of keys and values for the queries, and pad all heads to one width, a multiple of 8."""
    heads, width = qkv[0].shape[1], -(-max(t.shape[-1] for t in qkv) // 8) * 8
    return [_of_width(t, width).repeat_interleave(heads // t.shape[1], 1) for t in qkv]


def _of_width(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


#: name -> how to compute the attention of one chunk to another
PAIR_ATTENTION = {
    "flash": PairAttention(flash, flash_gradients),
    "tiles": PairAttention(tiles, tile_gradients),
}
