"""Statistics of the MoE layers in a training step.

Each rank fills one row of numbers per layer, the rows are summed over ranks, and records are made from the sums.
L MoE layers, M micro-batches of the step on this rank, E experts, X any number of columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
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
from ..transfer import Reading, to_device
from ..types import load_summary
from .waiting import busiest_over_mean, possible_degrees, straggler

ESTIMATE = ("balance_tokens", "balance_sequences", "estimator_error", "gradient_error")


def estimate_quality(totals: StepTotals) -> dict[str, float]:
    """Return how well the main loss estimated the load of the whole step; empty if no backward pass used it.

    Waits for the device, once.

    - ``balance_tokens``, ``balance_sequences``: the tokens and sequences over which the loss counted its load (the
      paper's balance batch size), averaged over the step's backward passes. Under ``carry`` this includes those of the
      previous step. Tokens are converted to sequences using this rank's mean sequence length.
    - ``estimator_error``: |estimated load - load of the step| / |load of the step|, with 2-norms over experts and the
      root mean square over micro-batches (and over sequences, for the sequence loss).
    - ``gradient_error``: |estimated load - load of the step| / |load of the step - even load|. Only the uneven part of
      a load has a gradient, so this is approximately the relative error of the loss's gradient. Absent if the load is
      even.

    For a scope within one rank, the step's load is that of this rank, unless some loss or the expert bias counts over
    all ranks.
    """
    found = _quality(totals)
    if not found:
        return {}
    values = map(float, Reading(torch.stack(list(found.values()))).get())
    return {name: value for name, value in zip(found, values, strict=True) if not math.isnan(value)}


def _quality(totals: StepTotals) -> dict[str, Tensor]:
    """Return the values of :func:`estimate_quality` on the device, fp64; NaN for one that is absent."""
    if not totals.losses:
        return {}
    experts, counts_E = len(totals.counts_E), totals.counts_E.double()
    load_E = counts_E * experts / counts_E.sum().clamp_min(1)
    read_XE = torch.cat([loss.loads.view(-1, experts) for loss in totals.losses])
    apart = (read_XE - load_E).square().sum(1).mean().sqrt()
    tokens, uneven = torch.stack([loss.tokens for loss in totals.losses]).mean(), (load_E - 1.0).norm()
    local_tokens = totals.local_tokens.double()
    sequences = tokens * totals.local_sequences / (local_tokens * totals.sequence_ranks)
    return {
        "balance_tokens": tokens,
        "estimator_error": apart / load_E.norm().clamp_min(1e-300),
        "balance_sequences": torch.where(local_tokens > 0, sequences, math.nan),
        "gradient_error": torch.where(uneven > 0, apart / uneven, math.nan),
    }


class Columns(NamedTuple):
    """The columns of a layer's row, equal on every rank, so that rows can be summed over ranks."""

    #: number of experts that tokens choose among; the first ``owned`` of them are on one rank each
    experts: int
    owned: int
    #: number of a token's choices that count
    top_k: int
    #: names of the losses that are trained on
    losses: tuple[str, ...]
    #: expert-parallel degrees for which the straggler factor is projected
    degrees: tuple[int, ...]
    ranks: int

    @staticmethod
    def of(config: MoEConfig, ranks: int) -> Columns:
        """Return the columns for a run on ``ranks`` ranks in which every MoE layer has this configuration."""
        names = [name for name, _ in loss_terms(config.balance)]
        names += ["z"] * bool(config.router.z_loss) + ["entropy"] * bool(config.router.entropy_loss)
        owned, top_k = config.num_experts, config.balance.counted(config.top_k)
        return Columns(config.all_experts, owned, top_k, tuple(dict.fromkeys(names)), possible_degrees(owned), ranks)

    @property
    def widths(self) -> dict[str, int]:
        """The number of columns of each kind, in order."""
        return {
            "counts": self.experts,
            "prob_sums": self.experts,
            **dict.fromkeys(("tokens", "dropped", "wanted"), 1),
            # sums over micro-batches and ranks: their number, micro-batch loss and straggler factor
            **dict.fromkeys(("micro_batches", "micro", "straggler"), 1),
            "projected": len(self.degrees),
            "busiest": self.ranks,  # each rank's largest factor in its own column, so that the sum keeps them apart
            **dict.fromkeys(("used", "losses", "scaled_losses"), len(self.losses)),
            **dict.fromkeys((*ESTIMATE, *(f"has_{name}" for name in ESTIMATE)), 1),
            # under replication: straggler factor (as above), replicas, bytes of their weights and gradients, relative
            # error of the expected load, and the numbers of ranks that say so
            "replicated": 1,
            **dict.fromkeys(("replicas", "copied_bytes", "forecast_error", "has_replicas", "has_forecast_error"), 1),
            "score": 2,
        }

    @property
    def width(self) -> int:
        return sum(self.widths.values())

    def split(self, row: Tensor) -> dict[str, Tensor]:
        """Split a row into its kinds of columns."""
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
    """Add the statistics of this rank's layers in the last step to ``table``, fp64 zeros [layers, columns].

    ``places`` are the layers' row numbers, ``scores`` their results of :func:`training_score`. All ranks of a pipeline
    stage must call this: ranks that share sequences or experts sum their counts.
    """
    layers = list(layers)
    if not layers:
        return
    own_LMX, rows_LME = _together(layers, mesh)
    factors_LM = _replicated(layers, mesh)
    rest = zip(own_LMX, rows_LME, factors_LM, scores, strict=True)
    for place, layer, (own_MX, rows_ME, replicated_M, score) in zip(places, layers, rest, strict=True):
        totals, stats, row = layer.balancer.previous_step, layer.stats, columns.split(table[place])
        assert totals is not None
        row["counts"] += totals.local_counts_ME.sum(0)
        row["prob_sums"] += totals.local_prob_sums_ME.sum(0)
        row["tokens"] += totals.local_tokens
        row["dropped"] += stats.dropped_choices
        row["wanted"] += stats.counts.sum()
        row["micro_batches"] += totals.micro_batches
        own_ME, prob_sums_ME, tokens_M = own_MX[:, : columns.experts], own_MX[:, columns.experts : -1], own_MX[:, -1]
        row["micro"] += loss_value(own_ME, tokens_M, prob_sums_ME, tokens_M, columns.top_k).sum()
        factor_M = straggler(rows_ME[:, : columns.owned], layer.balancer.owners)
        row["straggler"] += factor_M.sum()
        row["busiest"][rank] = factor_M.max()
        for i, ranks in enumerate(columns.degrees):
            row["projected"][i] = straggler(own_ME[:, : columns.owned], Owners.consecutive(columns.owned, ranks)).sum()
        if (replication := layer.replication) is not None:
            row["replicated"] += replicated_M.sum()
            row["replicas"] += fmean(len(used) for used in replication.used[-totals.micro_batches :])
            row["copied_bytes"] += replication.sent_bytes
            row["has_replicas"] += 1.0
            if (expected_E := replication.replicas.expected_E) is not None:
                row["forecast_error"] += forecast_error(expected_E, totals.counts_E[: columns.owned])
                row["has_forecast_error"] += 1.0
        for term in totals.terms:
            i = columns.losses.index(term.name)
            row["used"][i].fill_(1.0)  # an assignment would copy the number from the host
            row["scaled_losses"][i] += term.value * term.coefficient
            row["losses"][i] += term.value
        for name, value in _quality(totals).items():
            row[name] += value.nan_to_num(0.0)
            row[f"has_{name}"] += ~value.isnan()
        if score is not None:
            row["score"] += score


def forecast_error(expected_E: Sequence[float], counts_E: Tensor) -> Tensor:
    """Return |expected load - load| / |load|, an fp64 scalar, where both are shares of all choices."""
    expected = to_device(torch.tensor(expected_E, dtype=torch.float64, device="cpu"), counts_E.device)
    wanted = counts_E.double() / counts_E.sum().clamp_min(1)
    return (expected / expected.sum().clamp_min(1e-300) - wanted).norm() / wanted.norm().clamp_min(1e-300)


def _replicated(layers: list[MoE], mesh: Mesh | None) -> list[Tensor]:
    """Return the straggler factor of each layer's micro-batches [M] with replicas; NaN without."""
    found = []
    for layer in layers:
        totals, replication = layer.balancer.previous_step, layer.replication
        assert totals is not None
        if replication is None or mesh is None:
            found.append(torch.full_like(totals.local_tokens_M, math.nan, dtype=torch.float64))
            continue
        owned, used = replication.replicas.owners.num_experts, replication.used[-totals.micro_batches :]
        counts_ME = totals.local_counts_ME[:, :owned]
        rank = mesh["ep"].rank
        rows_MP = torch.stack([of.rows_sent(c[None], rank)[0] for c, of in zip(counts_ME, used, strict=True)])
        for axis in ("ep", "etp"):
            rows_MP = sum_over(rows_MP, mesh[axis]).get()
        found.append(busiest_over_mean(rows_MP))
    return found


def _together(layers: list[MoE], mesh: Mesh | None) -> tuple[Tensor, Tensor]:
    """Sum the statistics of each micro-batch over the ranks that share its sequences or exchange its rows.

    Returns counts, probability sums and tokens [L, M, 2E + 1] over the ranks that hold parts of its sequences, and
    counts [L, M, E] over the ranks that exchange rows with each other. Counts are exact in fp64.
    """
    steps = [layer.balancer.previous_step for layer in layers]
    own_LMX = torch.stack(
        [
            torch.cat((step.local_counts_ME, step.local_prob_sums_ME.double(), step.local_tokens_M[:, None]), dim=1)
            for step in steps
            if step is not None
        ]
    )
    rows_LME = own_LMX[..., : layers[0].config.all_experts].clone()
    if mesh is None:
        return own_LMX, rows_LME
    shared = sum_over(own_LMX, mesh["sequence"])
    for axis in ("ep", "etp"):
        rows_LME = sum_over(rows_LME, mesh[axis]).get()
    return shared.get(), rows_LME


def layer_record(row: Tensor, columns: Columns) -> dict[str, Any]:
    """Convert a layer's row, summed over ranks, to its entry in a ``train`` record."""
    of = columns.split(row)
    counts_E, tokens, micro_batches = of["counts"].long(), of["tokens"][0], of["micro_batches"].clamp_min(1)
    balance = float(loss_value(counts_E, tokens, of["prob_sums"], tokens, columns.top_k))
    used = [i for i, ranks in enumerate(of["used"].tolist()) if ranks]
    losses = {columns.losses[i]: float(of["losses"][i]) for i in used}
    record = {
        "counts": counts_E.tolist(),
        "balance": balance,
        **load_summary(counts_E),
        "dropped": float(of["dropped"] / of["wanted"].clamp_min(1)),
        "losses": losses
        | {n: v for n, v in (("global", balance), ("micro", float(of["micro"] / micro_batches))) if n not in losses},
        "scaled_losses": {columns.losses[i]: float(of["scaled_losses"][i]) for i in used},
        "straggler": float(of["straggler"] / micro_batches),
        "straggler_max": float(of["busiest"].max()),
        "projected_straggler": dict(
            zip(map(str, columns.degrees), (of["projected"] / micro_batches).tolist(), strict=True)
        ),
    }
    if of["has_replicas"] > 0:
        record["replicated_straggler"] = float(of["replicated"] / micro_batches)
        record["replicas"] = round(float(of["replicas"] / of["has_replicas"]))
        record["copied_bytes"] = int(of["copied_bytes"])
    if of["has_forecast_error"] > 0:
        record["forecast_error"] = float(of["forecast_error"] / of["has_forecast_error"])
    said = [name for name in ESTIMATE if of[f"has_{name}"] > 0]
    record |= {name: float(of[name] / of[f"has_{name}"]) for name in said}
    if of["score"][1] > 0:
        record["score_sum"] = float(of["score"][0] / of["score"][1])
    return record


def step_record(rows: list[dict[str, Any]], fraction: float) -> dict[str, Any]:
    """Summarise the layers' entries for a ``train`` record. ``fraction`` is the result of :func:`expert_fraction`."""

    def mean(values: Iterable[Any]) -> float:
        return float(np.mean(list(values)))

    def by_name(field: str, join: Callable[[Iterable[Any]], float]) -> dict[str, float]:
        return {name: join(row[field][name] for row in rows if name in row[field]) for name in rows[0][field]}

    if not rows:
        return {"balance": 1.0, "max_over_mean": 1.0}
    projected = by_name("projected_straggler", mean)
    placed = ("replicated_straggler", "replicas", "copied_bytes", "forecast_error")
    everywhere = [name for name in (*ESTIMATE, *placed, "score_sum") if all(name in row for row in rows)]
    return {
        "balance": mean(row["balance"] for row in rows),
        "max_over_mean": max(row["max_over_mean"] for row in rows),
        "losses": by_name("losses", mean),
        "scaled_losses": by_name("scaled_losses", sum),
        **{name: mean(row[name] for row in rows) for name in everywhere},
        "straggler": mean(row["straggler"] for row in rows),
        "straggler_max": max(row["straggler_max"] for row in rows),
        "waiting": fraction * sum(row.get("replicated_straggler", row["straggler"]) - 1.0 for row in rows),
        "projected_straggler": projected,
        "projected_waiting": {degree: fraction * len(rows) * (factor - 1.0) for degree, factor in projected.items()},
    }
