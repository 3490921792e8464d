"""The verbs through which a layer communicates, over named axes of ranks.

With no process group every verb is the identity, so each stage runs, and is tested, in one process.
All ranks of an axis must call the same verbs in the same order, whatever their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

V = TypeVar("V")


@dataclass(frozen=True)
class Axis:
    """The ranks along one dimension of the mesh, as this rank sees them."""

    name: str
    group: Any = None
    size: int = 1
    rank: int = 0

    def __deepcopy__(self, memo: dict) -> Axis:
        return self  # a process group is a handle; a copied layer talks to the same ranks


#: this rank alone
LOCAL = Axis("local")


def axis_of(name: str, group: Any) -> Axis:
    """The axis of a process group; one rank needs no communication."""
    size = dist.get_world_size(group)
    return Axis(name, group, size, dist.get_rank(group)) if size > 1 else Axis(name)


def world_axis() -> Axis:
    """All ranks of the default process group, or this one alone when there is none."""
    if dist.is_available() and dist.is_initialized():
        return axis_of("world", dist.group.WORLD)
    return LOCAL


def global_ranks(axis: Axis) -> list[int]:
    """The axis's ranks as the default process group numbers them."""
    return dist.get_process_group_ranks(axis.group) if axis.size > 1 else [0]


_halves: dict[tuple[Any, int], tuple[Axis, Axis]] = {}


def _new_group_like(group: Any, members: list[int]) -> Any:
    """A group of some of a group's ranks with the same timeout, which has been used once: all of them call this."""
    # a gloo group names every device
    usable = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    known = [kind for kind in group._device_types if kind.type in usable]
    device = next((kind for kind in known if kind.type == "cuda"), known[0])
    options = getattr(group._get_backend(device), "options", None)
    made = dist.new_group(members, timeout=getattr(options, "_timeout", None), use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=made)
    return made


def split_axis(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """The axis as a grid: (ranks ``inner`` apart, blocks of ``inner`` adjacent ranks). All its ranks call this.

    Raises ValueError when ``inner`` does not divide the size.
    """
    if inner < 1 or axis.size % inner:
        raise ValueError(f"split of axis {axis.name!r} into blocks of {inner}: must divide its {axis.size} ranks")
    if (axis.group, inner) not in _halves:
        ranks, block = global_ranks(axis), axis.rank // inner
        lengths = {"across": ranks[axis.rank % inner :: inner], "within": ranks[block * inner : (block + 1) * inner]}
        made = []
        for name, members in lengths.items():
            group = None
            if len(members) == axis.size:
                group = axis.group
            elif len(members) > 1:
                group = _new_group_like(axis.group, members)
            made.append(Axis(name) if len(members) == 1 else axis_of(name, group))
        _halves[axis.group, inner] = (made[0], made[1])
    across, within = _halves[axis.group, inner]
    return replace(across, name=f"{axis.name}.across"), replace(within, name=f"{axis.name}.within")


# ---- what is on the wire ------------------------------------------------------------------------------------------


class Traffic(NamedTuple):
    """One collective as this rank took part in it."""

    verb: str
    axis: str
    #: ranks of the axis
    size: int
    #: bytes that this rank sent to other ranks
    sent: int


_record: list[Traffic] | None = None


@contextmanager
def record_traffic() -> Iterator[list[Traffic]]:
    """Within it, every collective of a layer is noted in the list, those of backward passes too."""
    global _record
    before, _record = _record, []  # not a context variable: backward passes run in threads of their own
    try:
        yield _record
    finally:
        _record = before


def _note(verb: str, axis: Axis, sent: int) -> None:
    if _record is not None:
        _record.append(Traffic(verb, axis.name, axis.size, sent))


class Codec(Protocol):
    """How rows look on the wire: [S, ...] to a payload [S, ...] and back."""

    def encode(self, rows: Tensor) -> Tensor: ...

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor: ...


class Plain:
    """Rows travel as they are."""

    def encode(self, rows: Tensor) -> Tensor:
        return rows

    def decode(self, payload: Tensor, dtype: torch.dtype) -> Tensor:
        return payload


class Wire(NamedTuple):
    """The formats of rows and of their gradients."""

    forward: Codec = Plain()
    backward: Codec = Plain()


PLAIN = Wire()


# ---- what a recomputation need not communicate again --------------------------------------------------------------


class Kept:
    """What the exchanges of a region brought when it ran first; its recomputation takes them from here."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.next: int | None = None


#: set while a region runs whose exchanges are kept
keeping: ContextVar[Kept | None] = ContextVar("equimoe_kept_exchanges", default=None)


def once(make: Callable[[], V]) -> V:
    """What ``make`` brings from other ranks; in a recomputation that keeps exchanges, what it brought before."""
    kept = keeping.get()
    if kept is None:
        return make()
    if kept.next is None:
        kept.values.append(make())
        return kept.values[-1]
    kept.next += 1
    return kept.values[kept.next - 1]


# ---- sums and counts, without gradient ----------------------------------------------------------------------------


class Pending:
    """A tensor whose sum over an axis is under way; :meth:`get` waits for it."""

    def __init__(self, value: Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def get(self) -> Tensor:
        """The summed tensor."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._value


def sum_over(value: Tensor, axis: Axis) -> Pending:
    """Start to sum ``value`` over the axis; its own memory takes the result. No gradient."""
    if axis.size == 1:
        return Pending(value)
    _note("sum_over", axis, 2 * value.nbytes * (axis.size - 1) // axis.size)  # of a ring
    return Pending(value, dist.all_reduce(value, group=axis.group, async_op=True))


def exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    """Row p goes to rank p; row p of the result came from rank p. No gradient."""
    if counts_PX.shape[0] != axis.size:
        raise ValueError(f"counts_PX has {counts_PX.shape[0]} rows for axis {axis.name!r} of {axis.size} ranks")
    return counts_PX if axis.size == 1 else once(lambda: _exchange_counts(counts_PX, axis))


def _exchange_counts(counts_PX: Tensor, axis: Axis) -> Tensor:
    _note("exchange_counts", axis, counts_PX.nbytes * (axis.size - 1) // axis.size)
    received = counts_PX.clone()  # what a dry run, whose backend moves nothing, is to believe
    dist.all_to_all_single(received, counts_PX.contiguous(), group=axis.group)
    return received


#: (how many sizes, the axis) to what to believe of them
Belief = Callable[[int, Axis], list[int]]
_belief: Belief | None = None


@contextmanager
def believe_splits(belief: Belief) -> Iterator[None]:
    """Within it, :func:`splits` reads no tensors: those of a dry run have shapes, but no values."""
    global _belief
    before, _belief = _belief, belief
    try:
        yield
    finally:
        _belief = before


def splits(sent_P: Tensor, received_P: Tensor, axis: Axis) -> tuple[list[int], list[int]]:
    """Rows to and from each rank, for the host: it waits for the device here, and nowhere else in a layer."""
    if _belief is not None:
        return _belief(sent_P.numel(), axis), _belief(sent_P.numel(), axis)
    sent, received = torch.stack((sent_P, received_P)).tolist()
    return sent, received


def equal_sizes(rows: Tensor, axis: Axis) -> list[int]:
    """How many rows each rank has, where all are known to have equally many."""
    return [rows.shape[0]] * axis.size


def exchange_sizes(rows: Tensor, axis: Axis) -> list[int]:
    """How many rows each rank has; the host waits for the answer."""
    if axis.size == 1 or _belief is not None:
        return equal_sizes(rows, axis)
    mine_P = torch.full((axis.size, 1), rows.shape[0], dtype=torch.int64, device=rows.device)
    return exchange_counts(mine_P, axis).flatten().tolist()


# ---- rows ---------------------------------------------------------------------------------------------------------


class _Way(NamedTuple):
    """Who sends how many rows to whom, in rank order."""

    verb: str
    axis: Axis
    #: None: all to everybody
    sent: list[int] | None
    received: list[int]
    #: ranks send equally many, which are added up
    summed: bool = False

    @property
    def rows(self) -> int:
        """How many there are on arrival."""
        return self.received[0] if self.summed else sum(self.received)


class _Flight:
    """Rows on their way: a collective that has started, and how to read what arrives."""

    def __init__(self, rows: Tensor, way: _Way, codec: Codec) -> None:
        self.way, self.codec, self.dtype = way, codec, rows.dtype
        axis, sent, received = way.axis, way.sent, way.received
        payload = codec.encode(rows).contiguous()
        self.out = payload.new_empty((sum(received), *payload.shape[1:]))
        others = len(payload) * (axis.size - 1) if sent is None else len(payload) - sent[axis.rank]
        _note(way.verb, axis, others * (payload[0].nbytes if len(payload) else 0))
        if sent is None and len(set(received)) == 1:
            self.work = dist.all_gather_into_tensor(self.out, payload, group=axis.group, async_op=True)
        else:
            if sent is None:  # as an all-to-all, because gathering unequal parts is not for every backend
                sent, payload = [len(payload)] * axis.size, payload.repeat(axis.size, *[1] * (payload.dim() - 1))
            self.work = dist.all_to_all_single(self.out, payload, received, sent, group=axis.group, async_op=True)
        self.payload: Tensor | None = payload  # not freed before it has left

    def land(self) -> Tensor:
        """Wait, once; the rows that arrived, or their sum."""
        if self.payload is not None:
            self.work.wait()
            self.work = self.payload = None
        rows = self.codec.decode(self.out.detach(), self.dtype)
        if not self.way.summed:
            return rows
        first, *others = rows.split(self.way.received)
        total = first.to(torch.promote_types(rows.dtype, torch.float32), copy=True)
        for part in others:
            total += part
        return total.to(rows.dtype)


class _Leg:
    """Ties a departure to its arrival, forward and backward."""

    def __init__(self, there: _Way, back: _Way, wire: Wire) -> None:
        self.there, self.back, self.wire = there, back, wire
        self.flight: _Flight | None = None

    def land(self) -> Tensor:
        flight, self.flight = self.flight, None
        assert flight is not None
        return flight.land()


class _Depart(torch.autograd.Function):
    """Starts; the graph gets a token in the place of rows that are not there yet: their shape without their memory."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        leg.flight = once(lambda: _Flight(rows, leg.there, leg.wire.forward))
        return rows.new_zeros(()).expand(leg.there.rows, *rows.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.leg.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, leg: _Leg) -> Tensor:
        ctx.leg = leg
        return leg.land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leg = ctx.leg
        leg.flight = _Flight(grad, leg.back, leg.wire.backward)
        return grad.new_zeros(()).expand(grad.shape), None


class Transit:
    """Rows that are under way; :meth:`wait` gives those that arrive here.

    What is computed between start and wait runs while rows travel, and its backward while their gradients do.
    """

    def __init__(self, rows: Tensor, leg: _Leg) -> None:
        self._leg = leg if leg.there.axis.size > 1 else None
        self._token = rows if self._leg is None else _Depart.apply(rows, leg)

    def wait(self) -> Tensor:
        """The rows that arrived, in the order of the ranks that sent them."""
        return self._token if self._leg is None else _Arrive.apply(self._token, self._leg)


def start_exchange(rows: Tensor, sent: list[int], received: list[int], axis: Axis, wire: Wire = PLAIN) -> Transit:
    """Start an all-to-all of rows: ``sent[p]`` rows to rank p, ``received[p]`` from it, both in rank order.

    Differentiable; the gradient travels the same way back. ``received`` must come from the senders'
    own counts (:func:`exchange_counts`): a wrong one is undefined memory, not an error.
    """
    if len(sent) != axis.size or len(received) != axis.size or sum(sent) != rows.shape[0]:
        raise ValueError(
            f"splits {sent} and {received} do not fit {rows.shape[0]} rows on axis {axis.name!r} of {axis.size} ranks"
        )
    name = "exchange_rows"
    return Transit(rows, _Leg(_Way(name, axis, sent, received), _Way(name, axis, received, sent), wire))


def exchange_rows(rows: Tensor, sent: list[int], received: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """:func:`start_exchange`, and wait."""
    return start_exchange(rows, sent, received, axis, wire).wait()


def start_gather(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Transit:
    """Start to bring the rows of all ranks here, in rank order; rank p has ``sizes[p]``.

    Its backward is that of :func:`reduce_scatter_rows`.
    """
    _check_sizes(sizes, rows.shape[0], axis, sizes[axis.rank : axis.rank + 1])
    return Transit(rows, _Leg(_gather(sizes, axis), _reduce_scatter(sizes, axis), wire))


def gather_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """:func:`start_gather`, and wait."""
    return start_gather(rows, sizes, axis, wire).wait()


def reduce_scatter_rows(rows: Tensor, sizes: list[int], axis: Axis, wire: Wire = PLAIN) -> Tensor:
    """This rank's ``sizes[rank]`` rows of the sum over ranks of ``rows``. Its backward is :func:`gather_rows`.

    Terms are added in rank order, in fp32 for 16-bit rows.
    """
    _check_sizes(sizes, rows.shape[0], axis, sizes)
    return Transit(rows, _Leg(_reduce_scatter(sizes, axis), _gather(sizes, axis), wire)).wait()


def _check_sizes(sizes: list[int], rows: int, axis: Axis, counted: list[int]) -> None:
    if len(sizes) != axis.size or sum(counted) != rows:
        raise ValueError(f"sizes {sizes} do not fit {rows} rows on axis {axis.name!r} of {axis.size} ranks")


def _gather(sizes: list[int], axis: Axis) -> _Way:
    return _Way("gather_rows", axis, None, sizes)


def _reduce_scatter(sizes: list[int], axis: Axis) -> _Way:
    return _Way("reduce_scatter_rows", axis, sizes, [sizes[axis.rank]] * axis.size, summed=True)


# ---- ranks that all hold the same rows ----------------------------------------------------------------------------


def shares(rows: int, axis: Axis) -> list[int]:
    """How many of ``rows`` each rank takes, differing by one at most."""
    return [rows // axis.size + (rank < rows % axis.size) for rank in range(axis.size)]


def split_tokens(x_TD: Tensor, axis: Axis) -> Tensor:
    """This rank's share of rows that all ranks hold; its backward gathers the shares' gradients."""
    return x_TD if axis.size == 1 else _Split.apply(x_TD, axis)


def gather_tokens(y_TD: Tensor, tokens: int, axis: Axis) -> Tensor:
    """All ``tokens`` rows from the ranks' shares of them; its backward takes this rank's share of the gradient.

    For a gradient that is the same on all ranks, as it is where all compute the same loss from the rows: unlike
    :func:`gather_rows` it does not add the ranks' gradients up.
    """
    sizes = shares(tokens, axis)
    _check_sizes(sizes, y_TD.shape[0], axis, [sizes[axis.rank]])
    return y_TD if axis.size == 1 else _Join.apply(y_TD, sizes, axis)


def _share(rows: Tensor, axis: Axis) -> Tensor:
    return rows.split(shares(rows.shape[0], axis))[axis.rank].clone()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, axis: Axis) -> Tensor:
        ctx.way = _gather(shares(x_TD.shape[0], axis), axis)
        return _share(x_TD, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Flight(grad, ctx.way, Plain()).land(), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, sizes: list[int], axis: Axis) -> Tensor:
        ctx.axis = axis
        return once(lambda: _Flight(y_TD, _gather(sizes, axis), Plain())).land()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _share(grad, ctx.axis), None, None
