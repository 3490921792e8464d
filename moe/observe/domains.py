"""How differently domains are routed.  L MoE layers, E experts, N domains, X anything."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
#: the divergence of each pair is recorded for at most this many domains
MAX_DOMAINS = 16


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
