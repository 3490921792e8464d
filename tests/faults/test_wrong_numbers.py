"""Checks that numbers which are wrong on one rank only have the same consequence on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig
from equimoe.moe.parallel import build_mesh
from equimoe.moe.parallel.grad_norm import local_part
from equimoe.moe.train.config import HealthConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.judge import NonFiniteError
from equimoe.moe.train.trainer import Trainer
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.fork import run_ranks

Undo = Callable[[], Any]


def in_input(trainer: Trainer, value: float) -> Undo:
    def spoil(module: Any, args: Any, out: Tensor) -> Tensor:
        return out.index_fill(0, torch.tensor(0), value)

    return trainer.model.embedding.register_forward_hook(spoil).remove


def in_logits(trainer: Trainer, value: float) -> Undo:
    router = trainer.model.moe_layers()[0].router
    real = router.forward

    def forward(x_TD: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real(x_TD * torch.where(torch.arange(len(x_TD)) == 0, value, 1.0)[:, None], *args, **kwargs)

    router.forward = forward  # type: ignore[method-assign]
    return lambda: vars(router).pop("forward")


def in_weight(trainer: Trainer, value: float) -> Undo:
    weight = local_part(trainer.engine.weights()["blocks.0.mlp.experts.down_proj"]).view(-1)
    before = weight.clone()
    weight.fill_(value)
    return lambda: weight.copy_(before)


def in_gradient(trainer: Trainer, value: float) -> Undo:
    """The gradient is damaged after the ranks have reduced it."""
    reducer = trainer.engine._reducer  # type: ignore[attr-defined]
    finish = reducer.finish

    def finish_and_spoil() -> None:
        finish()
        next(p.grad for p in trainer.engine.parameters.values() if p.grad is not None).view(-1)[0] = value  # type: ignore

    reducer.finish = finish_and_spoil
    return lambda: setattr(reducer, "finish", finish)


def in_loss(trainer: Trainer, value: float) -> Undo:
    return trainer.model.head.register_forward_hook(lambda module, args, out: out * value).remove


PLACES = {place.__name__: place for place in (in_input, in_logits, in_weight, in_gradient, in_loss)}


def spoiled(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    """Spoil one rank's numbers, in the first step and later; return what happened in each case."""
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    mesh = build_mesh(config.parallel)
    found: dict[str, Any] = {}
    for policy in ("stop", "skip"):
        health = HealthConfig(nonfinite=policy, max_skipped=100)  # type: ignore[arg-type]
        trainer = Trainer(replace(config, health=health), corpus, mesh, torch.device("cpu"))
        for at in (0, 2):
            while trainer.step < at:
                trainer.train_step()
            for name, place in PLACES.items():
                for value in (float("nan"), float("inf")):
                    found[f"{policy} {name} {value} step {at}"] = _one(trainer, rank, place, value)
        found[f"{policy} goes on"] = float(trainer.train_step())
        trainer.check_replicas()
    return found


def _one(trainer: Trainer, rank: int, place: Callable[[Trainer, float], Undo], value: float) -> tuple[str, bool]:
    """Return the outcome on this rank, and whether weights, moments and balance are as before."""
    before = {name: local_part(t).clone() for name, t in trainer.state().items() if not name.startswith("generator")}
    undo = place(trainer, value) if rank == 1 else lambda: None
    attempt, attempts = trainer._attempt, 0

    def once(numbers: list[int], observed: bool) -> Any:
        nonlocal attempts
        attempts += 1
        if attempts == 2:  # the step was skipped
            raise InterruptedError
        return attempt(numbers, observed)

    trainer._attempt = once  # type: ignore[method-assign]
    try:
        trainer.train_step()
        outcome = "updated"
    except NonFiniteError as error:
        outcome = f"stopped: {error}"
    except InterruptedError:
        outcome = f"skipped: {trainer.skipped.pop()['reason']}"
    finally:
        del trainer._attempt
        undo()
    after = trainer.state()
    return outcome, all(torch.equal(local_part(after[name]), value) for name, value in before.items())


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.faults
def test_a_number_that_is_not_finite_on_one_rank(tmp_path: Path, ep: int) -> None:
    balance = BalanceConfig(coefficient=0.05, estimator="carry", bias_update_rate=0.1)
    config = small.on(small.write_texts(tmp_path / "texts"), ep, steps=9, balance=balance)
    first, second = run_ranks(spoiled, 2, config)
    assert first == second
    cases = {case: outcome for case, outcome in first.items() if not case.endswith("goes on")}
    assert len(cases) == 40
    for case, (outcome, unchanged) in cases.items():
        policy = case.split()[0]
        assert outcome.startswith({"stop": "stopped: ", "skip": "skipped: "}[policy]), (case, outcome)
        assert "is not finite" in outcome and unchanged, (case, outcome)
    agreed = f"{len(cases)}/{len(cases)}"
    report("29", f"all ranks decide alike and nothing changes, ep {ep}", cases_in_which_ranks_agreed=agreed)
    report("30", "as in later steps", cases=len(cases) // 2)


def twice(rank: int, world: int, config: TrainConfig) -> list[Any]:
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, build_mesh(config.parallel), torch.device("cpu"))
    records = [trainer.record(trainer.train_step()) for _ in range(4)]
    return [records, {name: local_part(weight) for name, weight in trainer.engine.weights().items()}]


def test_the_same_run_twice_has_the_same_bits(tmp_path: Path) -> None:
    config = small.on(small.write_texts(tmp_path / "texts"), 2, steps=4)
    runs = [run_ranks(twice, 2, config) for _ in range(2)]
    for (records, weights), (again, weights_again) in zip(*runs, strict=True):
        assert records == again
        assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    report("42", "bits are equal", weights=len(runs[0][0][1]))
