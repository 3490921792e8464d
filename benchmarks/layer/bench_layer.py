"""Compares forward and backward of one Mixture-of-Experts layer with other libraries, on the CPU.

    python benchmarks/layer/bench_layer.py [--rounds N] [--json FILE] [-T 4096 -D 512 -F 1024 -E 16 -K 2]

All contestants have the same weights, inputs and number of threads. They run in one process and take turns; each round
starts with another one. A ratio is the median over rounds of the other's time divided by ours, so that other load on
the machine affects both alike. Every round has new tokens, as in training, so the experts' loads change from round to
round. Outputs and gradients of the first and the last timed round are compared with fp64. If ours are wrong, nothing is
shown; a peer with wrong results is left out and named.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
from torch import Tensor, nn

from benchmarks.layer.layer_suite import ONE, decided, expected_dense, expected_layer
from benchmarks.shared.agreement import Errors, WrongResult, check_dtype, checking, compare
from benchmarks.shared.options import CORES, Parser, file, positive, threads
from benchmarks.shared.records import OURS, facts
from benchmarks.shared.shapes import Batch, Shape
from equimoe.moe import MoE, MoEConfig

DENSE = "dense"
#: factor on the tolerance of peers, because they may compute router logits in 16 bits
PEERS_SLACK = 5.0
#: kind of weight -> endings of its names in all contestants
WEIGHTS = {
    "router": ("router.weight", "gate.wg.weight"),
    "gate_up": ("experts.gate_up_proj", "gate_up.weight"),
    "down": ("experts.down_proj", ".down.weight"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"T": (4096, "tokens"), "D": (512, "hidden size"), "F": (1024, "expert width"), "E": (16, "experts")}
SIZES["K"] = (2, "experts per token")


class SwiGLU(nn.Module):
    """The usual dense feed-forward of three linear layers."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class FusedSwiGLU(nn.Module):
    """The same with gate and up as one product."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def build_ours(size: Shape, backend: str = "auto") -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(size.D, size.F, size.E, size.K, balance=ONE, backend=backend))


def build_transformers(size: Shape, ours: MoE, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=size.D,
        moe_intermediate_size=size.F,
        num_experts=size.E,
        num_experts_per_tok=size.K,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        block.experts.down_proj.copy_(ours.experts.down_proj)
    return block


def build_deepspeed(size: Shape, ours: MoE) -> nn.Module:
    import logging

    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from deepspeed.utils import logger

    class OutputOnly(DeepSpeedMoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    logger.setLevel(logging.ERROR)
    # without a process group, DeepSpeed does not build or load its communication library
    layer = OutputOnly(
        size.D,
        FusedSwiGLU(size.D, size.F),
        num_experts=size.E,
        k=size.K,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    )
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(ours.router.weight)
        for index, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(ours.experts.gate_up_proj[index])
            expert.down.weight.copy_(ours.experts.down_proj[index])
    return layer


def contestants(size: Shape) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build the layers, ours first; return them by name, and the reason for each that is missing."""
    ours = build_ours(size)
    layers: dict[str, nn.Module] = {OURS: ours, DENSE: SwiGLU(size.D, size.K * size.F)}
    layers["dense, fused gate_up"] = FusedSwiGLU(size.D, size.K * size.F)
    peers: dict[str, Callable[[], nn.Module]] = {
        "transformers Qwen3-MoE, eager": lambda: build_transformers(size, ours, "eager"),
        "transformers Qwen3-MoE, grouped_mm": lambda: build_transformers(size, ours, "grouped_mm"),
        "DeepSpeed MoE, no drop": lambda: build_deepspeed(size, ours),
    }
    missing = {}
    for name, build in peers.items():
        try:
            layers[name] = build()
        except ImportError as error:
            missing[name] = f"not installed ({error.name or error})"
    return layers, missing


def inputs(size: Shape, dtype: torch.dtype, router_ED: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return hidden states [1, T, D] whose routing does not depend on rounding, and the gradient of the output."""
    torch.manual_seed(seed)
    x_TD = decided(router_ED, size, dtype)
    return x_TD[None].requires_grad_(), torch.randn(1, size.T, size.D).to(dtype)


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Run the layer; return output and gradients by kind, for the weights that :data:`WEIGHTS` recognises."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(dy)
    named = [(name, p.grad) for name, p in layer.named_parameters() if p.grad is not None]
    found = {"output": y.detach()[0], "x": x.grad[0]}
    for kind, endings in WEIGHTS.items():
        grads = [grad for name, grad in named if name.endswith(endings)]
        if grads:
            found[kind] = grads[0] if len(grads) == 1 else torch.stack(grads)  # DeepSpeed has a module per expert
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return found


def expected(name: str, ours: MoE, layer: nn.Module, x: Tensor, dy: Tensor, size: Shape) -> dict[str, Tensor]:
    """Compute in fp64 what :func:`results` should return. Only our layer includes a balance loss."""
    batch = Batch(x[0], x.new_empty(0), x.new_empty(0), dy[0])
    if name.startswith(DENSE):
        first = [layer.gate.weight, layer.up.weight] if isinstance(layer, SwiGLU) else [layer.gate_up.weight]
        y, dx, *_ = expected_dense(batch, (torch.cat(first), layer.down.weight))
        return {"output": y, "x": dx}
    leaves = (ours.router.weight, ours.experts.gate_up_proj, ours.experts.down_proj)
    right = expected_layer(batch, leaves, size.K, ONE.coefficient if name == OURS else 0.0)
    return dict(zip(("output", "x", *WEIGHTS), right, strict=True))


def check(layers: dict[str, nn.Module], size: Shape, dtype: str, seeds: Sequence[int]) -> tuple[Errors, dict[str, str]]:
    """Check all layers on the inputs of ``seeds``; return our errors, and peers with wrong results and the reasons.

    Raise SystemExit with one line if ours is wrong.
    """
    own = (OURS, *(name for name in layers if name.startswith(DENSE)))
    errors: Errors = {}
    wrong: dict[str, str] = {}
    for seed in seeds:
        x, dy = inputs(size, DTYPES[dtype], layers[OURS].router.weight, seed)
        for name, layer in layers.items():
            slack = 1.0 if name in own else PEERS_SLACK
            try:
                with checking(name, "auto", size, DTYPES[dtype]):
                    right = expected(name, layers[OURS], layer, x, dy, size)
                    made = {kind: value for kind, value in results(layer, x, dy).items() if kind in right}
                    if name == OURS:
                        check_dtype(made["output"], DTYPES[dtype])
                    seen = compare(
                        list(made.values()), [right[kind] for kind in made], list(made), DTYPES[dtype], slack
                    )
            except WrongResult as error:
                if name == OURS:
                    raise SystemExit(f"WRONG: {error}; no measurements are shown") from None
                wrong[name] = f"disagrees: {error}"
            else:
                if name == OURS:
                    errors |= {kind: max(pair, errors.get(kind, pair)) for kind, pair in seen.items()}
    return errors, wrong


def measure(layers: dict[str, nn.Module], size: Shape, dtype: str, rounds: int, warmup: int) -> dict[str, list[float]]:
    """Return the seconds of forward and backward in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for index in range(-warmup, rounds):
        x, dy = inputs(size, DTYPES[dtype], layers[OURS].router.weight, seed=warmup + index + 1)
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            layers[name](x).backward(dy)
            stop = time.perf_counter()
            layers[name].zero_grad(set_to_none=True)
            x.grad = None
            if index >= 0:
                seconds[name].append(stop - start)
    return seconds


def bench(size: Shape, dtype: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Check and measure all layers in one dtype."""
    layers, missing = contestants(size)
    layers = {name: layer.to(DTYPES[dtype]).train() for name, layer in layers.items()}
    errors, wrong = check(layers, size, dtype, sorted({warmup + 1, warmup + rounds}))
    layers = {name: layer for name, layer in layers.items() if name not in wrong}
    seconds = measure(layers, size, dtype, rounds, warmup)
    return {"errors": errors, "missing": {**missing, **wrong}, "seconds": seconds}


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Return the median over rounds of the time of ``name`` divided by ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


def report(size: Shape, dtype: str, figures: dict[str, Any]) -> dict[str, float]:
    """Print the table of one dtype; return the ratios by name."""
    seconds = figures["seconds"]
    ratios = {name: ratio(seconds, name) for name in seconds}
    worst = max(norm for norm, _ in figures["errors"].values())
    print(f"\n{dtype}: T={size.T} D={size.D} F={size.F} E={size.E} K={size.K}, forward and backward")
    print(f"largest relative error of our output and gradients: {worst:.1e}")
    print(f"{'layer':36}{'median ms':>10}{'min ms':>9}{'GFLOP/s':>9}{'time/ours':>11}")
    for name, times in seconds.items():
        middle, least = statistics.median(times), min(times)
        speed = (size.forward_flops + size.backward_flops) / middle / 1e9
        print(f"{name:36}{middle * 1e3:10.1f}{least * 1e3:9.1f}{speed:9.0f}{ratios[name]:11.2f}")
    for name, reason in figures["missing"].items():
        print(f"{name:36}{reason}")
    return ratios


def summary(ratios: dict[str, dict[str, float]]) -> str:
    """Return the last line: for each dtype, the smallest ratio to a peer and to a dense feed-forward."""

    def least(dtype: str, dense: bool) -> str:
        chosen = [r for name, r in ratios[dtype].items() if name != OURS and name.startswith(DENSE) == dense]
        return f"{min(chosen):.2f}" if chosen else "n/a"

    peers, denses = (" ".join(f"{d} {least(d, dense)}" for d in ratios) for dense in (False, True))
    return f"ratio to fastest peer: {peers}; to dense: {denses}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds per dtype (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed rounds before them (default %(default)s)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="(default %(default)s)")
    parser.add_argument("--json", type=file, metavar="FILE", help="write all results to FILE")
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"-{name}", type=positive, default=default, help=f"{meaning} (default %(default)s)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    sizes = {name: getattr(args, name) for name in SIZES}
    size, machine = Shape("layer", **sizes), facts("transformers", "deepspeed")
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    figures = {dtype: bench(size, dtype, args.rounds, args.warmup) for dtype in DTYPES}
    ratios = {dtype: report(size, dtype, figures[dtype]) for dtype in DTYPES}
    line = summary(ratios)
    if args.json:
        result = {**machine, "size": sizes, "figures": figures, "ratios": ratios, "summary": line}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{line}")


if __name__ == "__main__":
    main()
