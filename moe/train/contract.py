"""What may change when a run is resumed: a change of meaning must be allowed by name."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from ..config import dotted
from .config import TrainConfig

#: fields and sections that a resumed run may change: how long, where and how fast it runs, and what it writes. All
#: others say what is trained on what. What says which tokens are read may change because the tokens are compared
MAY_CHANGE = (
    *("steps", "engine", "dtype", "model.recompute", "recompute", "data.micro_batch", "data.cache", "data.workers"),
    *("data.path", "data.tokenizer", "data.end_of_document"),
    *("moe.dispatch", "moe.backend", "moe.recompute_experts", "moe.balance.micro_batches"),
    *("optim.lr", "optim.schedule", "optim.warmup_steps", "optim.decay_fraction", "optim.min_lr_ratio"),
    *("optim.power_amplitude", "optim.power_exponent"),
    *("parallel", "placement", "deepspeed", "megatron", "checkpoint", "health", "log"),
    *("routing.record",),
)

#: name under which other training data can be allowed
DATA = "data"


def differences(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields, by dotted name, whose value differs: (saved value, new value).

    ``saved`` is the configuration as a nested mapping, as a checkpoint has it. A field that did not exist then had
    today's default.
    """
    before, now, default = (_fields(values) for values in (saved, asdict(config), asdict(TrainConfig())))
    pairs = {name: (before.get(name, default.get(name)), now.get(name)) for name in now | before}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_resumed(saved: dict[str, Any], config: TrainConfig, allowed: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Return all :func:`differences`. Raises ValueError for one that changes what is trained, unless it is allowed.

    ``allowed`` are names of fields or sections.
    """
    found = differences(saved, config)
    refused = [name for name in found if not (_within(name, MAY_CHANGE) or _within(name, allowed))]
    if refused:
        changes = ", ".join(f"{name} from {found[name][0]!r} to {found[name][1]!r}" for name in refused)
        allow = " ".join(f"--allow-change {name}" for name in refused)
        raise ValueError(f"the run was trained with other settings: {changes}; undo this, or add {allow}")
    return found


def _fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name, as they come back from JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dotted(values)}


def _within(name: str, sections: Collection[str]) -> bool:
    return any(name == section or name.startswith(f"{section}.") for section in sections)
