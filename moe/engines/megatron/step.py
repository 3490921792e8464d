"""The step of a layer under Megatron-Core, which says where the step ends and how gradients are scaled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from ...balance import Balancer, LayerStep, OwnStep, Visit, register_while_alive

#: number of micro-batches after which a step that nobody ends raises
_MOST = 65536


class MegatronStep(OwnStep):
    """Counts the micro-batches of one layer until Megatron-Core has finished the step's gradients.

    ``finalize_model_grads`` tells every router so if ``global_aux_loss`` is on. Other losses need no end of the step:
    their micro-batches are forgotten after the backward. A step that broke off is forgotten when Megatron's DDP has set
    its gradients to zero.

    ``log`` is called with every micro-batch whose backward has run, and with the number that its losses were divided
    by.
    """

    def __init__(self, balancer: Balancer, per_token: bool, log: Callable[[Visit, int], None]) -> None:
        super().__init__(balancer)
        self._per_token, self._log = per_token, log
        self._needs_end = balancer.config.scope == "global"
        #: a weak reference to the router's weight, and its version, when the step began
        self._at_start: tuple[Any, int] = (lambda: None, 0)
        #: whether an optimizer has stepped since the step began; Megatron's calls none if a gradient has overflowed
        self._updated = False
        register_while_alive(register_optimizer_step_post_hook, self.after_optimizer_step)

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after every optimizer step in the process."""
        self._updated = True

    def visit(self, layer: LayerStep, module: Any, x: Tensor) -> Visit:
        if _zeroed(module.router.weight):
            layer.visits = {key: v for key, v in layer.visits.items() if v.ahead}
            module.router.forget(skipped=not (self._updated or self._changed()))
            self._updated = False
        found = super().visit(layer, module, x)
        _watch(module.router.weight)
        return found

    def _end_if_over(self, layer: LayerStep) -> None:
        if not self._needs_end:
            layer.visits = {key: v for key, v in layer.visits.items() if not v.done}
        elif any(v.done for v in layer.visits.values()) and (self._changed() or len(layer.visits) >= _MOST):
            raise ValueError(
                f"config.finalize_model_grads_func: {len(layer.visits)} micro-batches without a call of it, so the "
                "step did not end; set it to megatron.core.distributed.finalize_model_grads"
            )

    def _begins(self) -> None:
        weight = self.layers[0].weights()[0]
        self._at_start = weakref.ref(weight), weight._version

    def _changed(self) -> bool:
        at_start, version = self._at_start
        weight = at_start()
        return weight is not None and weight is self.layers[0].weights()[0] and weight._version != version

    def expected(self, layer: LayerStep) -> int:
        """Return the number of micro-batches by which losses are divided; :meth:`scale` undoes it."""
        carries = layer.balancer.config.estimator in ("carry", "adaptive")
        carried = carries and layer.previous_step is not None
        previous = layer.previous_step.micro_batches if carried and layer.previous_step is not None else 0
        return max(len(layer.known), previous)

    def scale(self) -> Tensor:
        """Return the factor of the gradients of this layer's losses, during a backward.

        This package divides a micro-batch's losses by the number of micro-batches, and by the ranks that hold different
        sequences. Megatron-Core's factor contains one over the number of micro-batches, the context-parallel size and
        the scale of a gradient scaler; in the end it averages over data- and context-parallel ranks.

        With ``calculate_per_token_loss`` the factor is a gradient scaler's alone, and in the end Megatron divides by
        the step's tokens that have a label. They are taken to be the tokens that were routed, and this package's losses
        were divided by an estimate of these. If all losses count only the ranks of a sequence, the step's tokens are
        unknown, and each micro-batch is weighted by its tokens.
        """
        layer = self.layers[0]
        visit, placement, expected = layer.last_read, layer.balancer.placement, self.expected(layer)
        assert visit is not None
        ranks = placement.tokens.size // placement.sequence.size
        found = MoEAuxLossAutoScaler.main_loss_backward_scale
        scale = (torch.ones(1) if found is None else found).reshape(())
        if not self._per_token:
            return scale * (expected * ranks)
        if self._needs_end:
            return scale * layer.balancer.view(visit).step.step_tokens
        return scale * visit.total[-1] * (expected * ranks)

    def _finished(self, visit: Visit) -> None:
        layer, first = self.layers[0], not visit.done
        super()._finished(visit)
        for weight in layer.weights()[:1]:
            _watch(weight)
        if first:
            self._log(visit, self.expected(layer))


def _zeroed(weight: Any) -> bool:
    """Return whether Megatron's DDP has set the gradients to zero since the last :func:`_watch`."""
    return getattr(weight, "grad_added_to_main_grad", None) is False


def _watch(weight: Any) -> None:
    """Make the next ``zero_grad_buffer`` noticeable. It sets this attribute to False, and 0 means the same to DDP."""
    if _zeroed(weight):
        weight.grad_added_to_main_grad = 0
