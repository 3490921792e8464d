"""Records what one rank would do, while the real code runs on fake tensors, which have shapes but no memory.

Enter a :class:`Recorder` inside torch's FakeTensorMode, in torch's "fake" process group. It sees every operation:
memory allocated and freed, collectives with their groups, and matrix products.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import comb
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..collectives import Axis, assume_splits, part_sizes, record_traffic
from ..config import MoEConfig
from ..experts import SwiGLU
from ..layer import MoE
from ..model import Attention
from ..parallel import Mesh
from ..routing import Router
from .costs import FLOPS, bytes_sent, fused_attention, fused_norm, group_of, verb_of

aten = torch.ops.aten

#: DTensor's method that runs operations on unsharded tensors to infer shapes
PROPAGATE = "_propagate_tensor_meta_non_cached"

#: module class -> part of the model to which its products are counted; the innermost module decides
PART_OF_CLASS: dict[type[nn.Module], str] = {Attention: "attention", SwiGLU: "dense", Router: "router", MoE: "moe"}

#: collective -> mesh axes that use it, most likely first; needed if several axes have the same ranks
USERS = {
    "all_gather": ("tp", "fsdp", "edp_shard", "cp"),
    "reduce_scatter": ("tp", "fsdp", "edp_shard", "cp"),
    "all_reduce": ("tp", "edp_replicate", "edp", "edp_shard", "dp_replicate", "dense", "fsdp", "stage", "pp"),
    "all_to_all": ("ep", "cp"),
    "send": ("pp", "cp"),
    "recv": ("pp", "cp"),
}


@dataclass
class Allocation:
    """One piece of memory that was allocated, and its lifetime."""

    bytes: int
    #: "parameters", "gradients", ... if it was named; otherwise the kind is inferred from the lifetime
    kind: str = ""
    #: number of backward passes started before it was allocated
    born: int = 0
    #: whether it was allocated during a backward pass
    in_backward: bool = False
    #: number of backward passes started before it was freed; None: it outlived the step
    died: int | None = None
    #: whether it was freed and allocated again, as FSDP does with gathered weights
    resized: bool = False
    #: whether it was sent or received
    travels: bool = False

    def found(self) -> str:
        """Return its kind, inferred from the lifetime unless it was named."""
        if self.kind:
            return self.kind
        if self.resized:
            return "gathered weights"
        if not self.in_backward and self.died is not None and self.died > self.born:
            return "activations"
        if self.in_backward and not self.travels and (self.died is None or self.died > self.born):
            return "whole gradients"
        return "communication buffers" if self.travels else "temporary" if self.died is not None else "other"


@dataclass(frozen=True)
class Collective:
    """One kind of collective in which this rank takes part."""

    verb: str
    #: mesh axis, or "world"
    axis: str
    ranks: int
    #: whether all these ranks are on one node
    inside_node: bool
    #: "forward and backward": for each micro-batch, except that FSDP may wait for the last one; or "once a step"
    when: str


@dataclass
class Recorder(TorchDispatchMode):
    """Records memory, collectives and floating-point operations of this rank while it is entered."""

    mesh: Mesh | None
    #: ranks per node
    node: int
    #: tokens, or slots, that each MoE layer dispatches on this rank
    tokens: int
    #: configuration of the MoE layers
    moe: MoEConfig
    flops: Counter[str] = field(default_factory=Counter)
    calls: Counter[Collective] = field(default_factory=Counter)
    sent: Counter[Collective] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self._allocations: dict[int, Allocation] = {}
        self._alive: dict[int, weakref.ref] = {}
        self._events: list[tuple[Allocation, int]] = []
        self._backward, self._task, self._blind = 0, -1, False
        #: stack of the parts whose forward is running
        self._parts: list[str] = []
        #: autograd sequence numbers at which a part begins, and the name of each such part
        self._starts: list[int] = [0]
        self._labels: list[str] = ["head"]
        self._names: dict[str, list[str]] = {}
        for axis in () if self.mesh is None else self.mesh.axes.values():
            if axis.size > 1:
                self._names.setdefault(axis.group.group_name, []).append(axis.name)

    def __enter__(self) -> Recorder:
        self._stack = ExitStack()
        self._traffic = self._stack.enter_context(record_traffic())
        self._stack.enter_context(assume_splits(self._balanced))
        resize = torch.UntypedStorage.resize_
        self._swap(torch.UntypedStorage, "resize_", lambda storage, size: self._resized(resize, storage, size))
        self._swap(ShardingPropagator, PROPAGATE, self._unseen(getattr(ShardingPropagator, PROPAGATE)))
        self._swap(F, "scaled_dot_product_attention", fused_attention)
        self._swap(F, "rms_norm", fused_norm)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _swap(self, place: Any, name: str, new: Any) -> None:
        self._stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, new)

    def _unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            before, self._blind = self._blind, True
            try:
                return function(*args)
            finally:
                self._blind = before

        return call

    def watch(self, model: nn.Module) -> None:
        """Attribute the products of ``model`` to its parts, see :data:`PART_OF_CLASS`."""
        for module in model.modules():
            part = next((name for kind, name in PART_OF_CLASS.items() if isinstance(module, kind)), None)
            if part is not None:
                module.register_forward_pre_hook(partial(self._enter, part))
                module.register_forward_hook(self._leave, always_call=True)

    def name(self, kind: str, tensors: Iterator[Tensor]) -> None:
        """Label the memory of these tensors with ``kind``, and record it from now on if it is new."""
        for t in tensors:
            local = t.to_local() if isinstance(t, DTensor) else t
            self._seen(local).kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # unwrap them first: the plain tensors inside are recorded
        if self._blind:
            return func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default:
            return _assumed_value(args[0].dtype)
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self._backward += task != -1
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicates(func, args)
        out = func(*args, **(kwargs or {}))
        if (count := FLOPS.get(func._schema.name)) is not None:
            self.flops[self._part(func)] += count(*args, **(kwargs or {}), out=out)
        for t in tree_iter(out):
            if isinstance(t, FakeTensor):
                self._seen(t)
        return out

    # ---- memory

    def peak(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return two dicts of bytes by kind: at the moment when the total peaks, and each kind at its own peak.

        Optimizer state is counted as present from the start, although the first step only creates it at its end.
        """
        now: Counter[str] = Counter()
        most: Counter[str] = Counter()
        total, highest, best = 0, -1, dict(now)
        kinds = {id(allocation): allocation.found() for allocation, _ in self._events}
        state = sum(max(change, 0) for allocation, change in self._events if kinds[id(allocation)] == "optimizer state")
        for allocation, change in self._events:
            kind = kinds[id(allocation)]
            if kind == "optimizer state":
                continue
            now[kind] += change
            most[kind] = max(most[kind], now[kind])
            total += change
            if total > highest:
                highest, best = total, dict(now)
        both = (best | {"optimizer state": state}, dict(most) | {"optimizer state": state})
        return tuple({kind: size for kind, size in found.items() if size} for found in both)  # type: ignore[return-value]

    def _seen(self, t: Tensor) -> Allocation:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._allocations:
            size = 0 if t.device.type == "meta" else storage.nbytes()  # meta tensors are not allocated yet
            allocation = Allocation(size, born=self._backward, in_backward=self._task != -1)
            self._allocations[key] = allocation
            self._alive[key] = weakref.ref(storage, partial(self._freed, key))
            self._events.append((allocation, allocation.bytes))
        return self._allocations[key]

    def _freed(self, key: int, _: Any) -> None:
        allocation = self._allocations.pop(key)
        del self._alive[key]
        allocation.died = self._backward
        self._events.append((allocation, -allocation.bytes))

    def _resized(self, resize: Callable[..., Any], storage: torch.UntypedStorage, size: int) -> Any:
        allocation = self._allocations.get(storage._cdata)
        if allocation is not None:
            allocation.resized = True
            self._events.append((allocation, size - allocation.bytes))
            allocation.bytes = size
        return resize(storage, size)

    # ---- communication

    def _communicates(self, func: Any, args: tuple[Any, ...]) -> None:
        verb = verb_of(func._opname)
        tensors = [t for t in tree_iter(args) if isinstance(t, FakeTensor)]
        for t in tensors:
            self._seen(t).travels = True
        if verb is None:
            return
        group = group_of(args)
        size, names = group.size(), self._names.get(group.group_name, ["world"])
        noted = self._traffic[-1].axis if self._traffic else None  # recorded by moe/collectives just before the call
        self._traffic.clear()
        users = [name for name in USERS.get(verb, ()) if name in names]
        axis = noted or (users or names)[0]
        sent = bytes_sent(verb, func, args, size, group.rank())
        if size == 1 or (verb in ("send", "recv") and all(t.nbytes <= 8 for t in tensors)):
            return  # nothing is sent, or it is a pipeline schedule's handshake before the first step
        ranks = dist.get_process_group_ranks(group)
        if verb in ("send", "recv"):
            ranks = [dist.get_rank(), ranks[args[2]]]
        # reductions of gradients, and the sums at the start and end of a step
        once = axis in _WEIGHTS if verb == "reduce_scatter" else verb == "all_reduce" and not noted
        once = once and func.namespace == "c10d"
        inside = len({rank // self.node for rank in ranks}) == 1
        kind = Collective(verb, axis, size, inside, "once a step" if once else "forward and backward")
        self.calls[kind] += 1
        self.sent[kind] += sent

    def _balanced(self, parts: int, axis: Axis) -> list[int]:
        """Return the rows sent to each of ``parts`` destinations if all experts are chosen equally often."""
        moe, (hop, ranks) = self.moe, (axis.name.rsplit(".", 1)[-1], axis.size)
        if hop not in ("across", "within"):
            return part_sizes(round(self.tokens * moe.mlps_per_token), Axis("", size=parts))
        nodes = ranks if hop == "across" else _ep_size(self.mesh) // ranks
        experts = moe.num_experts // (nodes if hop == "across" else nodes * ranks)
        sources = self.tokens * (1 if hop == "across" else nodes)
        return [round(sources * reached_fraction(moe, experts))] * parts

    # ---- products

    def _enter(self, part: str, *_: Any) -> None:
        self._parts.append(part)
        self._mark(part)

    def _leave(self, *_: Any) -> None:
        self._parts.pop()
        self._mark(self._parts[-1] if self._parts else "head")

    def _mark(self, part: str) -> None:
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._labels.append(part)

    def _part(self, func: Any) -> str:
        if func.namespace == "equimoe":
            return "router" if func._schema.name.startswith("equimoe::router") else "experts"
        node = torch._C._current_autograd_node() if self._task != -1 and not self._parts else None
        if node is not None:  # attribute backward operations to the part whose forward created the node
            return self._labels[bisect_right(self._starts, node._sequence_nr()) - 1]
        return self._parts[-1] if self._parts else "head"


_WEIGHTS = ("fsdp", "dp_replicate", "dense", "edp", "edp_shard", "edp_replicate")


def _assumed_value(dtype: torch.dtype) -> bool | int | float:
    """Return a value for a fake tensor that the code reads: gradients count as finite, and are clipped."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def _ep_size(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh["ep"].size


def reached_fraction(moe: MoEConfig, experts: int) -> float:
    """Return the fraction of tokens that choose at least one of ``experts`` experts on one rank or node, at random."""
    groups, kept = moe.router.groups, moe.router.kept_groups
    number = moe.all_experts
    size, each = number // groups, moe.top_k // groups
    if moe.router.select == "each_group":  # whatever happens in other groups, or at least one whole group is here
        return 1.0 if experts >= size else 1 - comb(size - experts, each) / comb(size, each)
    if experts > number // groups:
        groups = kept = 1  # these experts span several groups
    open_to = number * kept // groups
    return kept / groups * (1 - comb(open_to - experts, moe.top_k) / comb(open_to, moe.top_k))
