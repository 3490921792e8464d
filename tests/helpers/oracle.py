"""A slow and obvious reference: the layer and its losses, as defined.  T tokens, D hidden, E experts, K top-k."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import MoE


def route(layer: MoE, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits, probabilities (summing to 1), ids and weights, computed token by token."""
    config = layer.config
    logits_TE = x_TD @ layer.router.weight.to(x_TD.dtype).T
    scores_TE = logits_TE.softmax(-1) if config.router.score == "softmax" else logits_TE.sigmoid()
    ids = []
    for row in scores_TE.detach().tolist():
        ids.append(sorted(range(len(row)), key=lambda e: (-row[e], e))[: config.top_k])
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, config.top_k)
    weights_TK = scores_TE.gather(1, ids_TK)
    if config.router.softmax_after_topk:
        weights_TK = logits_TE.gather(1, ids_TK).softmax(-1)
    elif config.router.normalize_weights:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return logits_TE, scores_TE / scores_TE.sum(-1, keepdim=True), ids_TK, weights_TK * config.router.weight_scale


def forward(layer: MoE, x_TD: Tensor, kept_TK: Tensor | None = None) -> Tensor:
    """Return the routed experts' output; where ``kept_TK`` is False, the choice is dropped."""
    _, _, ids_TK, weights_TK = route(layer, x_TD)
    gate_up, down = layer.experts.gate_up_proj.to(x_TD.dtype), layer.experts.down_proj.to(x_TD.dtype)
    rows = []
    for t, x_D in enumerate(x_TD):
        y_D = torch.zeros_like(x_D)
        for k, e in enumerate(ids_TK[t].tolist()):
            if kept_TK is None or bool(kept_TK[t, k]):
                gate, up = (gate_up[e] @ x_D).chunk(2)
                y_D = y_D + weights_TK[t, k] * (down[e] @ (F.silu(gate) * up))
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * 0


def balance_loss(layer: MoE, x_TD: Tensor, mask_T: Tensor | None = None) -> Tensor:
    """Return E / (K T) sum_i c_i * (1/T) sum_t p_i(t) over the valid tokens of one process that holds all tokens.

    If only first choices count, K is 1.
    """
    _, probs_TE, ids_TK, _ = route(layer, x_TD)
    if layer.config.balance.counts == "first":
        ids_TK = ids_TK[:, :1]
    if mask_T is not None:
        probs_TE, ids_TK = probs_TE[mask_T], ids_TK[mask_T]
    tokens, num_experts = probs_TE.shape
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).to(probs_TE.dtype)
    return num_experts / (ids_TK.shape[1] * tokens) * (counts_E * probs_TE.mean(0)).sum()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the norm of the difference over that of ``want``; the plain norm if ``want`` is zero up to rounding.

    If it is not a number, the error is infinite, because ``max`` would ignore a NaN.
    """
    got, want = got.detach().double(), want.detach().double()
    scale = float(want.norm())
    error = float((got - want).norm()) / (scale if scale > 1e-12 else 1.0)
    return math.inf if math.isnan(error) else error
