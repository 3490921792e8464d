"""What MoE layers did in a training step: a row of numbers for each layer that ranks add up, and records made of it.

L MoE layers, M micro-batches of the step on this rank, E experts, X anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..balance import StepTotals, loss_terms, loss_value
from ..collectives import sum_over
from ..config import MoEConfig
from ..layer import MoE
from ..parallel import Mesh
from ..placement import Owners
from ..types import load_summary
from .waiting import possible_degrees, straggler

ESTIMATE = ("balance_tokens", "balance_sequences", "estimator_error", "gradient_error")


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


class Columns(NamedTuple):
    """What a layer's row holds: the same columns on every rank, so that the sum of the rows says what all ranks did."""

    experts: int
    top_k: int
    #: of the losses that are trained on
    losses: tuple[str, ...]
    degrees: tuple[int, ...]
    ranks: int

    @staticmethod
    def of(config: MoEConfig, ranks: int) -> Columns:
        """The rows of a run whose MoE layers are all configured like this, on ``ranks`` ranks."""
        names = [name for name, _ in loss_terms(config.balance)] + (["z"] if config.router.z_loss else [])
        experts = config.num_experts
        return Columns(experts, config.top_k, tuple(dict.fromkeys(names)), possible_degrees(experts), ranks)

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
    columns: Columns,
    mesh: Mesh | None,
    rank: int,
    scores: Iterable[Tensor | None],
) -> None:
    """Write what this rank's layers did in the last step into their rows of ``table``: fp64 zeros, [layers, columns].

    ``scores`` are what :func:`training_score` saw of each layer. All ranks of a stage call it: where ranks share
    sequences or experts, they add up what is shared.
    """
    layers = list(layers)
    if not layers:
        return
    own_LMX, rows_LME = _together(layers, mesh)
    for place, layer, own_MX, rows_ME, score in zip(places, layers, own_LMX, rows_LME, scores, strict=True):
        totals, stats, row = layer.balancer.last, layer.stats, columns.split(table[place])
        assert totals is not None
        row["counts"] += totals.local_counts_ME.sum(0)
        row["prob_sums"] += totals.local_prob_sums_ME.sum(0)
        row["tokens"] += totals.local_tokens
        row["dropped"] += stats.dropped_choices
        row["wanted"] += stats.counts.sum()
        row["passes"] += totals.micro_batches
        own_ME, prob_sums_ME, tokens_M = own_MX[:, : columns.experts], own_MX[:, columns.experts : -1], own_MX[:, -1]
        row["micro"] += loss_value(own_ME, tokens_M, prob_sums_ME, tokens_M, columns.top_k).sum()
        factor_M = straggler(rows_ME, layer.balancer.owners)
        row["straggler"] += factor_M.sum()
        row["busiest"][rank] = factor_M.max()
        for i, ranks in enumerate(columns.degrees):
            row["projected"][i] = straggler(own_ME, Owners.consecutive(columns.experts, ranks)).sum()
        for term in totals.terms:
            i = columns.losses.index(term.name)
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


def layer_record(row: Tensor, columns: Columns) -> dict[str, Any]:
    """The summed row of a layer, as the metrics want it."""
    of = columns.split(row)
    counts_E, tokens, passes = of["counts"].long(), of["tokens"][0], of["passes"].clamp_min(1)
    balance = float(loss_value(counts_E, tokens, of["prob_sums"], tokens, columns.top_k))
    used = [i for i, ranks in enumerate(of["used"].tolist()) if ranks]
    losses = {columns.losses[i]: float(of["losses"][i]) for i in used}
    record = {
        "counts": counts_E.tolist(),
        "balance": balance,
        **load_summary(counts_E),
        "dropped": float(of["dropped"] / of["wanted"].clamp_min(1)),
        "losses": losses
        | {n: v for n, v in (("global", balance), ("micro", float(of["micro"] / passes))) if n not in losses},
        "scaled_losses": {columns.losses[i]: float(of["scaled_losses"][i]) for i in used},
        "straggler": float(of["straggler"] / passes),
        "straggler_max": float(of["busiest"].max()),
        "projected_straggler": dict(zip(map(str, columns.degrees), (of["projected"] / passes).tolist(), strict=True)),
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
