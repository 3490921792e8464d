"""Tests the balance experiment: the ranks that one process simulates, and its measurements."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.balance import global_balance
from benchmarks.balance.arms import ARMS, BATCH, BIAS_RATE, RANK, Arm, Heldout, Ranks, Size, build, configure, measure
from equimoe.moe import Step
from equimoe.moe.train.data import Corpus, load_corpus, load_tokenizer
from tests.helpers.slow import slow_but

SIZE = Size(steps=10, seq_len=8, hidden=16, layers=2, experts=4, heldout=128, bytes_per_domain=60_000)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(configure(ARMS["sync-4"], SIZE, 0).data, load_tokenizer("bytes"))


def gradients(arm: Arm, corpus: Corpus) -> dict[str, torch.Tensor]:
    """Compute all gradients of the first step."""
    trainer, _ = build(arm, SIZE, 0, corpus)
    batches = trainer.batches.sample(0, 0, 1, trainer.micro_batches, arm.micro_batch)
    step = Step.of(trainer.model)
    step.begin(len(batches))
    for inputs_BS, labels_BS, _ in batches:
        with step.micro_batch():
            logits_BSV = trainer.model(inputs_BS)
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())
        (loss / len(batches)).backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b if "router" in name)


def test_played_ranks_have_the_gradient_of_real_micro_batches(corpus: Corpus) -> None:
    strong = {"coefficient": 1.0}
    played = gradients(Arm("", RANK, 64, {"scope": "sequence"} | strong, together=RANK), corpus)
    real = gradients(Arm("", RANK, RANK, {"scope": "micro"} | strong), corpus)
    of_sequences = gradients(Arm("", 1, 64, {"scope": "sequence"} | strong), corpus)
    assert largest_difference(played, real) < 1e-4
    assert largest_difference(of_sequences, real) > 1e-2


def test_mixing_changes_the_loss_of_balance_alone(corpus: Corpus) -> None:
    plain = build(Arm("", BATCH, BATCH, {"coefficient": 0.0}), SIZE, 0, corpus)[0]
    mixed = build(Arm("", RANK, BATCH, {"scope": "sequence", "coefficient": 0.0}, RANK, mixed=True), SIZE, 0, corpus)[0]
    inputs_BS = plain.batches.sample(0, 0, 1, 1, BATCH)[0][0]
    with mixed.engine.balance.micro_batch(0), plain.engine.balance.micro_batch(0):
        logits_BSV = mixed.model(inputs_BS)
        torch.testing.assert_close(logits_BSV, plain.model(inputs_BS))
    counts_GE = [layer.balancer.visits[-1].counts_BE for layer in mixed.model.moe_layers()]
    assert all(counts.shape == (BATCH // RANK, SIZE.experts) for counts in counts_GE)
    strong = {"scope": "sequence", "coefficient": 1.0}
    shuffled = gradients(Arm("", RANK, BATCH, strong, RANK, mixed=True), corpus)
    assert largest_difference(shuffled, gradients(Arm("", RANK, BATCH, strong, RANK), corpus)) > 1e-2


def test_ranks_play_in_training_only(corpus: Corpus) -> None:
    trainer, _ = build(ARMS["sync-4"], SIZE, 0, corpus)
    layer = trainer.model.moe_layers()[0]
    shapes: list[int] = []
    layer.router.register_forward_hook(lambda module, args, routing: shapes.append(len(routing.counts_BE)))
    x_BSD = torch.randn(8, SIZE.seq_len, SIZE.hidden)
    with trainer.engine.balance.micro_batch(0):
        layer(x_BSD)
    layer.eval()(x_BSD)
    assert shapes == [8 // RANK, 8]


def heldout(counts_NLE: torch.Tensor, domain_N: torch.Tensor) -> Heldout:
    sequences, layers, experts = counts_NLE.shape
    seq_len, top_k = 16, 2
    probs_NLE = counts_NLE.double() / top_k
    nats_N = 1.0 + domain_N.double()
    return Heldout(("a", "b"), domain_N, nats_N, counts_NLE.double(), probs_NLE, probs_NLE[..., 0], seq_len, top_k)


def test_figures_of_domains_that_share_no_expert() -> None:
    domain_N = torch.arange(1024) % 2
    counts_NLE = torch.zeros(1024, 1, 4)
    counts_NLE[domain_N == 0, 0, :2] = 16
    counts_NLE[domain_N == 1, 0, 2:] = 16
    found = measure(heldout(counts_NLE, domain_N))
    assert found["divergence"] == pytest.approx(1.0) and found["max_frequency"] == pytest.approx(0.5)
    assert found["domain_loss"] == {"a": 1.0, "b": 2.0} and found["loss"] == 1.5
    assert found["balance"]["512"] == pytest.approx(1.0, abs=1e-2)
    # n of RANK sequences in one domain: E sum f P = 1 + (2n/RANK - 1)^2, whose mean is 1 + 1/RANK
    assert found["balance"][str(RANK)] == pytest.approx(1 + 1 / RANK, abs=0.05)
    assert found["max_over_mean"] == pytest.approx(1.0, abs=0.05)
    assert 1.2 < found["straggler"]["2"] < 1.4 and found["cv"] > 0.2


def test_figures_of_uniform_routing() -> None:
    found = measure(heldout(torch.full((1024, 2, 4), 8.0), torch.arange(1024) % 2))
    assert found["divergence"] == pytest.approx(0.0, abs=1e-9) and found["cv"] == 0.0
    assert all(value == pytest.approx(1.0) for value in [*found["balance"].values(), *found["straggler"].values()])


@pytest.mark.parametrize("pool", slow_but(["threads"], ["threads", "processes"]))
def test_only_missing_runs_are_trained(
    pool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, corpus: Corpus
) -> None:
    if pool == "threads":  # without seconds of imports
        monkeypatch.setattr(global_balance, "ProcessPoolExecutor", lambda jobs, mp_context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(global_balance, "load_corpus", lambda *of: corpus)
    arguments = ["--quick", "--arms", "sync-4", "--jobs", "1", "--runs", str(tmp_path), "--out", str(tmp_path)]
    args = global_balance.arguments(arguments)
    args.size, args.seeds = SIZE, 2
    complete = global_balance.train("sync-4", 1, SIZE, global_balance.folder_of(args, "sync-4", 1))
    assert len(complete["evaluations"]) == 10
    assert global_balance.run_all(args) == 0
    assert "1 arm x 2 seeds; 1 run to do" in capsys.readouterr().out
    assert [record["seed"] for record in global_balance.results(args)] == [0, 1]


def record(arm: str, seed: int, loss: float, steps: int = 2) -> dict[str, Any]:
    found = measure(heldout(torch.full((1024, 2, 32), 1.0), torch.arange(1024) % 2)) | {"loss": loss}
    sizes = {"steps": steps, "seq_len": 8, "layers": 2, "experts": 32, "top_k": 2}
    evaluations = [found | {"step": step} for step in (1, 2)]
    return {
        "arm": arm, "seed": seed, "size": sizes, "evaluations": evaluations, "parameters": 10, "active_parameters": 5
    }  # fmt: skip


def test_the_table_compares_runs_of_the_same_seed(tmp_path: Path) -> None:
    losses = {"sync-4": (2.0, 2.1), "sync-32": (1.94, 2.07), "sync-512": (1.9, 2.0), "exact": (1.903, 2.004)}
    found = [record(arm, seed, loss) for arm, of in losses.items() for seed, loss in enumerate(of)]
    facts = {"cpu": "a CPU", "versions": {"torch": "2"}, "python": "3", "commit": "c"}
    text = global_balance.write([*found, record("shuffled", 1, 2.08)], facts, tmp_path / "result")
    assert "they end 0.0035 apart" in text
    assert "| sync-32: 8 ranks | 32 | 2.0050 " in text and "-0.0450 \u00b1 0.0212" in text
    assert "Arms with fewer than 2 seeds: shuffled (1)." in text and text == (tmp_path / "result.md").read_text()
    assert json.loads((tmp_path / "result.json").read_text())["runs"][0]["arm"] == "sync-4"


def test_unknown_arms_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        global_balance.arguments(["--arms", "sync-4,sink"])
    assert "--arms=sink: choose from sync-4" in capsys.readouterr().err


def test_switching_changes_what_is_shown(corpus: Corpus) -> None:
    trainer, ranks = build(ARMS["to-global"], SIZE, 0, corpus)
    assert isinstance(ranks, Ranks) and ranks.together == RANK
    ranks.together = ARMS["to-global"].then
    trainer.train_step()
    assert trainer.model.moe_layers()[0].balancer.previous_step.losses[0].loads.shape == (1, SIZE.experts)


def test_bias_by_micro_batch_moves_by_the_mean_of_their_signs(corpus: Corpus) -> None:
    trainer, _ = build(ARMS["bias-micro"], SIZE, 0, corpus)
    trainer.train_step()
    for layer in trainer.model.moe_layers():
        counts_ME = layer.balancer.previous_step.local_counts_ME.double()
        assert len(counts_ME) == BATCH // RANK
        signs_ME = (counts_ME.mean(1, keepdim=True) - counts_ME).sign()
        assert torch.allclose(layer.router.bias_E.double(), BIAS_RATE * signs_ME.mean(0), rtol=1e-6)
        assert len(layer.router.bias_E.abs().unique()) > 1  # by the step's counts, every expert moves by the rate or 0
