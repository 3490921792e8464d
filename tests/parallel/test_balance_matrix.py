"""The balance gradient alone, in fp64: every mapping, number of micro-batches and kind of recomputation has that of one
process which holds the whole batch."""

# B sequences of a micro-batch, S positions, D hidden, V vocabulary.

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, MoEConfig, RouterConfig
from equimoe.moe.engines import DataParallel
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, build_mesh, parallelize, share_of, token_nats, vocabulary_parallel
from equimoe.moe.parallel import ParallelConfig as P
from equimoe.moe.parallel.pipeline import SCHEDULES, Pipeline, split, stage_ids
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.parity import full

SEQUENCES, LENGTH, VOCABULARY, WIDTH = 16, 8, 16, 8
#: tokens by which the language model's loss is divided, so that it weighs nothing beside the balance loss
MANY = 1e30
CPU = torch.device("cpu")

MAPPINGS: dict[str, tuple[int, P]] = {
    "dp 1": (1, P()),
    "dp 2": (2, P()),
    "dp 4": (4, P()),
    "dp 4, ep 2": (4, P(ep=2)),
    "fsdp 2": (2, P(data_parallel="fsdp")),
    "hsdp 2 x 2, ep 4": (4, P(dp_replicate=2, data_parallel="fsdp", ep=4)),
    "cp 2": (2, P(cp=2)),
    "cp 4": (4, P(cp=4)),
    "cp 2, dp 2, ep 4": (4, P(cp=2, ep=4)),
    "tp 2": (2, P(tp=2)),
    "tp 4": (4, P(tp=4)),
    "tp 2, dp 2": (4, P(tp=2)),
    "tp 2 without sequence parallelism, dp 2": (4, P(tp=2, sequence_parallel=False)),
    "cp 2, tp 2": (4, P(cp=2, tp=2)),
    **{f"pp 2, {schedule}": (2, P(pp=2, schedule=schedule)) for schedule in SCHEDULES},  # type: ignore[arg-type]
    "pp 2, dp 2, ep 2": (4, P(pp=2, ep=2)),
    "pp 2, interleaved_1f1b, cp 2": (4, P(pp=2, cp=2, schedule="interleaved_1f1b")),
    "pp 2, zbv, tp 2": (4, P(pp=2, tp=2, schedule="zbv")),
    "pp 4": (4, P(pp=4)),
}


def make(layers: int, micro_batches: int, recompute: bool) -> Decoder:
    """All weights are the same on every rank."""
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=1.0, estimator="exact", micro_batches=micro_batches)
    moe = MoEConfig(WIDTH, 4, 8, 2, router=RouterConfig(z_loss=0.01), balance=balance, init_std=0.4)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": layers, "num_heads": 4}
    return Decoder(**sizes, intermediate_size=8, moe=moe, recompute_blocks=recompute).double()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Text of one domain after the other, with another number of valid tokens in every sequence; two have none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, torch.arange(SEQUENCES)[:, None])
    valid = torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=generator)
    valid[3:5] = 0
    return ids[:, :-1], ids[:, 1:], torch.arange(LENGTH) < valid


def gradients(model: Decoder, mesh: Mesh | None, micro_batches: int) -> dict[str, Tensor]:
    """Of one step on this rank, by the names that parameters have in the whole model."""
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size, mesh["dp"].rank)
    parts = zip(*(t.chunk(dp)[rank].chunk(micro_batches) for t in batch()), strict=True)
    shares = [share_of(*part, mesh=mesh) for part in parts]
    if mesh is None or mesh["pp"].size == 1:
        engine = DataParallel(model if mesh is None else parallelize(model, mesh), mesh)
        engine.gradients(shares, MANY, exact=True)
    else:
        engine = through_stages(model, mesh, shares)
    return {name: full(p.grad) for name, p in engine.named_parameters().items() if p.grad is not None}


def through_stages(model: Decoder, mesh: Mesh, shares: list[Any]) -> DataParallel:
    degrees, axis = mesh.degrees, mesh["pp"]
    each = degrees.stages_of_rank
    ids = stage_ids(degrees.schedule, axis.size, axis.rank, each)
    stages = [parallelize(split(model, axis.size * each, number), mesh) for number in ids]
    engine = DataParallel(stages, mesh)
    inputs, labels, masks = zip(*((s.inputs, s.labels, s.mask) for s in shares), strict=True)
    shape = (*masks[0].shape, WIDTH)
    pipeline = Pipeline(stages, axis, degrees.schedule, len(shares), CPU, shape, torch.float64, tuple(inputs[0].shape))
    pipeline.count(list(inputs), list(masks))
    with vocabulary_parallel(mesh):
        pipeline.step(list(inputs), list(labels), list(masks), lambda *of: token_nats(*of) / MANY)
    engine.reduce_gradients()
    return engine


def cases(parallel: P, pp: int) -> Iterator[tuple[int, bool]]:
    for micro_batches in (1, 2, 4):
        for recompute in (False, True):
            schedule = SCHEDULES[parallel.schedule]
            if pp > 1 and ((schedule.split_backward and recompute) or (micro_batches < pp and schedule.fills_stages)):
                continue
            if pp > 1 and schedule.rounds and micro_batches < pp:
                continue
            yield micro_batches, recompute


@lru_cache
def alone(layers: int) -> dict[str, Tensor]:
    return gradients(make(layers, 1, False), None, 1)


@pytest.mark.parametrize("name", MAPPINGS)
def test_equals_one_process(name: str) -> None:
    world, parallel = MAPPINGS[name]
    pp = parallel.pp
    layers = 2 if pp == 1 else pp * parallel.stages_of_rank

    def script(rank: int, world: int) -> list[dict[str, Tensor]]:
        mesh = build_mesh(parallel) if world > 1 else None
        return [gradients(make(layers, m, again), mesh, m) for m, again in cases(parallel, pp)]

    want = alone(layers)
    assert len([n for n in want if n.endswith("router.weight")]) == layers
    assert all(float(value.norm()) > 1e-6 for n, value in want.items() if n.endswith("router.weight"))
    results = run_ranks(script, world)
    for i, case in enumerate(cases(parallel, pp)):
        found = {n: value for result in results for n, value in result[i].items()}
        assert found.keys() >= {n for n in want if ".router." in n}
        worst = max((oracle.relative_error(value, want[n]), n) for r in results for n, value in r[i].items())
        assert worst[0] < 1e-6, (case, worst)
