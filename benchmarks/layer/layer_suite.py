"""Measures the experts and the whole layer against other implementations: time and memory, even and skewed routing.

"Expert path" is the part of a layer after its router: from expert ids to the weighted sum of the experts' outputs.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.cost import floor, kept_bytes, layer_backward, layer_forward, path_backward, path_forward
from benchmarks.layer.peers import DENSE, Contestant, build_all
from benchmarks.shared.agreement import (
    NAMES,
    Errors,
    Watch,
    WrongResult,
    check_dtype,
    checking,
    compare,
    reduced,
    reference,
)
from benchmarks.shared.records import LAYER, OURS
from benchmarks.shared.shapes import ROUTINGS, Batch, Shape, expert_weights, make_batch, unit_random
from benchmarks.shared.timing import Context, Rates, Step, interleave, kept_for_backward, peak_bytes, summary
from equimoe.moe import BalanceConfig, MoE, MoEConfig

#: number of batches that a contestant alternates between, so that routing changes from step to step
_BATCHES = 2
#: number of weights in the check of the whole layer on a CPU; the expert path is checked at full width
_CPU_WEIGHTS = 1e7

#: factor on the tolerance of peers that route, because they may compute router logits in 16 bits
PEERS_SLACK = 5.0
#: no optimizer runs here, so every backward is a step of its own
ONE = BalanceConfig(micro_batches=1)


def gate(shape: Shape, context: Context) -> tuple[dict[str, Any], dict[str, str]]:
    """Check all contestants at a reduced size; return our errors, and peers with wrong results and the reasons.

    Raise WrongResult if ours is wrong.
    """
    small, dtype, device = reduced(shape, context.device), context.dtype, context.device
    gate_up, down = expert_weights(small, dtype, device)
    contestants, refused = build_all(context.builders, small, gate_up, down)
    found: dict[str, Any] = {"size": [small.T, small.D, small.F, small.E, small.K]}
    for routing in ROUTINGS:
        batch = make_batch(small, routing, dtype, device)
        chosen = {name: (one, [batch]) for name, one in contestants.items() if one.routed and name not in refused}
        errors, wrong = check_all(chosen, small, dtype, context.backend)
        found[routing] = {key: list(pair) for key, pair in errors.items()}
        refused |= wrong
    with checking(LAYER, context.backend, small, torch.float32):
        found["layer"] = gate_layer(small, context)
    return found, refused


def gate_layer(small: Shape, context: Context) -> dict[str, list[float]]:
    """Compare the whole layer in fp32 with the reference backend in fp64. (In 16 bits, routing could differ.)"""
    while not context.timer.cuda and small.weights > _CPU_WEIGHTS and small.F > 64:
        small = replace(small, F=small.F // 2)
    layer = MoE(MoEConfig(small.D, small.F, small.E, small.K, balance=ONE, backend=context.backend)).to(context.device)
    with torch.no_grad():
        layer.router.weight.normal_(std=small.D**-0.5)
        for weight in layer.experts.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    oracle = MoE(MoEConfig(small.D, small.F, small.E, small.K, balance=ONE, backend="reference"))
    oracle = oracle.to(context.device).double()
    oracle.load_state_dict(layer.state_dict())
    chosen_TD, dy_TD = (
        decided(layer.router.weight, small, torch.float32),
        torch.randn(small.T, small.D, device=context.device),
    )
    results = []
    for module, dtype in ((layer, torch.float32), (oracle, torch.float64)):
        x_TD = chosen_TD.to(dtype).requires_grad_()
        y_TD = module(x_TD)
        names = [name for name, _ in module.named_parameters()]
        grads = torch.autograd.grad(y_TD, (x_TD, *module.parameters()), dy_TD.to(dtype))
        results.append((y_TD.detach(), *grads))
    seen = compare(results[0], results[1], ("layer output", "layer x", *(f"layer {n}" for n in names)), torch.float32)
    return {name: list(pair) for name, pair in seen.items()}


def decided(router_ED: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """Return tokens [T, D] whose routing does not depend on rounding.

    Of twice as many random tokens, these have the widest margin between their k-th and the next expert.
    """
    x_TD = unit_random((2 * shape.T, shape.D), dtype, router_ED.device)
    best_TE = (x_TD.double() @ router_ED.detach().double().T).sort(dim=1, descending=True).values
    lead_T = best_TE[:, shape.K - 1] - best_TE[:, min(shape.K, shape.E - 1)]
    return x_TD[lead_T.topk(shape.T).indices]


def build_layer(shape: Shape, gate_up: nn.Parameter, down: nn.Parameter, backend: str) -> Contestant:
    """Build our MoE module, with router, balance loss and statistics, around the given experts."""
    layer = MoE(MoEConfig(shape.D, 8, shape.E, shape.K, balance=ONE, backend=backend)).to(gate_up.device, gate_up.dtype)
    with torch.no_grad():
        layer.router.weight.normal_(std=shape.D**-0.5)
    layer.experts.gate_up_proj, layer.experts.down_proj = gate_up, down
    router = layer.router.weight
    assert {id(one) for one in layer.parameters()} == {id(one) for one in (router, gate_up, down)}

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return layer(x_TD)

    return Contestant(run, (router, gate_up, down), routed=False)


def expected_layer(batch: Batch, leaves: Sequence[Tensor], k: int, coefficient: float) -> tuple[Tensor, ...]:
    """Compute output and gradients of x, router, gate_up and down in fp64, including the balance loss."""
    router_ED, gate_up, down = leaves
    x_TD, wide_ED = (t.detach().double().requires_grad_() for t in (batch.x_TD, router_ED))
    scores_TE = torch.softmax(x_TD @ wide_ED.T, 1)
    (tokens, experts), (weights_TK, ids_TK) = scores_TE.shape, scores_TE.topk(k, 1)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    routed = replace(batch, weights_TK=weights_TK.detach(), ids_TK=ids_TK)
    y_TD, dx_TD, dweights_TK, *dweights = reference(routed, gate_up, down)
    load_E = ids_TK.reshape(-1).bincount(minlength=experts) * experts / (tokens * k)
    balance = coefficient * (load_E * scores_TE.mean(0)).sum()
    through_TD, drouter_ED = torch.autograd.grad((weights_TK * dweights_TK).sum() + balance, (x_TD, wide_ED))
    return y_TD, dx_TD + through_TD, drouter_ED, *dweights


def expected_dense(batch: Batch, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compute output and gradients of x and both weights in fp64, as one expert that gets all tokens."""
    ones_TK = torch.ones(batch.x_TD.shape[0], 1, device=batch.x_TD.device)
    one = replace(batch, weights_TK=ones_TK, ids_TK=torch.zeros_like(ones_TK, dtype=torch.int64))
    y_TD, dx_TD, _, dup, ddown = reference(one, *(leaf.detach()[None] for leaf in leaves))
    return y_TD, dx_TD, dup[0], ddown[0]


def right_results(name: str, one: Contestant, batch: Batch, shape: Shape) -> tuple[Sequence[str], Sequence[Tensor]]:
    """Return the names of the parts of ``one.step(batch)``, and their right values in fp64."""
    leaves = one.restore(one.leaves)
    if one.routed:
        return NAMES, reference(batch, *leaves)
    if name.startswith(DENSE):
        return ("output", "x", "gate_up", "down"), expected_dense(batch, leaves)
    expected = expected_layer(batch, leaves, shape.K, ONE.coefficient if name in (OURS, LAYER) else 0.0)
    return ("output", "x", "router", "gate_up", "down"), expected


def check_all(
    chosen: dict[str, tuple[Contestant, list[Batch]]],
    shape: Shape,
    dtype: torch.dtype,
    backend: str,
    watch: Watch | None = None,
) -> tuple[Errors, dict[str, str]]:
    """Check every contestant on its batches; return our largest errors, and peers with wrong results and the reasons.

    ``watch`` recorded our timed runs, which must have returned the checked results. Raise WrongResult if ours is wrong.
    """
    watch = watch or Watch(all_inputs(chosen))
    errors: Errors = {}
    refused: dict[str, str] = {}
    shared: dict[int, tuple[Sequence[str], Sequence[Tensor]]] = {}  # right results per batch, for given routing
    for name, (one, batches) in chosen.items():
        ours = name in (OURS, LAYER)
        routes = not (ours or one.routed or name.startswith(DENSE))
        try:
            with checking(name, backend, shape, dtype):
                for index, batch in enumerate(batches):
                    made = one.step(batch)
                    if not routes:
                        watch.see(name, made)
                        check_dtype(made[0], dtype)
                    if one.routed and index not in shared:
                        shared[index] = right_results(OURS, chosen[OURS][0], batch, shape)
                    names, expected = shared[index] if one.routed else right_results(name, one, batch, shape)
                    seen = compare(made, expected, names, dtype, PEERS_SLACK if routes else 1.0)
                    if ours:
                        errors |= {kind: max(pair, errors.get(kind, pair)) for kind, pair in seen.items()}
                watch.check_inputs(name)
                watch.check_results(name, last=len(batches))
        except WrongResult as error:
            if ours:
                raise
            refused[name] = f"disagrees: {error}"
    return errors, refused


def make_step(one: Contestant, batches: list[Batch]) -> Step:
    turns = cycle(batches)

    def timed(mark: Callable[[], None]) -> Any:
        batch = next(turns)
        inputs = (batch.x_TD, batch.weights_TK) if one.routed else (batch.x_TD,)
        mark()
        y_TD = one.run(batch.x_TD, batch.weights_TK, batch.ids_TK)
        mark()
        grads = torch.autograd.grad(y_TD, (*inputs, *one.leaves), batch.dy_TD)
        mark()
        return y_TD, grads

    return timed


def memory(one: Contestant, batch: Batch, device: torch.device) -> dict[str, int | None]:
    """Return the memory saved for the backward pass, and the peaks of a forward and of a whole step."""

    def forward() -> Tensor:
        return one.run(batch.x_TD, batch.weights_TK, batch.ids_TK)

    whole = make_step(one, [batch])
    return {
        "kept_bytes": kept_for_backward(forward, one.leaves),
        "peak_forward_bytes": peak_bytes(forward, device),
        "peak_step_bytes": peak_bytes(lambda: whole(lambda: None), device),
    }


def measure(shape: Shape, context: Context, refused: dict[str, str]) -> dict[str, Any]:
    """Measure all contestants on one shape."""
    gate_up, down = expert_weights(shape, context.dtype, context.device)
    builders = {name: build for name, build in context.builders.items() if name not in refused}
    contestants, absent = build_all(builders, shape, gate_up, down)
    contestants[LAYER] = build_layer(shape, gate_up, down, context.backend)
    absent = {**refused, **absent}
    result: dict[str, Any] = {"floor": floors(shape, context.rates), "kept_formula_bytes": kept_bytes(shape)}
    for routing in ROUTINGS:
        batches = [make_batch(shape, routing, context.dtype, context.device) for _ in range(_BATCHES)]
        chosen = {
            name: (one, inputs(name, one, batches, shape, context.dtype))
            for name, one in contestants.items()
            if name not in absent and (one.routed or routing == "uniform")
        }
        steps = {name: make_step(*each) for name, each in chosen.items()}
        watch = Watch(all_inputs(chosen))
        seconds, failed = interleave(
            context.timer, steps, context.rounds, context.seconds_each, must=(OURS, LAYER), see=watch.see
        )
        timed = {name: chosen[name] for name in seconds}
        failed |= check_all(timed, shape, context.dtype, context.backend, watch)[1]
        absent.update(failed)
        result[routing] = {}
        for name, parts in seconds.items():
            if name in failed:
                continue
            result[routing][name] = figures(shape, parts)
            if routing == "uniform":
                one, own = chosen[name]
                result[routing][name].update(memory(one, own[0], context.device))
        del batches, steps, chosen
    for routing in ROUTINGS:  # a contestant that is wrong for one routing is not shown for the other
        result[routing] = {name: row for name, row in result[routing].items() if name not in absent}
    result["absent"] = absent
    return result


def inputs(name: str, one: Contestant, batches: list[Batch], shape: Shape, dtype: torch.dtype) -> list[Batch]:
    """Return a contestant's batches. Our layer routes by itself, so its tokens' routing must not depend on rounding."""
    if name != LAYER:
        return batches
    return [replace(batch, x_TD=decided(one.leaves[0], shape, dtype).requires_grad_()) for batch in batches]


def all_inputs(chosen: dict[str, tuple[Contestant, list[Batch]]]) -> dict[str, Tensor]:
    """Return all tensors that our contestants read: batches and weights."""
    found: dict[str, Tensor] = {}
    for name, (one, batches) in chosen.items():
        if name in (OURS, LAYER):
            for index, batch in enumerate(batches):
                found |= batch.tensors(f"{name}'s batch {index} ")
            found |= {f"{name}'s weight {index}": leaf for index, leaf in enumerate(one.leaves)}
    return found


def figures(shape: Shape, parts: list[list[float]]) -> dict[str, Any]:
    """Summarise forward, backward and total time; forward has 6*T*K*F*D operations, backward 12*T*K*F*D."""
    forward, backward = ([run[i] for run in parts] for i in (0, 1))
    found: dict[str, Any] = {
        "forward": summary(forward),
        "backward": summary(backward),
        "total": summary([sum(run) for run in parts]),
    }
    work = {"forward": shape.forward_flops, "backward": shape.backward_flops}
    work["total"] = sum(work.values())
    for part, flops in work.items():
        found[part]["tflops"] = flops / found[part]["median_us"] / 1e6
    return found


def floors(shape: Shape, rates: Rates) -> dict[str, float]:
    """Return lower bounds in microseconds for the expert path and the whole layer, at the measured rates."""
    stages = {
        "path_forward_us": path_forward(shape),
        "path_backward_us": path_backward(shape),
        "layer_forward_us": layer_forward(shape),
        "layer_backward_us": layer_backward(shape),
    }
    return {name: floor(each, rates) * 1e6 for name, each in stages.items()}
