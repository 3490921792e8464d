"""Checks that runs with every kind of router learn, and that a resumed run repeats the bits of one that went on."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equimoe.moe import BalanceConfig, CapacityConfig, RouterConfig, Routing, ZeroComputationConfig, checkpoint
from equimoe.moe.balance import Balancer, Visit
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.plan import DryRun, dry_run, memory
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.compositions import runs
from tests.helpers.fork import run_ranks
from tests.helpers.parity import Composition, train
from tests.helpers.slow import slow_but

EXACT = BalanceConfig(coefficient=0.05, estimator="exact")
FSDP = ParallelConfig(data_parallel="fsdp", timeout_s=60)
#: name -> (router, other settings)
RUNS: dict[str, tuple[RouterConfig, dict[str, Any]]] = {
    "noisy, jitter": (RouterConfig(gate="noisy", jitter=0.1, z_loss=1e-3), {"balance": EXACT}),
    "cosine": (RouterConfig(gate="cosine"), {"balance": EXACT}),
    "sinkhorn": (RouterConfig(select="sinkhorn"), {"balance": BalanceConfig(coefficient=0.0)}),
    "base": (
        RouterConfig("sigmoid", normalize_weights=False, select="base"),
        {"balance": BalanceConfig(coefficient=0.0), "top_k": 1},
    ),
    "expert choice": (
        RouterConfig(select="expert_choice", normalize_weights=False, cap=3, sees_future=True),
        {"balance": BalanceConfig(coefficient=0.0)},
    ),
    "hash": (RouterConfig(gate="hash"), {"balance": BalanceConfig(coefficient=0.0)}),
    "slots": (
        RouterConfig(gate="slots", slots=2, sees_future=True, normalize_weights=False),
        {"balance": BalanceConfig(coefficient=0.0), "top_k": 1},
    ),
    "task": (RouterConfig(gate="task", tasks=3), {"balance": EXACT}),
    "top-p": (RouterConfig(select="top_p", entropy_loss=0.03), {"balance": EXACT}),
    "moe++": (RouterConfig(gate="residual"), {"balance": EXACT, "zero_computation": ZeroComputationConfig(tau=0.5)}),
    "gshard": (
        RouterConfig(random_second=True),
        {"balance": replace(EXACT, counts="first"), "capacity": CapacityConfig(1.25, "choice")},
    ),
}


@pytest.mark.parametrize(("name", "dtype"), slow_but([("gshard", "float32")], product(RUNS, ("float32", "bfloat16"))))
def test_a_resumed_run_repeats_the_bits(name: str, dtype: Any, tmp_path: Path) -> None:
    """On two ranks with FSDP2 and recomputation, with an evaluation in between."""
    router, settings = RUNS[name]
    config = small.on(small.write_texts(tmp_path / "texts"), router=router, dtype=dtype, parallel=FSDP, **settings)
    config = replace(config, model=replace(config.model, recompute=True))

    def script(rank: int, world: int) -> tuple[list[float], list[float]]:
        corpus, mesh = load_corpus(config.data, load_tokenizer("bytes")), build_mesh(config.parallel)

        def trainer() -> Trainer:
            return Trainer(config, corpus, mesh, torch.device("cpu"))

        def losses(of: Trainer, steps: int) -> list[float]:
            return [of.record(of.train_step())["loss"] for _ in range(steps)]

        first = trainer()
        before = losses(first, 6)
        path = first.save(tmp_path / "run")
        on = losses(first, 6)
        first.evaluate()
        second = trainer()
        second.resume(path, checkpoint.read_manifest(path))
        assert losses(second, 6) == on
        assert all(torch.equal(a, b) for a, b in zip(first.state().values(), second.state().values(), strict=True))
        return before, on

    for before, on in run_ranks(script, 2):
        assert sum(on) < sum(before)


SIZES = replace(
    small.CONFIG,
    model=replace(small.CONFIG.model, vocab_size=50),
    moe=replace(small.CONFIG.moe, hidden_size=64, num_experts=32, top_k=2),
    data=replace(small.CONFIG.data, seq_len=128),
)


@pytest.mark.parametrize("name", slow_but(["noisy, jitter", "top-p"], RUNS))
def test_memory_of_a_router(name: str) -> None:
    """A dry run finds the bytes that the formula adds for the router, and the same weights."""
    router, settings = RUNS[name]
    kept = {name: getattr(router, name) for name in ("score", "normalize_weights", "z_loss")}
    plainly = RouterConfig(**kept)
    configs = [small.changed(SIZES, router=of, **settings) for of in (plainly, router)]

    def script(*_: Any) -> list[DryRun]:
        dist.destroy_process_group()
        return [dry_run(config, 2, 0) for config in configs]

    plain, found = run_ranks(script, 1)[0]
    formulas = [memory(config, 2, 0) for config in configs]
    assert found.most["parameters"] == formulas[1].parameters
    more = found.most["activations"] - plain.most["activations"]
    assert more == pytest.approx(
        formulas[1].activations - formulas[0].activations, rel=0.02, abs=0.01 * plain.most["activations"]
    )


def test_replicas_need_the_load_of_all_choices() -> None:
    fssdp = ParallelConfig(experts="fssdp")
    with pytest.raises(ValueError, match="parallel.experts='fssdp': plans replicas by all choices"):
        small.changed(small.CONFIG, parallel=fssdp, balance=BalanceConfig(counts="first"))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
def test_a_counting_pass_of_a_pipeline_draws_what_training_draws(
    schedule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage runs the micro-batches of its parts in the same order in both, whatever the schedule."""
    if not runs(ParallelConfig(pp=2, schedule=schedule)):
        pytest.skip("this torch cannot run the schedule")
    router = RouterConfig(gate="noisy", jitter=0.1, random_second=True)
    of = Composition(2, ParallelConfig(pp=2, schedule=schedule), 4, router=router, moe_every=1)
    compared: list[bool] = []
    count = Balancer.count

    def checked(self: Balancer, visit: Visit, routing: Routing, *rest: Any) -> bool:
        if visit.counted and visit.ahead:
            before = visit.decision
            compared.append(all(torch.equal(a, b) for a, b in zip(before, routing.decision, strict=True)))
        return count(self, visit, routing, *rest)

    monkeypatch.setattr(Balancer, "count", checked)

    def script(rank: int, world: int) -> list[bool]:
        torch.manual_seed(rank)
        train.__wrapped__(of, build_mesh(of.parallel), of.micro_batches)  # with random numbers
        return compared

    for found in run_ranks(script, 2):
        assert len(found) == 3 * 4 * 2 and all(found)
