"""What stands for the counts of an optimizer step that is still running.  E experts.

Counts carry no gradient, so a loss may use the newest ones that there are when its backward runs. In a step of M
micro-batches of which n are known, with counts c over S tokens, and a step before it with C over T in M':

    rolling    c / S                                   (Algorithm 1 of arXiv 2501.11873)
    carry      (c + w C) / (S + w T),  w = (M - n)/M'  (w is the part of the step that is still to come)
    exact      c / S, where n = M: all were counted ahead, or all forwards came before the first backward

``rolling`` with one backward after each forward is biased: over random orders of G equal micro-batches its expected
loss is (H_G/G) L_micro + (1 - H_G/G) (G L_global - L_micro) / (G - 1), with the harmonic number H_G = 1 + ... + 1/G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """fp64 values that stand for a whole step's, on all ranks."""

    #: [E] and scalar: choices, and the tokens among which they were counted
    counts_E: Tensor
    tokens: Tensor
    #: scalar, tokens that the whole step is expected to have
    step_tokens: Tensor


def so_far(known_X: Tensor, seen: int, micro_batches: int, previous_X: Tensor | None) -> Estimate:
    """The micro-batches known. Those to come are expected to have as many tokens each."""
    counts_E, tokens = known_X[:-1].double(), known_X[-1].double()
    return Estimate(counts_E, tokens, tokens * (max(micro_batches, seen) / seen))


def with_step_before(known_X: Tensor, seen: int, micro_batches: int, previous_X: Tensor | None) -> Estimate:
    """The micro-batches known, and as many of the step before as are to come; :func:`so_far` in the first step."""
    rolling = so_far(known_X, seen, micro_batches, previous_X)
    if previous_X is None or seen >= micro_batches:
        return rolling
    known = previous_X[-1] > 0  # restored from a checkpoint of a run that had no step before, it is all zero
    weight = (micro_batches - seen) / previous_X[-1].clamp_min(1).double()
    tokens = rolling.tokens + weight * previous_X[-2]
    return Estimate(
        rolling.counts_E + weight * previous_X[:-2], tokens, torch.where(known, tokens, rolling.step_tokens)
    )


#: (int64 [E + 1], counts and tokens of the micro-batches known; how many these are; how many the step has; int64
#: [E + 2], counts, tokens and number of micro-batches of the step before, None for the first) to the step
ESTIMATORS: dict[str, Callable[[Tensor, int, int, Tensor | None], Estimate]] = {
    "rolling": so_far,
    "carry": with_step_before,
    "exact": so_far,
}
