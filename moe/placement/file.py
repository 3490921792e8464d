"""Files that say which rank owns which expert.

A file is JSON: an object that maps each rank to the list of its experts, for all layers alike, or a list of such
objects, one for each MoE layer: ``{"0": [0, 5], "1": [1, 2, 3, 4]}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .owners import Owners

#: larger files are refused
MAX_BYTES = 64 << 20


def read_owners(path: Path, num_experts: Sequence[int], ranks: int) -> list[Owners]:
    """Return the owners of layers with ``num_experts`` experts each.

    Raises ValueError, with the file and the place, for a file that cannot be read or does not fit: a rank that is named
    twice or does not exist, or an expert that has no owner, has two, or does not exist.
    """
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ValueError("is not a file, or too large")
        found = json.loads(path.read_text(), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read as owners of experts ({why})") from None
    of_layers = found if isinstance(found, list) else [found] * len(num_experts)
    if len(of_layers) != len(num_experts):
        raise ValueError(f"{path}: has owners for {len(of_layers)} layers; the model has {len(num_experts)}")
    return [
        _owners(f"{path}, layer {i}", of, number, ranks)
        for i, (of, number) in enumerate(zip(of_layers, num_experts, strict=True))
    ]


def write_owners(owners: Sequence[Owners]) -> str:
    """Return the text of a file with the owners of each layer."""
    return json.dumps([{str(rank): of.experts_of(rank) for rank in range(of.ranks)} for of in owners]) + "\n"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"rank {name[:20]!r} is named twice")
        found[name] = value
    return found


def _owners(where: str, experts_of: Any, num_experts: int, ranks: int) -> Owners:
    if not isinstance(experts_of, dict) or not all(isinstance(experts, list) for experts in experts_of.values()):
        raise ValueError(f"{where}: must map each rank to the list of its experts")
    rank_of: dict[int, int] = {}
    names = {str(rank) for rank in range(ranks)}
    for name, experts in experts_of.items():
        if name not in names:
            raise ValueError(f"{where}: rank {name[:20]!r} does not exist; ranks are 0 to {ranks - 1}")
        for expert in experts:
            if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
                raise ValueError(
                    f"{where}: expert {repr(expert)[:20]} does not exist; experts are 0 to {num_experts - 1}"
                )
            if expert in rank_of:
                raise ValueError(f"{where}: expert {expert} has two owners, ranks {rank_of[expert]} and {int(name)}")
            rank_of[expert] = int(name)
    if missing := [expert for expert in range(num_experts) if expert not in rank_of]:
        raise ValueError(f"{where}: expert {missing[0]} has no owner; name it under a rank")
    return Owners.of_ranks(ranks, [rank_of[e] for e in range(num_experts)])  # slots as after a resume
