"""Reads fields of a ``config.json`` of transformers, among them those of rotary positions."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ..config import AttentionConfig, RotaryScaling
from .adapters import ACTIVATIONS
from .architecture import MOST_LAYERS

#: the largest whole number that a field may have, if it is not ``_MOST``: no file can make a reader allocate or loop
#: without end, and no tensor has more than 2**63 bytes
_MOST_OF = {
    "num_hidden_layers": MOST_LAYERS,
    "first_k_dense_replace": MOST_LAYERS,
    "vocab_size": 1 << 30,
    "max_position_embeddings": 1 << 48,
    "original_max_position_embeddings": 1 << 48,
    "sliding_window": 1 << 48,
} | dict.fromkeys(
    (
        *("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
        *("n_group", "topk_group", "num_attention_heads", "num_key_value_heads"),
    ),
    1 << 16,
)
_MOST = 1 << 20


class Given:
    """The content of a ``config.json``. Its methods raise a one-line ValueError that names the file and the field."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def error(self, name: str, why: str) -> ValueError:
        value = repr(self.values.get(name))
        return ValueError(f"{self.where}: {name}={value if len(value) < 80 else value[:77] + '...'}: {why}")

    def whole(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """Return the whole number that one of ``names`` has."""
        name = next((name for name in names if self.values.get(name) is not None), names[0])
        value = self.values.get(name, default)
        value = default if value is None else value
        most = _MOST_OF.get(name, _MOST)
        if type(value) is not int or not least <= value <= most:
            raise self.error(name, f"must be a whole number of at least {least} and at most {most}")
        return value

    def real(self, name: str, default: float | None = None, zero: bool = False) -> float:
        """Return a positive number, or 0 if ``zero`` allows that. It is so limited that its square is finite."""
        value: Any = self.values.get(name, default)
        value = default if value is None else value
        if type(value) not in (int, float) or not (1e-30 <= value <= 1e30 or (zero and value == 0)):
            raise self.error(name, f"must be {'0 or ' if zero else ''}a positive number between 1e-30 and 1e30")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.error(name, "must be true or false")
        return value

    def only(self, name: str, allowed: Collection[Any], why: str) -> None:
        """Refuse a value that is given and not one of ``allowed``."""
        if name in self.values and not any(self.values[name] == value for value in (None, *allowed)):
            raise self.error(name, why)

    def activation(self) -> str:
        name = self.values.get("hidden_act", "silu")
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise self.error("hidden_act", f"is an unknown activation; use one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


def rotary(c: Given, default: float) -> tuple[float, RotaryScaling | None]:
    """Read ``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` of version 4."""
    found = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    name = "rope_parameters" if c.values.get("rope_parameters") else "rope_scaling"
    if not isinstance(found, dict):
        raise c.error(name, "must be an object")
    r = Given(found, f"{c.where}: {name}")
    base = r.real("rope_theta", c.real("rope_theta", default))
    r.only("partial_rotary_factor", (1,), "this decoder rotates whole heads")
    c.only("partial_rotary_factor", (1,), "this decoder rotates whole heads")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in ("linear", "yarn", "llama3"):
        raise r.error("rope_type", "is an unknown rotary scaling; use default, linear, yarn or llama3")
    longest = c.whole("max_position_embeddings", default=4096)
    original = r.whole("original_max_position_embeddings", default=longest)
    factor = r.real("factor", longest / original)
    if kind == "linear":
        return base, RotaryScaling("linear", factor)
    if kind == "llama3":
        fast, slow = r.real("high_freq_factor"), r.real("low_freq_factor")
        return base, RotaryScaling("llama3", factor, original, fast, slow)
    r.only("truncate", (True,), "this decoder rounds the pairs between which it blends")
    fast, slow = r.real("beta_fast", 32.0), r.real("beta_slow", 1.0)
    table, all_dims = found.get("attention_factor"), r.real("mscale_all_dim", 0.0, zero=True)
    if table is None and r.real("mscale", 0.0, zero=True) and all_dims:
        table = magnitude(factor, r.real("mscale")) / magnitude(factor, all_dims)
    table = None if table is None else r.real("attention_factor", table)
    return base, RotaryScaling("yarn", factor, original, fast, slow, table)


def magnitude(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def written_rotary(a: AttentionConfig) -> dict[str, Any]:
    s, found = a.scaling, {"rope_theta": a.rotary_base, "rope_type": "default"}
    if s is None:
        return {"rope_parameters": found}
    found |= {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        found["original_max_position_embeddings"] = s.original_length
    if s.score_scale != 1.0:
        found["mscale_all_dim"] = (math.sqrt(s.score_scale) - 1.0) / (0.1 * math.log(s.factor))
    if s.kind == "yarn":
        found |= {"beta_fast": s.fast_turns, "beta_slow": s.slow_turns, "attention_factor": s.magnitude}
    elif s.kind == "llama3":
        found |= {"high_freq_factor": s.fast_turns, "low_freq_factor": s.slow_turns}
    return {"rope_parameters": found}
