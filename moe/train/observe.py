"""What is seen of routing: in a training step, a row of numbers for each layer that ranks add up, and records of it.

L MoE layers, M micro-batches of the step on this rank, T tokens, E experts, K top-k, B sequences, D expert-parallel
ranks, N domains, X anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..balance import StepTotals, loss_terms, loss_value
from ..collectives import sum_over
from ..layer import MoE
from ..model import Attention, Decoder, LatentAttention
from ..parallel import Mesh
from ..placement import Owners
from ..routing import Router
from ..types import Routing, load_summary
from .config import TrainConfig

V = TypeVar("V")
Array = NDArray[np.float64]
ESTIMATE = ("balance_tokens", "balance_sequences", "estimator_error", "gradient_error")
#: pairs of so many domains are written one by one
MAX_DOMAINS = 16


# ---- what a router does


@contextmanager
def watch_routers(layers: Iterable[MoE], see: Callable[[Router, Tensor, Routing], V]) -> Iterator[list[list[V]]]:
    """Within it, the list of a layer grows by what ``see`` makes of router, hidden states [T, D] and routing of every
    forward, of whatever kind that is."""
    handles, seen = [], []
    for layer in layers:
        found: list[V] = []

        def hook(router: Router, given: Any, routing: Routing, found: list[V] = found) -> None:
            found.append(see(router, given[0], routing))

        # before the hook by which FSDP takes the whole weight away
        handles.append(layer.router.register_forward_hook(hook, prepend=True))
        seen.append(found)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def chosen_probability(router: Router, x_TD: Tensor, routing: Routing) -> Tensor:
    """fp64 [B]: the sum over a sequence's valid tokens of the probabilities of their K experts.

    The probabilities are those of the balance loss: scores of all experts, normalised to 1. Per token it is K/E where
    scores are indifferent, 1 where all of them lie on the chosen ("topK score sum" of arXiv 2501.11873).
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = F.linear(x_TD.to(dtype), router.weight.to(dtype))
    scores_TE = logits_TE.softmax(-1) if router.method["score"] == "softmax" else logits_TE.sigmoid()
    chosen_TK = scores_TE.gather(1, routing.ids_TK.clamp_min(0)).masked_fill(routing.ids_TK < 0, 0.0)
    share_T = chosen_TK.sum(1) / scores_TE.sum(1).clamp_min(torch.finfo(dtype).tiny)
    sequences = len(routing.tokens_B)
    return share_T.double().view(sequences, len(share_T) // sequences).sum(1)


def training_score(router: Router, x_TD: Tensor, routing: Routing) -> Tensor | None:
    """fp64 [2], sum of :func:`chosen_probability` and valid tokens; None where a pass recomputes or only counts."""
    if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
        return None
    return torch.stack((chosen_probability(router, x_TD, routing).sum(), routing.tokens_B.sum().double()))


# ---- ranks that wait for each other


def straggler(counts_XE: Tensor, owners: Owners) -> Tensor:
    """fp64 [X]: rows of the busiest of the ranks that own the experts, over the mean of these ranks.

    1.0 when balanced, the number of ranks at worst; 1.0 without rows.
    """
    load_XP = owners.by_rank(counts_XE).double()
    mean_X = load_XP.mean(-1)
    return torch.where(mean_X > 0, load_XP.amax(-1) / mean_X.clamp_min(1e-300), 1.0)


def possible_degrees(experts: int) -> tuple[int, ...]:
    """Expert-parallel degrees that a factor is projected for: 2, 4, 8, ... where they divide E, and E."""
    powers = (2**i for i in range(1, experts.bit_length()))
    return tuple(sorted({d for d in powers if experts % d == 0} | ({experts} if experts > 1 else set())))


def expert_share(model: Decoder) -> float:
    """The routed experts' part, in one MoE layer, of the floating-point operations that the whole model does per token.

    Matrix products with weights, and attention over half a sequence in the mean; forward and backward alike.
    """
    layers, total = model.moe_layers(), 0.0
    routed = {id(w): layer.config for layer in layers for w in layer.experts.parameters()}
    of_layer = 0.0
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or name.startswith("embedding"):
            continue
        config = routed.get(id(weight))
        flops = 2.0 * weight.numel() * (1.0 if config is None else config.top_k / config.num_experts)
        total += flops
        of_layer += flops / len(layers) if config is not None else 0.0
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        inner = attention.get_parameter("out_proj.weight").shape[1]  # of all heads' values, and of as wide queries
        queries = attention.q_up_proj.out_features if isinstance(attention, LatentAttention) else inner
        total += attention.cos_SR.shape[0] * (queries + inner)
    return of_layer / total


# ---- a training step


def estimate_quality(totals: StepTotals) -> dict[str, float]:
    """How good the estimate of the load was that the main loss read in a step; empty where no backward read it.

    It synchronises with the device.

    - ``balance_tokens``, ``balance_sequences``: the tokens and sequences over which the loss counted its load (the
      paper's balance batch size), averaged over the step's backwards; under ``carry`` with those of the step before.
      Sequences by this rank's mean sequence length.
    - ``estimator_error``: |load read - load of the step| / |load of the step|, 2-norms over the experts, root mean
      square over micro-batches (and sequences, where the loss is of sequences).
    - ``gradient_error``: the same distance as a share of the load's distance from an even one, which alone has a
      gradient: about the relative error of the loss's gradient. Absent where the load is even.

    For a scope within one rank, these are of this rank's own step, unless a loss or the bias counts over all ranks.
    """
    if not totals.losses:
        return {}
    experts, counts_E = len(totals.counts_E), totals.counts_E.double()
    load_E = counts_E * experts / counts_E.sum().clamp_min(1)
    read_XE = torch.cat([loss.loads.view(-1, experts) for loss in totals.losses])
    apart = (read_XE - load_E).square().sum(1).mean().sqrt()
    tokens, uneven = float(torch.stack([loss.tokens for loss in totals.losses]).mean()), float((load_E - 1.0).norm())
    found = {"balance_tokens": tokens, "estimator_error": float(apart / load_E.norm().clamp_min(1e-300))}
    if local_tokens := int(totals.local_tokens):
        found["balance_sequences"] = tokens * int(totals.local_sequences) / (local_tokens * totals.sequence_ranks)
    return found | ({"gradient_error": float(apart) / uneven} if uneven else {})


class Layout(NamedTuple):
    """What the row of a layer holds: all ranks have the same rows, and their sum says what all ranks did."""

    experts: int
    top_k: int
    #: of the losses that are trained on
    losses: tuple[str, ...]
    degrees: tuple[int, ...]
    ranks: int

    @staticmethod
    def of(config: TrainConfig, ranks: int) -> Layout:
        """The rows of a run on so many ranks."""
        names = [name for name, _ in loss_terms(config.balance)] + (["z"] if config.router.z_loss else [])
        experts = config.model.num_experts
        return Layout(experts, config.model.top_k, tuple(dict.fromkeys(names)), possible_degrees(experts), ranks)

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers there are of each kind, in order."""
        return {
            "counts": self.experts,
            "prob_sums": self.experts,
            **dict.fromkeys(("tokens", "dropped", "wanted"), 1),
            # over micro-batches and ranks: how many, their micro-batch loss, their straggler factor
            **dict.fromkeys(("passes", "micro", "straggler"), 1),
            "projected": len(self.degrees),
            "busiest": self.ranks,  # the largest factor of each rank, in its place: a sum is all that ranks can make
            **dict.fromkeys(("used", "losses", "scaled_losses"), len(self.losses)),
            **dict.fromkeys((*ESTIMATE, *(f"has_{name}" for name in ESTIMATE)), 1),
            "score": 2,
        }

    @property
    def width(self) -> int:
        return sum(self.widths.values())

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """A row by kinds."""
        return dict(zip(self.widths, row.split(list(self.widths.values())), strict=True))


def observe(
    table: Tensor,
    places: Iterable[int],
    layers: Iterable[MoE],
    layout: Layout,
    mesh: Mesh | None,
    rank: int,
    scores: Iterable[Tensor | None],
) -> None:
    """Fill this rank's rows of the zeros ``table`` fp64 [all layers, width] with what its layers did in the last step.

    ``scores`` are what :func:`training_score` saw of each layer. All ranks of a stage call it: where ranks share
    sequences or experts, they add up what is shared.
    """
    layers = list(layers)
    if not layers:
        return
    own_LMX, rows_LME = _together(layers, mesh)
    for place, layer, own_MX, rows_ME, score in zip(places, layers, own_LMX, rows_LME, scores, strict=True):
        totals, stats, row = layer.balancer.last, layer.stats, layout.split(table[place])
        assert totals is not None
        row["counts"] += totals.local_counts_ME.sum(0)
        row["prob_sums"] += totals.local_prob_sums_ME.sum(0)
        row["tokens"] += totals.local_tokens
        row["dropped"] += stats.dropped_choices
        row["wanted"] += stats.counts.sum()
        row["passes"] += totals.micro_batches
        own_ME, prob_sums_ME, tokens_M = own_MX[:, : layout.experts], own_MX[:, layout.experts : -1], own_MX[:, -1]
        row["micro"] += loss_value(own_ME, tokens_M, prob_sums_ME, tokens_M, layout.top_k).sum()
        factor_M = straggler(rows_ME, layer.balancer.owners)
        row["straggler"] += factor_M.sum()
        row["busiest"][rank] = factor_M.max()
        for i, ranks in enumerate(layout.degrees):
            row["projected"][i] = straggler(own_ME, Owners.consecutive(layout.experts, ranks)).sum()
        for term in totals.terms:
            i = layout.losses.index(term.name)
            row["used"][i] = 1.0
            row["scaled_losses"][i] += term.value * term.coefficient
            row["losses"][i] += term.value
        for name, value in estimate_quality(totals).items():
            row[name] += value
            row[f"has_{name}"] += 1.0
        if score is not None:
            row["score"] += score


def _together(layers: list[MoE], mesh: Mesh | None) -> tuple[Tensor, Tensor]:
    """Of each micro-batch: counts, probability sums and tokens [L, M, 2E + 1] over the ranks that hold parts of its
    sequences; and counts [L, M, E] over the ranks that exchange rows with each other in it. Exact in fp64."""
    steps = [layer.balancer.last for layer in layers]
    own_LMX = torch.stack(
        [
            torch.cat((step.local_counts_ME, step.local_prob_sums_ME.double(), step.local_tokens_M[:, None]), dim=1)
            for step in steps
            if step is not None
        ]
    )
    rows_LME = own_LMX[..., : layers[0].config.num_experts].clone()
    if mesh is None:
        return own_LMX, rows_LME
    shared = sum_over(own_LMX, mesh["sequence"])
    for axis in ("ep", "etp"):
        rows_LME = sum_over(rows_LME, mesh[axis]).get()
    return shared.get(), rows_LME


def layer_record(row: Tensor, layout: Layout) -> dict[str, Any]:
    """The summed row of a layer, as the metrics want it."""
    of = layout.split(row)
    counts_E, tokens, passes = of["counts"].long(), of["tokens"][0], of["passes"].clamp_min(1)
    balance = float(loss_value(counts_E, tokens, of["prob_sums"], tokens, layout.top_k))
    used = [i for i, ranks in enumerate(of["used"].tolist()) if ranks]
    losses = {layout.losses[i]: float(of["losses"][i]) for i in used}
    record = {
        "counts": counts_E.tolist(),
        "balance": balance,
        **load_summary(counts_E),
        "dropped": float(of["dropped"] / of["wanted"].clamp_min(1)),
        "losses": losses
        | {n: v for n, v in (("global", balance), ("micro", float(of["micro"] / passes))) if n not in losses},
        "scaled_losses": {layout.losses[i]: float(of["scaled_losses"][i]) for i in used},
        "straggler": float(of["straggler"] / passes),
        "straggler_max": float(of["busiest"].max()),
        "projected_straggler": dict(zip(map(str, layout.degrees), (of["projected"] / passes).tolist(), strict=True)),
    }
    said = [name for name in ESTIMATE if of[f"has_{name}"] > 0]
    record |= {name: float(of[name] / of[f"has_{name}"]) for name in said}
    if of["score"][1] > 0:
        record["score_sum"] = float(of["score"][0] / of["score"][1])
    return record


def step_record(rows: list[dict[str, Any]], share: float) -> dict[str, Any]:
    """What the layers' records say together; ``share`` is what :func:`expert_share` gives."""

    def mean(values: Iterable[Any]) -> float:
        return float(np.mean(list(values)))

    def by_name(field: str, join: Callable[[Iterable[Any]], float]) -> dict[str, float]:
        return {name: join(row[field][name] for row in rows if name in row[field]) for name in rows[0][field]}

    if not rows:
        return {"balance": 1.0, "max_over_mean": 1.0}
    projected = by_name("projected_straggler", mean)
    everywhere = [name for name in (*ESTIMATE, "score_sum") if all(name in row for row in rows)]
    return {
        "balance": mean(row["balance"] for row in rows),
        "max_over_mean": max(row["max_over_mean"] for row in rows),
        "losses": by_name("losses", mean),
        "scaled_losses": by_name("scaled_losses", sum),
        **{name: mean(row[name] for row in rows) for name in everywhere},
        "straggler": mean(row["straggler"] for row in rows),
        "straggler_max": max(row["straggler_max"] for row in rows),
        "waiting": share * sum(row["straggler"] - 1.0 for row in rows),
        "projected_straggler": projected,
        "projected_waiting": {degree: share * len(rows) * (factor - 1.0) for degree, factor in projected.items()},
    }


# ---- an evaluation


def jensen_shannon(p_XE: Array, q_XE: Array) -> Array:
    """Divergence [X] of distributions over experts, in bits: 0 for equal ones, 1 for those with no expert in common.

    NaN where either has no mass.
    """

    def bits(a_XE: Array) -> Array:
        return np.where(a_XE > 0, a_XE * np.log2(np.where(a_XE > 0, a_XE, 1.0)), 0.0).sum(-1)

    p_XE, q_XE = np.asarray(p_XE, float), np.asarray(q_XE, float)
    apart = np.maximum(0.0, (bits(p_XE) + bits(q_XE)) / 2 - bits((p_XE + q_XE) / 2))
    return np.where((p_XE.sum(-1) > 0) & (q_XE.sum(-1) > 0), apart, np.nan)


def divergences(routing: Mapping[str, Any]) -> dict[tuple[str, str], Array]:
    """The divergence [L] between any two domains, from {domain: [L][E] frequency}."""
    share_NLE = {domain: np.array(layers, float) for domain, layers in routing.items()}
    return {(a, b): jensen_shannon(share_NLE[a], share_NLE[b]) for a, b in combinations(share_NLE, 2)}


def mean_divergence(pairs: Mapping[tuple[str, str], Array]) -> Array:
    """[L] the mean over the pairs that can be compared; NaN where none can."""
    values_XL = np.array(list(pairs.values()), float)
    there_XL = np.isfinite(values_XL)
    total_L, known_L = np.where(there_XL, values_XL, 0.0).sum(0), there_XL.sum(0)
    return np.where(known_L > 0, total_L / np.maximum(known_L, 1), np.nan)


def domain_record(routing: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """How domains differ in {domain: [L][E] frequency}; without MoE layers nothing, of one domain only its own part."""
    routing = {domain: layers for domain, layers in routing.items() if layers}
    if not routing:
        return {}
    record: dict[str, Any] = {"max_frequency": {d: [max(freq_E) for freq_E in layers] for d, layers in routing.items()}}
    pairs = divergences(routing)
    if pairs:
        record["divergence"] = mean_divergence(pairs).tolist()
    if pairs and len(routing) <= MAX_DOMAINS:
        record["divergence_pairs"] = {
            a: {b: pairs[a, b].tolist() for b in routing if (a, b) in pairs} for a in list(routing)[:-1]
        }
    return record
