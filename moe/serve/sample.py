"""Chooses the next token from logits.  V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import require


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The same seed gives the same text for a prompt, whatever other prompts there are."""

    #: largest number of tokens to generate for each prompt
    max_tokens: int = 100
    #: divides the logits; 0 always takes the most likely token
    temperature: float = 1.0
    #: sample from the smallest set of tokens whose probabilities add up to this (arXiv 1904.09751)
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        require(0 <= self.temperature < float("inf"), "temperature", self.temperature, "must be 0 or more; 0: greedy")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]; 1: all tokens")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the id of the next token. ``generator`` is one for the CPU.

    Raises ValueError if a logit is not a number.
    """
    logits_V = logits_V.float().cpu()
    if logits_V.isnan().any():
        raise ValueError("the model's logits are not finite; its weights are damaged, or its dtype is too narrow")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # the largest logit becomes 0 first, so that a tiny temperature cannot overflow it
    scaled_V = (logits_V.double() - logits_V.max().double()) / sampling.temperature
    probabilities_V, ids_V = scaled_V.softmax(0).sort(descending=True, stable=True)
    before_V = probabilities_V.cumsum(0) - probabilities_V
    probabilities_V = probabilities_V.masked_fill(before_V >= sampling.top_p, 0.0)
    return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])
