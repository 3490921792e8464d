"""Counts the parameters of a model from its configuration, without building it."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import require
from ..parallel.degrees import ParallelConfig
from ..train.config import TrainConfig
from .memory_formulas import RankPart, weights_of


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    #: of the whole model
    total: int
    #: without the routed experts that a token is not sent to
    active: int
    #: of the embedding, which computes nothing; part of the other two
    embedding: int


def sizes(config: TrainConfig, vocab_size: int | None = None) -> Sizes:
    """Return the numbers of parameters of a run's model. ``vocab_size`` is needed if the configuration leaves it out.

    Tied weights count once, as the embedding's.
    """
    vocabulary = config.model.vocab_size or vocab_size
    require(vocabulary is not None, "model.vocab_size", vocabulary, "give the tokenizer's vocabulary size")
    assert vocabulary is not None
    whole = RankPart(ParallelConfig().resolve(1), 0, tuple(range(config.model.num_layers)), (0,), 1)
    counts = [(weight.rows * weight.width, weight.expert) for weight in weights_of(config, whole, vocabulary)]
    experts = sum(count for count, expert in counts if expert)
    dense = sum(count for count, expert in counts if not expert)
    active = dense + experts * config.moe.top_k // config.moe.num_experts
    return Sizes(dense + experts, active, vocabulary * config.moe.hidden_size)
