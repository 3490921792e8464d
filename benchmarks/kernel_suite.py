"""Every op by itself, beside the least it can take and what its Triton kernels move."""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from agreement import Red, check_gate, compare, reduced
from cost import floor, ops
from layer_suite import Context
from shapes import Shape, expert_weights, make_batch, unit_random
from timing import Step, graphed, interleave, summary
from torch import Tensor
from traffic import moved

from equimoe.kernels.configs import arch_of
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.kernels.topk_gate import topk_gate

#: short ops, whose launches would be timed instead of themselves
GRAPHED = ("topk_gate", "sort_by_expert", "permute", "combine")


class Bench:
    """The inputs of all ops for one shape, and the calls."""

    def __init__(self, shape: Shape, context: Context, routing: str = "uniform") -> None:
        dtype, device, self.backend = context.dtype, context.device, context.backend
        self.shape = shape
        self.batch = make_batch(shape, routing, dtype, device)
        self.gate_up, self.down = expert_weights(shape, dtype, device)
        self.logits_TE = unit_random((shape.T, shape.E), torch.float32, device).requires_grad_()
        self.order = sort_by_expert(self.batch.ids_TK, shape.E, backend=self.backend)
        self.source_R = self.order.order_R // shape.K
        widths = {"rows_RD": shape.D, "dpre_RF": 2 * shape.F, "h_RF": shape.F}
        for name, width in widths.items():
            setattr(self, name, unit_random((shape.rows, width), dtype, device))

    rows_RD: Tensor
    dpre_RF: Tensor
    h_RF: Tensor

    def gate_forward(self) -> Tensor:
        return topk_gate(self.logits_TE, self.shape.K, backend=self.backend).weights_TK

    def gate_backward(self, weights_TK: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(weights_TK, self.logits_TE, self.batch.weights_TK.detach())

    def mlp_forward(self) -> Tensor:
        b = self.batch
        return expert_mlp(b.x_TD, b.weights_TK, self.order, self.gate_up, self.down, backend=self.backend)

    def mlp_backward(self, y_TD: Tensor) -> tuple[Tensor, ...]:
        inputs = (self.batch.x_TD, self.batch.weights_TK, self.gate_up, self.down)
        return torch.autograd.grad(y_TD, inputs, self.batch.dy_TD)

    def pairs(self) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]]:
        """Forward and backward of the ops that have both."""
        return {
            "topk_gate": (self.gate_forward, self.gate_backward),
            "expert_mlp": (self.mlp_forward, self.mlp_backward),
        }

    def products(self) -> dict[str, Callable[[], Tensor]]:
        """The six grouped products of a layer, as its forward and backward have them."""
        x_TD, dy_TD = self.batch.x_TD.detach(), self.batch.dy_TD
        gate_up, down, offsets = self.gate_up.detach(), self.down.detach(), self.order.offsets_E
        index, how = self.source_R, {"backend": self.backend}
        return {
            "grouped_gemm up": lambda: grouped_gemm(x_TD, gate_up, offsets, index, **how),
            "grouped_gemm down": lambda: grouped_gemm(self.h_RF, down, offsets, **how),
            "grouped_gemm up dgrad": lambda: grouped_gemm_dgrad(self.dpre_RF, gate_up, offsets, **how),
            "grouped_gemm down dgrad": lambda: grouped_gemm_dgrad(self.rows_RD, down, offsets, **how),
            "grouped_gemm up wgrad": lambda: grouped_gemm_wgrad(self.dpre_RF, x_TD, offsets, index_R=index, **how),
            "grouped_gemm down wgrad": lambda: grouped_gemm_wgrad(dy_TD, self.h_RF, offsets, dy_index_R=index, **how),
        }

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The ops of one direction."""
        x_TD, how = self.batch.x_TD.detach(), {"backend": self.backend}
        return {
            "sort_by_expert": lambda: sort_by_expert(self.batch.ids_TK, self.shape.E, **how),
            "permute": lambda: permute(x_TD, self.order, **how),
            "combine": lambda: combine(self.rows_RD, self.order, **how),
            **self.products(),
        }


def _expected_products(bench: Bench) -> dict[str, Tensor]:
    """The grouped products in fp64, expert by expert, from the expert ids alone."""
    s, batch = bench.shape, bench.batch
    x, dy, gate_up, down, rows, dpre, h = (
        t.detach().double()
        for t in (batch.x_TD, batch.dy_TD, bench.gate_up, bench.down, bench.rows_RD, bench.dpre_RF, bench.h_RF)
    )
    flat_R = batch.ids_TK.reshape(-1).argsort(stable=True)
    counts = batch.ids_TK.reshape(-1).bincount(minlength=s.E).tolist()
    names = list(bench.products())
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    start = 0
    for expert, count in enumerate(counts):
        here = slice(start, start + count)
        source = flat_R[here] // s.K
        results = (
            x[source] @ gate_up[expert].T,
            h[here] @ down[expert].T,
            dpre[here] @ gate_up[expert],
            rows[here] @ down[expert],
            (dpre[here].T @ x[source])[None],
            (dy[source].T @ h[here])[None],
        )
        for name, result in zip(names, results, strict=True):
            parts[name].append(result)
        start += count
    return {name: torch.cat(each) for name, each in parts.items()}


def gate(shape: Shape, context: Context) -> dict[str, Any]:
    """The errors of every op at a reduced size. Raises Red."""
    bench = Bench(reduced(shape, context.device), context, routing="zipf")
    s, batch, how = bench.shape, bench.batch, {"backend": context.backend}
    found: dict[str, Any] = {}
    # evenly spaced in a random order, because fp32 scores of almost equal logits may be equal
    rank_TE = torch.rand(s.T, s.E, device=context.device).argsort(1)
    logits_TE = (rank_TE.float() * (6 / s.E) - 3).requires_grad_()
    answer = topk_gate(logits_TE, s.K, **how)
    dweights = torch.rand_like(answer.weights_TK)
    (dlogits,) = torch.autograd.grad(answer.weights_TK, logits_TE, dweights)
    found |= check_gate((answer.ids_TK, answer.weights_TK, dlogits), logits_TE, s.K, dweights)

    flat_R = batch.ids_TK.reshape(-1).argsort(stable=True)
    inverse_R = torch.empty_like(flat_R).scatter_(0, flat_R, torch.arange(s.rows, device=flat_R.device))
    counts = batch.ids_TK.reshape(-1).bincount(minlength=s.E)
    right = (flat_R, inverse_R.view(s.T, s.K), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    for part, made, expected in zip(bench.order._fields, bench.order, right, strict=True):
        if not torch.equal(made, expected):
            raise Red(f"sort_by_expert: {part} differs in {int((made != expected).sum())} places")

    x_TD = batch.x_TD.detach()
    summed = bench.rows_RD.double()[inverse_R].view(s.T, s.K, s.D).sum(1)
    expected = {"permute": x_TD[flat_R // s.K].double(), "combine": summed, **_expected_products(bench)}
    calls = bench.calls()
    made = [calls[name]() for name in expected]
    found |= compare(made, list(expected.values()), list(expected), context.dtype)
    return {name: list(pair) for name, pair in found.items()}


def _step(call: Callable[[], object]) -> Step:
    def timed(mark: Callable[[], None]) -> None:
        mark()
        call()
        mark()

    return timed


def _pair_step(forward: Callable[[], Tensor], backward: Callable[[Tensor], object]) -> Step:
    def timed(mark: Callable[[], None]) -> None:
        mark()
        y = forward()
        mark()
        backward(y)
        mark()

    return timed


def steps_of(bench: Bench, context: Context) -> tuple[dict[str, Step], set[str]]:
    """What is timed, and the names of what runs as a graph. Under "op total" a graph does both directions."""
    steps: dict[str, Step] = {}
    graphs: set[str] = set()

    def capture(name: str, call: Callable[[], object]) -> bool:
        if not (context.timer.cuda and context.backend == "triton" and name.startswith(GRAPHED)):
            return False
        if (graph := graphed(call, context.device)) is None:
            return False
        steps[name] = _step(graph)
        graphs.add(name)
        return True

    for op, (forward, backward) in bench.pairs().items():
        both = capture(f"{op} total", lambda f=forward, b=backward: b(f()))
        if not (both and capture(f"{op} forward", forward)):
            steps.pop(f"{op} total", None)
            steps[op] = _pair_step(forward, backward)
    for name, call in bench.calls().items():
        if not capture(name, call):
            steps[name] = _step(call)
    return steps, graphs


def times(seconds: dict[str, list[list[float]]]) -> dict[str, dict[str, float]]:
    """Medians and spreads by op and direction. A backward alone is total - forward, of each run or of the medians."""
    found: dict[str, dict[str, float]] = {}
    for name, runs in seconds.items():
        if len(runs[0]) == 2:
            for part, direction in enumerate(("forward", "backward")):
                found[f"{name} {direction}"] = summary([run[part] for run in runs])
        else:
            found[name] = summary([run[0] for run in runs])
    for name in [name for name in found if name.endswith(" total")]:
        op, total = name.removesuffix(" total"), found.pop(name)
        found[f"{op} backward"] = {**total, "median_us": total["median_us"] - found[f"{op} forward"]["median_us"]}
    return found


def measure(shape: Shape, context: Context) -> dict[str, Any]:
    """One row per op: time, floor, and the bytes that must and do move."""
    bench = Bench(shape, context)
    steps, graphs = steps_of(bench, context)
    seconds, failed = interleave(context.timer, steps, context.rounds, context.seconds_each / 4, must=tuple(steps))
    arch = arch_of(context.device) if context.timer.cuda else "sm_90"
    least, triton, medians = ops(shape), moved(shape, arch, context.dtype), times(seconds)
    rows: dict[str, Any] = {}
    for name in [name for name in least if name in medians]:
        row, stages = medians[name], least[name]
        floor_us = floor(stages, context.rates) * 1e6
        waiting = sum(stage.seconds(context.rates) for stage in stages if stage.memory_bound(context.rates)) * 1e6
        rows[name] = {
            **row,
            "timing": "graph" if name.replace("backward", "total") in graphs else "eager",
            "floor_us": floor_us,
            "fraction": floor_us / row["median_us"],
            "bound": "memory" if waiting > floor_us / 2 else "compute",
            "flops": sum(stage.flops for stage in stages),
            "floor_bytes": sum(stage.bytes for stage in stages),
            "triton_bytes": triton[name][0],
            "triton_issued_bytes": triton[name][1],
        }
    return {"ops": rows, "failed": failed, "triton_arch": arch}
