"""Checks that the held-out loss does not depend on how sequences are grouped, and that evaluation changes no run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe import CapacityConfig, checkpoint
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.config import TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import full
from tests.helpers.slow import slow_but


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_texts(tmp_path_factory.mktemp("texts"))


def trainer_of(config: TrainConfig, world: int) -> Trainer:
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    return Trainer(config, corpus, build_mesh(config.parallel) if world > 1 else None, torch.device("cpu"))


@pytest.mark.parametrize("scope", ["local", "sequence", "global"])
@pytest.mark.slow
def test_with_limited_capacity_any_world_and_micro_batch_evaluate_alike(texts: Path, scope: str) -> None:
    """Neither padding nor other sequences may take a token's capacity. The last sequences are shorter."""
    config = small.on(texts, capacity=CapacityConfig(0.7, scope=scope))  # type: ignore[arg-type]
    log = replace(config.log, eval_sequences=5)
    config = replace(config, log=log, model=replace(config.model, vocab_size=258))

    def script(rank: int, world: int, degrees: dict[str, Any], micro_batch: int) -> dict[str, Any]:
        parallel, data = replace(config.parallel, **degrees), replace(config.data, micro_batch=micro_batch)
        trainer = trainer_of(replace(config, parallel=parallel, data=data), world)
        trained = [layer.capacity for layer in trainer.layers.values()]
        with torch.no_grad():  # as in a trained model, where experts matter
            for layer in trainer.layers.values():
                for weight in (layer.router.weight, *layer.experts.parameters()):
                    weight.mul_(20.0)
        found = trainer.evaluate()
        assert trained == [layer.capacity for layer in trainer.layers.values()]
        return found

    want = run_ranks(script, 1, {}, 2)[0]
    limitless = small.changed(config, capacity=None)
    assert run_ranks(lambda *_: trainer_of(limitless, 1).evaluate(), 1)[0]["loss"] != want["loss"]
    for world, degrees, micro_batch in (
        (1, {}, 1),
        (1, {}, 8),
        (2, {}, 4),
        (4, {"ep": 2}, 2),
        (2, {"cp": 2}, 2),
        (2, {"tp": 2}, 2),
        (2, {"pp": 2}, 2),
        (2, {"data_parallel": "fsdp"}, 1),
    ):
        for got in run_ranks(script, world, degrees, micro_batch):
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-6), (world, degrees, micro_batch)
            assert got["domains"].keys() == want["domains"].keys()
            for domain, rows in want["routing"].items():
                assert torch.allclose(torch.tensor(got["routing"][domain]), torch.tensor(rows), atol=1e-6)


@pytest.mark.parametrize(
    ("world", "parallel", "dtype"),
    slow_but(
        [(2, {"data_parallel": "fsdp"}, "float32")],
        [
            (2, {"data_parallel": "fsdp"}, "float32"),
            (2, {"data_parallel": "fsdp", "ep": 2}, "bfloat16"),
            (4, {"dp_replicate": 2, "data_parallel": "fsdp"}, "float32"),
            (4, {"pp": 2, "data_parallel": "fsdp"}, "float32"),
        ],
    ),
    ids=str,
)
def test_a_checkpoint_right_after_an_evaluation_resumes_in_the_same_bits(
    texts: Path, tmp_path: Path, world: int, parallel: dict[str, Any], dtype: str
) -> None:
    config = small.on(texts, steps=4, dtype=dtype)
    config = replace(config, parallel=replace(config.parallel, **parallel))

    def script(rank: int, world: int) -> bool:
        first, second = trainer_of(config, world), trainer_of(config, world)
        for _ in range(2):
            first.train_step()
        first.evaluate()
        path = first.save(tmp_path / "run")
        second.resume(path, checkpoint.read_manifest(path))
        for trainer in (first, second):
            trainer.train_step()
            trainer.train_step()
        one, two = first.state(), second.state()
        return one.keys() == two.keys() and all(torch.equal(full(one[n]), full(two[n])) for n in one)

    assert all(run_ranks(script, world))
