"""Reads the records of a run for its report.

Shapes: N records, L MoE layers, E experts, D domains.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..moe.observe.metrics import METRICS_FILE, Record, read_records
from ..moe.observe.printable import printable

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """The records of one run, sorted by kind and step."""

    run: Record
    bigram: dict[str, float]
    train: list[Record]
    evals: list[Record]
    name: str = ""

    @staticmethod
    def read(run_dir: Path) -> Run:
        """Read the records of a run folder. Raises ValueError if there are none, or they cannot be read."""
        path = run_dir / METRICS_FILE
        try:
            records = [_printable(record) for record in read_records(path)]
        except RecursionError:
            raise ValueError(f"{path}: is nested too deeply; give the folder of a run") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror or error}); give the folder of a run") from None
        if not records:
            raise ValueError(f"{path}: has no records yet; wait for the run's first steps")
        kinds: dict[str, dict[int, Record]] = {}
        for number, record in enumerate(records):
            kinds.setdefault(str(record.get("kind")), {})[record.get("step", number)] = record  # the newest of a step
        by_step = {kind: [found[step] for step in sorted(found)] for kind, found in kinds.items()}
        last = {kind: (by_step.get(kind) or [{}])[-1] for kind in ("run", "baseline")}
        train, evals = by_step.get("train", []), by_step.get("eval", [])
        name = printable(run_dir.resolve().name)
        return Run(last["run"], last["baseline"].get("bigram") or {}, train, evals, name)

    def option(self, *path: str) -> Any:
        """Return a field of the run's configuration, or None if it is missing."""
        value: Any = self.run.get("config")
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def domains(self) -> list[str]:
        found = {d for record in self.train for d in record.get("domain_loss") or {}}
        return sorted(found | {d for record in self.evals for d in record.get("domains") or {}})

    def counts_NLE(self) -> tuple[Array, Array]:
        """Return steps [N] and tokens per expert [N, L, E]; both are empty without MoE layers."""
        rows = [(r["step"], [layer["counts"] for layer in r["layers"]]) for r in self.train if r.get("layers")]
        rows = [(s, c) for s, c in rows if [len(x) for x in c] == [len(x) for x in rows[-1][1]]]
        return np.array([s for s, _ in rows], float), np.array([c for _, c in rows], float)

    def routing_DLE(self, record: Record) -> tuple[list[str], Array]:
        """Return the domains and the frequency [D, L, E] with which each chooses each expert, sum 1 over experts."""
        routing = {d: layers for d, layers in sorted((record.get("routing") or {}).items()) if layers}
        return list(routing), np.array(list(routing.values()), float)


def _printable(value: Any) -> Any:
    """Escape the names in a record, which come from the training text."""
    if isinstance(value, dict):
        return {printable(str(key)): _printable(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
        return [_printable(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def numbers(records: Iterable[Record], *path: str) -> Array:
    """Return one number per record [N]; NaN where it is missing, not a number or not finite."""

    def value(record: Any) -> float:
        for part in path:
            record = record.get(part) if isinstance(record, dict) else None
        is_one = isinstance(record, (int, float)) and abs(record) <= sys.float_info.max
        return float(record) if is_one else math.nan

    return np.array([value(record) for record in records], float)


def layers_in(records: Sequence[Record]) -> int:
    """Return the number of MoE layers."""
    return max((len(record.get("layers") or []) for record in records), default=0)


def of_layer(records: Sequence[Record], layer: int, *path: str) -> Array:
    """Return a number of one layer for each record [N]."""
    rows = [record.get("layers") or [] for record in records]
    return numbers([row[layer] if layer < len(row) else {} for row in rows], *path)


def names_in(records: Sequence[Record], field: str) -> list[str]:
    """Return the keys of a field that maps names to numbers, in order of first occurrence."""
    return list(dict.fromkeys(name for record in records for name in as_dict(record.get(field))))


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def seen(values: Array) -> bool:
    """Return whether any value is finite."""
    return bool(np.isfinite(values).any())


def flat(values: Array, at: float) -> bool:
    """Return whether all finite values are the same number ``at``."""
    finite = values[np.isfinite(values)]
    return bool(np.allclose(finite, at, rtol=1e-6, atol=1e-9))


def last_of(values: Array, spec: str = ".2f") -> str:
    """Format the last finite value."""
    finite = values[np.isfinite(values)]
    return format(finite[-1], spec) if len(finite) else "unknown"


def mean_of(values: Array) -> Array:
    """Mean over the first axis, [X, N] to [N], ignoring values that are not finite; NaN where there are none."""
    finite = np.isfinite(values)
    total, count = np.where(finite, values, 0.0).sum(0), finite.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)
