"""Checks that a training run is the same on any mapping: loss curves, evaluation, and the data of each step."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, RouterConfig
from equimoe.moe.parallel import build_mesh
from equimoe.moe.parallel.stages import SPLITS_BACKWARD
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but


def curve(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    """Return the records of every step, and the final evaluation."""
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    mesh = build_mesh(config.parallel) if world > 1 else None
    trainer = Trainer(config, corpus, mesh, torch.device("cpu"))
    records = [trainer.record(trainer.train_step()) for _ in range(config.steps)]
    return {"records": records, "eval": trainer.evaluate()}


@cache
def alone(config: TrainConfig) -> dict[str, Any]:
    """Return what one process records, trained once for all runs that should equal it."""
    return run_ranks(curve, 1, config)[0]


def same(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    for key in ("loss", "grad_norm", "balance"):
        assert [r[key] for r in one["records"]] == pytest.approx([r[key] for r in two["records"]], rel=tolerance), key
    assert one["eval"]["loss"] == pytest.approx(two["eval"]["loss"], rel=tolerance)
    assert one["eval"]["domains"].keys() == two["eval"]["domains"].keys()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_texts(tmp_path_factory.mktemp("texts"))


BALANCE = BalanceConfig(coefficient=0.05, estimator="exact")


@pytest.mark.slow
def test_expert_parallel_2_and_expert_data_parallel(texts: Path) -> None:
    config = small.on(texts, balance=BALANCE, router=RouterConfig(z_loss=1e-3))
    want = alone(config)
    losses = [r["loss"] for r in want["records"]]
    assert losses[-1] < losses[0] - 0.5
    for world, ep in ((2, 2), (4, 2)):
        results = run_ranks(curve, world, replace(config, parallel=replace(config.parallel, ep=ep)))
        for result in results:
            same(result, want, 1e-5)
        assert [r["layers"][0]["counts"] for r in results[0]["records"]] == [
            r["layers"][0]["counts"] for r in want["records"]
        ]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"data_parallel": "fsdp", "ep": 2}),
        (2, {"tp": 2, "ep": 2}),
        (2, {"cp": 2}),
        (4, {"data_parallel": "fsdp", "tp": 2, "ep": 4}),
        (2, {"pp": 2}),
        *([(4, {"pp": 2, "schedule": "zbv", "ep": 2})] if SPLITS_BACKWARD else []),
    ],
    ids=str,
)
@pytest.mark.slow
def test_mappings(texts: Path, world: int, parallel: dict[str, Any]) -> None:
    """Loss curve, counts, domain losses and evaluation of a run must not depend on how the model is split.

    The vocabulary is that of bytes, 257 entries, which no degree of tensor parallelism divides.
    """
    config = small.on(texts, balance=BALANCE, steps=6)
    config = replace(config, model=replace(config.model, num_layers=4))
    want = alone(config)
    for result in run_ranks(curve, world, replace(config, parallel=replace(config.parallel, **parallel))):
        same(result, want, 1e-5)
        for got, expected in zip(result["records"], want["records"], strict=True):
            assert [row["counts"] for row in got["layers"]] == [row["counts"] for row in expected["layers"]]
            assert got["domain_loss"] == pytest.approx(expected["domain_loss"], rel=1e-5)
        assert result["eval"]["domains"] == {
            domain: pytest.approx(entry, rel=1e-5, abs=1e-6)  # loss_std is a small difference of losses
            for domain, entry in want["eval"]["domains"].items()
        }
        for domain, table in result["eval"]["routing"].items():
            assert torch.allclose(torch.tensor(table), torch.tensor(want["eval"]["routing"][domain]), atol=1e-6)


@pytest.mark.parametrize(
    "balance",
    slow_but([BALANCE], [BALANCE, replace(BALANCE, scope="micro"), replace(BALANCE, scope="sequence")]),
    ids=["global-exact", "micro", "sequence"],
)
def test_four_ranks_equal_four_micro_batches(texts: Path, balance: BalanceConfig) -> None:
    config = small.on(texts, balance=balance, steps=8)
    same(run_ranks(curve, 4, config)[0], alone(config), 1e-5)


def test_rolling_is_exact_with_one_micro_batch_per_step(texts: Path) -> None:
    rolling = small.on(texts, steps=5, balance=replace(BALANCE, estimator="rolling"))
    exact = small.on(texts, steps=5, balance=BALANCE)
    same(run_ranks(curve, 4, rolling)[0], run_ranks(curve, 4, exact)[0], 1e-9)


def test_recomputation_changes_nothing(texts: Path) -> None:
    config = small.on(texts, ep=2, steps=6, balance=replace(BALANCE, estimator="rolling"))
    again = replace(config, model=replace(config.model, recompute=True))
    one, two = run_ranks(curve, 2, config)[0], run_ranks(curve, 2, again)[0]
    assert one["records"] == two["records"]


def test_bf16_follows_fp32(texts: Path) -> None:
    config = small.on(texts, ep=2, steps=8)
    fp32, bf16 = run_ranks(curve, 2, config)[0], run_ranks(curve, 2, replace(config, dtype="bfloat16"))[0]
    same(bf16, fp32, 5e-2)
    assert fp32["records"] != bf16["records"]


def test_same_seed_same_bits(texts: Path) -> None:
    config = small.on(texts, ep=2, steps=8)
    one, two, other = (run_ranks(curve, 2, replace(config, seed=seed)) for seed in (0, 0, 1))
    assert one == two
    assert other[0]["records"][-1]["loss"] != one[0]["records"][-1]["loss"]
