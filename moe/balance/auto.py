"""The step of a layer whose training loop does not drive one: the only code that infers where a step ends."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .hooks import register_while_alive
from .own_step import OwnStep, registry
from .step import LayerStep
from .visit import Visit, accumulates

if TYPE_CHECKING:
    from .balancer import Balancer

#: number of training forwards without an update after which a step of unknown length raises
MAX_VISITS = 1024
_REMEDY = (
    "set balance.micro_batches to the layer's number of training forwards per optimizer step, or drive the step "
    "yourself: step = Step.of(model), step.micro_batch() around each forward, step.end(applied) after each update"
)


class AutoStep(OwnStep):
    """The step of one layer whose training loop does not drive it.

    It watches the router's weight; if that is frozen, another weight of the layer; if all of them are, the nearest
    trained parameter that precedes the layer. A step ends

    - when an optimizer that holds the watched weight has stepped, or with a number announced, one that holds copies;
    - at the backward that follows those of ``balance.micro_batches`` training forwards, or as many as were counted
      ahead;
    - if neither number is known, at the next backward when the last one has left a gradient on the watched weight that
      is gone.

    The last two had no update that an optimizer made. If the weight has changed in place nevertheless, the step ends at
    the next forward already, with an update.

    A micro-batch counts if its backward has run or can still run; forwards without a backward do not count. Other loops
    raise before their update, and the error names the remedy: optimizers of copies of the weights, gradients that are
    removed and restored, and training forwards without a backward.

    Every rank must run some layer in every forward pass, unlike with a step that the training loop drives.
    """

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(balancer)
        #: weak references to the watched weight and the gradient that the last backward left on it, and its version
        self._left: tuple[Any, Any, int] | None = None
        #: a weak reference to the watched weight, and its version, when the step began
        self._at_start: tuple[Any, int] = (lambda: None, 0)
        #: whether an optimizer that holds the watched weight has ever stepped, and whether the previous step ended
        #: without an update
        self._optimized = self._skipped = False
        #: what ``_left`` was at the end of the previous step, if that had no update; and whether a backward of this
        #: step has added to that gradient
        self._kept: tuple[Any, Any, int] | None = None
        self._added = False
        register_while_alive(register_optimizer_step_pre_hook, self.before_optimizer_step)
        register_while_alive(register_optimizer_step_post_hook, self.after_optimizer_step)

    # ---- where the step ends

    def _begins(self) -> None:
        weight = self._watched()
        self._at_start = (lambda: None, 0) if weight is None else (weakref.ref(weight), weight._version)

    def visit(self, layer: LayerStep, module: nn.Module, x: Tensor) -> Visit:
        found = super().visit(layer, module, x)
        if layer.first_trained() is None:
            layer.before = _nearest_parameter(x)
        return found

    def _over(self, layer: LayerStep) -> bool:
        """Return whether the step is complete, or its gradient has been cleared; it may still get its update."""
        visits, announced = layer.visits.values(), self.announced(layer)
        done = sum(v.done for v in visits)
        if announced:
            return done >= announced and not any(v.ahead for v in visits)
        return bool(done) and (self._gradient_is_gone() or (self._left is None and self._changed()))

    def _end_if_over(self, layer: LayerStep) -> None:
        if self._over(layer):
            if self._changed():
                self.end()  # else at the next backward, because nothing may train on this forward
            return
        visits = layer.visits.values()
        done = sum(v.done for v in visits)
        if self.announced(layer):
            # an exception broke the step off; optimizers of copies may take the gradients away after every backward
            if done and self._optimized and self._gradient_is_gone() and not all(v.lives for v in visits):
                self.end(applied=False)
        elif done >= MAX_VISITS:
            raise ValueError(
                f"balance.micro_batches=None: no update of the router after {done} training forwards of the layer; "
                f"{_REMEDY}"
            )

    def _end_before_backward(self, layer: LayerStep) -> None:
        """End the step, but keep the forwards whose backward has not run for the next one."""
        later = {key: v for key, v in layer.visits.items() if v.lives and not v.done}
        layer.visits = {key: v for key, v in layer.visits.items() if v.done}
        self.end(applied=self._changed())
        layer.visits = later
        self._begins()

    def _more_to_come(self, layer: LayerStep) -> bool:
        return len(layer.known) < self.announced(layer)

    def end(self, applied: bool = True, overflow: Tensor | None = None) -> None:
        if self.layers[0].known:
            self._skipped = not applied
        # the next step's first backward may leave no gradient (a split backward computes those of activations first)
        self._kept, self._left, self._added = None if applied else self._left, None, False
        super().end(applied, overflow)

    def _watched(self) -> nn.Parameter | None:
        return self.layers[0].first_trained()

    def _changed(self) -> bool:
        (at_start, version), weight = self._at_start, self._watched()
        return weight is not None and weight is at_start() and weight._version != version

    def read(self, layer: LayerStep, visit: Visit, trains: bool = True) -> None:
        trains_watched = accumulates(self._watched())
        if trains_watched is None and not self.announced(layer):
            raise ValueError(
                "balance.micro_batches=None: torch.autograd.grad leaves no gradient on the weights, which would show "
                f"where the step ends; {_REMEDY}"
            )
        if trains_watched is not False and not (visit.done or visit.being_read) and self._over(layer):
            self._end_before_backward(layer)
        if trains_watched:
            self._added = self._added or self._adds_to_kept()
        super().read(layer, visit, trains_watched is not False)

    def _finished(self, visit: Visit) -> None:
        super()._finished(visit)
        weight = self._watched()
        grad = None if weight is None else weight.grad
        self._left = None if grad is None else (weakref.ref(weight), weakref.ref(grad), grad._version)

    def _gradient_is_gone(self) -> bool:
        """Return whether the gradient that the last backward left was removed or set to zero."""
        weight = None if self._left is None else self._left[0]()
        if self._left is None or weight is None:
            return False
        grad = weight.grad
        touched = type(grad) is Tensor and grad is self._left[1]() and grad._version != self._left[2]
        return grad is None or (touched and not bool(grad.any()))  # waits for the device, but only when touched

    def _adds_to_kept(self) -> bool:
        """Return whether the gradient of a step without an update is still there, as it was when that step ended."""
        kept, self._kept, weight = self._kept, None, self._watched()
        if kept is None or weight is None or weight.grad is None or weight is not kept[0]():
            return False
        return weight.grad is kept[1]() and weight.grad._version == kept[2]

    # ---- what optimizers do

    def before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before every optimizer step in the process. Raises if the balance gradients are wrong."""
        layer, weight = self.layers[0], self._watched()
        visits, announced = layer.visits.values(), self.announced(layer)
        done = sum(v.done for v in visits)
        if not done:
            return
        if not announced and weight is not None and not _is_leaf(weight):
            raise ValueError(
                "MoE: its weights are views of a flat parameter, so the end of a step is unknown; use "
                f"FullyShardedDataParallel(..., use_orig_params=True), or fully_shard, or {_REMEDY}"
            )
        if not self._trained_by(optimizer):
            if not (announced or self._optimized) and may_hold_copies(layer, optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__}: it holds no weight of this MoE layer, but perhaps copies of them, so "
                    f"the end of a step is unknown; {_REMEDY}"
                )
            return
        left = self._left if weight is not None and self._left is not None and weight is self._left[0]() else None
        restored = left is not None and weight is not None and weight.grad is not left[1]()
        if self._skipped and not announced and restored:
            raise ValueError(
                "balance.micro_batches=None: the gradient of a backward pass was removed before the next one, and is "
                "back in another tensor for the update; if the step has several backward passes, each was balanced "
                f"separately; {_REMEDY}"
            )
        more = done - announced if done > announced else done
        if announced and (done > announced or self._added or (self._skipped and done < announced)):
            raise ValueError(
                f"balance.micro_batches={announced}: no update came after that many training forwards of the layer, "
                f"but one after {more} more; if a step was broken off, drive the steps: {_REMEDY}"
            )
        if any(v.counted and v.lives and not v.done for v in visits):
            raise ValueError(
                "MoE: the backward of a training forward has not run; run forwards that are not trained on under "
                "torch.no_grad() or in model.eval(), or delete their output before the update"
            )
        previous = layer.previous_step
        if done < announced:
            warnings.warn(
                f"MoE: {announced} micro-batches were announced, but this step has {done}, so that its balance loss is "
                f"{done}/{announced} of what it should be; give all steps as many, or {_REMEDY}",
                stacklevel=2,
            )
        if not announced and previous is not None and done != previous.micro_batches:
            warnings.warn(
                "MoE: steps have different numbers of micro-batches, but losses are weighted by the number in the "
                f"previous step; {_REMEDY}",
                stacklevel=2,
            )

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        if not self.layers[0].visits:
            return
        if self._trained_by(optimizer):
            self._optimized = True
        elif self._optimized or not self._updates_copies(optimizer):
            return
        self.end(applied=True, overflow=getattr(optimizer, "found_inf", None))

    def _updates_copies(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer has updated copies of this layer's weights at the end of an announced step.

        Such a step may be shorter than announced, as the last one of an epoch, if the optimizer holds tensors that are
        no parameters, as ZeRO's does: the optimizer of another model holds that model's parameters.
        """
        layer = self.layers[0]
        done, announced = sum(v.done for v in layer.visits.values()), self.announced(layer)
        if not (done and announced and may_hold_copies(layer, optimizer)):
            return False
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return done >= announced or any(not isinstance(p, nn.Parameter) for p in held)

    def _trained_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer holds the watched weight, or the flat parameter that it is a view of.

        If nothing can be watched, any optimizer may train what precedes the layer, so a known number decides.
        """
        layer, weight = self.layers[0], self._watched()
        done = sum(v.done for v in layer.visits.values())
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if weight is None:
            return done >= self.announced(layer)
        if any(p is weight or p is weight._base for p in held):
            return True
        # a parameter before the layer is in the graph, but FSDP2 moves its gradient to a DTensor, its part on this rank
        moved = bool(done) and weight is layer.before() and weight.grad is None
        return moved and any(hasattr(p, "device_mesh") and p.shape == weight.shape for p in held)


def _nearest_parameter(x: Tensor) -> Any:
    """Return a weak reference to the nearest trained parameter from which ``x`` was computed."""
    nodes = [torch.autograd.graph.get_gradient_edge(x).node] if x.requires_grad else []
    seen = set(nodes)
    for node in nodes:  # grows: nearest first
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter):
            return weakref.ref(leaf)
        new = [following for following, _ in node.next_functions if following is not None and following not in seen]
        nodes += dict.fromkeys(new)
        seen.update(new)
    return lambda: None


def _is_leaf(weight: Tensor) -> bool:
    try:
        return weight.is_leaf
    except RuntimeError:  # a view whose flat parameter has changed in place
        return False


def may_hold_copies(layer: LayerStep, optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer may hold copies of a layer's weights, one by one, in flat buffers, or in parts.

    Tensors that are no module's parameters are suspect at any size: with ZeRO, each rank's optimizer holds only a part
    of a flat buffer, and experts may have an optimizer of their own.
    """
    held = [p for group in optimizer.param_groups for p in group["params"]]
    of_layers = {id(p) for b in list(registry.layers.values()) for p in b.layer.weights()}
    if any(id(p) in of_layers for p in held):  # it trains another model
        return False
    trained = layer.trained()
    shapes = {p.shape for p in trained}
    if any(p.dim() == 1 or p.shape in shapes for p in held if not isinstance(p, nn.Parameter)):
        return True
    largest_flat = max((p.numel() for p in held if p.dim() == 1), default=0)
    return largest_flat >= sum(p.numel() for p in trained) or shapes <= {p.shape for p in held}
