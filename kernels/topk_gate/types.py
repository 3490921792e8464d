"""The options and the result of :func:`topk_gate`.  T tokens, E experts, K top-k, B sequences."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Score = Literal["softmax", "sigmoid"]
#: the scores that the op supports
FUSED_SCORES: tuple[str, ...] = get_args(Score)

#: for a logit below LOW, sigmoid equals exp to rounding, even in fp64
LOW = -40.0


def least_sum() -> float:
    """Return the sum of the chosen scores below which they are proportional to the exponentials of their logits.

    Normalising them is then a softmax of these logits, which cannot underflow. It is far above the smallest fp32
    number, and far below a sum that contains a score of exp(LOW). It is a function because torch.compile may make a
    global number an input, which several layers cannot share.
    """
    return math.exp(-60.0)


class GateOutput(NamedTuple):
    """The result of :func:`topk_gate`: each token's experts and weights, and the sums that balance losses need.

    Floating-point values are fp32 (fp64 for fp64 logits). Masked tokens are left out of the sums.
    """

    #: int64 [T, K], the chosen experts, best first; also for masked tokens
    ids_TK: Tensor
    #: [T, K], the weights of the chosen experts, differentiable
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
    """The arguments of :func:`topk_gate` that are not tensors."""

    k: int
    score: Score
    groups: int
    kept_groups: int
    normalize: bool
    softmax_after_topk: bool
    scale: float
    sequences: int


def lowest_bias(dtype: torch.dtype) -> float:
    """Return the value to which lower biases, such as -inf, are raised.

    Adding a score does not change it, and the sum of two such values is finite.
    """
    return torch.finfo(dtype).min / 4
