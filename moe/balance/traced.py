"""Load balancing of a layer that torch.compile traces: two ops, which look the layer up when they run.

A graph cannot contain what a step counts, so the ops are opaque to the compiler. The first counts a forward, and
returns a token, whose memory lives as long as the forward's graph does. The second reads the gradients of the forward's
losses in the backward.

B sequences, E experts, K top-k, T tokens.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..types import Decision, Routing
from .own_step import registry

if TYPE_CHECKING:
    from torch import nn

    from .balancer import Balancer
    from .visit import Visit


class TracedVisit:
    """Stands for the visit of a forward while this is traced. The visit itself begins when the forward runs."""

    #: what the op that counts has returned
    token: Tensor


def begin(balancer: Balancer, module: nn.Module, x_TD: Tensor) -> Any:
    """Do what :meth:`.balancer.Balancer.begin` does, in evaluation and if the training loop drives the step.

    Recomputation routes the same tokens again.
    """
    if module.training and not balancer.step.traceable:
        return NotImplemented
    return TracedVisit() if module.training and balancer.counts_forward(module, x_TD) else None, None


def count(balancer: Balancer, visit: Any, routing: Routing, mask_T: Tensor | None = None) -> Any:
    """Do what :meth:`.balancer.Balancer.count` does. Returns False, because the op also keeps the statistics."""
    if not isinstance(visit, TracedVisit):
        return NotImplemented
    sums = (routing.prob_sums_BE, routing.z_sum, routing.entropy_sum)
    prob_sums_BE, z_sum, entropy_sum = (None if t is None else t.detach() for t in sums)
    counts = (routing.counts_BE, routing.tokens_B)
    visit.token = torch.ops.equimoe_balance.count_load(
        balancer.traced.mark, *balancer.number, *routing.decision, mask_T, *counts, prob_sums_BE, z_sum, entropy_sum
    )
    return False


def attach(balancer: Balancer, visit: Any, carrier: Tensor, routing: Routing, weight: Tensor) -> Any:
    """Do what :meth:`.balancer.Balancer.attach` does."""
    if visit is None or not carrier.requires_grad:
        return carrier
    if not isinstance(visit, TracedVisit):
        return NotImplemented
    sums = (routing.prob_sums_BE, routing.z_sum, routing.entropy_sum)
    return _Attach.apply(carrier, *sums, visit.token, *balancer.number)


class Traced:
    """The visits that compiled forwards have begun, by the number in their tokens."""

    def __init__(self) -> None:
        #: int64 scalar that each op changes, so that the compiler neither drops it nor changes the order
        self.mark = torch.zeros((), dtype=torch.int64, device="cpu")
        self.visits: weakref.WeakValueDictionary[int, Visit] = weakref.WeakValueDictionary()
        self._last = 0

    def add(self, visit: Visit) -> Tensor:
        """Return the token of a forward of ``visit``."""
        self._last += 1
        self.visits[self._last] = visit
        token = torch.tensor(self._last, device="cpu")
        if visit.graph() is None:  # a recomputation has a graph of its own, which dies before the backward ends
            # hooks for saved tensors, as those of checkpointing, may let go of the token: then assume that it lives
            hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            visit.graph = partial(_alive, None if hooked else StorageWeakRef(token.untyped_storage()))
        return token


def _alive(storage: StorageWeakRef | None) -> bool | None:
    return None if storage is not None and storage.expired() else True


def _layer(number: int, copy: int) -> tuple[Balancer, Any]:
    balancer = registry.layers.get((number, copy))
    module = None if balancer is None else balancer.layer.module()
    if balancer is None or module is None:
        raise RuntimeError(f"MoE layer {number}: it was deleted, but a compiled graph of it still runs; compile again")
    return balancer, module


@torch.library.custom_op("equimoe_balance::count_load", mutates_args=("mark",))
def _count_load(
    mark: Tensor,
    number: int,
    copy: int,
    chosen_TK: Tensor,
    ids_TK: Tensor,
    mask_T: Tensor | None,
    counts_BE: Tensor,
    tokens_B: Tensor,
    prob_sums_BE: Tensor,
    z_sum: Tensor,
    entropy_sum: Tensor | None,
) -> Tensor:
    balancer, module = _layer(number, copy)
    decision, no_weights = Decision(chosen_TK, ids_TK), prob_sums_BE.new_empty(0)
    routing = Routing(decision, no_weights, counts_BE, tokens_B, prob_sums_BE, z_sum, entropy_sum)
    routing = routing.cloned()  # the compiler may overwrite what it gives to an op as soon as that has run
    visit, _ = balancer.visit(module, routing.weights_TK)
    if balancer.count(visit, routing, mask_T):
        module._keep_stats(routing, visit)
    token = balancer.traced.add(visit)
    mark.copy_(token)
    return token


@_count_load.register_fake
def _(
    mark, number, copy, chosen_TK, ids_TK, mask_T, counts_BE, tokens_B, prob_sums_BE, z_sum, entropy_sum
):  # as the op that it describes
    return torch.empty_like(mark)


@torch.library.custom_op("equimoe_balance::read_losses", mutates_args=())
def _read_losses(
    grad: Tensor, token: Tensor, number: int, copy: int, prob_sums_BE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of prob_sums, z_sum and entropy_sum. ``grad`` is the output's: it orders the op after it."""
    balancer, module = _layer(number, copy)
    gradients = balancer.read_once(balancer.traced.visits.get(int(token)), module.router.weight)
    shapes = prob_sums_BE.shape, (), ()
    first, *others = (
        prob_sums_BE.new_zeros(s) if g is None else g.expand(s).to(prob_sums_BE.dtype, copy=True)
        for g, s in zip(gradients, shapes, strict=True)
    )
    return first, others[0], others[1]


@_read_losses.register_fake
def _(grad, token, number, copy, prob_sums_BE):
    return prob_sums_BE.new_empty(prob_sums_BE.shape), prob_sums_BE.new_empty(()), prob_sums_BE.new_empty(())


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        carrier: Tensor,
        prob_sums_BE: Tensor,
        z_sum: Tensor,
        entropy_sum: Tensor | None,
        token: Tensor,
        number: int,
        copy: int,
    ) -> Tensor:
        ctx.save_for_backward(token, prob_sums_BE)
        ctx.layer, ctx.has_entropy = (number, copy), entropy_sum is not None
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        token, prob_sums_BE = ctx.saved_tensors
        grad_BE, grad_z, grad_entropy = torch.ops.equimoe_balance.read_losses(grad, token, *ctx.layer, prob_sums_BE)
        return grad, grad_BE, grad_z, grad_entropy if ctx.has_entropy else None, None, None, None
