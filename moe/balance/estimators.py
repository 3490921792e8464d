"""Estimates the load of an optimizer step that is still running.  E experts.

Counts have no gradient, so a loss can use the newest ones when its backward runs. Suppose that n of the step's M
micro-batches are known, with counts c of S tokens, and that the previous step had M' with counts C of T tokens:

    rolling    c / S                                   (Algorithm 1 of arXiv 2501.11873)
    carry      (c + w C) / (S + w T),  w = (M - n)/M'  (the previous step stands in for the remaining micro-batches)
    adaptive   c / S + the rest of the step, as a mixture of rolling and carry: :mod:`.agreement` derives its weight
    exact      c / S, where n = M: a counting pass, or all forwards before the first backward

``rolling`` is biased if each forward is followed by its backward: over random orders of G equal micro-batches, the
expected loss is (H_G/G) L_micro + (1 - H_G/G) (G L_global - L_micro) / (G - 1), with H_G = 1 + 1/2 + ... + 1/G.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .agreement import Agreement


class Estimate(NamedTuple):
    """The estimated load of the whole step on all ranks, in fp64."""

    #: [E] and scalar: choices, and the tokens that made them
    counts_E: Tensor
    tokens: Tensor
    #: scalar, the expected number of tokens in the whole step
    step_tokens: Tensor


def rolling(
    known_X: Tensor, seen: int, micro_batches: int, previous_X: Tensor | None, agreement: Agreement | None = None
) -> Estimate:
    """Take the load of the micro-batches that are known. The others count as having the same load and length."""
    known_X = known_X.double()
    counts_E, tokens = known_X[:-1], known_X[-1]
    return Estimate(counts_E, tokens, tokens if seen >= micro_batches else tokens * (micro_batches / seen))


def carry(
    known_X: Tensor, seen: int, micro_batches: int, previous_X: Tensor | None, agreement: Agreement | None = None
) -> Estimate:
    """Take the load of the micro-batches that are known, and the previous step's load for the others.

    In the first step, this is :func:`rolling`.
    """
    so_far = rolling(known_X, seen, micro_batches, previous_X)
    if previous_X is None or seen >= micro_batches:
        return so_far
    # after a resume, all zero if the saved run had no previous step
    exists = previous_X[-1] > 0
    weight = (micro_batches - seen) / previous_X[-1].clamp_min(1).double()
    tokens = so_far.tokens + weight * previous_X[-2]
    step_tokens = torch.where(exists, tokens, so_far.step_tokens)
    return Estimate(so_far.counts_E + weight * previous_X[:-2], tokens, step_tokens)


def adaptive(
    known_X: Tensor, seen: int, micro_batches: int, previous_X: Tensor | None, agreement: Agreement | None = None
) -> Estimate:
    """Expect of the other micro-batches a mixture of the known ones' load and the previous step's load.

    In the first two steps, this is :func:`rolling`.
    """
    carried = carry(known_X, seen, micro_batches, previous_X)
    if previous_X is None or agreement is None or seen >= micro_batches:
        return carried
    counts_E, tokens = known_X[:-1].double(), known_X[-1].double()
    weight = agreement.weight(seen / micro_batches)
    weight = torch.where(previous_X[-1] > 0, weight, 0.0)  # after a resume, there may be no previous step
    whole, rest = micro_batches / seen, 1 - weight
    return Estimate(
        rest * whole * counts_E + weight * carried.counts_E,
        rest * whole * tokens + weight * carried.tokens,
        rest * whole * tokens + weight * carried.step_tokens,
    )


#: name -> function from (counts and tokens of the known micro-batches, int64 [E + 1]; their number; the number in the
#: step; counts, tokens and number of micro-batches of the previous step, int64 [E + 2], or None; how well steps have
#: predicted each other, or None) to the estimate
ESTIMATORS: dict[str, Callable[[Tensor, int, int, Tensor | None, Agreement | None], Estimate]] = {
    "rolling": rolling,
    "carry": carry,
    "adaptive": adaptive,
    "exact": rolling,  # the balancer verifies that all micro-batches are known
}
