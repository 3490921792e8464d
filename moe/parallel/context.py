"""Context parallelism: each rank holds some chunks of every sequence, and attends to the keys of all ranks.

If a sequence were cut into P equal parts, causal attention would leave the first rank almost idle: its queries see few
keys. It is cut into 2P chunks instead, and rank r holds chunks r and 2P-1-r, so that all ranks compute the same
amount. Attention is computed for one chunk of queries and one of keys at a time (:mod:`.pair_attention`), and merged by
the logsumexp of the scores (online softmax, arXiv 1805.02867). Memory grows with the positions of a rank, not with the
square of their number.

B sequences, N query heads, M key/value heads, S positions of this rank, H width of a query or key head, W width of a
value head, P ranks of the axis, Q queries and C keys of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives import Axis
from ..model.attend import autocast, causal_attention
from ..model.documents import Documents
from .pair_attention import Rest, choose_pair_attention, wide

# torch 2.13 renamed both and warns about the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def positions(seq_len: int, size: int, rank: int) -> Tensor:
    """Return the positions of a sequence that this rank holds, in the order in which it holds them.

    int64 [seq_len / size].
    """
    return shard_sequence(torch.arange(seq_len), 0, size, rank)


def shard_sequence(t: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """Take this rank's part of a tensor that has whole sequences along ``dim``. Differentiable.

    Raises ValueError unless 2 * size divides the sequence length.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank={rank}: must be from 0 to {size - 1}, for size={size} context-parallel ranks")
    count = size * len(_held(rank, size))
    if t.shape[dim] == 0 or t.shape[dim] % count:
        raise ValueError(
            f"seq_len={t.shape[dim]}: must be divisible by {count}, {count // size} for each of {size} "
            "context-parallel ranks; pad the sequences or lower parallel.cp"
        )
    chunks = t.chunk(count, dim)
    return torch.cat([chunks[i] for i in _held(rank, size)], dim)


class ContextAttention:
    """Causal attention over sequences that are split over an axis; replaces scaled_dot_product_attention.

    ``exchange="ring"`` passes K and V around the ranks while tiles are computed, so that a rank holds K and V of only
    two ranks at a time (arXiv 2310.01889). ``exchange="all_gather"`` gathers K and V of all ranks with one collective
    instead of P - 1 exchanges. Sequences must be split by :func:`shard_sequence`. All ranks must call this with equal
    shapes.
    """

    def __init__(self, axis: Axis, exchange: str = "ring") -> None:
        if exchange not in KV_EXCHANGES:
            raise ValueError(f"exchange={exchange!r}: unknown; use one of {', '.join(KV_EXCHANGES)}")
        self.axis, self.exchange = axis, exchange

    def __call__(self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, documents: Documents | None = None) -> Tensor:
        """Return this rank's rows of F.scaled_dot_product_attention(is_causal=True) on the whole sequences.

        Query head n uses key head n // (N / M). v may differ from k in width. Accumulates in fp32 (fp64 for fp64).
        ``documents`` are those of this rank's positions; their starts are positions of the whole sequence.
        """
        q_BNSH, k_BMSH, v_BMSH = (autocast(t) for t in (q_BNSH, k_BMSH, v_BMSH))
        # before anything is sent: peers would take what is under way for the next call's
        self._check(q_BNSH, k_BMSH, v_BMSH, documents)
        if self.axis.size == 1:
            return causal_attention(q_BNSH, k_BMSH, v_BMSH, documents)
        starts_BS = None if documents is None else documents.starts_BS
        return _ContextAttention.apply(q_BNSH, k_BMSH, v_BMSH, starts_BS, self.axis, KV_EXCHANGES[self.exchange])

    def _check(self, q_BNSH: Tensor, k_BMSH: Tensor, v_BMSH: Tensor, documents: Documents | None) -> None:
        shapes = [tuple(t.shape) for t in (q_BNSH, k_BMSH, v_BMSH)]
        q, k, v = shapes
        heads_fit = len(q) == len(k) == len(v) == 4 and k[1] > 0 and q[1] % k[1] == 0
        if not heads_fit or k[:3] != v[:3] or (q[0], *q[2:]) != (k[0], *k[2:]):
            raise ValueError(
                f"q, k, v have shapes {shapes}: must be [B, N, S, H], [B, M, S, H], [B, M, S, any]; M must divide N"
            )
        dtypes = [t.dtype for t in (q_BNSH, k_BMSH, v_BMSH)]
        if len(set(dtypes)) > 1:
            raise ValueError(f"q, k, v have dtypes {dtypes}: must have the same one; cast them")
        if documents is not None and documents.starts_BS.shape != (q[0], q[2]):
            raise ValueError(
                f"documents.starts_BS={list(documents.starts_BS.shape)}: must be [B, S]={[q[0], q[2]]}, those of the "
                "positions that this rank holds; split them with shard_sequence"
            )
        chunks = len(_held(0, self.axis.size))
        if q[2] == 0 or q[2] % chunks:
            raise ValueError(
                f"seq_len={q[2] * self.axis.size}: must be divisible by {chunks * self.axis.size}, {chunks} chunks for "
                f"each rank of axis {self.axis.name!r}; pad the sequences and split them with shard_sequence"
            )


# ---- which chunks


def _held(rank: int, size: int) -> tuple[int, ...]:
    """Return the numbers of the chunks that a rank holds."""
    return (rank, 2 * size - 1 - rank) if size > 1 else (rank,)


@dataclass(frozen=True)
class _Pair:
    """A chunk of this rank's queries and one of another's keys, as slices of the positions that their rank holds."""

    rows: slice
    keys: slice
    #: position of the first key in the whole sequence
    first_key: int
    #: whether they are the same chunk, so that a query sees no later key
    causal: bool

    def first_seen(self, starts_BS: Tensor | None) -> Tensor | None:
        """Return the first key of the chunk that each query sees, [B, Q], given where the documents start."""
        return None if starts_BS is None else starts_BS[:, self.rows] - self.first_key


def _pairs(axis: Axis, source: int, length: int) -> Iterator[_Pair]:
    """Yield the pairs to compute. Those that the causal mask hides entirely are left out."""
    own, other = _held(axis.rank, axis.size), _held(source, axis.size)
    chunk = length // len(own)
    for a, i in enumerate(own):
        for b, j in enumerate(other):
            if j <= i:
                rows, keys = slice(a * chunk, (a + 1) * chunk), slice(b * chunk, (b + 1) * chunk)
                yield _Pair(rows, keys, j * chunk, i == j)


# ---- how K and V reach all ranks, and their gradients the owner


class _Arriving:
    """An exchange along the ring: sends tensors to the next rank; :meth:`get` waits for those of the previous one."""

    def __init__(self, tensors: Sequence[Tensor], axis: Axis, tag: int) -> None:
        self.sent = [t.contiguous() for t in tensors]  # kept alive until the send completes
        self.received = [torch.empty_like(t) for t in self.sent]
        after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        ops = []
        for i, (out, into) in enumerate(zip(self.sent, self.received, strict=True)):
            ops.append(dist.P2POp(dist.isend, out, group=axis.group, tag=tag + i, group_peer=after))
            ops.append(dist.P2POp(dist.irecv, into, group=axis.group, tag=tag + i, group_peer=before))
        self.works = dist.batch_isend_irecv(ops)

    def get(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _ring_sources(kv: Sequence[Tensor], axis: Axis) -> Iterator[tuple[int, Sequence[Tensor]]]:
    for step in range(axis.size):
        last = step == axis.size - 1
        arriving = None if last else _Arriving(kv, axis, tag=0)
        yield (axis.rank - step) % axis.size, kv
        if arriving is not None:
            kv = arriving.get()


class _RingReturn:
    """Passes the gradients of K and V around the ring; each rank adds its part, and the last hop reaches the owner."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.own: Sequence[Tensor] = ()
        self.arriving: _Arriving | None = None

    def add(self, source: int, part: Sequence[Tensor]) -> None:
        if source == self.axis.rank:
            self.own = part
            return
        self.arriving = _Arriving(self._plus_arrived(part), self.axis, tag=2)

    def get(self) -> Sequence[Tensor]:
        return self._plus_arrived(self.own)

    def _plus_arrived(self, part: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.arriving is None:
            return part
        return [mine.add_(others) for mine, others in zip(part, self.arriving.get(), strict=True)]


def _gathered_sources(kv: Sequence[Tensor], axis: Axis) -> Iterator[tuple[int, Sequence[Tensor]]]:
    sent = [t.contiguous() for t in kv]
    gathered = [t.new_empty((axis.size, *t.shape)) for t in sent]
    works = [
        _all_gather(into.flatten(0, 1), out, group=axis.group, async_op=True)
        for into, out in zip(gathered, sent, strict=True)
    ]
    yield axis.rank, kv
    for work in works:
        work.wait()
    for step in range(1, axis.size):
        source = (axis.rank - step) % axis.size
        yield source, [t[source] for t in gathered]


class _GatherReturn:
    """Sums all ranks' parts of the gradients at the owner, with one reduce-scatter."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.parts: dict[int, Sequence[Tensor]] = {}

    def add(self, source: int, part: Sequence[Tensor]) -> None:
        self.parts[source] = part

    def get(self) -> Sequence[Tensor]:
        sums = [torch.empty_like(t) for t in self.parts[0]]
        works = []
        for i, into in enumerate(sums):
            parts = torch.cat([self.parts[source][i] for source in range(self.axis.size)])
            works.append(_reduce_scatter(into, parts, group=self.axis.group, async_op=True))
        for work in works:
            work.wait()
        return sums


class _GradientReturn(Protocol):
    def add(self, source: int, part: Sequence[Tensor]) -> None:
        """Add this rank's part of the gradients of ``source``'s K and V. May modify ``part``."""

    def get(self) -> Sequence[Tensor]:
        """Return the complete gradients of this rank's K and V."""


@dataclass(frozen=True)
class _KVExchange:
    """How a rank gets all ranks' K and V (its own, then those of its predecessors), and returns their gradients."""

    sources: Callable[[Sequence[Tensor], Axis], Iterator[tuple[int, Sequence[Tensor]]]]
    gradients: Callable[[Axis], _GradientReturn]


KV_EXCHANGES = {
    "ring": _KVExchange(_ring_sources, _RingReturn),
    "all_gather": _KVExchange(_gathered_sources, _GatherReturn),
}


# ---- the mathematics


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, axis: Axis, exchange: _KVExchange
    ) -> Tensor:
        attention = choose_pair_attention(q, v, documents=starts is not None)
        ctx.how = (axis, exchange, attention)
        rest: Rest = ()
        with torch.autocast(q.device.type, enabled=False):
            out_BNSW = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=wide(q.dtype))
            lse_BNS = out_BNSW.new_full(q.shape[:-1], float("-inf"))
            for source, (k_BMSH, v_BMSW) in exchange.sources((k, v), axis):
                for pair in _pairs(axis, source, q.shape[2]):
                    rows, keys = pair.rows, pair.keys
                    part, lse, rest = attention.forward(
                        q[:, :, rows], k_BMSH[:, :, keys], v_BMSW[:, :, keys], pair.causal, pair.first_seen(starts)
                    )
                    before = lse_BNS[:, :, rows]
                    after = torch.logaddexp(before, lse)
                    out_BNSW[:, :, rows].mul_((before - after).exp_().unsqueeze(-1))
                    out_BNSW[:, :, rows].add_(part * (lse - after).exp_().unsqueeze(-1))
                    lse_BNS[:, :, rows] = after
        out = out_BNSW.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_BNS, starts, *rest)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, *rest = ctx.saved_tensors
        axis, exchange, attention = ctx.how
        with torch.autocast(q.device.type, enabled=False):
            dq = torch.zeros_like(q, dtype=wide(q.dtype))
            gradients = exchange.gradients(axis)
            for source, (k_BMSH, v_BMSW) in exchange.sources((k, v), axis):
                dk, dv = (t.new_zeros(t.shape, dtype=dq.dtype) for t in (k_BMSH, v_BMSW))
                for pair in _pairs(axis, source, q.shape[2]):
                    rows, keys = pair.rows, pair.keys
                    queries = (t[:, :, rows] for t in (grad, q))
                    chunk = (t[:, :, keys] for t in (k_BMSH, v_BMSW))
                    result = (t[:, :, rows] for t in (out, lse))
                    parts = attention.backward(
                        *queries, *chunk, *result, pair.causal, pair.first_seen(starts), tuple(rest)
                    )
                    for total, part in zip((dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]), parts, strict=True):
                        total.add_(part)
                gradients.add(source, (dk, dv))
            dk, dv = gradients.get()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None
