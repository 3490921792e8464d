"""Forward and backward of one Mixture-of-Experts layer against its peers, on the CPU.

    python benchmarks/bench_layer.py [--rounds N] [--json FILE] [-T 4096 -H 512 -F 1024 -E 16 -K 2]

All contestants have the same weights, inputs and number of threads, live in one process, and take turns in every
round, each round starting with another one; a ratio is the median over rounds of peer time / our time, so that what
the machine does meanwhile meets all alike. Every round has new tokens, as every step of a training run has, so the
experts' loads change and nothing can be tuned to them. Output and gradients of all are compared with fp64, on the
inputs of the first and the last timed round: if ours are wrong, there are no figures; a peer that disagrees is left
out, and named.
"""

# T tokens, H hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import checkout  # noqa: F401  (first: it decides which equimoe is imported)
import torch
from agreement import Errors, Red, about, check_dtype, compare
from layer_suite import decided, expected_dense, expected_layer
from options import CORES, Parser, file, positive, threads
from shapes import Batch, Shape
from torch import Tensor, nn
from workloads import LayerSize, environment

from equimoe.moe import BalanceConfig, MoE, MoEConfig

OURS, DENSE = "equimoe", "dense"
#: peers may compute router logits in 16 bits, which changes weights by more than a product's rounding
PEERS_SLACK = 5.0
#: how the names of the weights end, here and in peers
WEIGHTS = {
    "router": ("router.weight", "gate.wg.weight"),
    "gate_up": ("experts.gate_up_proj", "gate_up.weight"),
    "down": ("experts.down_proj", ".down.weight"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: nothing is updated here: every backward is a step of its own
ONE = BalanceConfig(micro_batches=1)


class SwiGLU(nn.Module):
    """The usual feed-forward of three linear layers."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class FusedSwiGLU(nn.Module):
    """The same with gate and up in one product."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


def build_ours(size: LayerSize, backend: str = "auto") -> MoE:
    torch.manual_seed(0)
    return MoE(MoEConfig(size.H, size.F, size.E, size.K, balance=ONE, backend=backend))


def build_transformers(size: LayerSize, ours: MoE, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=size.H,
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


def build_deepspeed(size: LayerSize, ours: MoE) -> nn.Module:
    import logging

    from deepspeed.moe.layer import MoE as DeepSpeedMoE
    from deepspeed.utils import logger

    class OutputOnly(DeepSpeedMoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    logger.setLevel(logging.ERROR)
    # one expert-parallel rank needs no process group, so DeepSpeed's communication library is never built or loaded
    layer = OutputOnly(
        size.H,
        FusedSwiGLU(size.H, size.F),
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


def contestants(size: LayerSize) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers by name, ours first, and the reason for each that is missing."""
    ours = build_ours(size)
    layers: dict[str, nn.Module] = {OURS: ours, DENSE: SwiGLU(size.H, size.K * size.F)}
    layers["dense, fused gate_up"] = FusedSwiGLU(size.H, size.K * size.F)
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


def inputs(size: LayerSize, dtype: torch.dtype, router_EH: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states [1, T, H] that no rounding routes elsewhere, and the gradient that arrives at the output."""
    torch.manual_seed(seed)
    x_TH = decided(router_EH, shape_of(size), dtype)
    return x_TH[None].requires_grad_(), torch.randn(1, size.T, size.H).to(dtype)


def shape_of(size: LayerSize) -> Shape:
    return Shape("layer", size.T, size.H, size.F, size.E, size.K)


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output and gradients by what they are of; of the weights, those that can be recognised."""
    x.grad = None
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(dy)
    named = [(name, p.grad) for name, p in layer.named_parameters() if p.grad is not None]
    found = {"output": y.detach()[0], "x": x.grad[0]}
    for kind, endings in WEIGHTS.items():
        grads = [grad for name, grad in named if name.endswith(endings)]
        if grads:
            found[kind] = grads[0] if len(grads) == 1 else torch.stack(grads)  # one for each expert
    x.grad = None
    layer.zero_grad(set_to_none=True)
    return found


def expected(name: str, ours: MoE, layer: nn.Module, x: Tensor, dy: Tensor, size: LayerSize) -> dict[str, Tensor]:
    """What :func:`results` should return, in fp64; only our layer has a balance loss."""
    batch = Batch(x[0], x.new_empty(0), x.new_empty(0), dy[0])
    if name.startswith(DENSE):
        first = [layer.gate.weight, layer.up.weight] if isinstance(layer, SwiGLU) else [layer.gate_up.weight]
        y, dx, *_ = expected_dense(batch, (torch.cat(first), layer.down.weight))
        return {"output": y, "x": dx}
    leaves = (ours.router.weight, ours.experts.gate_up_proj, ours.experts.down_proj)
    right = expected_layer(batch, leaves, size.K, ONE.coefficient if name == OURS else 0.0)
    return dict(zip(("output", "x", *WEIGHTS), right, strict=True))


def check(
    layers: dict[str, nn.Module], size: LayerSize, dtype: str, seeds: Sequence[int]
) -> tuple[Errors, dict[str, str]]:
    """Our errors, and the peers that disagree and how. Raises SystemExit with one line where ours are too large."""
    own = (OURS, *(name for name in layers if name.startswith(DENSE)))
    errors: Errors = {}
    wrong: dict[str, str] = {}
    for seed in seeds:
        x, dy = inputs(size, DTYPES[dtype], layers[OURS].router.weight, seed)
        for name, layer in layers.items():
            slack = 1.0 if name in own else PEERS_SLACK
            try:
                with about(name, "auto", shape_of(size), DTYPES[dtype]):
                    right = expected(name, layers[OURS], layer, x, dy, size)
                    made = {kind: value for kind, value in results(layer, x, dy).items() if kind in right}
                    if name == OURS:
                        check_dtype(made["output"], DTYPES[dtype])
                    seen = compare(
                        list(made.values()), [right[kind] for kind in made], list(made), DTYPES[dtype], slack
                    )
            except Red as error:  # a peer may fail in any way that it likes
                if name == OURS:
                    raise SystemExit(f"WRONG: {error}; no figures") from None
                wrong[name] = f"disagrees: {error}"
            else:
                if name == OURS:
                    errors |= {kind: max(pair, errors.get(kind, pair)) for kind, pair in seen.items()}
    return errors, wrong


def measure(
    layers: dict[str, nn.Module], size: LayerSize, dtype: str, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds per round of forward and backward."""
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


def bench(size: LayerSize, dtype: str, rounds: int, warmup: int) -> dict[str, Any]:
    """All figures of one dtype."""
    layers, missing = contestants(size)
    layers = {name: layer.to(DTYPES[dtype]).train() for name, layer in layers.items()}
    errors, wrong = check(layers, size, dtype, sorted({warmup + 1, warmup + rounds}))
    layers = {name: layer for name, layer in layers.items() if name not in wrong}
    seconds = measure(layers, size, dtype, rounds, warmup)
    return {"errors": errors, "missing": {**missing, **wrong}, "seconds": seconds}


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """The median over rounds of the time of ``name`` over ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


def report(size: LayerSize, dtype: str, figures: dict[str, Any]) -> dict[str, float]:
    """Print one dtype's table; the ratios by name."""
    seconds = figures["seconds"]
    ratios = {name: ratio(seconds, name) for name in seconds}
    worst = max(norm for norm, _ in figures["errors"].values())
    print(f"\n{dtype}: T={size.T} H={size.H} F={size.F} E={size.E} K={size.K}, forward and backward")
    print(f"our output and gradients against fp64: relative error at most {worst:.1e}")
    print(f"{'layer':36}{'median ms':>10}{'min ms':>9}{'GFLOP/s':>9}{'time/ours':>11}")
    for name, times in seconds.items():
        middle, least = statistics.median(times), min(times)
        speed = size.flops / middle / 1e9
        print(f"{name:36}{middle * 1e3:10.1f}{least * 1e3:9.1f}{speed:9.0f}{ratios[name]:11.2f}")
    for name, reason in figures["missing"].items():
        print(f"{name:36}{reason}")
    return ratios


def summary(ratios: dict[str, dict[str, float]]) -> str:
    """The last line: the smallest ratio to a peer, and to a dense feed-forward, of each dtype."""

    def least(dtype: str, dense: bool) -> str:
        chosen = [r for name, r in ratios[dtype].items() if name != OURS and name.startswith(DENSE) == dense]
        return f"{min(chosen):.2f}" if chosen else "n/a"

    peers, denses = (" ".join(f"{d} {least(d, dense)}" for d in ratios) for dense in (False, True))
    return f"ratio to fastest peer: {peers}; to dense: {denses}"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds per dtype (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default %(default)s)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="(default %(default)s)")
    parser.add_argument("--json", type=file, metavar="FILE", help="write hardware, versions, commit and every figure")
    LayerSize.add_arguments(parser)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    size = LayerSize.from_arguments(args)
    facts = environment(("transformers", "deepspeed"))
    print(", ".join(f"{key}: {value}" for key, value in facts.items()))
    figures = {dtype: bench(size, dtype, args.rounds, args.warmup) for dtype in DTYPES}
    ratios = {dtype: report(size, dtype, figures[dtype]) for dtype in DTYPES}
    line = summary(ratios)
    if args.json:
        with args.json.open("w") as out:
            json.dump(
                {**facts, "size": asdict(size), "figures": figures, "ratios": ratios, "summary": line}, out, indent=1
            )
    print(f"\n{line}")


if __name__ == "__main__":
    main()
