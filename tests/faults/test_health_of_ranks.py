"""Checks that ranks notice, alike, numbers that only one of them has: NaN, a flipped bit, another copy of a weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, checkpoint
from equimoe.moe.collectives import world_axis
from equimoe.moe.health import Replicas, finite_everywhere
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.grad_norm import local_part
from equimoe.moe.train.config import CheckpointConfig, HealthConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.judge import NonFiniteError
from equimoe.moe.train.loop import run
from equimoe.moe.train.replay import DisagreementError
from equimoe.moe.train.trainer import Trainer
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.fork import run_ranks

pytestmark = pytest.mark.faults

NAME = "blocks.1.attention.out_proj.weight"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_texts(tmp_path_factory.mktemp("texts"))


def config_of(texts: Path, parallel: ParallelConfig, **health: Any) -> TrainConfig:
    balance = BalanceConfig(coefficient=0.05, bias_update_rate=0.1)
    config = replace(small.on(texts, steps=4, balance=balance), parallel=replace(parallel, timeout_s=60))
    return replace(config, health=HealthConfig(**health))


def trainer_of(config: TrainConfig) -> Trainer:
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    return Trainer(config, corpus, build_mesh(config.parallel), torch.device("cpu"))


def refusal(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as raised:
        call()
    return str(raised.value)


MESHES = {
    "dp": (2, ParallelConfig()),
    "ep": (2, ParallelConfig(ep=2)),
    "ep x edp": (4, ParallelConfig(ep=2)),
    "tp": (2, ParallelConfig(tp=2)),
    "etp": (2, ParallelConfig(etp=2)),
    "pp": (4, ParallelConfig(pp=2)),
    "fsdp": (2, ParallelConfig(data_parallel="fsdp")),
    "hsdp x ep": (4, ParallelConfig(data_parallel="fsdp", dp_replicate=2, ep=2)),
}


def replicas(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    """Train, and compare replicas before and after one rank's copies have been damaged, one weight at a time."""
    trainer = trainer_of(config)
    for _ in range(2):
        trainer.train_step()
        trainer.check_replicas()
    found: dict[str, Any] = {}
    held = trainer.engine.weights() | trainer.engine.moments()
    copies = Replicas(held, world_axis()).copies
    for (name, place), ranks in copies.items():
        if name.startswith("optimizer.") and "out_proj" not in name:
            continue  # a few moments are enough
        mine = ranks[-1] == rank
        bits: Tensor | None = None
        if mine:
            bits = local_part(held[name]).view(torch.int32).view(-1)
            bits[-1] ^= 1
        found[f"{name} {place}"] = (ranks, refusal(DisagreementError, trainer.check_replicas))
        if bits is not None:
            bits[-1] ^= 1
    trainer.check_replicas()
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_a_flipped_bit_in_any_copy_is_found_and_named(texts: Path, mesh: str) -> None:
    world, parallel = MESHES[mesh]
    results = run_ranks(replicas, world, config_of(texts, parallel))
    assert all(result == results[0] for result in results)
    names = {key.split()[0] for key in results[0]}
    for key, (ranks, message) in results[0].items():
        name = key.split()[0]
        who = f"rank {ranks[-1]} differs from the other {len(ranks) - 1}"
        if len(ranks) == 2:
            who = f"ranks {ranks[0]}, {ranks[1]} differ from each other"
        assert message.startswith(f"{name}: {who}"), message
    assert ("embedding.weight" in names) == (mesh not in ("fsdp", "tp"))  # both shard it
    assert any("experts" in name for name in names) == (mesh not in ("ep", "etp", "fsdp"))
    assert any("bias_E" in name for name in names)
    assert any(name.endswith("exp_avg_sq") for name in names) == (mesh not in ("fsdp", "tp"))
    report("40", f"the weight and the ranks are named ({mesh})", copies=len(results[0]), found=len(results[0]))


def damaged_before_a_save(rank: int, world: int, config: TrainConfig, folder: Path) -> str:
    trainer = trainer_of(config)
    step = trainer.train_step

    def train_step(observed: bool = True) -> Tensor:
        norm = step(observed)
        if rank == 1 and trainer.step == 3:
            local_part(trainer.engine.weights()[NAME]).view(torch.int32).view(-1)[0] ^= 1
        return norm

    trainer.train_step = train_step  # type: ignore[method-assign]
    return refusal(DisagreementError, lambda: run(trainer, folder, None, None))


def test_copies_are_compared_before_every_save(texts: Path, tmp_path: Path) -> None:
    config = config_of(texts, ParallelConfig(), replicas_every=1000)
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    for message in run_ranks(damaged_before_a_save, 2, config, tmp_path):
        assert message.startswith(f"{NAME}: ranks 0, 1 differ")
    assert [path.name for path in checkpoint.complete(tmp_path / "checkpoints")] == ["step-00000002"]


def lone_nan(rank: int, world: int, config: TrainConfig) -> tuple[str, bool, list[int]]:
    """One rank's gradient becomes NaN after the ranks have reduced it."""
    trainer = trainer_of(config)
    trainer.train_step()
    finish = trainer.engine._reducer.finish  # type: ignore[attr-defined]

    def damaged() -> None:
        finish()
        if rank == 1 and trainer.step == 1:
            dict(trainer.model.named_parameters())[NAME].grad[0, 0] = float("nan")

    trainer.engine._reducer.finish = damaged  # type: ignore[attr-defined]
    before = {name: local_part(w).clone() for name, w in trainer.engine.weights().items()}
    message = refusal(NonFiniteError, trainer.train_step)
    same = all(torch.equal(local_part(w), before[name]) for name, w in trainer.engine.weights().items())
    return message, same, trainer.cursor.batch(1, 2)


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (3, 1)])
def test_nan_in_a_reduced_gradient_of_one_rank_stops_all(texts: Path, world: int, ep: int) -> None:
    config = config_of(texts, ParallelConfig(ep=ep))
    config = replace(config, data=replace(config.data, global_batch=12, micro_batch=2))
    for message, unchanged, _ in run_ranks(lone_nan, world, config):
        assert message.startswith("grad_norm=nan: is not finite on ranks [1]; ") and unchanged


def lone_spike(rank: int, world: int, config: TrainConfig) -> tuple[int, list[Any], float]:
    """One rank's losses are far too high in one attempt."""
    trainer = trainer_of(config)
    trainer.judge.window.losses = [5.3, 5.7] * 20
    attempts = [0]

    def count(module: Any, args: Any) -> None:
        attempts[0] += 1

    trainer.model.register_forward_pre_hook(count)
    trainer.model.head.register_forward_hook(
        lambda module, args, out: out * 1e3 if rank == 0 and attempts[0] == trainer.micro_batches + 1 else out
    )
    for _ in range(3):
        trainer.train_step()
    trainer.check_replicas()
    return trainer.judge.skips, trainer.skipped, float(trainer.engine.weights()[NAME].double().sum())


def test_spike_of_one_rank_is_skipped_by_all(texts: Path) -> None:
    first, second = run_ranks(lone_spike, 2, config_of(texts, ParallelConfig(), spike="revisit"))
    assert first == second and first[0] == 1
    assert first[1][0]["postponed"] == 8 and first[1][0]["step"] == 1
    report("56", "all ranks skip it, and read the batch again later", ranks=2)


def replay(rank: int, world: int, config: TrainConfig) -> str:
    """A rank computes another number when it computes a step again."""
    trainer = trainer_of(config)
    trainer.train_step()
    calls = [0]

    def flip(module: Any, args: Any, out: Tensor) -> Tensor:
        calls[0] += 1
        if rank == 0 or calls[0] <= trainer.micro_batches:
            return out
        changed = out.clone()
        changed.view(torch.int32).view(-1)[0] ^= 1 << 12
        return changed

    trainer.train_step()
    trainer.model.blocks["0"].attention.register_forward_hook(flip)
    return refusal(DisagreementError, trainer.train_step)


def test_replay_names_the_rank_that_calculates_wrongly(texts: Path) -> None:
    for message in run_ranks(replay, 2, config_of(texts, ParallelConfig(), replay_every=1)):
        assert "computing the step twice gave different losses on ranks [1]; " in message
    report("41", "a step that is computed twice differs; the ranks are named")


def finite(rank: int, world: int) -> list[bool]:
    one, nan, inf = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))
    cases = [([one], one), ([nan] if rank == 1 else [one], one), ([], inf if rank == 0 else one), ([], one)]
    return [finite_everywhere(losses, norm, world_axis()) for losses, norm in cases]


def test_finite_everywhere_is_the_same_answer_on_all_ranks() -> None:
    assert run_ranks(finite, 2) == [[True, False, False, True]] * 2
