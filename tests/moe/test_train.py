"""Checks the parts of the training loop in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from equimoe.moe import BalanceConfig
from equimoe.moe.train.config import OptimConfig, TrainConfig
from equimoe.moe.train.data import heldout_batches, load_corpus, load_tokenizer
from equimoe.moe.train.judge import NonFiniteError
from equimoe.moe.train.optim import learning_rate
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return small.on(small.write_texts(tmp_path / "texts"), steps=4)


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, CPU)


def test_cosine_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[59] == pytest.approx(0.55) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_warmup_stable_decay_schedule() -> None:
    config = OptimConfig(lr=2.0, warmup_steps=5, decay_fraction=0.2, min_lr_ratio=0.0, schedule="wsd")
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[4:80] == [2.0] * 76 and rates[-1] == pytest.approx(0.0)
    assert rates[89] == pytest.approx(1.0)


def test_power_schedule() -> None:
    """It depends on tokens and batch alone, so far; twice the batch doubles it, up to the highest rate."""
    config = OptimConfig(lr=0.02, warmup_steps=4, decay_fraction=0.25, min_lr_ratio=0.0, schedule="power")

    def rate(step: int, steps: int, sequences: int, tokens: int) -> float:
        return learning_rate(config, step, steps, sequences, tokens)

    for step, steps in ((10, 100), (70, 100), (10, 100_000)):
        assert rate(step, steps, 64, 10**9) == pytest.approx(64 * 4.6 * 1e9**-0.51)
        assert rate(step, steps, 128, 10**9) == pytest.approx(2 * rate(step, steps, 64, 10**9))
    assert rate(10, 100, 256, 10**9) == 0.02 and rate(10, 100, 4, 1) == 0.02
    assert rate(1, 100, 64, 10**9) == pytest.approx(0.5 * rate(10, 100, 64, 10**9))
    assert rate(99, 100, 64, 10**9) == 0.0 < rate(98, 100, 64, 10**9) < rate(74, 100, 64, 10**9)


@pytest.mark.parametrize("schedule", ["wsd", "power"])
def test_the_stable_phase_of_runs_of_any_length_is_the_same(config: TrainConfig, schedule: str) -> None:
    """A longer run passes through bit-equal weights until the shorter one decays."""
    optim = OptimConfig(lr=0.01, warmup_steps=1, decay_fraction=0.25, schedule=schedule)  # type: ignore[arg-type]
    optim = replace(optim, power_amplitude=0.01, power_exponent=0.1)
    short, long = (trainer_of(replace(config, steps=steps, optim=optim)) for steps in (4, 40))
    for step in range(4):
        for trainer in (short, long):
            trainer.train_step()
        same = [torch.equal(a, b) for a, b in zip(short.model.parameters(), long.model.parameters(), strict=True)]
        assert all(same) if step < 3 else not any(same), step
    ratio = short.rate / learning_rate(optim, 3, 40, config.data.global_batch, short.tokens)
    assert ratio == pytest.approx(optim.min_lr_ratio)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "power"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 5), (3, 3), (2, 100)])
def test_schedules_of_short_runs(schedule: str, steps: int, warmup: int) -> None:
    config = OptimConfig(lr=1.0, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < learning_rate(config, step, steps) <= 1.0 for step in range(steps))


def test_weight_decay_spares_vectors(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    decay = {id(p): group["weight_decay"] for group in trainer.engine.optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(trainer.model.parameters()))
    for name, p in trainer.model.named_parameters():
        assert decay[id(p)] == (0.0 if name.endswith("norm.weight") else 0.1), name


def test_first_loss_is_that_of_an_untrained_model(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    record = trainer.record(trainer.train_step())
    assert record["loss"] == pytest.approx(torch.log(torch.tensor(257.0)).item(), abs=0.05)
    assert record["tokens"] == 8 * 16 and len(record["layers"]) == 2
    assert all(sum(layer["counts"]) == 8 * 16 * 2 for layer in record["layers"])
    domains = record["domain_loss"]
    assert set(domains) <= set(trainer.corpus.domains) and record["loss"] <= max(domains.values())


def test_evaluation_by_hand_and_without_a_trace(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    trainer.train_step()
    layers = trainer.model.moe_layers()
    before = [(layer.stats, layer.balancer.previous_step, list(layer.balancer.visits)) for layer in layers]
    result = trainer.evaluate()
    assert trainer.model.training
    assert before == [(layer.stats, layer.balancer.previous_step, list(layer.balancer.visits)) for layer in layers]

    sums: dict[str, list[tuple[float, int]]] = {}
    with torch.no_grad():
        for domain, inputs, labels, mask in heldout_batches(trainer.corpus, 16, 2, 2):
            for row in range(2):
                logits, seen = trainer.model(inputs[row : row + 1])[0], mask[row]
                nats = F.cross_entropy(logits[seen], labels[row][seen], reduction="sum")
                sums.setdefault(domain, []).append((float(nats), int(seen.sum())))
    assert result["domains"].keys() == sums.keys()
    for found, rows in [(result, sum(sums.values(), [])), *((result["domains"][d], sums[d]) for d in sums)]:
        nats, tokens = map(sum, zip(*rows, strict=True))
        assert found["tokens"] == tokens
        assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
        variance = sum((n - nats / tokens * t) ** 2 for n, t in rows) * len(rows) / (len(rows) - 1)
        assert found["loss_std"] == pytest.approx(variance**0.5 / tokens, rel=1e-3)
    for domain in sums:
        assert [sum(frequency) for frequency in result["routing"][domain]] == pytest.approx([1.0, 1.0])


def test_step_that_is_not_finite_leaves_the_weights(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    trainer.train_step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    handle = trainer.model.head.register_forward_hook(lambda module, args, out: out * float("nan"))
    with pytest.raises(NonFiniteError, match="grad_norm=nan: is not finite"):
        trainer.train_step()
    handle.remove()
    assert all(torch.equal(p, b) for p, b in zip(trainer.model.parameters(), before, strict=True))
    trainer.train_step()
    assert int(trainer.model.moe_layers()[0].balancer.previous_step.tokens) == 8 * 16


@pytest.mark.parametrize(("every", "where"), [(0, []), (1, [0, 1, 2, 3]), (2, [1, 3]), (3, [2])])
def test_where_the_moe_layers_are(config: TrainConfig, every: int, where: list[int]) -> None:
    trainer = trainer_of(replace(config, model=replace(config.model, num_layers=4, moe_every=every)))
    kinds = [type(block.mlp).__name__ for block in trainer.model.blocks.values()]
    assert [i for i, kind in enumerate(kinds) if kind == "MoE"] == where
    record = trainer.record(trainer.train_step())
    assert len(record["layers"]) == len(where)


def test_model_sees_no_later_token(config: TrainConfig) -> None:
    model = trainer_of(config).model.eval()
    ids = torch.randint(0, 257, (2, 16))
    other = ids.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 257
    one, two = model(ids), model(other)
    assert torch.allclose(one[:, :9], two[:, :9], atol=1e-6) and not torch.allclose(one[:, 9:], two[:, 9:])


def test_parameters_that_a_token_uses(config: TrainConfig) -> None:
    trainer = trainer_of(config)
    experts = sum(p.numel() for layer in trainer.model.moe_layers() for p in layer.experts.parameters())
    assert trainer.parameters == sum(p.numel() for p in trainer.model.parameters())
    assert trainer.active_parameters == trainer.parameters - experts // 2


def test_micro_batches_of_the_balance_follow_from_the_data(config: TrainConfig) -> None:
    assert trainer_of(config).micro_batches == 4
    with pytest.raises(ValueError, match="moe.balance.micro_batches=2: data.global_batch.* give 4; leave it out"):
        trainer_of(small.changed(config, balance=BalanceConfig(micro_batches=2)))
