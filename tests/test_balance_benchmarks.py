"""Tests the benchmarks of estimators and of the cost of balance: definitions, tables, and both commands.

L layers, M micro-batches, E experts, T tokens, D hidden.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.balance import balance_cost, estimators
from equimoe.moe import BalanceConfig
from equimoe.moe.balance import Balancer
from equimoe.moe.model import Decoder
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.oracle import relative_error

M, B = 4, 8


def tiny(folder: Path) -> TrainConfig:
    config = small.on(small.write_texts(folder))
    return replace(config, data=replace(config.data, seq_len=16, global_batch=B, micro_batch=B))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Decoder, estimators.Steps]:
    """Return a trainer after five steps, the model before the last step, and the data."""
    config = tiny(tmp_path_factory.mktemp("texts"))
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, None, torch.device("cpu"))
    for _ in range(5):
        previous = estimators.frozen(trainer.model)
        trainer.train_step()
    return trainer, previous, estimators.Steps(corpus, config)


def weigh(model: Decoder, coefficient: float) -> None:
    """Give each layer a new balancer with this coefficient."""
    for layer in model.moe_layers():
        balance = BalanceConfig(coefficient=coefficient, micro_batches=M)
        layer.balancer = Balancer(balance, layer.config.num_experts, layer.config.top_k)


def routed(model: Decoder, inputs_BS: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return each layer's counts [E] and differentiable sums of probabilities [E], from the router's inputs."""
    counted, inputs, layers = estimators.count(model, inputs_BS, 1), [], model.moe_layers()
    hooks = [layer.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in layers]
    weigh(model, 0.0)
    model(inputs_BS)
    for hook in hooks:
        hook.remove()
    sums = [(x_TD @ layer.router.weight.T).softmax(-1).sum(0) for x_TD, layer in zip(inputs, layers, strict=True)]
    return [(counts_1X[0, :-1].double(), sums_E) for counts_1X, sums_E in zip(counted, sums, strict=True)]


def by_hand(model: Decoder, inputs_BS: Tensor, estimator: str, before: list[Tensor]) -> list[Tensor]:
    """Compute the gradients [E, D] of all layers' losses from the definitions of the estimators.

    ``before`` has the counts and tokens of the micro-batches of the step before, [M, E + 1] of each layer.
    """
    shares = [routed(model, share) for share in inputs_BS.chunk(M)]
    tokens, loss, k = inputs_BS.numel(), torch.zeros(()), model.moe_layers()[0].config.top_k
    for layer, before_MX in enumerate(before):
        previous_X = before_MX.sum(0)
        counts_ME = torch.stack([share[layer][0] for share in shares])
        for n, share in enumerate(shares, start=1):
            load_E = {
                "rolling": counts_ME[:n].sum(0) * M / n,
                "carry": counts_ME[:n].sum(0) + previous_X[:-1] * (M - n) / M,
                "adaptive": counts_ME[:n].sum(0) * M / n,  # as rolling, after a single step
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
    before_BS, inputs_BS = steps.inputs(order, trainer.step - 1), steps.inputs(order, trainer.step)
    before, model = estimators.count(previous, before_BS, M), estimators.frozen(trainer.model)
    whole = estimators.gradients(model, inputs_BS, 1, "rolling").gradients
    found = {
        name: estimators.gradients(model, inputs_BS, M, name, [before]).gradients for name in estimators.ESTIMATORS
    }
    for name, got in found.items():
        assert far(got, by_hand(model, inputs_BS, name, before)) < 1e-10, name
        assert (far(got, whole) < 1e-10) == (name == "exact"), name
    assert far(found["carry"], found["rolling"]) > 1e-3


def test_it_is_what_the_coefficient_adds_to_a_training_gradient(
    trained: tuple[Trainer, Decoder, estimators.Steps],
) -> None:
    trainer, _, steps = trained
    model = estimators.frozen(trainer.model)
    inputs_BS = steps.inputs("shuffled", trainer.step)
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
    before_BS, shuffled_BS = (steps.inputs("shuffled", trainer.step + i) for i in (-1, 0))
    for got_MX, layer in zip(estimators.count(previous, before_BS, M), trainer.model.moe_layers(), strict=True):
        assert layer.balancer.previous_step is not None
        got_X, want_X = got_MX.sum(0), layer.balancer.previous_step.total_X
        assert got_X[-1] == want_X[-1] == before_BS.numel()
        assert int((got_X - want_X).abs().sum()) <= 0.02 * int(want_X.sum())  # fp64 may choose other experts than fp32
    (batch,) = trainer.batches.sample(trainer.step - 1, 0, 1, 1, B)
    assert torch.equal(before_BS, batch[0])
    domain_of = {tuple(row): int(d) for row, d in zip(*map(Tensor.tolist, _next(trainer)), strict=True)}
    domains = [domain_of[tuple(row)] for row in steps.inputs("by domain", trainer.step).tolist()]
    assert domains == sorted(domains) and sorted(domains) == sorted(domain_of[tuple(r)] for r in shuffled_BS.tolist())
    one, two = (steps.inputs("drifting", trainer.step + i) for i in (0, 1))
    assert torch.equal(steps.inputs("drifting", trainer.step), one) and not torch.equal(one, two)


def _next(trainer: Trainer) -> tuple[Tensor, Tensor]:
    inputs_BS, _, domain_B = trainer.batches.sample(trainer.step, 0, 1, 1, B)[0]
    return inputs_BS, domain_B


def test_ranks_and_tables() -> None:
    assert estimators.rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert estimators.rank_correlation([1, 2, 3, 4], [4, 3, 1, 2]) == pytest.approx(-0.8)
    assert estimators.rank_correlation([3, 1, 3, 2], [2, 0, 2, 1]) == pytest.approx(1)
    point = {"order": "shuffled", "stage": "end", "micro_batches": 2, "trial": 0, "estimator_error": 0.1}
    found = [
        {**point, "estimator": name, "layer": layer, "cosine": cosine, "error": error}
        for name, figures in {
            "rolling": [(0.9, 0.1), (0.7, 0.5)],
            "carry": [(0.8, 0.6), (0.4, 0.2)],
            "adaptive": [(0.9, 0.2), (0.8, 0.1)],
            "exact": [(1.0, 1e-15), (1.0, 3e-15)],
        }.items()
        for layer, (cosine, error) in enumerate(figures)
    ]
    row = estimators.gradient_table(found, ("order", "micro_batches")).splitlines()[-1]
    cells = "shuffled 2 0.800 0.700 0.300 0.500 0.100 0.600 0.400 0.400 0.600 0.100"
    cells += " 0.850 0.800 0.150 0.200 0.100 3e-15"
    assert row.strip("| ").split(" | ") == ["shuffled", *cells.split()[1:]]
    assert estimators.ratios(found, "carry", ["rolling"]) == {("shuffled", "end"): [pytest.approx(4 / 3)]}
    assert estimators.ratios(found, "adaptive", ["rolling", "carry"]) == {("shuffled", "end"): [pytest.approx(1 / 2)]}


def test_the_estimators_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = estimators.Plan(tiny(tmp_path / "texts"), {"start": 1, "end": 3}, (2, M), 2)
    monkeypatch.setattr(estimators, "SHORT", plan)
    assert estimators.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("estimators-quick_*.json")
    result = json.loads(path.read_text())
    points = result["points"]
    exact = [p["error"] for p in points if p["estimator"] == "exact"]
    # layers, stages, orders, M; the other estimators have two steps of data
    assert len(exact) == 2 * 2 * 3 * 2 and max(exact) < 1e-6
    assert len(points) == 7 * len(exact)
    others = [p for p in points if p["estimator"] != "exact"]
    assert min(p["error"] for p in others) > 1e-4 and all(p["estimator_error"] < p["gradient_error"] for p in others)
    assert max(r["error"] for r in result["rounding"]) < 1e-2
    text = path.with_suffix(".md").read_text()
    assert text.count("| by domain | end |") == 2 and result["facts"]["cpu"] in text
    assert "## Error of `carry`" in text and "## Error of `adaptive`" in text


def test_the_formula_of_bytes() -> None:
    assert balance_cost.ring(288, 4) == 432 and balance_cost.ring(288, 1) == 0
    want = {"micro": 0, "global, rolling": 432, "global, exact": 432, "global + 1 % micro": 432, "bias, global": 432}
    assert {name: balance_cost.formula(name, 8, 4, 4, 1) for name in want} == want
    assert balance_cost.formula("micro", 8, 4, 4, 2) == 288
    assert balance_cost.formula("global + 1 % micro", 8, 4, 4, 2) == 432 + 288


def test_bytes_that_differ_from_the_formula_are_reported() -> None:
    def faults(sent: int, rest: int = 0, scope: str = "global, carry") -> int:
        ranks = [
            {"micro": balance_cost.Sent(0, 70, 0), scope: balance_cost.Sent(n, 70 + rest, 576)} for n in (576, sent)
        ]
        return len(balance_cost.wrong(balance_cost.byte_rows("2 ranks", ranks)))

    assert faults(576) == 0
    assert faults(584) == 1 and faults(568) == 1
    assert faults(576, rest=8) == 1
    assert faults(576, rest=8, scope="global, exact") == 0


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
            assert rows[case, scope]["counted"] == 2 * 8 * (8 + 1) * 4
            assert (rows[case, scope]["rest"] > 0) == (case.endswith("ep 2") and scope == "global, exact")
    assert "All numbers equal their formulas" in path.with_suffix(".md").read_text()
