"""Measures how differently domains are routed.  L MoE layers, E experts, N domains, X any leading dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: most domains for which the divergence of each pair is recorded
MAX_DOMAINS = 16


def jensen_shannon(p_XE: Array, q_XE: Array) -> Array:
    """Return the Jensen-Shannon divergence [X] of two distributions over experts, in bits.

    It is 0 for equal distributions, 1 if they have no expert in common, and NaN if either one sums to 0.
    """

    def bits(a_XE: Array) -> Array:
        return np.where(a_XE > 0, a_XE * np.log2(np.where(a_XE > 0, a_XE, 1.0)), 0.0).sum(-1)

    p_XE, q_XE = np.asarray(p_XE, float), np.asarray(q_XE, float)
    apart = np.maximum(0.0, (bits(p_XE) + bits(q_XE)) / 2 - bits((p_XE + q_XE) / 2))
    return np.where((p_XE.sum(-1) > 0) & (q_XE.sum(-1) > 0), apart, np.nan)


def divergences(routing: Mapping[str, Any]) -> dict[tuple[str, str], Array]:
    """Return the divergence [L] of every pair of domains, given {domain: [L][E] frequency}."""
    frequency_NLE = {domain: np.array(layers, float) for domain, layers in routing.items()}
    return {(a, b): jensen_shannon(frequency_NLE[a], frequency_NLE[b]) for a, b in combinations(frequency_NLE, 2)}


def mean_divergence(pairs: Mapping[tuple[str, str], Array]) -> Array:
    """Return the mean [L] over the pairs whose divergence is finite; NaN if there are none."""
    values_XL = np.array(list(pairs.values()), float)
    finite_XL = np.isfinite(values_XL)
    total_L, known_L = np.where(finite_XL, values_XL, 0.0).sum(0), finite_XL.sum(0)
    return np.where(known_L > 0, total_L / np.maximum(known_L, 1), np.nan)


def domain_record(routing: Mapping[str, list[list[float]]]) -> dict[str, Any]:
    """Return the fields of an ``eval`` record that compare domains, given {domain: [L][E] frequency}.

    Without MoE layers there are none; with a single domain there is no divergence.
    """
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
