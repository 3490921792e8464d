"""The benchmarks of global-batch balance: what they compare with, their figures, and both commands on tiny models.

L layers, M micro-batches, E experts, T tokens, D hidden.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig
from equimoe.moe.balance import Balancer
from equimoe.moe.model import Decoder
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.loop import Trainer
from tests.helpers import small
from tests.helpers.oracle import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import balance_cost
import estimator_tables
import estimators

M, B = 4, 8


def tiny(folder: Path) -> TrainConfig:
    config = small.on(small.write_texts(folder))
    return replace(config, data=replace(config.data, seq_len=16, global_batch=B, micro_batch=B))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Decoder, estimators.Steps]:
    """After some steps; the weights before the last of them; the data."""
    config = tiny(tmp_path_factory.mktemp("texts"))
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, None, torch.device("cpu"))
    for _ in range(5):
        previous = estimators.still(trainer.model)
        trainer.train_step()
    return trainer, previous, estimators.Steps(corpus, config)


def weigh(model: Decoder, coefficient: float) -> None:
    """New balancers of this coefficient."""
    for layer in model.moe_layers():
        balance = BalanceConfig(coefficient=coefficient, micro_batches=M)
        layer.balancer = Balancer(balance, layer.config.num_experts, layer.config.top_k)


def routed(model: Decoder, inputs_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, counts [E] and differentiable sums of probabilities [E], from the router's inputs alone."""
    counted, inputs, layers = estimators.count(model, inputs_BS), [], model.moe_layers()
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    weigh(model, 0.0)
    model(inputs_BS)
    for hook in hooks:
        hook.remove()
    sums = [(x_TD @ layer.router.weight.T).softmax(-1).sum(0) for x_TD, layer in zip(inputs, layers, strict=True)]
    return [(counts_X[:-1].double(), sums_E) for counts_X, sums_E in zip(counted, sums, strict=True)]


def by_hand(model: Decoder, inputs_BS: Tensor, estimator: str, before: list[Tensor]) -> list[Tensor]:
    """The gradients [E, D] of the losses of all layers, with the loads that the definitions give."""
    shares = [routed(model, share) for share in inputs_BS.chunk(M)]
    tokens, loss, k = inputs_BS.numel(), torch.zeros(()), model.moe_layers()[0].config.top_k
    for layer, previous_X in enumerate(before):
        counts_ME = torch.stack([share[layer][0] for share in shares])
        for n, share in enumerate(shares, start=1):
            load_E = {
                "rolling": counts_ME[:n].sum(0) * M / n,
                "carry": counts_ME[:n].sum(0) + previous_X[:-1] * (M - n) / M,
                "exact": counts_ME.sum(0),
            }[estimator]
            loss = loss + len(load_E) / (k * tokens) * (load_E * share[layer][1]).sum() / tokens
    return list(torch.autograd.grad(loss, [layer.router.weight for layer in model.moe_layers()]))


def far(got: list[Tensor], want: list[Tensor]) -> float:
    return max(relative_error(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("order", estimators.ORDERS)
def test_each_estimator_has_the_gradient_of_its_definition(
    trained: tuple[Trainer, Decoder, estimators.Steps], order: str
) -> None:
    trainer, previous, steps = trained
    before_BS, inputs_BS = steps.pair(order, trainer.step)
    before, model = estimators.count(previous, before_BS), estimators.still(trainer.model)
    whole = estimators.gradients(model, inputs_BS, 1, "rolling").gradients
    found = {name: estimators.gradients(model, inputs_BS, M, name, before).gradients for name in estimators.ESTIMATORS}
    for name, got in found.items():
        assert far(got, by_hand(model, inputs_BS, name, before)) < 1e-10, name
        assert (far(got, whole) < 1e-10) == (name == "exact"), name
    assert far(found["carry"], found["rolling"]) > 1e-3


def test_it_is_what_the_coefficient_adds_to_a_training_gradient(
    trained: tuple[Trainer, Decoder, estimators.Steps],
) -> None:
    trainer, _, steps = trained
    model = estimators.still(trainer.model)
    _, inputs_BS = steps.pair("shuffled", trainer.step)
    weights = [layer.router.weight for layer in model.moe_layers()]
    want, found = estimators.gradients(model, inputs_BS, M, "rolling").gradients, []
    for coefficient in (0.0, 0.5):
        weigh(model, coefficient)
        for weight in weights:
            weight.grad = None
        for share in inputs_BS.chunk(M):
            model(share).logsumexp(-1).mean().backward()
        found.append([weight.grad.clone() for weight in weights])
    assert far([b - a for a, b in zip(*found, strict=True)], [0.5 * w for w in want]) < 1e-9


def test_the_step_before_is_the_one_that_was_trained_on(trained: tuple[Trainer, Decoder, estimators.Steps]) -> None:
    trainer, previous, steps = trained
    before_BS, shuffled_BS = steps.pair("shuffled", trainer.step)
    for got_X, layer in zip(estimators.count(previous, before_BS), trainer.model.moe_layers(), strict=True):
        want_X = layer.balancer.previous_X[:-1]
        assert got_X[-1] == want_X[-1] == before_BS.numel()
        assert int((got_X - want_X).abs().sum()) <= 0.02 * int(want_X.sum())  # fp64 may choose otherwise than fp32
    (batch,) = trainer.batches.sample(trainer.step - 1, 0, 1, 1, B)
    assert torch.equal(before_BS, batch[0])
    domain_of = {tuple(row): int(d) for row, d in zip(*map(Tensor.tolist, _next(trainer)), strict=True)}
    domains = [domain_of[tuple(row)] for row in steps.pair("by domain", trainer.step)[1].tolist()]
    assert domains == sorted(domains) and sorted(domains) == sorted(domain_of[tuple(r)] for r in shuffled_BS.tolist())
    one, two = steps.pair("drifting", trainer.step)
    assert torch.equal(steps.pair("drifting", trainer.step + 1)[0], two) and not torch.equal(one, two)


def _next(trainer: Trainer) -> tuple[Tensor, Tensor]:
    inputs_BS, _, domain_B = trainer.batches.sample(trainer.step, 0, 1, 1, B)[0]
    return inputs_BS, domain_B


def test_the_mean_over_all_orders_is_the_closed_expectation(trained: tuple[Trainer, Decoder, estimators.Steps]) -> None:
    trainer, _, steps = trained
    model = estimators.still(trainer.model)
    found = estimators.gradients(model, steps.pair("by domain", trainer.step)[1], M, "rolling")
    for counts_MX, prob_sums_ME, loss in zip(found.counts, found.prob_sums, found.losses, strict=True):
        assert estimators.rolling_loss(counts_MX, prob_sums_ME, 2) == pytest.approx(loss, rel=1e-12)
    row = estimators.mean_over_orders(found, model)
    assert row["orders"] == 24 and row["share"] == pytest.approx(0.5208, abs=1e-4)
    assert row["mean"] == pytest.approx(row["closed"], rel=1e-12)
    assert row["micro"] > row["mean"] + 1e-4 and row["mean"] > row["global"] + 1e-4


def test_ranks_and_tables() -> None:
    assert estimator_tables.ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert estimator_tables.rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert estimator_tables.rank_correlation([1, 2, 3, 4], [4, 3, 1, 2]) == pytest.approx(-0.8)
    point = {"order": "shuffled", "stage": "end", "micro_batches": 2, "trial": 0, "reported": 0.1, "of_imbalance": 0.3}
    found = [
        {**point, "estimator": name, "layer": layer, "cosine": cosine, "error": error}
        for name, figures in {
            "rolling": [(0.9, 0.1), (0.7, 0.5)],
            "carry": [(0.8, 0.6), (0.4, 0.2)],
            "exact": [(1.0, 1e-15), (1.0, 3e-15)],
        }.items()
        for layer, (cosine, error) in enumerate(figures)
    ]
    row = estimator_tables.gradient_table(found, ("order", "micro_batches")).splitlines()[-1]
    cells = "shuffled 2 0.800 0.700 0.300 0.500 0.100 0.600 0.400 0.400 0.600 0.100 3e-15"
    assert row.strip("| ").split(" | ") == ["shuffled", *cells.split()[1:]]
    assert estimator_tables.carry_over_rolling(found) == {("shuffled", "end"): [pytest.approx(4 / 3)]}


def test_the_estimators_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = estimators.Plan(tiny(tmp_path / "texts"), {"start": 1, "end": 3}, (2, M), 2)
    monkeypatch.setattr(estimators, "SHORT", plan)
    assert estimators.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("estimators-quick_*.json")
    result = json.loads(path.read_text())
    points = result["points"]
    exact = [p["error"] for p in points if p["estimator"] == "exact"]
    # layers, stages, orders, M; two steps of data for the others
    assert len(exact) == 2 * 2 * 3 * 2 and max(exact) < 1e-6
    assert len(points) == 5 * len(exact)
    others = [p for p in points if p["estimator"] != "exact"]
    assert min(p["error"] for p in others) > 1e-4 and all(p["reported"] < p["of_imbalance"] for p in others)
    assert all(r["mean"] == pytest.approx(r["closed"], rel=1e-9) for r in result["orders_mean"])
    assert max(r["error"] for r in result["rounding"]) < 1e-2
    text = path.with_suffix(".md").read_text()
    assert text.count("| by domain | end |") == 2 and result["facts"]["cpu"] in text and "## Error of `carry`" in text


def test_the_formula_of_bytes() -> None:
    assert balance_cost.ring(288, 4) == 432 and balance_cost.ring(288, 1) == 0
    want = {"micro": 0, "global, rolling": 432, "global, exact": 432, "global + 1 % micro": 432, "bias, global": 432}
    assert {name: balance_cost.formula(name, 8, 4, 4, 1) for name in want} == want
    assert balance_cost.formula("micro", 8, 4, 4, 2) == 288
    assert balance_cost.formula("global + 1 % micro", 8, 4, 4, 2) == 432 + 288


def test_bytes_that_are_not_the_formula_are_told() -> None:
    def row(case: str, global_sent: int, rest: int = 0, scope: str = "global, carry") -> list[dict]:
        micro = balance_cost.Sent(0, 70, 0), 0
        other = balance_cost.Sent(global_sent, 70 + rest, 2), 288
        return balance_cost.byte_rows(case, [{"micro": micro, scope: other}] * 2)

    def wrong(*rows: list[dict]) -> int:
        return len(balance_cost.wrong({"bytes": sum(rows, [])}))

    assert wrong(row("2 ranks", 576)) == 0
    assert wrong(row("2 ranks", 584)) == 1 and wrong(row("2 ranks", 568)) == 1
    assert wrong(row("2 ranks", 576, rest=8)) == 1
    assert wrong(row("2 ranks", 576, rest=8, scope="global, exact")) == 0
    assert wrong(row("2 ranks", 576), row("2 ranks, twice the tokens", 1152)) == 2


def test_ratios_are_of_the_same_round() -> None:
    seconds = {"micro": [1.0, 2.0, 4.0], "global": [2.0, 2.0, 6.0]}
    row = balance_cost.figures(seconds)["global"]
    assert (row["ratio_low"], row["ratio"], row["ratio_high"]) == (1.25, 1.5, 1.75) and row["median_us"] == 2e6


@pytest.mark.slow
def test_the_cost_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance_cost, "MIXES", [(2, {"ep": 2})])
    assert balance_cost.main(["--quick", "--ranks", "2", "--rounds", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("balance_cost-quick_*.json")
    result = json.loads(path.read_text())
    assert result["times"]["2"]["scopes"].keys() == balance_cost.SCOPES.keys()
    assert all(len(runs) == 2 and min(runs) > 0 for runs in result["times"]["2"]["seconds"].values())
    rows = {(row["case"], row["scope"]): row for row in result["bytes"]}
    for case in ("2 ranks", "2 ranks, twice the tokens", "2 ranks, ep 2"):
        for scope in balance_cost.SCOPES.keys() - {"micro", "micro again"}:
            assert rows[case, scope]["counted"] == 2 * 8 * (8 + 1) * 4 and rows[case, scope]["collectives"] == 2
            assert (rows[case, scope]["rest"] > 0) == (case.endswith("ep 2") and scope == "global, exact")
    assert "Every figure equals its formula" in path.with_suffix(".md").read_text()
