"""The op that turns router logits into a routing: score, select, weigh and count."""

# T tokens, E experts, K top-k, B sequences of equal length.

from __future__ import annotations

import torch
from torch import Tensor

from .. import pick
from ..auto import automatic
from ..checks import backend_without_values, check_device, readable
from . import reference, torch_ops
from .tiles import MAX_EXPERTS, MAX_K
from .types import FUSED_SCORES, GateOptions, GateOutput, Score, lowest_bias

__all__ = ["FUSED_SCORES", "GateOutput", "lowest_bias", "topk_gate"]


def _triton(
    logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, ids_TK: Tensor | None, options: GateOptions
) -> GateOutput:
    from . import triton_ops  # imported late, because the other backends do not need triton

    return triton_ops.topk_gate(logits_TE, bias_E, mask_T, ids_TK, options)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BACKENDS = {"reference": reference.topk_gate, "torch": torch_ops.topk_gate, "triton": _triton}


def topk_gate(
    logits_TE: Tensor,
    k: int,
    *,
    score: Score = "softmax",
    bias_E: Tensor | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    normalize: bool = True,
    softmax_after_topk: bool = False,
    scale: float = 1.0,
    mask_T: Tensor | None = None,
    sequences: int = 1,
    ids_TK: Tensor | None = None,
    backend: str = "auto",
) -> GateOutput:
    """Choose each token's k experts, compute their weights, and sum what balance losses need.

    Everything is computed in fp32 (fp64 for fp64 logits). Differentiable once in ``logits_TE``, through the weights,
    prob_sums and z_sum. The result is a :class:`GateOutput`.

    * ``logits_TE`` is [T, E]. ``score`` is "softmax" or "sigmoid".
    * A token's experts are those with the k highest scores plus ``bias_E`` ([E], floating point); of equal ones, those
      with the lower index. The bias does not enter the weights (DeepSeek-V3, arXiv 2412.19437).
    * With ``groups`` of E/groups consecutive experts, only experts of the ``kept_groups`` best groups can be chosen. A
      group's value is the sum of its two highest biased scores.
    * The weights are the chosen scores, divided by their sum if ``normalize``; or, with ``softmax_after_topk``, the
      softmax of the chosen logits (Mixtral, arXiv 2401.04088). Both are multiplied by ``scale``.
    * ``mask_T`` is bool [T]; tokens with False do not count. The T tokens are ``sequences`` sequences of equal length.
    * ``ids_TK`` (int64 [T, K]) is a choice made earlier: it is weighed and counted, and bias and groups have no effect.

    Whatever logits, bias and mask contain, a token chooses k different experts, all from its kept groups. A NaN score
    ranks highest; a bias of -inf ranks like a very large negative number; scores that underflow are equal. Normalised
    weights sum to ``scale``, however small the chosen scores are.

    Non-finite logits affect only their own token's choice, weights and gradient, and the sums unless the token is
    masked. NaN logits, +inf under a softmax, and chosen logits that are all -inf make the weights that depend on them
    NaN, and also the gradient of the token's logits and the sums. An infinite logsumexp (a +inf logit under any score,
    or a token whose logits are all -inf) makes z_sum non-finite, inf or NaN depending on the backend, and the gradient
    of that token's logits NaN.

    The triton backend takes fp32, bf16 and fp16 logits, k up to 64 and E up to 4096; "auto" takes torch for others.
    Raises ValueError for arguments that do not fit and, on the CPU, for ids out of range.
    """
    options = GateOptions(k, score, groups, kept_groups, normalize, softmax_after_topk, float(scale), sequences)
    _check(logits_TE, bias_E, mask_T, options)
    if ids_TK is not None:
        _check_ids(ids_TK, logits_TE, k)
    check_device(logits_TE.device, bias_E=bias_E, mask_T=mask_T, ids_TK=ids_TK)
    if backend == "auto":
        tokens, experts = logits_TE.shape
        fits = logits_TE.dtype != torch.float64 and experts <= MAX_EXPERTS and k <= MAX_K
        backend = automatic("topk_gate", logits_TE, tokens * k, experts) if fits else "torch"
    backend = backend_without_values(backend, logits_TE)
    return pick("topk_gate", _BACKENDS, backend)(logits_TE, bias_E, mask_T, ids_TK, options)


def _check_ids(ids_TK: Tensor, logits_TE: Tensor, k: int) -> None:
    tokens, experts = logits_TE.shape
    if ids_TK.shape != (tokens, k) or ids_TK.dtype != torch.int64:
        raise ValueError(f"ids_TK={ids_TK.dtype}{list(ids_TK.shape)}: must be int64 [{tokens}, {k}], k per token")
    if readable(ids_TK) and ids_TK.numel():
        low, high = (int(bound) for bound in ids_TK.aminmax())
        if low < 0 or high >= experts:
            raise ValueError(
                f"ids_TK in [{low}, {high}]: use 0..{experts - 1}; exclude tokens without a choice by mask_T"
            )


def _check(logits_TE: Tensor, bias_E: Tensor | None, mask_T: Tensor | None, options: GateOptions) -> None:
    shape = list(logits_TE.shape)
    if len(shape) != 2 or logits_TE.dtype not in _DTYPES:
        raise ValueError(f"logits_TE={logits_TE.dtype}{shape}: give fp32, bf16, fp16 or fp64 logits of shape [T, E]")
    tokens, experts = shape
    if not 1 <= options.k <= experts:
        raise ValueError(f"k={options.k}: must lie in 1..{experts}, the number of experts")
    if options.score not in FUSED_SCORES:
        raise ValueError(f"score={options.score!r}: use one of {', '.join(FUSED_SCORES)}")
    if options.groups < 1 or experts % options.groups:
        raise ValueError(f"groups={options.groups}: must divide the {experts} experts")
    if not 1 <= options.kept_groups <= options.groups:
        raise ValueError(f"kept_groups={options.kept_groups}: must lie in 1..{options.groups}, the number of groups")
    if options.kept_groups * (experts // options.groups) < options.k:
        held = options.kept_groups * (experts // options.groups)
        raise ValueError(f"kept_groups={options.kept_groups}: they hold {held} experts; keep enough for k={options.k}")
    if not options.scale > 0:
        raise ValueError(f"scale={options.scale}: must be positive")
    if bias_E is not None and (bias_E.shape != (experts,) or not bias_E.is_floating_point()):
        raise ValueError(
            f"bias_E={bias_E.dtype}{list(bias_E.shape)}: must be floating-point [{experts}], one per expert"
        )
    if mask_T is not None and (mask_T.shape != (tokens,) or mask_T.dtype != torch.bool):
        raise ValueError(f"mask_T={mask_T.dtype}{list(mask_T.shape)}: must be bool [{tokens}], one per token")
    if options.sequences < 1 or tokens % options.sequences:
        raise ValueError(f"sequences={options.sequences}: must divide the {tokens} tokens")
