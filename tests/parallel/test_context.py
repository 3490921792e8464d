"""Checks that causal attention over split sequences equals attention on whole sequences.

B sequences, N query heads, M key/value heads, S positions, H head width.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from equimoe.moe.collectives import Axis, axis_of, world_axis
from equimoe.moe.model.documents import Documents
from equimoe.moe.parallel import context, pair_attention
from equimoe.moe.parallel.context import KV_EXCHANGES, ContextAttention, positions, shard_sequence
from equimoe.moe.parallel.pair_attention import PAIR_ATTENTION, PairAttention
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

SEQ = 48
BOTH = pytest.mark.parametrize("exchange", KV_EXCHANGES)

#: batch, query heads, key heads, head width, width of v
SHAPES = {"plain": (2, 2, 2, 4, 4), "grouped": (1, 6, 2, 4, 4), "one_head": (1, 4, 1, 3, 5)}


def inputs(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return q, k, v and the gradient of the output, for whole sequences."""
    batch, heads, kv_heads, width, v_width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, v_width), (heads, v_width))
    return tuple(torch.randn(batch, n, SEQ, h, dtype=torch.float64, generator=generator).to(dtype) for n, h in sizes)


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """Return output and gradients of torch's own attention in fp64."""
    qkv = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
    out.backward(grad.double())
    return [out.detach(), *(t.grad for t in qkv)]


def part(tensors: tuple[Tensor, ...], axis: Axis) -> list[Tensor]:
    return [shard_sequence(t, 2, axis.size, axis.rank) for t in tensors]


def unshard(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Assemble whole sequences from the parts of all ranks."""
    held = torch.cat([positions(SEQ, len(parts), rank) for rank in range(len(parts))])
    return torch.cat(tuple(parts), dim).index_select(dim, held.argsort())


def split(tensors: tuple[Tensor, ...], axis: Axis, exchange: str, run: Any = None) -> list[Tensor]:
    """Return this rank's output and gradients; ``run(attention, q, k, v)`` may wrap the call."""
    *qkv, grad = part(tensors, axis)
    qkv = [t.requires_grad_() for t in qkv]
    attention = ContextAttention(axis, exchange)
    out = run(attention, *qkv) if run else attention(*qkv)
    out.backward(grad)
    return [out.detach(), *(t.grad for t in qkv)]


def errors(results: list[list[Tensor]], want: list[Tensor]) -> list[float]:
    """Return the relative errors of output, dq, dk, dv, assembled from all ranks."""
    return [
        oracle.relative_error(unshard(parts, 2), value)
        for parts, value in zip(zip(*results, strict=True), want, strict=True)
    ]


def compute_with(attention: PairAttention) -> None:
    """Compute all pairs in this way. It is never restored, so use it only in a forked rank."""
    context.choose_pair_attention = lambda *_, **__: attention


def noting(forward: Callable[..., None], backward: Callable[..., None]) -> None:
    """Call these functions with the arguments of each pair first. Use it only in a forked rank."""
    plain = PAIR_ATTENTION["flash"]

    def noted(note: Callable[..., None], compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (note(*args), compute(*args))[1]

    compute_with(PairAttention(noted(forward, plain.forward), noted(backward, plain.backward)))


def counting(module: Any, name: str, note: Callable[..., None]) -> None:
    """Count the calls of a function. It is never restored, so use it only in a forked rank."""
    original = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        note(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, counted)


# ---- the layout


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_position_is_held_once(size: int) -> None:
    held = [positions(SEQ, size, rank) for rank in range(size)]
    assert all(t.dtype == torch.int64 and len(t) == SEQ // size for t in held)
    assert torch.cat(held).sort().values.tolist() == list(range(SEQ))
    x_BS = torch.randn(3, SEQ)
    parts = [shard_sequence(x_BS, 1, size, rank) for rank in range(size)]
    assert all(torch.equal(x_BS[:, ids], own) for ids, own in zip(held, parts, strict=True))
    assert torch.equal(unshard(parts, 1), x_BS)


def test_rank_holds_one_chunk_of_either_end() -> None:
    assert positions(8, 2, 0).tolist() == [0, 1, 6, 7] and positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert positions(7, 1, 0).tolist() == list(range(7))  # one rank has nothing to balance


# ---- the mathematics


@BOTH
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_whole_sequence(size: int, exchange: str) -> None:
    """All shapes must agree in every way, also with query tiles that do not divide a chunk."""
    ways = (("flash", 512), ("tiles", 512), ("tiles", 5))

    def script(rank: int, world: int) -> list[Any]:
        results = []
        for shape in SHAPES:
            for way, tile in ways:
                pair_attention.TILE = tile
                compute_with(PAIR_ATTENTION[way])
                results.append(split(inputs(shape), world_axis(), exchange))
        return results

    per_rank = run_ranks(script, size)
    for i, case in enumerate(itertools.product(SHAPES, ways)):
        found = errors([results[i] for results in per_rank], whole(*inputs(case[0])))
        assert max(found) < 1e-10, (case, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", PAIR_ATTENTION)
@BOTH
def test_low_precision(exchange: str, way: str, dtype: torch.dtype) -> None:
    """Compare with fp64 on the same rounded inputs; results keep the dtype, sums and sent gradients are fp32."""

    def script(rank: int, world: int) -> list[Tensor]:
        compute_with(PAIR_ATTENTION[way])
        return split(inputs("grouped", dtype), world_axis(), exchange)

    results = run_ranks(script, 4)
    assert {t.dtype for result in results for t in result} == {dtype}
    limit = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert max(errors(results, whole(*inputs("grouped", dtype)))) < limit


@pytest.mark.parametrize("way", PAIR_ATTENTION)
def test_large_scores_do_not_overflow(way: str) -> None:
    tensors = inputs("plain")
    tensors = (tensors[0] * 300, *tensors[1:])

    def script(rank: int, world: int) -> list[Tensor]:
        compute_with(PAIR_ATTENTION[way])
        return split(tensors, world_axis(), "ring")

    assert max(errors(run_ranks(script, 2), whole(*tensors))) < 1e-10


@BOTH
def test_any_strides(exchange: str) -> None:
    """q, k, v may be views of one projection, as in the model, and the gradient may be an expanded tensor."""

    def script(rank: int, world: int) -> list[Tensor]:
        dense: list[bool] = []
        q, k, v, _ = part(inputs("plain"), world_axis())
        batch, heads, length, width = q.shape
        qkv = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).requires_grad_()  # [B, S, 3, N, H]
        views = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        assert not any(t.is_contiguous() for t in views)
        # nccl requires contiguous tensors, gloo does not
        counting(context, "_all_gather", lambda into, t, **_: dense.append(t.is_contiguous()))
        counting(dist, "batch_isend_irecv", lambda ops: dense.extend(op.tensor.is_contiguous() for op in ops))
        out = ContextAttention(world_axis(), exchange)(*views)
        out.backward(torch.ones(()).double().expand(batch, heads, length, width))
        assert len(dense) >= 4 and all(dense)
        return [out.detach(), *(t.transpose(1, 2) for t in qkv.grad.unbind(2))]

    q, k, v, grad = inputs("plain")
    assert max(errors(run_ranks(script, 2), whole(q, k, v, torch.ones_like(grad)))) < 1e-10


@BOTH
def test_autocast_is_that_of_torch(exchange: str) -> None:
    """fp32 arguments become bf16, and nothing else is rounded, in the forward or the backward."""

    def script(rank: int, world: int) -> list[Any]:
        results = []
        for dtype, enabled in ((torch.float32, True), (torch.bfloat16, False)):
            tensors = tuple(t.bfloat16().to(dtype) for t in inputs("plain"))
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                *qkv, grad = (t.requires_grad_() for t in part(tensors, world_axis()))
                out = ContextAttention(world_axis(), exchange)(*qkv)
                assert out.dtype == torch.bfloat16
                out.backward(grad.detach().bfloat16())
            results.append([out.detach(), *(t.grad.bfloat16() for t in qkv)])
        return results

    for with_autocast, without in run_ranks(script, 2):
        assert all(torch.equal(a, b) for a, b in zip(with_autocast, without, strict=True))


# ---- what it costs


@BOTH
def test_hidden_pairs_are_not_computed(exchange: str) -> None:
    """Every rank computes 2P + 1 pairs of chunks of S / 2P positions, and as many in the backward."""

    def script(rank: int, world: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        forward: list[tuple[int, int]] = []
        backward: list[tuple[int, int]] = []
        noting(
            lambda q, k, *_: forward.append((q.shape[2], k.shape[2])),
            lambda _, q, k, *__: backward.append((q.shape[2], k.shape[2])),
        )
        q, k, v, grad = (t.requires_grad_() for t in part(inputs("plain"), world_axis()))
        ContextAttention(world_axis(), exchange)(q, k, v).backward(grad.detach())
        return forward, backward

    for world in (2, 4):
        pairs = [(SEQ // (2 * world),) * 2] * (2 * world + 1)
        assert run_ranks(script, world) == [(pairs, pairs)] * world


@pytest.mark.parametrize("way", PAIR_ATTENTION)
def test_memory_is_linear_in_the_positions_of_a_rank(way: str) -> None:
    """With four times the positions, each rank holds at most four times as much, and no tensor of all scores."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            tensors = [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor)]
            self.elements = max([self.elements, *(t.numel() for t in tensors)])
            return found

    def script(rank: int, world: int) -> list[int]:
        pair_attention.TILE = 16
        compute_with(PAIR_ATTENTION[way])
        found = []
        for local in (256, 1024):
            q, k, v = (torch.randn(1, 1, local, 8, requires_grad=True) for _ in range(3))
            with Largest() as largest:
                ContextAttention(world_axis())(q, k, v).sum().backward()
            found.append(largest.elements)
        return found

    for few, many in run_ranks(script, 2):
        assert few <= many <= 4 * few and many <= 1024 * 16


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_bytes_and_calls_on_the_wire(size: int, dtype: torch.dtype) -> None:
    """Forward and backward each send K and V P - 1 times; the backward also sends their gradients, in fp32 or wider."""

    def script(rank: int, world: int, exchange: str) -> list[tuple[int, int]]:
        warnings.simplefilter("error")
        sent: list[int] = []

        def send(ops: list[dist.P2POp]) -> None:
            sent.append(sum(op.tensor.nbytes for op in ops if op.op is dist.isend))
            assert sent[-1] == sum(op.tensor.nbytes for op in ops if op.op is dist.irecv)

        counting(dist, "batch_isend_irecv", send)
        counting(context, "_all_gather", lambda into, t, **_: sent.append(into.nbytes - t.nbytes))
        counting(context, "_reduce_scatter", lambda into, t, **_: sent.append(t.nbytes - into.nbytes))
        q, k, v, grad = (t.requires_grad_() for t in part(inputs("one_head", dtype), world_axis()))
        out = ContextAttention(world_axis(), exchange)(q, k, v)
        forward = (len(sent), sum(sent))
        out.backward(grad.detach())
        return [forward, (len(sent) - forward[0], sum(sent) - forward[1])]

    batch, _, kv_heads, width, v_width = SHAPES["one_head"]
    elements = batch * kv_heads * SEQ // size * (width + v_width)
    hops = size - 1
    forward = hops * elements * dtype.itemsize
    backward = forward + hops * elements * max(dtype.itemsize, 4)
    calls = (hops, 2 * hops)
    assert run_ranks(script, size, "ring") == [[(calls[0], forward), (calls[1], backward)]] * size
    calls = (2, 4) if size > 1 else (0, 0)
    assert run_ranks(script, size, "all_gather") == [[(calls[0], forward), (calls[1], backward)]] * size


def test_ring_computes_while_it_communicates() -> None:
    """Each exchange starts before pairs that do not need it, and is waited for after them."""

    def script(rank: int, world: int) -> list[str]:
        events: list[str] = []
        noting(lambda *_: events.append("pair"), lambda *_: events.append("pair"))
        counting(dist, "batch_isend_irecv", lambda *_: events.append("start"))
        counting(context._Arriving, "get", lambda *_: events.append("wait"))
        q, k, v, grad = (t.requires_grad_() for t in part(inputs("plain"), world_axis()))
        out = ContextAttention(world_axis())(q, k, v)
        events.append("backward")
        out.backward(grad.detach())
        return events

    forward = "start 3 wait start 2 wait 2 backward"
    # exchanges of K and V, and then those of their gradients, which start as soon as each part is computed
    backward = "start 3 wait start 2 start wait 2 wait start wait"
    numbers = {str(n): ["pair"] * n for n in (2, 3)}
    want = [event for word in f"{forward} {backward}".split() for event in numbers.get(word, [word])]
    assert run_ranks(script, 3) == [want] * 3


@BOTH
def test_saves_only_arguments_output_and_logsumexp(exchange: str) -> None:
    def script(rank: int, world: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        saved: list[Tensor] = []
        q, k, v, _ = (t.requires_grad_() for t in part(inputs("grouped", torch.bfloat16), world_axis()))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            ContextAttention(world_axis(), exchange)(q, k, v)
        return [(tuple(t.shape), t.dtype) for t in saved]

    batch, heads, kv_heads, width, _ = SHAPES["grouped"]
    local = SEQ // 2
    q, kv = (batch, heads, local, width), (batch, kv_heads, local, width)
    lse = (batch, heads, local)
    want = [*((shape, torch.bfloat16) for shape in (q, kv, kv, q)), (lse, torch.float32)]
    assert run_ranks(script, 2) == [want] * 2


# ---- in larger models and meshes


@BOTH
def test_same_bits_again_and_under_checkpoint(exchange: str) -> None:
    def script(rank: int, world: int) -> bool:
        def again(attention: ContextAttention, *qkv: Tensor) -> Tensor:
            return checkpoint(attention, *qkv, use_reentrant=False)

        tensors = inputs("grouped", torch.float32)
        first = split(tensors, world_axis(), exchange)
        others = [split(tensors, world_axis(), exchange, run) for run in (None, None, again)]
        return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    assert run_ranks(script, 4) == [True] * 4


@BOTH
def test_axis_of_some_ranks_in_two_layers(exchange: str) -> None:
    """Two groups of two ranks that are not adjacent, each with its own sequence, run two layers."""

    def script(rank: int, world: int) -> list[Tensor]:
        groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
        axis = axis_of("cp", groups[rank % 2])
        tensors = tuple(t + rank % 2 for t in inputs("plain"))

        def twice(attention: ContextAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(attention(q, k, v), k, v)

        return split(tensors, axis, exchange, twice)

    results = run_ranks(script, 4, detail=True)
    for group in range(2):
        q, k, v, grad = (t + group for t in inputs("plain"))
        qkv = [t.requires_grad_() for t in (q, k, v)]
        once = F.scaled_dot_product_attention(*qkv, is_causal=True)
        out = F.scaled_dot_product_attention(once, *qkv[1:], is_causal=True)
        out.backward(grad)
        assert max(errors(results[group::2], [out, *(t.grad for t in qkv)])) < 1e-10


# ---- errors


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="seq_len=12: must be divisible by 8, 2 for each of 4 .* pad"):
        positions(12, 4, 0)
    with pytest.raises(ValueError, match="seq_len=10: must be divisible by 4, 2 for each of 2 .* pad"):
        shard_sequence(torch.zeros(3, 10), 1, 2, 0)
    with pytest.raises(ValueError, match="rank=2: must be from 0 to 1"):
        positions(8, 2, 2)
    with pytest.raises(ValueError, match="exchange='tree': unknown; use one of ring, all_gather"):
        ContextAttention(Axis("cp"), "tree")
    two = ContextAttention(Axis("cp", size=2))
    with pytest.raises(ValueError, match="seq_len=6: must be divisible by 4, 2 chunks for each rank of axis 'cp'"):
        two(*(torch.zeros(1, 2, 3, 4) for _ in range(3)))


@pytest.mark.parametrize("bad", [(1, 3, 4, 4), (1, 2, 2, 4), (1, 2, 4, 3), (2, 2, 4, 4), (2, 4, 4)])
def test_refuses_keys_that_do_not_fit(bad: tuple[int, ...]) -> None:
    q = torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="q, k, v have shapes .* must be"):
        ContextAttention(Axis("cp", size=2))(q, torch.zeros(bad), torch.zeros(bad))


def test_refuses_dtypes_and_documents_that_do_not_fit_before_it_sends() -> None:
    def script(rank: int, world: int) -> Tensor:
        attention, qkv = ContextAttention(world_axis()), list(torch.ones(3, 1, 2, 4, 8))
        with pytest.raises(ValueError, match=r"dtypes \[torch.float32, torch.bfloat16, .* same one; cast them"):
            attention(qkv[0], *(t.bfloat16() for t in qkv[1:]))
        with pytest.raises(ValueError, match=r"starts_BS=\[1, 8\]: must be \[B, S\]=\[1, 4\], .* shard_sequence"):
            attention(*qkv, Documents(torch.zeros(1, 8, dtype=torch.int64)))
        return attention(*qkv)

    assert all(out.allclose(torch.ones(())) for out in run_ranks(script, 2))
