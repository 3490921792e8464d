"""One composition of parallelisms against one process that holds the whole batch."""

# G sequences of a step, S positions, V vocabulary.

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from equimoe.moe.engines import DataParallel
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh, clip_grad_norm_, parallelize, share_of
from equimoe.moe.train.step import gradients
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

SEQUENCES, LENGTH, VOCABULARY, STEPS = 16, 16, 32, 3


@dataclass(frozen=True)
class Composition:
    """A mapping onto ``world`` ranks, and what is computed on it."""

    world: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    micro_batches: int = 2
    recompute: bool = False
    #: how many positions of each sequence are valid: all; different numbers; none on the first rank
    tokens: str = "unequal"
    capacity: CapacityConfig | None = None
    dtype: torch.dtype = torch.float32


def make(of: Composition, micro_batches: int) -> Decoder:
    """The whole model, the same on every rank."""
    torch.manual_seed(0)
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=8,
        num_experts=8,
        top_k=2,
        router=RouterConfig(z_loss=0.01),
        balance=BalanceConfig(coefficient=0.1, estimator="exact", micro_batches=micro_batches),
        capacity=of.capacity,
        shared_intermediate_size=8,
        init_std=0.3,
    )
    return Decoder(
        vocab_size=VOCABULARY,
        seq_len=LENGTH,
        num_layers=4,
        num_heads=4,
        intermediate_size=24,
        moe=moe,
        moe_every=2,
        recompute_blocks=of.recompute,
    )


def batch(step: int, of: Composition) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and mask [G, S] of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    valid_G = torch.full((SEQUENCES,), LENGTH)
    if of.tokens != "equal":
        valid_G = torch.randint(1, LENGTH + 1, (SEQUENCES,), generator=generator)
    if of.tokens == "zero":
        valid_G[: SEQUENCES // 4] = 0
    return ids[:, :-1], ids[:, 1:], torch.arange(LENGTH) < valid_G[:, None]


def train(model: Decoder, of: Composition, mesh: Mesh | None, micro_batches: int) -> dict[str, Any]:
    """Three steps: loss, gradients and norm of each of them, and the parameters after the last."""
    engine = DataParallel(model, mesh)
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1, momentum=0.9, foreach=False)
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size, mesh["dp"].rank)
    result: dict[str, Any] = {"loss": [], "norm": []}
    for step in range(STEPS):
        whole = batch(step, of)
        tokens = float(whole[2].sum())
        parts = zip(*(t.chunk(dp)[rank].chunk(micro_batches) for t in whole), strict=True)
        shares = [share_of(*part, mesh=mesh) for part in parts]
        nats = gradients(engine, shares, tokens, exact=True)
        if step == 0:
            result["gradients"] = {name: full(p.grad) for name, p in model.named_parameters()}
        result["loss"].append(float(sum(n.double().sum() for n in nats)) / tokens)
        result["norm"].append(float(clip_grad_norm_(engine.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
    result["parameters"] = {name: full(p) for name, p in model.named_parameters()}
    return result


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split."""
    whole = getattr(tensor, "full_tensor", None)
    return (tensor if whole is None else whole()).detach().clone()


def on_ranks(of: Composition, timeout: float = 120.0) -> list[dict[str, Any]]:
    """The composition's result on every rank; losses are this rank's shares."""

    def script(rank: int, world: int) -> dict[str, Any]:
        mesh = build_mesh(of.parallel)
        model = parallelize(make(of, of.micro_batches), mesh)
        result = train(model, of, mesh, of.micro_batches)
        mine = mesh["tp"].rank == 0
        return result | {"loss": [value if mine else 0.0 for value in result["loss"]]}

    return run_ranks(script, of.world, timeout=timeout)


def alone(of: Composition) -> dict[str, Any]:
    """The same in one process."""
    return train(make(replace(of, recompute=False), 1), of, None, 1)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error among named tensors, and its name."""
    return max((oracle.relative_error(got[name], want[name]), name) for name in want)


def compare(of: Composition) -> dict[str, float]:
    """Largest relative errors of loss, norm, gradients and parameters over all ranks."""
    want, results = alone(of), on_ranks(of)
    losses = [sum(result["loss"][step] for result in results) for step in range(STEPS)]
    found = {"loss": max(abs(a / b - 1) for a, b in zip(losses, want["loss"], strict=True)), "norm": 0.0}
    names: dict[str, dict[str, Tensor]] = {"gradients": {}, "parameters": {}}
    for result in results:
        norms = (abs(a / b - 1) for a, b in zip(result["norm"], want["norm"], strict=True))
        found["norm"] = max(found["norm"], *norms)
        for kind, tensors in names.items():
            part = {name: want[kind][name] for name in result[kind]}
            found[kind] = max(found.get(kind, 0.0), worst(result[kind], part)[0])
            tensors.update(result[kind])
    for kind, tensors in names.items():
        assert tensors.keys() == want[kind].keys(), f"{kind} that no rank has: {want[kind].keys() - tensors.keys()}"
    return found
