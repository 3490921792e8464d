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
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # as in train_step.py

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
from torch import Tensor, nn

from benchmarks.layer.layer_suite import ONE, check_all, decided, make_step
from benchmarks.layer.peers import DENSE, Contestant, build_all
from benchmarks.shared.agreement import WrongResult
from benchmarks.shared.options import CORES, Parser, file, positive, threads
from benchmarks.shared.records import OURS, facts
from benchmarks.shared.shapes import Batch, Shape
from benchmarks.shared.timing import Timer, interleave
from equimoe.launch.env import command
from equimoe.moe import MoE, MoEConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {"T": (4096, "tokens"), "D": (512, "hidden size"), "F": (1024, "expert width"), "E": (16, "experts")}
SIZES["K"] = (2, "experts per token")
#: number of untimed first runs in :func:`interleave`, which have batches of their own
WARMUP = 2


class SwiGLU(nn.Module):
    """A dense feed-forward with gate and up as one product."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class SeparateSwiGLU(nn.Module):
    """The same with three linear layers, which is the usual form."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, width, bias=False) for _ in range(2))
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def contestant(
    layer: nn.Module, leaves: Sequence[Tensor], restore: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = tuple
) -> Contestant:
    """Wrap a layer that routes by itself. ``restore`` converts its weights to our layout: [router], gate_up, down."""

    def run(x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        return layer(x_TD[None])[0]

    return Contestant(run, tuple(leaves), restore, routed=False)


def build_ours(size: Shape, dtype: torch.dtype) -> Contestant:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(size.D, size.F, size.E, size.K, balance=ONE)).to(dtype)
    return contestant(layer, (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj))


def build_dense(size: Shape, ours: Contestant) -> Contestant:
    layer = SeparateSwiGLU(size.D, size.K * size.F).to(ours.leaves[0].dtype)
    leaves = (layer.gate.weight, layer.up.weight, layer.down.weight)
    return contestant(layer, leaves, lambda given: (torch.cat(tuple(given[:2])), given[2]))


def build_fused_dense(size: Shape, ours: Contestant) -> Contestant:
    layer = SwiGLU(size.D, size.K * size.F).to(ours.leaves[0].dtype)
    return contestant(layer, (layer.gate_up.weight, layer.down.weight))


def build_transformers(size: Shape, ours: Contestant, implementation: str) -> Contestant:
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
    block = Qwen3MoeSparseMoeBlock(config).to(ours.leaves[0].dtype)
    leaves = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        for leaf, value in zip(leaves, ours.leaves, strict=True):
            leaf.copy_(value)
    return contestant(block, leaves)


def build_deepspeed(size: Shape, ours: Contestant) -> Contestant:
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
        SwiGLU(size.D, size.F),
        num_experts=size.E,
        k=size.K,
        drop_tokens=False,
        top2_2nd_expert_sampling=False,
    ).to(ours.leaves[0].dtype)
    router, experts = layer.deepspeed_moe.gate.wg.weight, layer.deepspeed_moe.experts.deepspeed_experts
    leaves = [router, *(one.gate_up.weight for one in experts), *(one.down.weight for one in experts)]
    with torch.no_grad():
        for leaf, value in zip(leaves, (ours.leaves[0], *ours.leaves[1], *ours.leaves[2]), strict=True):
            leaf.copy_(value)

    def restore(given: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return given[0], torch.stack(given[1 : 1 + size.E]), torch.stack(given[1 + size.E :])

    return contestant(layer, leaves, restore)


#: name -> function that builds a contestant with our weights
BUILDERS: dict[str, Callable[[Shape, Contestant], Contestant]] = {
    DENSE: build_dense,
    "dense, fused gate_up": build_fused_dense,
    "transformers Qwen3-MoE, eager": partial(build_transformers, implementation="eager"),
    "transformers Qwen3-MoE, grouped_mm": partial(build_transformers, implementation="grouped_mm"),
    "DeepSpeed MoE, no drop": build_deepspeed,
}


def make_batch(size: Shape, dtype: torch.dtype, router_ED: Tensor, seed: int) -> Batch:
    """Return tokens whose routing does not depend on rounding, and the gradient of the output."""
    torch.manual_seed(seed)
    x_TD = decided(router_ED, size, dtype).requires_grad_()
    return Batch(x_TD, x_TD.new_zeros(1), x_TD.new_zeros(1), torch.randn(size.T, size.D).to(dtype))


def bench(size: Shape, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Check and measure all contestants in one dtype. Raise WrongResult if ours is wrong."""
    ours = build_ours(size, dtype)
    others, missing = build_all(BUILDERS, size, ours)
    layers = {OURS: ours, **others}
    batches = [make_batch(size, dtype, ours.leaves[0], seed) for seed in range(WARMUP + rounds)]
    checked = {name: (one, [batches[WARMUP], batches[-1]]) for name, one in layers.items()}
    errors, wrong = check_all(checked, size, dtype, "auto")
    steps = {name: make_step(one, batches) for name, one in layers.items() if name not in wrong}
    runs, failed = interleave(Timer(torch.device("cpu")), steps, rounds, 0.0, must=(OURS,))
    seconds = {name: [sum(parts) for parts in each] for name, each in runs.items()}
    return {"errors": errors, "missing": {**missing, **wrong, **failed}, "seconds": seconds}


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


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds per dtype (default %(default)s)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="(default %(default)s)")
    parser.add_argument("--json", type=file, metavar="FILE", help="write all results to FILE")
    for name, (default, meaning) in SIZES.items():
        parser.add_argument(f"-{name}", type=positive, default=default, help=f"{meaning} (default %(default)s)")
    args = parser.parse_args(argv)
    if args.K > args.E:
        parser.error(f"-K={args.K}: give at most the number of experts, -E={args.E}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    sizes = {name: getattr(args, name) for name in SIZES}
    size, machine = Shape("layer", **sizes), facts("transformers", "deepspeed")
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    try:
        figures = {name: bench(size, dtype, args.rounds) for name, dtype in DTYPES.items()}
    except WrongResult as error:
        print(f"WRONG: {error}; no measurements are shown", file=sys.stderr)
        return 1
    ratios = {dtype: report(size, dtype, figures[dtype]) for dtype in DTYPES}
    line = summary(ratios)
    if args.json:
        result = {**machine, "size": sizes, "figures": figures, "ratios": ratios, "summary": line}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
