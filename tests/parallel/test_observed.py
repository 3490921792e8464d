"""Checks that routing metrics do not depend on the mapping, and that stragglers match the rows that ranks received."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, RouterConfig
from equimoe.moe.collectives import global_ranks
from equimoe.moe.config import CapacityConfig, ExtraLossConfig, PlacementConfig
from equimoe.moe.parallel import build_mesh
from equimoe.moe.parallel.stages import SPLITS_BACKWARD
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

BALANCE = BalanceConfig(coefficient=0.05, estimator="exact", extra=ExtraLossConfig(micro=0.01, sequence=0.002))
SAME = ("losses", "scaled_losses", "balance_tokens", "balance_sequences", "estimator_error", "score_sum")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    texts = small.write_texts(tmp_path_factory.mktemp("texts"))
    config = small.on(texts, balance=BALANCE, router=RouterConfig(z_loss=1e-3), steps=3)
    return replace(config, model=replace(config.model, vocab_size=260, num_layers=4))


def observed(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    """Return the last record, the evaluation, and the rows that each layer's experts here got in the last step."""
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    mesh = build_mesh(config.parallel) if world > 1 else None
    trainer = Trainer(config, corpus, mesh, torch.device("cpu"))
    rows: dict[int, list[int]] = {}

    def count(number: int, given: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled():  # not a counting pass
            rows.setdefault(number, []).append(given[0].shape[0])

    for number, layer in trainer.layers.items():
        layer.experts.register_forward_pre_hook(lambda _, given, number=number: count(number, given))
    for _ in range(config.steps):
        rows.clear()
        norm = trainer.train_step()
    group = None if mesh is None else tuple(global_ranks(mesh["ep"])) if mesh["ep"].size > 1 else (rank,)
    return {"record": trainer.record(norm), "eval": trainer.evaluate(), "rows": rows, "group": group}


@pytest.fixture(scope="module")
def alone(config: TrainConfig) -> dict[str, Any]:
    return run_ranks(observed, 1, config)[0]


def on(config: TrainConfig, parallel: dict[str, Any]) -> TrainConfig:
    return replace(config, parallel=replace(config.parallel, **parallel))


def close(one: Any, two: Any, where: str) -> None:
    """Return whether dicts and lists are equal up to rounding."""
    if isinstance(two, dict):
        assert one.keys() == two.keys(), where
        for key in two:
            close(one[key], two[key], f"{where}.{key}")
    elif isinstance(two, list):
        assert len(one) == len(two), where
        for i, (a, b) in enumerate(zip(one, two, strict=True)):
            close(a, b, f"{where}[{i}]")
    else:
        assert one == pytest.approx(two, rel=1e-5, abs=1e-7), where


MAPPINGS = [
    (2, {}),
    (2, {"ep": 2}),
    (2, {"pp": 2}),
    (2, {"cp": 2}),
    (2, {"tp": 2, "ep": 2}),
    (2, {"tp": 2, "ep": 2, "sequence_parallel": False}),
    (2, {"data_parallel": "fsdp"}),
    (4, {"ep": 2}),
    *([(4, {"pp": 2, "schedule": "zbv", "ep": 2})] if SPLITS_BACKWARD else []),
    (4, {"ep": 2, "etp": 2}),
]
FAST = [(2, {"pp": 2}), (2, {"cp": 2}), (2, {"tp": 2, "ep": 2})]


@pytest.mark.parametrize(("world", "parallel"), slow_but(FAST, MAPPINGS), ids=str)
def test_any_mapping_tells_the_same(
    config: TrainConfig, alone: dict[str, Any], world: int, parallel: dict[str, Any]
) -> None:
    results = run_ranks(observed, world, on(config, parallel))
    want = alone["record"]
    for result in results:
        got = result["record"]
        for name in SAME:
            close(got[name], want[name], name)
        close(got["projected_straggler"], want["projected_straggler"], "projected_straggler")
        close(got["projected_waiting"], want["projected_waiting"], "projected_waiting")
        for one, two in zip(got["layers"], want["layers"], strict=True):
            for name in (*SAME, "projected_straggler", "balance", "counts"):
                close(one[name], two[name], name)
        for name in ("score_sum", "max_frequency", "divergence", "divergence_pairs"):
            close(result["eval"][name], alone["eval"][name], name)
        if parallel.get("ep", 1) == 1:
            assert got["straggler"] == got["straggler_max"] == 1.0 and got["waiting"] == 0.0
        assert got == results[0]["record"], "all ranks tell the same"


@pytest.mark.parametrize(
    ("world", "parallel"), slow_but([(2, {"ep": 2}), (4, {"ep": 2})], [m for m in MAPPINGS if "ep" in m[1]]), ids=str
)
def test_stragglers_are_the_rows_that_ranks_received(config: TrainConfig, world: int, parallel: dict[str, Any]) -> None:
    results = run_ranks(observed, world, on(config, parallel))
    record = results[0]["record"]
    numbers = sorted({number for result in results for number in result["rows"]})
    assert len(numbers) == 4
    for number, row in zip(numbers, record["layers"], strict=True):
        factors = []
        groups = {result["group"] for result in results if number in result["rows"]}
        for group in sorted(groups):
            by_rank = [results[rank]["rows"][number] for rank in group]
            for rows in zip(*by_rank, strict=True):
                factors.append(max(rows) / (sum(rows) / len(rows)))
        assert row["straggler"] == pytest.approx(sum(factors) / len(factors))
        assert row["straggler_max"] == pytest.approx(max(factors))
        assert 1.0 <= row["straggler"] <= row["straggler_max"]
    assert any(row["straggler"] > 1.0 for row in record["layers"])
    if len(set(factors)) > 1:
        assert any(row["straggler"] < row["straggler_max"] for row in record["layers"])
    assert record["straggler_max"] == max(row["straggler_max"] for row in record["layers"])
    # for four equal layers, the waiting projected to 2 ranks gives the cost per unit of straggling
    each = record["projected_waiting"]["2"] / (record["projected_straggler"]["2"] - 1.0)
    assert record["waiting"] == pytest.approx(each * (record["straggler"] - 1.0))


def test_stragglers_are_before_any_drop(config: TrainConfig) -> None:
    """A capacity limit changes what is computed, not what the router chooses."""
    limited = small.changed(config, capacity=CapacityConfig(factor=0.5), steps=1)
    free, short = (run_ranks(observed, 2, on(c, {"ep": 2}))[0]["record"] for c in (replace(config, steps=1), limited))
    assert short["layers"][0]["dropped"] > 0.2
    assert short["layers"][0]["straggler"] == free["layers"][0]["straggler"] > 1.0


def moved(rank: int, world: int, config: TrainConfig) -> list[tuple[dict[str, Any], Any]]:
    """Return every step's record, and the owners of the first layer's experts."""
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, build_mesh(config.parallel), torch.device("cpu"))
    found = []
    for _ in range(config.steps):
        record = trainer.record(trainer.train_step())
        found.append((record, trainer.engine.experts.owners[0]))
    return found


def test_a_step_before_a_move_of_owners_is_recorded_as_any_other(config: TrainConfig) -> None:
    every = replace(on(config, {"experts": "fssdp"}), placement=PlacementConfig(reshard_every=2, window=1), steps=6)
    records = run_ranks(moved, 2, every)[0]
    owners = [of_step for _, of_step in records]
    assert owners[0] == owners[1] != owners[2] == owners[3]
    for step, (record, _) in enumerate(records):
        for row in record["layers"]:
            assert {"replicas", "copied_bytes", "replicated_straggler"} <= row.keys()
            assert ("forecast_error" in row) == (step > 0), "nothing is known before the first step"
            if not row["replicas"]:
                assert row["replicated_straggler"] == pytest.approx(row["straggler"])
    assert any(row["replicas"] for row in records[1][0]["layers"]), "owners move after this step"


def test_megatrons_convention_is_part_of_what_is_added(config: TrainConfig) -> None:
    balance = replace(BALANCE, scale_convention="megatron")
    record = run_ranks(observed, 2, small.changed(config, balance=balance, steps=1))[0]["record"]
    for row in record["layers"]:
        assert row["scaled_losses"]["global"] == pytest.approx(0.05 / 2 * row["losses"]["global"])
        assert row["scaled_losses"]["micro"] == pytest.approx(0.01 * row["losses"]["micro"])


def test_a_loss_within_one_rank_counts_its_own_sequences(config: TrainConfig) -> None:
    for scope, sequences in (("micro", 2.0), ("sequence", 1.0), ("data_parallel", 4.0)):
        micro = small.changed(config, balance=BalanceConfig(scope=scope), steps=2)
        for result in run_ranks(observed, 2, micro):
            assert result["record"]["balance_sequences"] == pytest.approx(sequences)


def test_bf16_weights_that_fsdp_takes_away(config: TrainConfig, alone: dict[str, Any]) -> None:
    """Scores must be read while FSDP has the router's whole weight gathered."""
    half = replace(on(config, {"data_parallel": "fsdp"}), dtype="bfloat16")
    record = run_ranks(observed, 2, half)[0]["record"]
    assert record["score_sum"] == pytest.approx(alone["record"]["score_sum"], rel=1e-2)
