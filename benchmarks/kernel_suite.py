"""Every op by itself, beside the least it can take and what its Triton kernels move."""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from agreement import (
    NAMES,
    Errors,
    Tally,
    about,
    check_choice,
    check_order,
    compare,
    judge,
    reduced,
    reference,
    right_order,
)
from cost import floor, ops
from layer_suite import Context
from shapes import Shape, expert_weights, make_batch, spread_logits, unit_random
from timing import Step, graphed, interleave, summary
from torch import Tensor
from traffic import moved

from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.matmul_tiles import arch_of
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.kernels.topk_gate import GateOutput, topk_gate

#: short ops, whose launches would be timed instead of themselves
GRAPHED = ("topk_gate", "sort_by_expert", "permute", "combine")


class Bench:
    """The inputs of all ops for one shape, and the calls."""

    def __init__(self, shape: Shape, context: Context, routing: str = "uniform") -> None:
        dtype, device, self.backend = context.dtype, context.device, context.backend
        self.shape = shape
        self.batch = make_batch(shape, routing, dtype, device)
        self.gate_up, self.down = expert_weights(shape, dtype, device)
        self.logits_TE = spread_logits(shape, device)
        self.order = right_order(self.batch.ids_TK, shape.E)  # so that a wrong sort is no other op's fault
        self.source_R = self.order.order_R // shape.K
        widths = {"rows_RD": shape.D, "dpre_RF": 2 * shape.F, "h_RF": shape.F}
        for name, width in widths.items():
            setattr(self, name, unit_random((shape.rows, width), dtype, device))

    rows_RD: Tensor
    dpre_RF: Tensor
    h_RF: Tensor

    def gate_forward(self) -> GateOutput:
        return topk_gate(self.logits_TE, self.shape.K, backend=self.backend)

    def gate_backward(self, found: GateOutput) -> tuple[Tensor, ...]:
        return torch.autograd.grad(found.weights_TK, self.logits_TE, self.batch.weights_TK.detach())

    def mlp_forward(self) -> Tensor:
        b = self.batch
        return expert_mlp(b.x_TD, b.weights_TK, self.order, self.gate_up, self.down, backend=self.backend)

    def mlp_backward(self, y_TD: Tensor) -> tuple[Tensor, ...]:
        inputs = (self.batch.x_TD, self.batch.weights_TK, self.gate_up, self.down)
        return torch.autograd.grad(y_TD, inputs, self.batch.dy_TD)

    def pairs(self) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
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


class Check:
    """The right results of everything that a bench runs, in fp64."""

    def __init__(self, bench: Bench, context: Context) -> None:
        self.bench, self.dtype = bench, context.dtype
        self.source_R = bench.source_R
        bounds = bench.order.offsets_E.tolist()
        self.groups = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def __call__(self, name: str, made: Any) -> Errors:
        """The errors of what the step ``name`` returned. Raises Red."""
        bench, op = self.bench, name.removesuffix(" total").removesuffix(" forward")
        with about(op, bench.backend, bench.shape, self.dtype):
            if op == "sort_by_expert":
                check_order(made, bench.order)
                return {}
            if op in bench.pairs():
                forward, grads = (made, None) if name.endswith(" forward") else made
                seen = self.choice(forward, grads) if op == "topk_gate" else self.mlp(forward, grads)
            elif op in bench.products():
                seen = judge({"output": self.product(op, made)}, self.dtype)
            else:
                seen = compare([made], [self.moved(op, self._input(op))], ["output"], self.dtype)
        return {f"{op} {part}": pair for part, pair in seen.items()}

    def choice(self, found: GateOutput, grads: tuple[Tensor, ...] | None) -> Errors:
        dlogits = None if grads is None else grads[0]
        return check_choice(found, dlogits, self.bench.logits_TE, self.bench.batch.weights_TK.detach())

    def mlp(self, y_TD: Tensor, grads: tuple[Tensor, ...] | None) -> Errors:
        made = (y_TD, *(grads or ()))
        expected = reference(self.bench.batch, self.bench.gate_up, self.bench.down)[: len(made)]
        names = ("output", *(f"gradient of {name}" for name in NAMES[1:]))[: len(made)]
        return compare(made, expected, names, self.dtype)

    def product(self, name: str, made: Tensor) -> Tally:
        """One grouped product, expert by expert."""
        b, tally = self.bench, Tally()
        for expert, here in enumerate(self.groups):
            source = self.source_R[here]
            x, dy, gate_up, down, rows, dpre, h = (
                t.detach().double()
                for t in (b.batch.x_TD[source], b.batch.dy_TD[source], b.gate_up[expert], b.down[expert],
                          b.rows_RD[here], b.dpre_RF[here], b.h_RF[here])
            )  # fmt: skip
            factors = {
                "up": (x, gate_up.T),
                "down": (h, down.T),
                "up dgrad": (dpre, gate_up),
                "down dgrad": (rows, down),
                "up wgrad": (dpre.T, x),
                "down wgrad": (dy.T, h),
            }
            left, right = factors[name.removeprefix("grouped_gemm ")]
            tally.add(made[expert] if name.endswith("wgrad") else made[here], left @ right)
        return tally

    def moved(self, op: str, given: Tensor) -> Tensor:
        """permute or combine of ``given``; each is the other's gradient."""
        if op == "permute":
            return given[self.source_R]
        s = self.bench.shape
        return given.double()[self.bench.order.inverse_SK.reshape(-1)].view(s.T, s.K, -1).sum(1)

    def _input(self, op: str) -> Tensor:
        return self.bench.batch.x_TD.detach() if op == "permute" else self.bench.rows_RD

    def gradients(self) -> Errors:
        """Of the ops whose backward is not timed by itself. Raises Red."""
        b, how = self.bench, {"backend": self.bench.backend}
        found: Errors = {}
        for op, run, back, dy in (
            ("permute", permute, "combine", b.rows_RD),
            ("combine", combine, "permute", b.batch.dy_TD),
        ):
            with about(op, b.backend, b.shape, self.dtype):
                leaf = self._input(op).clone().requires_grad_()
                made = torch.autograd.grad(run(leaf, b.order, **how), leaf, dy)
                seen = compare(made, [self.moved(back, dy)], ["gradient"], self.dtype)
            found[f"{op} gradient"] = seen["gradient"]
        with about("grouped_gemm", b.backend, b.shape, self.dtype):
            rows, weight = (t.detach().clone().requires_grad_() for t in (b.h_RF, b.down))
            y_RD = grouped_gemm(rows, weight, b.order.offsets_E, **how)
            drows, dweight = torch.autograd.grad(y_RD, (rows, weight), b.rows_RD)
            tallies = {
                "gradient of rows": self.product("grouped_gemm down dgrad", drows),
                "gradient of weight": Tally(),
            }
            for expert, here in enumerate(self.groups):
                expected = b.rows_RD[here].double().T @ b.h_RF[here].double()
                tallies["gradient of weight"].add(dweight[expert], expected)
            seen = judge(tallies, self.dtype)
        return found | {f"grouped_gemm {part}": pair for part, pair in seen.items()}


def check_all(bench: Bench, steps: dict[str, Step], context: Context) -> dict[str, list[float]]:
    """The errors of every step on its own inputs, and of every other gradient. Raises Red."""
    check, found = Check(bench, context), {}
    for name, step in steps.items():
        found |= check(name, step(lambda: None))
    return {name: list(pair) for name, pair in (found | check.gradients()).items()}


def gate(shape: Shape, context: Context) -> dict[str, Any]:
    """The errors of every op at a reduced size and with skewed routing, so that little time is lost. Raises Red."""
    bench = Bench(reduced(shape, context.device), context, routing="zipf")
    return check_all(bench, steps_of(bench, context)[0], context)


def _step(call: Callable[[], Any]) -> Step:
    def timed(mark: Callable[[], None]) -> Any:
        mark()
        made = call()
        mark()
        return made

    return timed


def _both(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> tuple[Any, Any]:
    y = forward()
    return y, backward(y)


def _pair_step(forward: Callable[[], Any], backward: Callable[[Any], Any]) -> Step:
    def timed(mark: Callable[[], None]) -> tuple[Any, Any]:
        mark()
        y = forward()
        mark()
        grads = backward(y)
        mark()
        return y, grads

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
        both = capture(f"{op} total", lambda f=forward, b=backward: _both(f, b))
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
    """One row per op: time, floor, and the bytes that must and do move. Raises Red when a timed step is wrong."""
    bench = Bench(shape, context)
    steps, graphs = steps_of(bench, context)
    seconds, failed = interleave(context.timer, steps, context.rounds, context.seconds_each / 4, must=tuple(steps))
    checked = check_all(bench, {name: step for name, step in steps.items() if name in seconds}, context)
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
    return {"ops": rows, "failed": failed, "triton_arch": arch, "checked": checked}
