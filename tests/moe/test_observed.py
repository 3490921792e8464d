"""Compares the routing metrics of a training step and an evaluation with values computed by hand, in one process."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoEConfig, RouterConfig
from equimoe.moe.config import AttentionConfig, ExtraLossConfig
from equimoe.moe.model import Decoder
from equimoe.moe.observe import (
    chosen_probability,
    divergences,
    domain_record,
    estimate_quality,
    expert_fraction,
    jensen_shannon,
    mean_divergence,
    metrics,
    possible_degrees,
    straggler,
    watch_routers,
)
from equimoe.moe.placement import Owners
from equimoe.moe.routing import Router
from equimoe.moe.train.build import build_model
from equimoe.moe.train.config import ModelConfig, TrainConfig
from equimoe.moe.train.data import heldout_batches, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small

SEQUENCES, MICRO, SEQ = 8, 2, 16  # of a step, of a micro-batch; tokens
E, K = 4, 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_texts(tmp_path_factory.mktemp("texts"))


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))


def step(config: TrainConfig) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    """Return the second step's record, and the routings of each layer's micro-batches."""
    trainer = trainer_of(config)
    trainer.train_step()

    def see(router: Router, x_TD: torch.Tensor, routing: Any, _: Any) -> dict[str, Any]:
        x_TD, weight = x_TD.detach(), router.weight.detach()
        return {
            "training": torch.is_grad_enabled(),
            "counts": routing.counts_BE.double(),
            "probs": routing.prob_sums_BE.detach().double(),
            "z": float(F.linear(x_TD, weight).logsumexp(-1).square().mean()),
            "score": float(F.linear(x_TD, weight).softmax(-1).topk(K, dim=-1).values.sum(-1).mean()),
        }

    with watch_routers(trainer.layers.values(), see) as seen:
        norm = trainer.train_step()
    return trainer.record(norm), [[one for one in of_layer if one["training"]] for of_layer in seen]


def micro_loss(counts_E: torch.Tensor, probs_E: torch.Tensor, tokens: int) -> float:
    return sum(float(c) * E / (K * tokens) * float(p) / tokens for c, p in zip(counts_E, probs_E, strict=True))


def test_losses_as_the_backwards_used_them(texts: Path) -> None:
    extra = ExtraLossConfig(micro=0.003, sequence=0.0007)
    balance = BalanceConfig(coefficient=0.05, estimator="rolling", extra=extra)
    record, seen = step(small.on(texts, balance=balance, router=RouterConfig(z_loss=0.02)))
    number_of, tokens = SEQUENCES // MICRO, MICRO * SEQ
    for row, micro_batches in zip(record["layers"], seen, strict=True):
        assert len(micro_batches) == number_of
        so_far, rolling = torch.zeros(E, dtype=torch.float64), 0.0
        for number, one in enumerate(micro_batches, 1):
            so_far = so_far + one["counts"].sum(0)
            load = so_far * E / (K * tokens * number)
            rolling += float((load * one["probs"].sum(0)).sum()) / (tokens * number_of)
        want = {
            "global": rolling,
            "micro": np.mean([micro_loss(m["counts"].sum(0), m["probs"].sum(0), tokens) for m in micro_batches]),
            "sequence": np.mean(
                [micro_loss(c, p, SEQ) for m in micro_batches for c, p in zip(m["counts"], m["probs"], strict=True)]
            ),
            "z": np.mean([m["z"] for m in micro_batches]),
        }
        assert row["losses"] == pytest.approx(want, rel=1e-6)
        weights = {"global": 0.05, "micro": 0.003, "sequence": 0.0007, "z": 0.02}
        assert row["scaled_losses"] == pytest.approx({n: want[n] * c for n, c in weights.items()}, rel=1e-6)
        assert abs(row["losses"]["global"] - row["balance"]) > 1e-6, "the estimate is not the whole step's load"
        assert row["score_sum"] == pytest.approx(np.mean([m["score"] for m in micro_batches]), rel=1e-5)
    for name, value in record["losses"].items():
        assert value == pytest.approx(np.mean([row["losses"][name] for row in record["layers"]]))
        assert record["scaled_losses"][name] == pytest.approx(sum(r["scaled_losses"][name] for r in record["layers"]))


def test_a_run_on_micro_batches_shows_the_global_loss_too(texts: Path) -> None:
    twice = BalanceConfig(scope="micro", coefficient=0.01, extra=ExtraLossConfig(micro=0.02))
    record, _ = step(small.on(texts, balance=twice))
    once, _ = step(small.on(texts, balance=replace(twice, extra=ExtraLossConfig(), coefficient=0.03)))
    for row, other in zip(record["layers"], once["layers"], strict=True):
        assert set(row["losses"]) == {"global", "micro"} and set(row["scaled_losses"]) == {"micro"}
        assert row["losses"]["global"] == row["balance"] != row["losses"]["micro"]
        # the same loss twice has its value once, and its coefficients together
        assert row["losses"] == pytest.approx(other["losses"], rel=1e-6)
        assert row["scaled_losses"]["micro"] == pytest.approx(0.03 * row["losses"]["micro"])


def test_what_is_trained_on_and_what_is_watched_agree(texts: Path) -> None:
    """A loss with coefficient 0 adds nothing, and "micro" has the same value whether or not it is trained on."""
    silent = BalanceConfig(scope="micro", coefficient=0.0)
    inside, _ = step(small.on(texts, balance=silent))
    outside, _ = step(small.on(texts, balance=replace(silent, scope="global", estimator="exact")))
    for one, two in zip(inside["layers"], outside["layers"], strict=True):
        assert one["losses"] == pytest.approx(two["losses"], rel=1e-6)
        assert one["scaled_losses"] == {"micro": 0.0} and two["scaled_losses"] == {"global": 0.0}
        assert one["losses"]["micro"] != pytest.approx(one["losses"]["global"], rel=1e-6)


@pytest.mark.parametrize(
    ("estimator", "sequences"),
    [("rolling", (2 + 4 + 6 + 8) / 4), ("exact", 8), ("carry", 8)],
)
def test_estimator_line(texts: Path, estimator: Any, sequences: float) -> None:
    trainer = trainer_of(small.on(texts, balance=BalanceConfig(estimator=estimator)))
    trainer.train_step()
    record = trainer.record(trainer.train_step())
    for row, layer in zip(record["layers"], trainer.layers.values(), strict=True):
        quality = estimate_quality(layer.balancer.previous_step)
        assert quality and {name: row[name] for name in quality} == quality
    assert record["balance_sequences"] == pytest.approx(sequences)
    assert record["balance_tokens"] == pytest.approx(sequences * SEQ)
    assert (record["estimator_error"] > 1e-3) == (estimator != "exact")


@pytest.mark.parametrize("estimator", ["rolling", "exact"])
@pytest.mark.parametrize("recompute", [False, True])
def test_scores_are_looked_at_once_and_only_in_observed_steps(texts: Path, estimator: Any, recompute: bool) -> None:
    config = small.on(texts, balance=BalanceConfig(estimator=estimator))
    trainer = trainer_of(replace(config, model=replace(config.model, recompute=recompute)))
    norm = trainer.train_step()
    assert [float(score[1]) for score in trainer.scores if score is not None] == [SEQUENCES * SEQ] * 2
    record = trainer.record(norm)
    assert record["score_sum"] == pytest.approx(np.mean([row["score_sum"] for row in record["layers"]]))
    record = trainer.record(trainer.train_step(observed=False))
    assert "score_sum" not in record and not any("score_sum" in row for row in record["layers"])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_chosen_probability(score: Any) -> None:
    torch.manual_seed(0)
    x_TD, mask_T = torch.randn(12, 8), torch.rand(12) > 0.3
    router = Router(8, 5, 2, RouterConfig(score=score), 1.0).requires_grad_(False)
    router.bias_E = torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0])  # affects choices, but not probabilities
    routing = router(x_TD, mask_T, sequences=3)
    want = [0.0] * 3
    for t in range(12):
        logits = [float(x_TD[t] @ router.weight[e]) for e in range(5)]
        scores = [math.exp(v) if score == "softmax" else 1 / (1 + math.exp(-v)) for v in logits]
        best = sorted(
            range(5), key=lambda e: -(9.0 * (e == 2) + scores[e] / (sum(scores) if score == "softmax" else 1))
        )
        want[t // 4] += bool(mask_T[t]) * sum(scores[e] for e in best[:2]) / sum(scores)
    assert chosen_probability(router, x_TD, routing).tolist() == pytest.approx(want, rel=1e-5)
    everything = Router(8, 5, 5, RouterConfig(score=score), 1.0)
    assert chosen_probability(everything, x_TD, everything(x_TD)).tolist() == pytest.approx([12.0])
    indifferent = Router(8, 5, 2, RouterConfig(score=score), 0.0)
    assert chosen_probability(indifferent, x_TD, indifferent(x_TD)).tolist() == pytest.approx([12 * 2 / 5])
    nothing = router(x_TD[:0])
    assert chosen_probability(router, x_TD[:0], nothing).tolist() == [0.0]


def test_straggler() -> None:
    counts_XE = torch.tensor([[4, 0, 1, 3], [2, 2, 2, 2], [8, 0, 0, 0], [0, 0, 0, 0]])
    assert straggler(counts_XE, Owners.consecutive(4, 1)).tolist() == [1.0, 1.0, 1.0, 1.0]
    # runs of consecutive experts: 4+0 and 1+3
    assert straggler(counts_XE, Owners.consecutive(4, 2)).tolist() == [1.0, 1.0, 2.0, 1.0]
    assert straggler(counts_XE, Owners.consecutive(4, 4)).tolist() == [2.0, 1.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("experts", "degrees"), [(1, ()), (2, (2,)), (6, (2, 6)), (8, (2, 4, 8)), (12, (2, 4, 12)), (7, (7,))]
)
def test_possible_degrees(experts: int, degrees: tuple[int, ...]) -> None:
    assert possible_degrees(experts) == degrees


def test_projection_and_its_cost(texts: Path) -> None:
    config = small.on(texts)
    record, seen = step(config)
    fraction = expert_fraction(trainer_of(config).model)
    for row, micro_batches in zip(record["layers"], seen, strict=True):
        loads = [m["counts"].sum(0) for m in micro_batches]
        pairs = [torch.stack((load[0] + load[1], load[2] + load[3])) for load in loads]
        want = {"2": np.mean([float(p.max() / p.mean()) for p in pairs])}
        want["4"] = np.mean([float(load.max() / load.mean()) for load in loads])
        assert row["projected_straggler"] == pytest.approx(want)
        assert row["straggler"] == row["straggler_max"] == 1.0
    assert record["waiting"] == 0.0
    for degree in ("2", "4"):
        factors = [row["projected_straggler"][degree] for row in record["layers"]]
        assert record["projected_straggler"][degree] == pytest.approx(np.mean(factors))
        assert record["projected_waiting"][degree] == pytest.approx(sum((f - 1) * fraction for f in factors))


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_expert_fraction_counts_operations(kind: Any) -> None:
    """One dense and two MoE blocks: 2 operations per weight and token, and attention to earlier positions."""
    hidden, width, ffn, vocabulary, seq, heads = 8, 12, 20, 50, 32, 2
    moe = MoEConfig(hidden_size=hidden, intermediate_size=width, num_experts=4, top_k=2, shared_intermediate_size=6)
    latent = AttentionConfig(
        kind=kind, q_lora_rank=0, kv_lora_rank=6, qk_nope_width=4, qk_rope_width=2, v_width=3, num_kv_heads=1
    )
    model = Decoder(
        vocab_size=vocabulary, seq_len=seq, num_layers=3, num_heads=heads, intermediate_size=ffn, moe=moe,
        dense_layers=1, attention=latent,
    )  # fmt: skip
    routed = 2 * 2 * 3 * hidden * width
    in_layer = routed + 2 * (4 * hidden + 3 * hidden * 6)
    if kind == "grouped":
        projections = hidden * (hidden + 2 * hidden // heads) + hidden * hidden
        attended = (seq + 1) / 2 * 2 * heads * (hidden // heads + hidden // heads)
    else:
        projections = hidden * heads * 6 + hidden * (6 + 2) + 6 * heads * (4 + 3) + heads * 3 * hidden
        attended = (seq + 1) / 2 * 2 * heads * (6 + 3)
    total = 3 * (2 * projections + attended) + 2 * in_layer + 2 * 3 * hidden * ffn + 2 * hidden * vocabulary
    assert expert_fraction(model) == pytest.approx(routed / total)


def test_a_head_that_is_the_embeddings_weight_counts_too() -> None:
    made = [build_model(replace(TrainConfig(), model=ModelConfig(tie_embeddings=tied)), 300) for tied in (False, True)]
    assert expert_fraction(made[0]) == expert_fraction(made[1])


def test_a_window_makes_attention_compute_all_pairs() -> None:
    plain, windowed = (
        1 / expert_fraction(build_model(replace(TrainConfig(), attention=AttentionConfig(window=window)), 300))
        for window in (None, 8)
    )
    config = TrainConfig()
    routed = config.model.num_layers * 2 * config.moe.top_k * 3 * config.moe.hidden_size * config.moe.intermediate_size
    pairs = config.model.num_layers * (config.data.seq_len - 1) * 2 * config.moe.hidden_size
    assert windowed - plain == pytest.approx(config.model.num_layers * pairs / routed)


def test_evaluation_tells_how_domains_part(texts: Path) -> None:
    trainer = trainer_of(small.on(texts, steps=6))
    for _ in range(6):
        trainer.train_step()
    result = trainer.evaluate()
    assert list(result["routing"]) == list(trainer.corpus.domains)
    sums: dict[str, list[list[float]]] = {}
    with torch.no_grad():
        for domain, inputs, _, mask in heldout_batches(trainer.corpus, SEQ, 2, 2):
            inputs = inputs[mask.all(1)]
            x_BSD = trainer.model.embedding(inputs)
            for number, block in enumerate(trainer.model.blocks.values()):
                x_BSD = x_BSD + block.attention(block.attention_norm(x_BSD))
                given = block.mlp_norm(x_BSD)
                chosen = F.linear(given, block.mlp.router.weight).softmax(-1).topk(K, dim=-1).values.sum(-1)
                of_layer = sums.setdefault(domain, [[0.0, 0.0] for _ in trainer.layers])[number]
                of_layer[0], of_layer[1] = of_layer[0] + float(chosen.sum()), of_layer[1] + chosen.numel()
                x_BSD = x_BSD + block.mlp(given)
    for domain, layers in sums.items():
        assert result["score_sum"][domain] == pytest.approx([total / tokens for total, tokens in layers], rel=1e-5)
        assert result["max_frequency"][domain] == [max(freq_E) for freq_E in result["routing"][domain]]
        assert all(K / E < value <= 1 for value in result["score_sum"][domain])
    a, b, c = trainer.corpus.domains
    pairs = result["divergence_pairs"]
    assert set(pairs) == {a, b} and set(pairs[a]) == {b, c} and set(pairs[b]) == {c}
    for layer in range(2):
        p, q = (np.array(result["routing"][d][layer]) for d in (a, c))
        assert pairs[a][c][layer] == pytest.approx(float(jensen_shannon(p, q)))
        assert result["divergence"][layer] == pytest.approx(
            np.mean([pairs[a][b][layer], pairs[a][c][layer], pairs[b][c][layer]])
        )


def test_jensen_shannon() -> None:
    uniform, one, other = np.full(4, 0.25), np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0])
    assert jensen_shannon(uniform, uniform) == 0
    assert jensen_shannon(one, other) == pytest.approx(1.0)
    mixed = (one + uniform) / 2
    entropy = -sum(p * np.log2(p) for p in mixed)
    assert jensen_shannon(one, uniform) == pytest.approx(entropy - 1.0)  # H(mix) - (0 + 2) / 2
    both = jensen_shannon(np.stack([one, one]), np.stack([other, one]))
    assert both.tolist() == pytest.approx([1.0, 0.0])  # over the last dimension
    assert np.isnan(jensen_shannon(one, np.zeros(4)))
    assert np.isnan(jensen_shannon(one, np.full(4, np.nan)))


def test_domains_that_cannot_be_compared() -> None:
    even, single, none = [0.5, 0.5], [1.0, 0.0], [0.0, 0.0]
    assert domain_record({}) == domain_record({"a": []}) == {}
    assert domain_record({"a": [single]}) == {"max_frequency": {"a": [1.0]}}
    routing = {"a": [single, single], "b": [[0.0, 1.0], none], "c": [single, even]}
    pairs = divergences(routing)
    assert mean_divergence(pairs).tolist() == pytest.approx([2 / 3, float(jensen_shannon(single, even))])
    assert np.isnan(mean_divergence({("a", "b"): np.array([math.nan])})[0])
    assert "divergence_pairs" in domain_record({str(i): [even] for i in range(16)})
    many = domain_record({str(i): [even] for i in range(17)})
    assert many["divergence"] == [0.0] and "divergence_pairs" not in many


def test_a_model_without_moe_layers(texts: Path) -> None:
    config = small.on(texts)
    trainer = trainer_of(replace(config, model=replace(config.model, moe_every=0)))
    record = trainer.record(trainer.train_step())
    assert record["layers"] == [] and "losses" not in record and record["balance"] == 1.0
    assert trainer.expert_fraction == 0.0
    assert "divergence" not in trainer.evaluate()


def test_every_field_is_documented_and_finite(texts: Path) -> None:
    text = " ".join((metrics.__doc__ or "").split())
    config = small.on(texts, balance=BalanceConfig(estimator="carry"), router=RouterConfig(z_loss=1e-3))
    trainer = trainer_of(config)
    train, evaluation = trainer.record(trainer.train_step()), trainer.evaluate()
    for record in (train, *train["layers"], evaluation):
        for name in record:
            assert name in text, name
    assert b"nonfinite" not in metrics.to_line(train) + metrics.to_line(evaluation)
    for name in ("max_over_mean", "cv", "entropy", "dead"):
        assert name in train["layers"][0]
