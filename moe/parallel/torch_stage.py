"""A pipeline stage for the schedules of ``torch.distributed.pipelining``; isolates our dependence on torch internals.

torch's own stage keeps the state of micro-batches in private attributes, which change from version to version. Our
stage keeps this state itself and implements the methods that schedules call, nearly all of which are public. We still
depend on two private methods that prepare a stage, and on how torch reduces the gradients of FSDP weights.

B sequences per micro-batch, S tokens per sequence, D hidden.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage

from ..config import require


@dataclass
class _InFlight:
    """A stage's state for one micro-batch. Each field is cleared as soon as it is no longer needed."""

    input: Tensor | None = None
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    input_gradient: Tensor | None = None
    #: the deferred backward of the weights, if the schedule splits the backward
    weights: Callable[..., Any] | None = None


class TorchStage(PipelineStage):
    """Pipeline stage ``number`` of ``num_stages``. ``module`` maps ids or hidden states to hidden states or logits.

    ``inputs_BS`` (input of the first stage) and ``hidden_BSD`` (sent between stages) are meta tensors. ``precision``
    returns the context of every forward (autocast). ``micro_batch(n)`` returns the context of all work for micro-batch
    n.
    """

    def __init__(
        self,
        module: nn.Module,
        number: int,
        num_stages: int,
        device: torch.device,
        group: Any,
        inputs_BS: Tensor,
        hidden_BSD: Tensor,
        precision: Callable[[], AbstractContextManager],
        micro_batch: Callable[[int], AbstractContextManager],
    ) -> None:
        # if both are given, torch does not infer shapes with a forward of its own, which the balancer would count
        given = hidden_BSD if number else inputs_BS
        super().__init__(module, number, num_stages, device, input_args=given, output_args=hidden_BSD, group=group)
        self._hidden_BSD = hidden_BSD
        self._precision, self._micro_batch = precision, micro_batch
        self._in_flight: defaultdict[int, _InFlight] = defaultdict(_InFlight)

    def clear_runtime_states(self) -> None:
        """Discard the state of an interrupted step."""
        self._in_flight.clear()

    # ---- preparation

    def _prepare_forward_infra(self, *_: Any, **__: Any) -> Any:
        """Allocate no receive buffers. torch would allocate one per micro-batch here, and keep them all."""
        self.args_recv_info[0] = ()  # torch looks here for connections that skip a stage
        return ()

    def _prepare_backward_infra(self, *_: Any, **__: Any) -> Any:
        return None

    def _post_metadata_inference_cleanup(self) -> None:
        """Do nothing: no shapes were inferred. torch's version would drop FSDP gradients at every evaluation."""

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        """Skip the warm-up messages: the mesh has used its groups already.

        With a V-shaped schedule, torch 2.11 would send a message from a rank to itself, which gloo cannot do.
        """
        return []

    # ---- forward

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first:
            return []
        self._in_flight[fwd_chunk_id].input = buffer_BSD = self._buffer()
        return [self._op(dist.irecv, buffer_BSD, self.stage_index - 1)]

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        self._in_flight[mb_index].input = prev_stage_outputs.detach()

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        held = self._in_flight[fwd_chunk_id]
        inputs: Any = args[0] if self.is_first else held.input
        if not self.is_first:
            inputs.requires_grad_(self.has_backward)
        if self.has_backward and isinstance(self.submod, FSDPModule):
            by_hand = getattr(self.submod, "set_manual_backward_finalization", None)
            if by_hand is not None:  # since torch 2.15, where perform_reduce_grad requires it
                by_hand(True)
        with self._micro_batch(fwd_chunk_id), self._precision():
            output = self.submod(inputs, **(kwargs or {}))
        if not self.is_last:
            self._check_hidden(output)
        held.input = inputs if self.has_backward else None
        # the schedule holds the logits, which it passes to the loss
        held.output = output if self._sends_output or (self.has_backward and not self.is_last) else None
        return output

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last:
            return []
        held = self._in_flight[fwd_chunk_id]
        assert held.output is not None
        output_BSD = held.output.detach().contiguous()
        if not self.has_backward:
            held.output = None
        return [self._op(dist.isend, output_BSD, self.stage_index + 1)]

    def release_fwd_send_outputs(self, fwd_chunk_id: int) -> None:
        """Keep the output: the backward starts from it. torch calls this after a send, since 2.15."""

    # ---- backward

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_last or not self.has_backward:
            return []
        self._in_flight[bwd_chunk_id].output_gradient = buffer_BSD = self._buffer()
        return [self._op(dist.irecv, buffer_BSD, self.stage_index + 1)]

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        self._in_flight[mb_index].output_gradient = next_stage_bwd_outputs

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run the backward of a micro-batch; without ``full_backward``, defer the gradients of the weights."""
        if not self.has_backward:
            return
        with self._micro_batch(bwd_chunk_id):
            self._backward(bwd_chunk_id, loss, full_backward, last_backward)

    def _backward(self, bwd_chunk_id: int, loss: Any, full_backward: bool, last_backward: bool) -> None:
        held = self._in_flight[bwd_chunk_id]
        output, gradient = (loss, None) if self.is_last else (held.output, held.output_gradient)
        inputs, held.input, held.output, held.output_gradient = [held.input], None, None, None
        what = {"stage_output": output, "output_grads": gradient, "input_values": inputs}
        if full_backward:
            held.input_gradient = self.backward_maybe_with_nosync("full", what, last_backward)[0][0]
        elif self.is_first:  # ids have no gradient, so the whole backward is deferred
            held.weights = partial(self.backward_maybe_with_nosync, "full", what)
        else:
            several = what | {"stage_output": (output,), "output_grads": None if gradient is None else (gradient,)}
            (held.input_gradient,), groups = self.backward_maybe_with_nosync("input", several, last_backward)
            held.weights = partial(self.backward_maybe_with_nosync, "weight", {"param_groups": groups})
        if loss is not None:  # the schedule keeps losses until the step ends; a graph would keep the stage's input too
            loss.detach_()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        if not self.has_backward:
            return
        held = self._in_flight[bwd_chunk_id]
        assert held.weights is not None
        backward, held.weights = held.weights, None
        with self._micro_batch(bwd_chunk_id):
            backward(last_backward)

    def get_local_bwd_output(self, mb_index: int) -> Any:
        held = self._in_flight[mb_index]
        gradient, held.input_gradient = held.input_gradient, None
        return gradient

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.is_first or not self.has_backward:
            return []
        gradient_BSD = self.get_local_bwd_output(bwd_chunk_id).contiguous()
        return [self._op(dist.isend, gradient_BSD, self.stage_index - 1)]

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        if self.has_backward:
            super().perform_reduce_grad(grad_scale_factor)
            return
        for module in self.submod.modules():  # after a forward without backward, FSDP leaves its root gathered
            if isinstance(module, FSDPModule):
                module.reshard()

    # ---- helpers

    @property
    def _sends_output(self) -> bool:
        """Return whether the next stage is on another rank."""
        return not self.is_last and self.stage_index_to_group_rank[self.stage_index + 1] != self.group_rank

    def _buffer(self) -> Tensor:
        """Allocate memory for a hidden state, or its gradient, from another rank."""
        return torch.empty_like(self._hidden_BSD, device=self.device, requires_grad=False)

    def _op(self, verb: Callable[..., Any], tensor: Tensor, stage: int) -> dist.P2POp:
        peer = self.stage_index_to_group_rank[stage]
        return dist.P2POp(verb, tensor, group=self.group, group_peer=peer)

    def _check_hidden(self, hidden_BSD: Tensor) -> None:
        """Raise ValueError for a hidden state that does not match the receiver's buffer: it would arrive corrupted."""
        for name, found, told in (
            ("hidden_shape", tuple(hidden_BSD.shape), tuple(self._hidden_BSD.shape)),
            ("hidden_dtype", hidden_BSD.dtype, self._hidden_BSD.dtype),
        ):
            require(found == told, name, told, f"stage {self.stage_index} gives {found}; build the pipeline with that")
