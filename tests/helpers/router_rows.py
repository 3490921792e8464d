"""The routers beyond the plain best K, each with its definition in fp64, written token by token.

T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.routing import Router

E, D = 12, 10
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    #: (a token's logits, k) -> its experts, best first
    choose: Callable[[list[float], int], list[int]] = best
    #: the same of all tokens, if they depend on each other: (logits [T, E], valid tokens [T], k) -> experts of each
    choose_all: Callable[[Tensor, Tensor, int], list[list[int]]] | None = None
    #: parameters and hidden states -> logits in training; may draw random numbers as the router does
    logits: Callable[[Weights, Tensor], Tensor] = product
    #: the same -> probabilities of the balance loss; None: the scores, normalised
    balance_probs: Callable[[Weights, Tensor], Tensor] | None = None
    #: gate weights -> which of them are computed; may draw random numbers as the router does
    keep: Callable[[Tensor], list[list[bool]]] | None = None
    ks: tuple[int, ...] = (1, 3, E)
    #: most choices of a token; None: k
    width: int | None = None
    #: number of tokens -> the codes that it reads
    codes: Callable[[int], Tensor] | None = None
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


def top_p(p: float) -> Callable[[list[float], int], list[int]]:
    def choose(logits: list[float], k: int) -> list[int]:
        total, chosen, mass = sum(map(math.exp, logits)), [], 0.0
        for e in best(logits, k):
            if mass >= p:
                break
            chosen.append(e)
            mass += math.exp(logits[e]) / total
        return chosen

    return choose


def in_turn(logits_TE: Tensor, valid_T: Tensor, k: int) -> list[list[int]]:
    return [[(t * k + choice) % E for choice in range(k)] for t in range(len(logits_TE))]


def sinkhorn(logits_TE: Tensor, valid_T: Tensor, k: int) -> list[list[int]]:
    """Multiply rows and columns of exp(logits) by factors until rows sum to 1 and columns to T/E."""
    cost_TE = logits_TE[valid_T].exp()
    d1_E, change = torch.ones_like(cost_TE[0]), 1.0
    while change > 1e-14:
        d0_T = 1 / (cost_TE * d1_E).sum(1)
        new_E = len(cost_TE) / cost_TE.shape[1] / (cost_TE * d0_T[:, None]).sum(0)
        d1_E, change = new_E, float((new_E - d1_E).abs().mean())
    return [best(row, k) for row in (logits_TE.exp() * d1_E).tolist()]


def optimum(logits_TE: Tensor, valid_T: Tensor, k: int) -> list[list[int]]:
    """Give each expert at most ceil(T/E) tokens with the highest sum of logits, by the Hungarian method."""
    logits = logits_TE[valid_T].tolist()
    experts = logits_TE.shape[1]
    most = -(-len(logits) // experts)
    columns = experts * most
    # potentials of rows and columns, and the row in each column, all counted from 1 (0: none)
    u, v, row_of, way = [0.0] * (len(logits) + 1), [0.0] * (columns + 1), [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, len(logits) + 1):
        row_of[0], column = row, 0
        least, used = [float("inf")] * (columns + 1), [False] * (columns + 1)
        while row_of[column]:
            used[column], current, delta, following = True, row_of[column], float("inf"), 0
            for j in range(1, columns + 1):
                if not used[j]:
                    cost = -logits[current - 1][(j - 1) // most] - u[current] - v[j]
                    if cost < least[j]:
                        least[j], way[j] = cost, column
                    if least[j] < delta:
                        delta, following = least[j], j
            for j in range(columns + 1):
                if used[j]:
                    u[row_of[j]] += delta
                    v[j] -= delta
                else:
                    least[j] -= delta
            column = following
        while column:
            row_of[column], column = row_of[way[column]], way[column]
    expert_of = {row: (column - 1) // most for column, row in enumerate(row_of) if column}
    found = iter(expert_of[row] for row in range(1, len(logits) + 1))
    return [[next(found)] if ok else best(row, 1) for row, ok in zip(logits_TE.tolist(), valid_T.tolist(), strict=True)]


def chosen_by_experts(
    cap: int, sequences: int = 1, sigmoid: bool = False
) -> Callable[[Tensor, Tensor, int], list[list[int]]]:
    """Take pairs of token and expert in the order of scores, if both have room; tokens compete at each position of the
    sequences, or all of them."""

    def choose_all(logits_TE: Tensor, valid_T: Tensor, k: int) -> list[list[int]]:
        tokens, experts = logits_TE.shape
        scores = logits_TE.tolist() if sigmoid else logits_TE.softmax(1).tolist()
        length = tokens // sequences if sequences > 1 else 1
        chosen: list[list[int]] = [[] for _ in range(tokens)]
        for position in range(length):
            group = [t for t in range(position, tokens, length) if valid_T[t]]
            room = [len(group) * k // experts] * experts
            if not room[0]:
                for t in group:
                    chosen[t] = best(scores[t], k)
                continue
            for _, t, e in sorted((-scores[t][e], t, e) for t in group for e in range(experts)):
                if room[e] and len(chosen[t]) < cap:
                    chosen[t].append(e)
                    room[e] -= 1
        return chosen

    return choose_all


def jittered(size: float, x_TD: Tensor) -> Tensor:
    return x_TD * (torch.rand(x_TD.shape, device=x_TD.device).to(x_TD) * 2 * size + (1 - size))


def jitter(size: float) -> Callable[[Weights, Tensor], Tensor]:
    return lambda p, x_TD: product(p, jittered(size, x_TD))


def second_at_random(weights_TK: Tensor) -> list[list[bool]]:
    draws = torch.rand(len(weights_TK), device=weights_TK.device).tolist()
    return [[True, draw < min(1.0, 2 * b / (a + b))] for draw, (a, b) in zip(draws, weights_TK.tolist(), strict=True)]


def noisy(p: Weights, x_TD: Tensor) -> Tensor:
    draw_TE = torch.randn(len(x_TD), E, device=x_TD.device).double()
    return product(p, x_TD) + draw_TE * (1 + (x_TD @ p["noise_weight"].T).exp()).log()


def cosines(p: Weights, x_TD: Tensor) -> Tensor:
    h_TR, e_ER = x_TD @ p["projection"].T, p["weight"]
    return (h_TR @ e_ER.T) / h_TR.square().sum(1, keepdim=True).sqrt() / e_ER.square().sum(1).sqrt()


def cosine(p: Weights, x_TD: Tensor) -> Tensor:
    return cosines(p, x_TD) * p["log_scale"].exp()


def tasks(tokens: int) -> Tensor:
    """Return four tasks and the unknown one in turn."""
    return torch.arange(tokens, device=DEVICE) % 5 - 1


def with_tasks(p: Weights, x_TD: Tensor) -> Tensor:
    """Multiply [h; e] by one weight, where e is the embedding of the task, or the mean of all."""
    codes = tasks(len(x_TD)).tolist()
    mean = p["task_embedding"].mean(0)
    e_TR = torch.stack([mean if code < 0 else p["task_embedding"][code] for code in codes])
    return torch.cat((x_TD, e_TR), 1) @ torch.cat((p["weight"], p["task_weight"]), 1).T


NO_LOSS = BalanceConfig(coefficient=0.0)
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
    "task": Row(
        RouterConfig(gate="task", tasks=4, task_width=5, normalize_weights=False), logits=with_tasks, codes=tasks
    ),
    "task, sigmoid, jitter": Row(
        RouterConfig("sigmoid", gate="task", tasks=4, jitter=0.3, normalize_weights=False),
        logits=lambda p, x_TD: with_tasks(p, jittered(0.3, x_TD)),
        codes=tasks,
        ks=(2,),
    ),
    "MoE++, first layer": Row(RouterConfig(gate="residual", normalize_weights=False)),
    "S-BASE": Row(
        RouterConfig(normalize_weights=False, select="sinkhorn"), choose_all=sinkhorn, layer={"balance": NO_LOSS}
    ),
    "S-BASE, sigmoid": Row(
        RouterConfig("sigmoid", normalize_weights=False, select="sinkhorn"),
        choose_all=sinkhorn,
        ks=(1,),
        layer={"balance": NO_LOSS},
    ),
    "BASE": Row(
        RouterConfig("sigmoid", normalize_weights=False, select="base"),
        choose_all=optimum,
        ks=(1,),
        layer={"balance": NO_LOSS},
    ),
    "expert choice": Row(
        RouterConfig(normalize_weights=False, select="expert_choice"),
        choose_all=chosen_by_experts(E),
        width=E,
        layer={"balance": NO_LOSS},
    ),
    "expert choice, capped": Row(
        RouterConfig(normalize_weights=False, select="expert_choice", cap=4, weight_scale=2.0),
        choose_all=chosen_by_experts(4),
        ks=(2, 3),
        width=4,
        layer={"balance": NO_LOSS},
    ),
    "expert choice, sigmoid": Row(
        RouterConfig("sigmoid", normalize_weights=False, select="expert_choice"),
        choose_all=chosen_by_experts(E, sigmoid=True),
        ks=(2,),
        width=E,
        layer={"balance": NO_LOSS},
    ),
    "expert choice by position": Row(
        RouterConfig(normalize_weights=False, select="expert_choice_by_position"),
        choose_all=chosen_by_experts(E, sequences=3),
        ks=(1, 4, E),
        width=E,
        layer={"balance": NO_LOSS},
    ),
    "expert choice by position, capped": Row(
        RouterConfig(normalize_weights=False, select="expert_choice_by_position", cap=6),
        choose_all=chosen_by_experts(6, sequences=3),
        ks=(4,),
        width=6,
        layer={"balance": NO_LOSS},
    ),
    "even": Row(RouterConfig(normalize_weights=False, select="even"), choose_all=in_turn),
    "GShard": Row(RouterConfig(random_second=True), keep=second_at_random, ks=(2,)),
    "GShard, plain weights": Row(
        RouterConfig(normalize_weights=False, random_second=True), keep=second_at_random, ks=(2,)
    ),
    "top-p (HMoE)": Row(RouterConfig(select="top_p", top_p=0.5, entropy_loss=0.03), top_p(0.5), ks=(3, E)),
    "top-p, plain weights": Row(
        RouterConfig(select="top_p", normalize_weights=False, weight_scale=2.0), top_p(0.6), ks=(1, 5)
    ),
    "top-p, kept logits": Row(RouterConfig(select="top_p", softmax_after_topk=True, top_p=0.9), top_p(0.9), ks=(4,)),
}


def codes_of(row: Row, tokens: int) -> Tensor | None:
    return None if row.codes is None else row.codes(tokens)


def router_of(row: Row, k: int, backend: str = "torch") -> Router:
    return layer_of(row, k, backend=backend).router.to(DEVICE)


@torch.no_grad()
def layer_of(row: Row, k: int, **changes: Any) -> MoE:
    """Build a layer, none of whose router's parameters is zero."""
    torch.manual_seed(0)
    layer = MoE(config_of(row, k, **changes))
    for weight in layer.router.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return layer


def config_of(row: Row, k: int, **changes: Any) -> MoEConfig:
    return MoEConfig(D, 8, E, k, row.config, init_std=0.4, **row.layer | changes)
