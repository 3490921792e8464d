"""The step of a layer whose training loop says nothing of steps: the only place that detects anything."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..collectives import Axis, agreed_prefix, private_axis
from .step import Layer, Step, random_state_kept
from .sums import Sums
from .visit import Visit

if TYPE_CHECKING:
    from .balancer import Balancer

#: micro-batches without an optimizer step after which an automatic step gives up
MOST = 1024
_REMEDY = (
    "set balance.micro_batches to the number of backward passes per optimizer step, or drive the step yourself: "
    "step = Step.of(model), step.micro_batch() around each forward, step.end(applied) after each update"
)


class CountingPass:
    """A pass over the micro-batches of a step that counts them ahead, and the steps it counts for."""

    def __init__(self) -> None:
        self.steps: weakref.WeakSet[AutoStep] = weakref.WeakSet()


_counting: ContextVar[CountingPass | None] = ContextVar("equimoe_counting_pass", default=None)
#: all layers of the process by number, so that those that nobody drives find each other
_layers: weakref.WeakValueDictionary[int, Balancer] = weakref.WeakValueDictionary()


def number_of_layer(balancer: Balancer) -> int:
    """Number a new layer: unique in the process, in the order of construction, so identical on all ranks."""
    number = 1 + max(_layers, default=-1)
    _layers[number] = balancer
    return number


@contextmanager
def counting_pass() -> Iterator[None]:
    """Within it, forwards without gradient count their micro-batch ahead of its training forward.

    Run it over all micro-batches of a step, then train on them in the same order: the estimator is then exact. It puts
    the random state back at its end, so that dropout repeats itself in training. Counts are discarded if the block
    raises, or if a new counting pass starts before every counted micro-batch has been trained.
    """
    counting = CountingPass()
    token = _counting.set(counting)
    try:
        with random_state_kept(), torch.no_grad():
            yield
    except BaseException:
        for step in counting.steps:
            step.forget_ahead()
        raise
    finally:
        _counting.reset(token)


class Cohort:
    """The layers that nobody drives, on one set of ranks: their counts share a sum, matched by layer."""

    def __init__(self, axis: Axis) -> None:
        gc.collect()  # layers that are no more, but in a cycle of references, would have a place in every sum
        free = sorted((n, b) for n, b in list(_layers.items()) if b.free(axis))
        rows = [(n, tuple(b.widths(axis).items())) for n, b in free]
        # in a group of their own, where no other library's collective can come between
        own = private_axis(axis)
        agreed = rows[: agreed_prefix(rows, own)]
        self.sums = Sums(own, {(n, kind): width for n, widths in agreed for kind, width in widths}, early=True)
        for (_, balancer), _ in zip(free, agreed, strict=False):
            balancer.cohorts[axis] = self


class AutoStep(Step):
    """The step of one layer in somebody's training loop.

    A step ends

    - when an optimizer that holds the router's weight has stepped. While no such optimizer was seen, one that holds
      another weight of the layer ends it, or the only optimizer there is, since wrappers with master weights hold
      copies;
    - when something else has changed the router's weight in place;
    - after ``balance.micro_batches`` backward passes, or as many as were counted ahead;
    - where neither number is known, when a backward has left a gradient that is gone before the next forward: the
      update was skipped, or made by hand.

    A micro-batch counts while its graph lives and once its backward has run, so a forward that is not trained on does
    not count. What turns out to have been something else, such as gradients that were taken away after each micro-batch
    and are put back for the update, is refused before the update, naming the call that would have told it.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.join(balancer)
        self._number = itertools.count()
        self._of: Any = lambda: None
        self._axis: Axis | None = None
        self._pass: CountingPass | None = None
        #: the gradient that a backward has left on the witness, and the witness with its version when the step began
        self._left: tuple[Any, Any, int] | None = None
        self._seen: tuple[Any, int] = (lambda: None, 0)
        #: steps that ended because the gradient was gone: before the first update, the second, and since
        self._gone = [0]
        #: how much of the layer the best known optimizer holds, and one that may hold copies
        self._held = 0
        self._stranger: Any = lambda: None
        #: what was found out of an optimizer, while it has as many parameters
        self._known_optimizers: weakref.WeakKeyDictionary[Any, tuple[Any, int]] = weakref.WeakKeyDictionary()
        for register, call in (
            (register_optimizer_step_pre_hook, AutoStep.optimizer_steps),
            (register_optimizer_step_post_hook, AutoStep.optimizer_stepped),
        ):
            weakref.finalize(self, register(_for(weakref.ref(self), call)).remove)

    # ---- the forward

    @property
    def counting(self) -> bool:
        return _counting.get() is not None

    def visit(self, index: int, of: nn.Module) -> Visit:
        counting, layer = _counting.get(), self.layers[0]
        self._of, layer.router = weakref.ref(of), weakref.ref(of.router)
        self._find_boundary(layer, counting)
        layer.visits = {key: v for key, v in layer.visits.items() if v.lives}
        weight = self._witness()
        if weight is not None and not layer.visits:
            self._seen = weakref.ref(weight), weight._version
        waiting = [v for v in layer.visits.values() if v.ahead is not None]
        if waiting and counting is None:
            return waiting[0]
        number = next(self._number)
        found = layer.visits[number, 0] = Visit(number, counting)
        return found

    def sums(self, index: int, axis: Axis) -> tuple[Sums, int]:
        balancer = self.layers[0].balancer
        if axis not in balancer.cohorts:
            if balancer.placed is None:
                warnings.warn(
                    f"MoE: the load is counted over all {axis.size} ranks of the default process group, and the engine "
                    "is taken to average gradients over them. If some of these ranks hold the same tokens, or "
                    "gradients are joined in another way, say so by MoE(config, group=...) or MoE.place(...)",
                    stacklevel=2,
                )
            Cohort(axis)
        if axis not in balancer.cohorts:
            raise ValueError(
                f"MoE layer {balancer.number} of this process: other ranks have not built it; build the same layers in "
                "the same order on all ranks, or give the ranks that hold it: MoE(config, group=...)"
            )
        return balancer.cohorts[axis].sums, balancer.number

    # ---- where the step ends

    def _find_boundary(self, layer: Layer, counting: CountingPass | None) -> None:
        """End the step that was under way if this forward does not belong to it."""
        axis, before = layer.balancer.counting_axis, self._axis
        self._axis = axis
        if before is not None and before != axis:  # the process group was made again
            self.discard()
            layer.balancer.cohorts = {}
        if counting is not None and counting is not self._pass:  # counting ahead begins a step
            self._pass = counting
            counting.steps.add(self)
            self.forget_ahead()
            self.end(applied=self._changed())
            return
        visits = list(layer.visits.values())
        done, waiting = sum(v.done for v in visits), any(v.ahead is not None for v in visits)
        told = layer.balancer.config.micro_batches or sum(v.was_ahead for v in visits)
        gone = self._gradient_is_gone()
        if not done:
            return
        if self._changed():
            self.end(applied=True)
        elif told:
            broken_off = gone and not all(v.lives for v in visits)
            if broken_off or (done >= told and not waiting):
                self.end(applied=False)
        elif gone:
            self.end(applied=False)
            self._gone[-1] += 1
        elif done >= MOST:
            raise ValueError(f"balance.micro_batches=None: no update of the router after {done} backwards; {_REMEDY}")

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        if applied and self.layers[0].known:
            self._gone = [*self._gone[:2], 0]
        # the next step's first gradient may come after its first backward (of activations alone, in a split backward)
        self._left = None
        super().end(applied, overflow)

    def forget_ahead(self) -> None:
        """Drop what was counted ahead and not trained on."""
        layer = self.layers[0]
        layer.visits = {key: v for key, v in layer.visits.items() if v.ahead is None}

    def _witness(self) -> nn.Parameter | None:
        """The weight that tells of gradients and updates: the router's, or another of the layer where it is frozen."""
        of = self._of()
        return None if of is None else next((p for p in (of.router.weight, *of.parameters()) if p.requires_grad), None)

    def _changed(self) -> bool:
        (weight_seen, version), weight = self._seen, self._witness()
        return weight is not None and weight is weight_seen() and weight._version != version

    def read(self, index: int, visit: Visit) -> None:
        super().read(index, visit)
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        weight, stranger = self._witness(), self._stranger()
        if stranger is not None and not self._held:  # it may train copies
            copies = (p for group in stranger.param_groups for p in group["params"])
            weight = next((p for p in copies if p.grad is not None), None)
        grad = None if weight is None else weight.grad
        self._left = None if grad is None else (weakref.ref(weight), weakref.ref(grad), grad._version)

    def _gradient_is_gone(self) -> bool:
        """What the last backward left was taken away, or set to zero."""
        weight = None if self._left is None else self._left[0]()
        if self._left is None or weight is None:
            return False
        grad = weight.grad
        touched = type(grad) is Tensor and grad is self._left[1]() and grad._version != self._left[2]
        return grad is None or (touched and not bool(grad.any()))  # waits for the device, but only when touched

    def _holds(self, optimizer: torch.optim.Optimizer) -> int:
        """2: the witness; 1: another weight of the layer; 0: perhaps copies; -1: nothing, as far as is known."""
        of, weight, groups = self._of(), self._witness(), [group["params"] for group in optimizer.param_groups]
        key = id(weight), sum(map(len, groups))
        known, holds = self._known_optimizers.get(optimizer, (None, 0))
        if known != key:
            theirs = {id(p) for group in groups for p in group}
            own = of is not None and any(id(p) in theirs for p in of.parameters())
            holds = 2 if id(weight) in theirs else int(own)
            self._known_optimizers[optimizer] = key, holds
        if holds < self._held:
            return -1
        return holds if holds or self._may_be_copies([p for group in groups for p in group]) else -1

    def _may_be_copies(self, theirs: list[Tensor]) -> bool:
        """Whether an optimizer may train copies of this layer's weights, each by itself or in flat buffers."""
        weight, done = self._witness(), any(v.done for v in self.layers[0].visits.values())
        if not done or weight is None:
            return False
        steps = (b.driven for b in list(_layers.values()))
        of_layers = {id(step._witness()) for step in steps if isinstance(step, AutoStep)}
        if any(id(p) in of_layers for p in theirs):  # it trains another model
            return False
        return any(p.shape == weight.shape or (p.dim() == 1 and p.numel() >= weight.numel()) for p in theirs)

    def optimizer_steps(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step in the process: refuse one whose balance gradients are wrong."""
        holds, weight = self._holds(optimizer), self._witness()
        if holds < 0:
            return
        stranger = self._stranger()
        if not holds and stranger is not None and stranger is not optimizer:
            raise ValueError(
                f"{type(optimizer).__name__}: neither it nor {type(stranger).__name__}, which has stepped before, "
                f"holds a weight of this MoE layer, so the end of its step is unknown; {_REMEDY}"
            )
        put_back = self._left is not None and weight is self._left[0]() and weight.grad is not self._left[1]()
        again = len(self._gone) == 2 and self._gone[0] == self._gone[1]
        if self._gone[-1] and (put_back or again or not holds):
            raise ValueError(
                "balance.micro_batches=None: the router's gradient was taken away after a backward pass and has come "
                f"back for the update, so each micro-batch was balanced by itself; {_REMEDY}"
            )

    def optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        holds = self._holds(optimizer)
        if holds < 0:
            return
        self._held = holds
        if not holds:
            self._stranger = weakref.ref(optimizer)
        self.end(applied=True, overflow=getattr(optimizer, "found_inf", None))


def _for(step: weakref.ref[AutoStep], call: Callable[[AutoStep, torch.optim.Optimizer], None]) -> Callable[..., None]:
    def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        alive = step()
        if alive is not None:
            call(alive, optimizer)

    return hook
