"""Checks runs on separate documents, some of whose tokens are not trained on: by hand, and on several ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from equimoe.moe import BalanceConfig
from equimoe.moe.model.documents import document_numbers, document_starts
from equimoe.moe.parallel import IGNORED, build_mesh
from equimoe.moe.train.config import HealthConfig, TrainConfig
from equimoe.moe.train.data import Corpus, bigram_loss, heldout_batches, load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

#: the id that ends a document: a space, so that sequences of 16 tokens have several
END = 32


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = small.write_texts(tmp_path_factory.mktemp("texts"))
    config = small.on(folder, steps=3, balance=BalanceConfig(coefficient=0.05, estimator="exact"))
    return replace(config, data=replace(config.data, documents="separate"))


def corpus_of(config: TrainConfig, trained: float = 0.6) -> Corpus:
    """Return the corpus, of whose first domain a part of the tokens is trained on, and of whose last one none."""
    corpus, draw = load_corpus(config.data, load_tokenizer("bytes")), np.random.default_rng(0)
    first, _, last = corpus.domains

    def masks(streams: dict[str, Any]) -> dict[str, Any]:
        some = (draw.random(len(streams[first])) < trained).astype(np.uint8)
        return {first: some, last: np.zeros(len(streams[last]), np.uint8)}

    return replace(corpus, end_of_document=END, train_masks=masks(corpus.train), heldout_masks=masks(corpus.heldout))


def trainer_of(config: TrainConfig, world: int = 1, trained: float = 0.6) -> Trainer:
    mesh = build_mesh(config.parallel) if world > 1 else None
    return Trainer(config, corpus_of(config, trained), mesh, torch.device("cpu"))


def losses_of(trainer: Trainer, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = trainer.model(inputs, None, document_starts(document_numbers(inputs, END)))
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


@torch.no_grad()
def test_losses_are_means_over_labels(config: TrainConfig) -> None:
    """By hand, for the first step and the evaluation. Tokens without a label are still counted as read."""
    trainer = trainer_of(config)
    first, second, last = trainer.corpus.domains
    sums = {d: [0.0, 0] for d in trainer.corpus.domains}
    for inputs, labels, domain_B in trainer.batches.sample(0, 0, 1, trainer.micro_batches, 2):
        for nats, row, d in zip(losses_of(trainer, inputs, labels), labels, domain_B.tolist(), strict=True):
            sums[trainer.corpus.domains[d]][0] += float(nats.sum())
            sums[trainer.corpus.domains[d]][1] += int((row != IGNORED).sum())
    with torch.enable_grad():
        record = trainer.record(trainer.train_step())
    assert sums[last][1] == 0 < sums[first][1]
    want = {d: nats / labels for d, (nats, labels) in sums.items() if labels}
    assert record["domain_loss"] == pytest.approx(want, rel=1e-5)
    everything = [sum(column) for column in zip(*sums.values(), strict=True)]
    assert record["loss"] == pytest.approx(everything[0] / everything[1], rel=1e-5)
    assert record["tokens"] == 8 * 16 and all(sum(layer["counts"]) == 8 * 16 * 2 for layer in record["layers"])

    held = {d: [0.0, 0] for d in trainer.corpus.domains}
    for d, inputs, labels, mask in heldout_batches(trainer.corpus, 16, 2, 2):
        held[d][0] += float(losses_of(trainer, inputs, labels)[mask].sum())
        held[d][1] += int((labels[mask] != IGNORED).sum())
    found = trainer.evaluate()["domains"]
    assert found.keys() == {first, second}
    for d, row in found.items():
        assert row["tokens"] == held[d][1] and row["loss"] == pytest.approx(held[d][0] / held[d][1], rel=1e-5)
    assert bigram_loss(trainer.corpus, 257, 16, 2).keys() == {first, second, "all"}


def test_joined_documents_are_another_training(config: TrainConfig) -> None:
    joined = replace(config, data=replace(config.data, documents="joined"))
    one, two = (trainer.record(trainer.train_step()) for trainer in (trainer_of(config), trainer_of(joined)))
    assert one["loss"] != two["loss"]
    with pytest.raises(ValueError, match="data.documents='separate': the corpus does not say which id ends a document"):
        corpus = replace(corpus_of(config), end_of_document=None)
        Trainer(config, corpus, None, torch.device("cpu")).train_step()


def test_a_run_without_labels_in_a_step_goes_on(config: TrainConfig) -> None:
    """Such a step has no loss, which cannot be a spike, nor count among the losses that a spike is compared with."""
    trainer = trainer_of(replace(config, health=HealthConfig(spike="stop")))
    trainer.train_step()
    seen = list(trainer.judge.window.losses)
    read = trainer.batches.read
    trainer.batches.read = lambda *how: [(x, torch.full_like(y, IGNORED), d) for x, y, d in read(*how)]
    trainer.losses.sums_N2.zero_()
    record = trainer.record(trainer.train_step())
    assert record["loss"] is None and record["domain_loss"] == {} and np.isfinite(record["grad_norm"])
    assert trainer.judge.window.losses == seen and trainer.step == 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def curve(rank: int, world: int, config: TrainConfig) -> dict[str, Any]:
    trainer = trainer_of(config, world)
    records = [trainer.record(trainer.train_step()) for _ in range(config.steps)]
    return {"records": records, "eval": trainer.evaluate()}


MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp 2": (2, {"ep": 2}),
    "cp 2": (2, {"cp": 2}),
    "cp 2, gathered": (2, {"cp": 2, "context": "all_gather"}),
    "tp 2": (2, {"tp": 2}),
    "pp 2": (2, {"pp": 2}),
    "pp 2, cp 2, tp 2": (8, {"pp": 2, "cp": 2, "tp": 2}),
}


@pytest.mark.parametrize("name", slow_but(["dp 2", "cp 2", "tp 2", "pp 2"], MESHES))
def test_ranks_record_what_one_process_does(config: TrainConfig, name: str) -> None:
    world, degrees = MESHES[name]
    config = replace(config, model=replace(config.model, vocab_size=258))
    parallel = replace(config.parallel, **{"ep": 1} | degrees)
    (want,) = run_ranks(curve, 1, config)
    for found in run_ranks(curve, world, replace(config, parallel=parallel)):
        for one, two in zip(found["records"], want["records"], strict=True):
            assert one["domain_loss"] == pytest.approx(two["domain_loss"], rel=1e-4)
            assert [one[key] for key in ("loss", "tokens")] == pytest.approx([two[key] for key in ("loss", "tokens")])
        assert found["eval"]["domains"].keys() == want["eval"]["domains"].keys()
        for domain, row in want["eval"]["domains"].items():
            assert found["eval"]["domains"][domain] == pytest.approx(row, rel=1e-4)
