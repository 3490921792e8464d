"""The routers beyond the plain best K, each with its definition in fp64, written token by token.

T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equimoe.moe import RouterConfig

E = 12
#: parameters of the router by name
Weights = dict[str, Tensor]


def best(values: list[float], k: int, among: list[int] | None = None) -> list[int]:
    """Return the indices of the k highest values, best first; ties by index."""
    return sorted(range(len(values)) if among is None else among, key=lambda e: (-values[e], e))[:k]


def product(p: Weights, x_TD: Tensor) -> Tensor:
    return x_TD @ p["weight"].T


@dataclass(frozen=True)
class Row:
    """A router, and what it is defined to compute. The defaults are those of softmax scores."""

    config: RouterConfig
    #: (logits of a token, valid tokens' logits [V, E], k) -> its experts, best first
    choose: Callable[[list[float], int], list[int]] = best
    #: parameters and hidden states -> logits in training; may draw random numbers as the router does
    logits: Callable[[Weights, Tensor], Tensor] = product
    #: the same -> probabilities of the balance loss; None: the scores, normalised
    balance_probs: Callable[[Weights, Tensor], Tensor] | None = None
    ks: tuple[int, ...] = (1, 3, E)
    #: other settings of the layer
    layer: dict[str, Any] = field(default_factory=dict)

    def score(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.softmax(1) if self.config.score == "softmax" else logits_TE.sigmoid()


def each_group(groups: int) -> Callable[[list[float], int], list[int]]:
    def choose(logits: list[float], k: int) -> list[int]:
        size = len(logits) // groups
        chosen = [e for g in range(groups) for e in best(logits, k // groups, list(range(g * size, (g + 1) * size)))]
        return best(logits, k, chosen)

    return choose


def jitter(size: float) -> Callable[[Weights, Tensor], Tensor]:
    def logits(p: Weights, x_TD: Tensor) -> Tensor:
        return product(p, x_TD * (torch.rand(x_TD.shape, device=x_TD.device).to(x_TD) * 2 * size + (1 - size)))

    return logits


def noisy(p: Weights, x_TD: Tensor) -> Tensor:
    draw_TE = torch.randn(len(x_TD), E, device=x_TD.device).double()
    return product(p, x_TD) + draw_TE * (1 + (x_TD @ p["noise_weight"].T).exp()).log()


def cosines(p: Weights, x_TD: Tensor) -> Tensor:
    h_TR, e_ER = x_TD @ p["projection"].T, p["weight"]
    return (h_TR @ e_ER.T) / h_TR.square().sum(1, keepdim=True).sqrt() / e_ER.square().sum(1).sqrt()


def cosine(p: Weights, x_TD: Tensor) -> Tensor:
    return cosines(p, x_TD) * p["log_scale"].exp()


ROWS: dict[str, Row] = {
    "MoGE": Row(RouterConfig(normalize_weights=False, select="each_group", groups=3), each_group(3), ks=(3, 6, E)),
    "MoGE, normalized sigmoid": Row(
        RouterConfig("sigmoid", weight_scale=2.5, select="each_group", groups=2), each_group(2), ks=(2, 4, E)
    ),
    "Switch, jitter": Row(RouterConfig(normalize_weights=False, jitter=0.3), logits=jitter(0.3)),
    "noisy top-k": Row(RouterConfig(normalize_weights=False, gate="noisy"), logits=noisy),
    "noisy top-k, kept logits": Row(RouterConfig(gate="noisy"), logits=noisy, ks=(3,)),
    "X-MoE": Row(
        RouterConfig(gate="cosine", normalize_weights=False),
        logits=cosine,
        balance_probs=lambda p, x_TD: (cosines(p, x_TD) / 0.3).softmax(1),
    ),
    "X-MoE, sigmoid": Row(
        RouterConfig("sigmoid", gate="cosine", projection=5, temperature=0.07, normalize_weights=False),
        logits=cosine,
        balance_probs=lambda p, x_TD: (cosines(p, x_TD) / 0.07).softmax(1),
        ks=(2,),
    ),
}
