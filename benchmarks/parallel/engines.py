"""Trains one model with every engine, and prints whether each equals one process.

    python benchmarks/parallel/engines.py [WORD ...]

Each engine trains 20 fp32 steps on two forked gloo ranks: the same weights, the same tokens, AdamW, clipping, and the
global-batch loss with estimator "exact". Words select the engines whose names contain all of them. DeepSpeed and
Megatron-Core take part if they are installed (`make engines` installs them). The exit status is 1 if an engine exceeds
the limit.
"""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import checkout  # noqa: F401

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.shared.options import Parser
from benchmarks.shared.records import facts_line
from equimoe.launch.env import command
from equimoe.moe.balance import counting_pass
from equimoe.moe.engines import Engine, build_engine
from equimoe.moe.parallel import IGNORED, Mesh, ParallelConfig, build_mesh, token_losses
from tests.helpers import trained
from tests.helpers.fork import run_ranks
from tests.helpers.megatron_cpu import megatron_on_cpu
from tests.helpers.recorded import full

#: name -> degrees of parallelism on two ranks
MEGATRON: dict[str, dict[str, int]] = {
    "ep 1": {},
    "ep 2": {"ep": 2},
    "tp 2": {"tp": 2},
    "tp 2, ep 2": {"tp": 2, "ep": 2},
    "tp 2, etp 2": {"tp": 2, "etp": 2},
    "pp 2": {"pp": 2},
}
STEPS, RATE, MAX_NORM, LIMIT, WORLD = 20, 0.01, 1.0, 1e-5, 2

#: the loss and the gradient norm of every step, and the parameters after the last one
Run = tuple[list[float], list[float], dict[str, Tensor]]


def adamw(trainable: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable.values(), lr=RATE, weight_decay=0.1)


def mean_over_tokens(losses: list[Tensor], mesh: Mesh | None) -> float:
    """The mean loss per token of a step, over all ranks."""
    total = sum((part.sum().double() for part in losses), torch.zeros((), dtype=torch.float64)).reshape(1)
    if mesh is not None:  # all ranks of a tensor-parallel group have the same losses
        total = total * (mesh["tp"].rank == 0)
        dist.all_reduce(total)
    return float(total) / (trained.SEQUENCES * trained.LENGTH)


def with_engine(
    build: Callable[[nn.Module, Mesh | None], Engine], degrees: ParallelConfig, micro_batches: int, *rank: int
) -> Run:
    trained.MICRO_BATCHES = micro_batches
    mesh = build_mesh(degrees) if rank else None
    model = trained.make().float()
    engine = build(model, mesh)
    results = [engine.step(trained.batches(mesh, step), RATE) for step in range(STEPS)]
    parameters = {
        name.removeprefix("model."): full(value) for name, value in engine.state().items() if name.startswith("model.")
    }
    losses = [mean_over_tokens(r.losses, mesh) for r in results]
    return losses, [float(r.norm) for r in results], parameters


def torch_engine(model: nn.Module, mesh: Mesh | None) -> Engine:
    return build_engine(model, mesh, adamw, max_norm=MAX_NORM)


def deepspeed_engine(stage: int, model: nn.Module, mesh: Mesh | None) -> Engine:
    from equimoe.moe.engines.deepspeed import build_deepspeed_engine

    passes = trained.MICRO_BATCHES
    size = trained.SEQUENCES // WORLD // passes
    # by default ZeRO 3 keeps weights as small as these whole
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return build_deepspeed_engine(
        model,
        mesh,
        adamw,
        zero_stage=stage,
        settings=settings,
        max_norm=MAX_NORM,
        micro_batch=size,
        micro_batches=passes,
    )


def megatron_engine(distributed_optimizer: bool, model: nn.Module, mesh: Mesh | None) -> Engine:
    from equimoe.moe.engines.megatron import build_megatron_engine

    return build_megatron_engine(model, mesh, adamw, max_norm=MAX_NORM, distributed_optimizer=distributed_optimizer)


def with_megatron(*args: Any) -> Run:
    with megatron_on_cpu(), warnings.catch_warnings(action="ignore"):  # of what it would use on a GPU
        return with_engine(*args)


def plain_loop(wrap: Callable[[nn.Module], nn.Module], micro_batches: int, rank: int, world: int) -> Run:
    """A training loop of torch's own, without an engine of this package."""
    trained.MICRO_BATCHES = micro_batches
    warnings.filterwarnings("ignore", message="MoE: the load is counted over all")
    mesh = build_mesh(ParallelConfig())
    original = trained.make().float()
    model = wrap(original)
    optimizer = adamw(dict(model.named_parameters()))
    losses, norms = [], []
    for step in range(STEPS):
        batches = trained.batches(mesh, step)
        with counting_pass():
            for batch in batches:
                model(batch.inputs)
        parts = []
        for batch in batches:
            parts.append(token_losses(model(batch.inputs), batch.labels))
            valid = (batch.labels != IGNORED).sum()
            (parts[-1].sum() / valid / micro_batches).backward()
        norms.append(float(full(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_tokens([part.detach() for part in parts], mesh))
    return losses, norms, {name: full(p.detach()) for name, p in original.named_parameters()}


def engines() -> dict[str, Callable[..., Run]]:
    """Name -> function of (rank, world)."""
    found: dict[str, Callable[..., Run]] = {}
    for passes in (1, 2):
        found[f"DistributedDataParallel, accumulation {passes}"] = partial(plain_loop, DistributedDataParallel, passes)
        found[f"FSDP2, accumulation {passes}"] = partial(plain_loop, fully_shard, passes)
        for ep in (1, 2):
            where, degrees = f"ep {ep}, accumulation {passes}", ParallelConfig(ep=ep)
            sharded = replace(degrees, data_parallel="fsdp")
            found[f"this package's engine, ddp, {where}"] = partial(with_engine, torch_engine, degrees, passes)
            found[f"this package's engine, fsdp, {where}"] = partial(with_engine, torch_engine, sharded, passes)
            for stage in (0, 1, 2, 3):
                build = partial(deepspeed_engine, stage)
                found[f"DeepSpeed, ZeRO {stage}, {where}"] = partial(with_engine, build, degrees, passes)
        for what, given in MEGATRON.items():
            degrees = ParallelConfig(**given, sequence_parallel=False)
            for sharding in (False, True):
                build = partial(megatron_engine, sharding)
                name = f"Megatron-Core, {what}{', distributed optimizer' * sharding}, accumulation {passes}"
                found[name] = partial(with_megatron, build, degrees, passes)
    for package, name in (("deepspeed", "DeepSpeed"), ("megatron", "Megatron-Core")):
        if importlib.util.find_spec(package) is None:
            found = {key: run for key, run in found.items() if not key.startswith(name)}
            print(f"{name} is not installed, so it takes no part; `make engines` installs it\n")
    return dict(sorted(found.items()))


def error(found: list[float], right: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, right, strict=True))


@command
def main(argv: list[str] | None = None) -> int:
    """Print the table; return the number of engines that exceed the limit."""
    parser = Parser(__doc__)
    chosen = parser.choose(engines(), argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    print(f"{facts_line()}, gloo\n")
    print(f"largest relative error compared with one process, {STEPS} steps; limit {LIMIT:.0e}\n")
    print(f"{'engine':<66} {'loss':>8} {'norm':>8} {'parameters':>10} {'s':>6}")
    right = {passes: with_engine(torch_engine, ParallelConfig(), passes) for passes in (1, 2)}
    bad = 0
    for name, run in chosen.items():
        start = time.perf_counter()
        expected = right[int(name[-1])]
        found: list[Any] = run_ranks(run, WORLD, timeout=300)
        loss, norm = (max(error(each[part], expected[part]) for each in found) for part in (0, 1))
        weights = max(trained.worst(each[2], expected[2])[0] for each in found)
        wrong = not max(loss, norm, weights) < LIMIT
        bad += wrong
        seconds = time.perf_counter() - start
        row = f"{name:<66} {loss:>8.1e} {norm:>8.1e} {weights:>10.1e} {seconds:>6.1f}"
        print(f"{row}{'  NOT EQUAL' * wrong}", flush=True)
    print(f"\n{len(chosen) - bad} of {len(chosen)} engines equal one process")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
