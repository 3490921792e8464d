"""Forward and backward of one Mixture-of-Experts layer against its peers, on the CPU.

    python benchmarks/bench_layer.py [--rounds N] [--json FILE] [-T 4096 -H 512 -F 1024 -E 16 -K 2]

All contestants have the same weights, inputs and number of threads, live in one process, and take turns in every
round, each round starting with another one; a ratio is the median over rounds of peer time / our time, so that what
the machine does meanwhile meets all alike. Every round has new tokens, as every step of a training run has, so the
experts' loads change and nothing can be tuned to them. Nothing is reported unless our layer agrees with its reference.
"""

# T tokens, H hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import checkout  # noqa: F401  (first: it decides which equimoe is imported)
import torch
from options import CORES, Parser, file, positive, threads
from torch import Tensor, nn
from workloads import LayerSize, environment, layer_inputs

from equimoe.moe import MoE, MoEConfig

OURS, DENSE = "equimoe", "dense"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
#: relative error, by norm, that our layer may have against its reference backend
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}


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
    return MoE(MoEConfig(size.H, size.F, size.E, size.K, backend=backend))


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


def gradients(layer: nn.Module, size: LayerSize, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer's output and every gradient, by name."""
    x, dy = layer_inputs(size, dtype)
    layer.zero_grad(set_to_none=True)
    y = layer(x)
    y.backward(dy)
    found = {"output": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    layer.zero_grad(set_to_none=True)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm())


def verify(ours: MoE, size: LayerSize, dtype: str) -> dict[str, float]:
    """Our relative errors against the reference backend; raises SystemExit where one is too large."""
    reference = build_ours(size, backend="reference")
    reference.load_state_dict(ours.state_dict())
    expected = gradients(reference.to(DTYPES[dtype]), size, DTYPES[dtype])
    found = gradients(ours, size, DTYPES[dtype])
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    if wrong:
        raise SystemExit(f"{dtype}: our layer disagrees with its reference, no figures: {wrong}")
    return errors


def measure(
    layers: dict[str, nn.Module], size: LayerSize, dtype: str, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds per round of forward and backward."""
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    names = list(layers)
    for index in range(-warmup, rounds):
        x, dy = layer_inputs(size, DTYPES[dtype], seed=warmup + index + 1)
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
    errors = verify(layers[OURS], size, dtype)
    x, _ = layer_inputs(size, DTYPES[dtype])
    with torch.no_grad():
        ours_y = deepcopy(layers[OURS])(x)
        apart = {name: relative_error(layer(x), ours_y) for name, layer in layers.items() if "dense" not in name}
    seconds = measure(layers, size, dtype, rounds, warmup)
    return {"errors": errors, "apart": apart, "missing": missing, "seconds": seconds}


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """The median over rounds of the time of ``name`` over ours."""
    return statistics.median(theirs / ours for theirs, ours in zip(seconds[name], seconds[OURS], strict=True))


def report(size: LayerSize, dtype: str, figures: dict[str, Any]) -> dict[str, float]:
    """Print one dtype's table; the ratios by name."""
    seconds = figures["seconds"]
    ratios = {name: ratio(seconds, name) for name in seconds}
    worst = max(figures["errors"].values())
    print(f"\n{dtype}: T={size.T} H={size.H} F={size.F} E={size.E} K={size.K}, forward and backward")
    print(f"our output and gradients against the reference: relative error at most {worst:.1e}")
    print(f"{'layer':36}{'median ms':>10}{'min ms':>9}{'GFLOP/s':>9}{'time/ours':>11}{'output vs ours':>16}")
    for name, times in seconds.items():
        middle, least = statistics.median(times), min(times)
        apart = f"{figures['apart'][name]:.1e}" if name in figures["apart"] else "-"
        speed = size.flops / middle / 1e9
        print(f"{name:36}{middle * 1e3:10.1f}{least * 1e3:9.1f}{speed:9.0f}{ratios[name]:11.2f}{apart:>16}")
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
