"""Measures every op alone, and compares it with its lower bound and with the bytes that its Triton kernels move."""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from importlib import util
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cost import floor, ops
from benchmarks.shared.agreement import (
    NAMES,
    Errors,
    Tally,
    Watch,
    check_choice,
    check_dtype,
    check_order,
    checking,
    compare,
    judge,
    reduced,
    reference,
    right_order,
)
from benchmarks.shared.shapes import Shape, expert_weights, make_batch, spread_logits, unit_random
from benchmarks.shared.timing import Context, Step, graphed, interleave, summary
from equimoe.kernels.expert_mlp import expert_mlp
from equimoe.kernels.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from equimoe.kernels.permute import combine, permute
from equimoe.kernels.router_logits import router_logits
from equimoe.kernels.sort_by_expert import sort_by_expert
from equimoe.kernels.topk_gate import GateOutput, topk_gate

#: short ops, timed as CUDA graphs, because launch overhead would dominate
GRAPHED = ("router_logits", "topk_gate", "sort_by_expert", "permute", "combine")


class Bench:
    """The inputs of all ops for one shape, and the calls to measure."""

    def __init__(self, shape: Shape, context: Context, routing: str = "uniform") -> None:
        dtype, device, self.backend = context.dtype, context.device, context.backend
        self.shape = shape
        self.batch = make_batch(shape, routing, dtype, device)
        self.gate_up, self.down = expert_weights(shape, dtype, device)
        self.router_ED = unit_random((shape.E, shape.D), torch.float32, device, shape.D**-0.5).requires_grad_()
        self.logits_TE = spread_logits(shape, device)
        self.dlogits_TE = unit_random((shape.T, shape.E), torch.float32, device)
        self.order = right_order(self.batch.ids_TK, shape.E)  # not our sort, whose errors would reach other ops
        self.source_R = self.order.order_R // shape.K
        widths = {"rows_RD": shape.D, "dpre_RF": 2 * shape.F, "h_RF": shape.F}
        for name, width in widths.items():
            setattr(self, name, unit_random((shape.rows, width), dtype, device))

    rows_RD: Tensor
    dpre_RF: Tensor
    h_RF: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Return all tensors that the calls read, with names for error messages."""
        order = {f"order's {name}": value for name, value in self.order._asdict().items()}
        weights = {"gate_up": self.gate_up, "down": self.down, "router": self.router_ED}
        logits = {"logits": self.logits_TE, "gradient of logits": self.dlogits_TE}
        rows = {"rows": self.rows_RD, "gradient of the first product": self.dpre_RF, "hidden rows": self.h_RF}
        return {**self.batch.tensors(), **weights, **logits, **rows, **order, "source rows": self.source_R}

    def logits_forward(self) -> Tensor:
        return router_logits(self.batch.x_TD, self.router_ED, backend=self.backend)

    def logits_backward(self, y_TE: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y_TE, (self.batch.x_TD, self.router_ED), self.dlogits_TE)

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
        """Return forward and backward of the ops whose directions are both timed."""
        return {
            "router_logits": (self.logits_forward, self.logits_backward),
            "topk_gate": (self.gate_forward, self.gate_backward),
            "expert_mlp": (self.mlp_forward, self.mlp_backward),
        }

    def products(self) -> dict[str, Callable[[], Tensor]]:
        """Return the six grouped products of a layer's forward and backward."""
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
        """Return the ops that are timed in one direction."""
        x_TD, how = self.batch.x_TD.detach(), {"backend": self.backend}
        return {
            "sort_by_expert": lambda: sort_by_expert(self.batch.ids_TK, self.shape.E, **how),
            "permute": lambda: permute(x_TD, self.order, **how),
            "combine": lambda: combine(self.rows_RD, self.order, **how),
            **self.products(),
        }


def _op(step: str) -> str:
    """Return the op that a step runs."""
    return step.removesuffix(" total").removesuffix(" forward")


class Check:
    """Compares everything that a bench runs with fp64."""

    def __init__(self, bench: Bench, context: Context) -> None:
        self.bench, self.dtype = bench, context.dtype
        self.source_R = bench.source_R
        bounds = bench.order.offsets_E.tolist()
        self.groups = [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]

    def __call__(self, name: str, step: Step, watch: Watch) -> Errors:
        """Run the step ``name`` and return its errors. Raise WrongResult if it, or a recorded run, is wrong."""
        bench, op = self.bench, _op(name)
        with checking(op, bench.backend, bench.shape, self.dtype):
            made = step(lambda: None)
            watch.see(name, made)
            watch.check_inputs(name)
            watch.check_results(name)
            if op == "sort_by_expert":
                check_order(made, bench.order)
                return {}
            if op in bench.pairs():
                forward, grads = (made, None) if name.endswith(" forward") else made
                check = {"router_logits": self.logits, "topk_gate": self.choice, "expert_mlp": self.mlp}[op]
                seen = check(forward, grads)
            elif op in bench.products():
                check_dtype(made, self.dtype)
                seen = judge({"output": self.product(op, made)}, self.dtype)
            else:
                check_dtype(made, self.dtype)
                seen = compare([made], [self.moved(op, self._input(op))], ["output"], self.dtype)
        return {f"{op} {part}": pair for part, pair in seen.items()}

    def logits(self, y_TE: Tensor, grads: tuple[Tensor, ...] | None) -> Errors:
        """Check logits and the weight's gradient to fp32 accuracy, and the gradient of x to that of its dtype."""
        bench = self.bench
        check_dtype(y_TE, torch.float32)
        x_TD, weight_ED, dy_TE = (t.detach().double() for t in (bench.batch.x_TD, bench.router_ED, bench.dlogits_TE))
        found = compare([y_TE], [x_TD @ weight_ED.T], ["output"], torch.float32)
        if grads is not None:
            found |= compare(grads[:1], [dy_TE @ weight_ED], ["gradient of x"], self.dtype)
            found |= compare(grads[1:], [dy_TE.T @ x_TD], ["gradient of weight"], torch.float32)
        return found

    def choice(self, found: GateOutput, grads: tuple[Tensor, ...] | None) -> Errors:
        dlogits = None if grads is None else grads[0]
        return check_choice(found, dlogits, self.bench.logits_TE, self.bench.batch.weights_TK.detach())

    def mlp(self, y_TD: Tensor, grads: tuple[Tensor, ...] | None) -> Errors:
        check_dtype(y_TD, self.dtype)
        made = (y_TD, *(grads or ()))
        expected = reference(self.bench.batch, self.bench.gate_up, self.bench.down)[: len(made)]
        names = ("output", *(f"gradient of {name}" for name in NAMES[1:]))[: len(made)]
        return compare(made, expected, names, self.dtype)

    def product(self, name: str, made: Tensor) -> Tally:
        """Compare one grouped product expert by expert."""
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
        """Compute permute or combine of ``given``. Each is the other's gradient."""
        if op == "permute":
            return given[self.source_R]
        s = self.bench.shape
        return given.double()[self.bench.order.inverse_SK.reshape(-1)].view(s.T, s.K, -1).sum(1)

    def _input(self, op: str) -> Tensor:
        return self.bench.batch.x_TD.detach() if op == "permute" else self.bench.rows_RD

    def gradients(self) -> Errors:
        """Check the gradients of the ops whose backward is not timed."""
        b, how = self.bench, {"backend": self.bench.backend}
        found: Errors = {}
        for op, run, back, dy in (
            ("permute", permute, "combine", b.rows_RD),
            ("combine", combine, "permute", b.batch.dy_TD),
        ):
            with checking(op, b.backend, b.shape, self.dtype):
                leaf = self._input(op).clone().requires_grad_()
                made = torch.autograd.grad(run(leaf, b.order, **how), leaf, dy)
                seen = compare(made, [self.moved(back, dy)], ["gradient"], self.dtype)
            found[f"{op} gradient"] = seen["gradient"]
        with checking("grouped_gemm", b.backend, b.shape, self.dtype):
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


def check_all(bench: Bench, steps: dict[str, Step], context: Context, watch: Watch) -> dict[str, list[float]]:
    """Check every step, and the gradients that no step computes; return the errors."""
    for name in steps:
        with checking(_op(name), bench.backend, bench.shape, context.dtype):
            watch.check_inputs(name)
    check, found = Check(bench, context), {}
    for name, step in steps.items():
        found |= check(name, step, watch)
    return {name: list(pair) for name, pair in (found | check.gradients()).items()}


def gate(shape: Shape, context: Context) -> dict[str, Any]:
    """Check every op at a reduced size with skewed routing, and return the errors; this precedes the measurements."""
    bench = Bench(reduced(shape, context.device), context, routing="zipf")
    return check_all(bench, steps_of(bench, context)[0], context, Watch(bench.inputs()))


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
    """Return the steps to time, and the names of those that are CUDA graphs. "<op> total" does both directions."""
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
    """Return medians and spreads by op and direction. Backward = total - forward, of each run or of the medians."""
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


def triton_bytes(bench: Bench, context: Context) -> dict[str, int]:
    """Return for each op the bytes of the tensors that its Triton kernels read or write.

    On a CPU, these are the launches for sm_90, which do not run. Empty without Triton or with its interpreter.
    """
    if not util.find_spec("triton") or os.environ.get("TRITON_INTERPRET") == "1":
        return {}
    from triton.backends.compiler import GPUTarget

    from benchmarks.kernels.launches import on_chip, recording

    on_gpu, bench = context.timer.cuda, copy(bench)
    bench.backend = "triton"
    found = {}
    with nullcontext() if on_gpu else on_chip("sm_90", GPUTarget("cuda", 90, 32)):
        for op, call in bench.calls().items():
            with recording(launch=on_gpu) as launches:
                call()
            found[op] = sum(one.bytes for one in launches)
        for op, (forward, backward) in bench.pairs().items():
            with recording(launch=on_gpu) as launches:
                y = forward()
            found[f"{op} forward"] = sum(one.bytes for one in launches)
            with recording(launch=on_gpu) as launches:
                backward(y)
            found[f"{op} backward"] = sum(one.bytes for one in launches)
    return found


def measure(shape: Shape, context: Context) -> dict[str, Any]:
    """Measure all ops: time, lower bound, bytes that are needed, and bytes that Triton kernels move."""
    bench = Bench(shape, context)
    steps, graphs = steps_of(bench, context)
    watch = Watch(bench.inputs())
    seconds, failed = interleave(
        context.timer, steps, context.rounds, context.seconds_each / 4, must=tuple(steps), see=watch.see
    )
    checked = check_all(bench, {name: step for name, step in steps.items() if name in seconds}, context, watch)
    least, moved, medians = ops(shape), triton_bytes(bench, context), times(seconds)
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
            "triton_bytes": moved.get(name),
        }
    return {"ops": rows, "failed": failed, "checked": checked}
