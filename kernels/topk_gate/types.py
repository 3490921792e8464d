"""What a gate is asked and what it answers. T tokens, E experts, K top-k, B sequences."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]
#: the scores that the op computes
FUSED_SCORES: tuple[str, ...] = get_args(Score)

#: a sigmoid below exp(LOW) is the exponential of its logit, in fp64 too
LOW = -40.0
#: scores whose sum is below are exponentials, up to a factor that they share; normalised, they are a softmax of logits.
#: Far above the smallest number of fp32, and far below a sum with a score of exp(LOW) in it
FLOOR = math.exp(-60.0)


class GateOutput(NamedTuple):
    """The experts each token takes, and the sums over tokens that a balance loss of any scope needs.

    Floating-point values are fp32 (fp64 for fp64 logits). Sums leave masked tokens out.
    """

    #: int64 [T, K], the experts chosen, best first; masked tokens have theirs too
    ids_TK: Tensor
    #: [T, K], differentiable
    weights_TK: Tensor
    #: int64 [B, E], choices per sequence and expert
    counts_BE: Tensor
    #: int64 [B], valid tokens per sequence
    tokens_B: Tensor
    #: [B, E], sum over tokens of the scores normalised to 1, differentiable
    prob_sums_BE: Tensor
    #: scalar, sum over tokens of logsumexp(logits)^2, differentiable
    z_sum: Tensor


class GateOptions(NamedTuple):
    """The choices of :func:`topk_gate` that are no tensors."""

    k: int
    score: Score
    groups: int
    kept_groups: int
    normalize: bool
    softmax_after_topk: bool
    scale: float
    sequences: int


def lowest_bias(dtype: torch.dtype) -> float:
    """What a lower bias, such as -inf, counts as: no score changes it, and a sum of two is finite."""
    return torch.finfo(dtype).min / 4
