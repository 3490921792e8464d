"""Lower bounds: the operations, bytes and time that a Mixture-of-Experts layer needs at least, stage by stage.

Bytes assume 16-bit activations and weights, fp32 router logits and 32-bit indices; each tensor is read or written once,
and gathered rows are read once per source row. A stage takes at least the longer of its arithmetic and its traffic at
the machine's measured rates, and a layer takes at least the sum of its stages. The experts' forward has 6*T*K*F*D
operations and their backward 12*T*K*F*D; the router has stages of its own.
"""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.shared.shapes import Shape
from benchmarks.shared.timing import Rates


class Stage(NamedTuple):
    """One step of the algorithm: its floating-point operations (2 per multiply-add) and its bytes."""

    name: str
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes)

    def memory_bound(self, rates: Rates) -> bool:
        return self.bytes / rates.bytes > self.flops / rates.flops


def router(s: Shape) -> list[Stage]:
    """Return the stages that compute logits and choose experts."""
    return [
        Stage("router", 2 * s.T * s.D * s.E, 2 * s.T * s.D + 2 * s.D * s.E + 4 * s.T * s.E),
        Stage("topk_gate", 0, 4 * s.T * s.E + 8 * s.rows),
    ]


def path_forward(s: Shape) -> list[Stage]:
    """Return the stages from expert ids to the layer's output. They save x and the pre-activation for the backward."""
    gemm = s.rows * s.D * s.F
    return [
        Stage("sort_by_expert", 0, 16 * s.rows + 4 * s.E),
        Stage("up", 4 * gemm, 2 * s.T * s.D + 4 * s.E * s.D * s.F + 6 * s.rows * s.F),
        Stage("down", 2 * gemm, 2 * s.rows * s.F + 2 * s.E * s.D * s.F + 2 * s.rows * s.D),
        Stage("combine", 2 * s.rows * s.D, 2 * s.rows * s.D + 2 * s.T * s.D + 8 * s.rows),
    ]


def path_backward(s: Shape) -> list[Stage]:
    """Return the backward stages without recomputation.

    The first stage computes dh, the activation's gradient and the router weights' gradient in one pass.
    """
    gemm, weight = s.rows * s.D * s.F, s.E * s.D * s.F
    return [
        Stage("dh", 2 * gemm, 2 * s.T * s.D + 2 * weight + 10 * s.rows * s.F + 4 * s.rows),
        Stage("down_wgrad", 2 * gemm, 2 * s.T * s.D + 2 * s.rows * s.F + 2 * weight),
        Stage("up_dgrad", 4 * gemm, 4 * s.rows * s.F + 4 * weight + 2 * s.rows * s.D),
        Stage("up_wgrad", 4 * gemm, 2 * s.T * s.D + 4 * s.rows * s.F + 4 * weight),
        Stage("dx_sum", s.rows * s.D, 2 * s.rows * s.D + 2 * s.T * s.D),
    ]


def router_backward(s: Shape) -> list[Stage]:
    traffic = 4 * s.T * s.E + 8 * s.rows + 4 * s.T * s.D + 4 * s.D * s.E
    return [Stage("router_backward", 4 * s.T * s.D * s.E, traffic)]


def layer_forward(s: Shape) -> list[Stage]:
    return router(s) + path_forward(s)


def layer_backward(s: Shape) -> list[Stage]:
    return path_backward(s) + router_backward(s)


def floor(stages: Iterable[Stage], rates: Rates) -> float:
    """Return the fewest seconds in which the stages can run, one after the other."""
    return sum(stage.seconds(rates) for stage in stages)


def kept_bytes(s: Shape) -> int:
    """Return the bytes that the experts must save for a backward pass without recomputation: x and pre-activation."""
    return 2 * s.T * s.D + 4 * s.rows * s.F


def _logits_backward(s: Shape) -> Stage:
    """Read x, weight and the logits' gradient; write the gradients of x and weight."""
    return Stage("router_logits backward", 4 * s.T * s.D * s.E, 4 * s.T * s.E + 4 * s.T * s.D + 4 * s.D * s.E)


def _gate_backward(s: Shape) -> Stage:
    """Read logits, ids and the weights' gradient; write the logits' gradient."""
    return Stage("topk_gate backward", 0, 8 * s.T * s.E + 8 * s.rows)


def ops(s: Shape) -> dict[str, list[Stage]]:
    """Return the stages of each op of the kernel suite alone: inputs are read once, outputs written once."""
    forward = {stage.name: stage for stage in path_forward(s)}
    backward = {stage.name: stage for stage in path_backward(s)}
    gemm, weight, rows = s.rows * s.D * s.F, s.E * s.D * s.F, s.rows
    gathered = 2 * s.T * s.D + 4 * rows
    return {
        "router_logits forward": [router(s)[0]],
        "router_logits backward": [_logits_backward(s)],
        "topk_gate forward": [router(s)[1]],
        "topk_gate backward": [_gate_backward(s)],
        "sort_by_expert": [forward["sort_by_expert"]],
        "permute": [Stage("permute", 0, gathered + 2 * rows * s.D)],
        "combine": [Stage("combine", rows * s.D, 2 * rows * s.D + 4 * rows + 2 * s.T * s.D)],
        "grouped_gemm up": [Stage("up", 4 * gemm, gathered + 4 * weight + 4 * rows * s.F)],
        "grouped_gemm down": [forward["down"]],
        "grouped_gemm up dgrad": [backward["up_dgrad"]],
        "grouped_gemm down dgrad": [Stage("dgrad", 2 * gemm, 2 * rows * s.D + 2 * weight + 2 * rows * s.F)],
        "grouped_gemm up wgrad": [Stage("wgrad", 4 * gemm, gathered + 4 * rows * s.F + 4 * weight)],
        "grouped_gemm down wgrad": [Stage("wgrad", 2 * gemm, gathered + 2 * rows * s.F + 2 * weight)],
        "expert_mlp forward": path_forward(s)[1:],
        "expert_mlp backward": path_backward(s),
    }
