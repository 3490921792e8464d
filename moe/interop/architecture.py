"""What determines the weights of a decoder and what it computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import AttentionConfig, MoEConfig, RotaryScaling, RouterConfig, dotted
from ..config.checks import require
from ..config.routing import OF_GATE

#: most decoder blocks
MOST_LAYERS = 10_000
#: most experts and heads in all blocks: conversion keeps a list of their tensors
_MOST_PARTS = 1 << 18

#: fields of ``MoEConfig`` and ``RouterConfig`` that belong to the architecture; the others are the user's choice
_MOE: tuple[str, ...] = (
    *("hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "gated"),
    *("shared_intermediate_size", "shared_gate"),
)
_ROUTER = ("score", "normalize_weights", "softmax_after_topk", "weight_scale", "groups", "kept_groups", "group_worth")
#: fields of ``RouterConfig`` that change what a trained model computes, and their values that transformers knows
_KNOWN: dict[str, tuple[Any, ...]] = {"select": ("top_k", "sinkhorn", "base"), "gate": ("linear",)}
#: what to do with a model that transformers does not have
_REMEDY = "so its weights cannot be converted; train on with --resume, or start another run with --init.from"
#: fields of ``MoEConfig`` for experts that no model of transformers has; None: none
_UNKNOWN = ("zero_computation", "widths")
#: fields that only runs of ours have, by dotted name, and their plain values: those that determine weights
OWN: dict[str, Any] = {
    "model.norm_head": False,
    **{f"moe.{name}": None for name in _UNKNOWN},
    "moe.router.gate": "linear",
    **{f"moe.router.{name}": getattr(RouterConfig, name) for names in OF_GATE.values() for name in names},
}
#: and those that do not, which a run that starts from the weights may change
OWN_CHOICES: dict[str, Any] = {
    f"moe.router.{name}": getattr(RouterConfig, name) for name in ("select", "cap", "top_p", "sees_future")
}


@dataclass(frozen=True)
class Architecture:
    """All that determines the weights of a decoder and what it computes with them."""

    num_layers: int
    num_heads: int
    #: width of the dense feed-forwards; None if there are none
    intermediate_size: int | None
    moe_every: int
    dense_layers: int
    vocab_size: int
    norm_eps: float
    tie_embeddings: bool
    moe: MoEConfig
    attention: AttentionConfig
    #: whether routers have an expert bias
    expert_bias: bool = False
    #: what transformers does not know, by dotted name, if it is not plain; only runs of ours have it
    own: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        layers, heads, experts = self.num_layers, self.num_heads, self.moe.num_experts
        require(1 <= layers <= MOST_LAYERS, "model.num_layers", layers, f"must be between 1 and {MOST_LAYERS}")
        require(heads >= 1, "model.num_heads", heads, "must be at least 1")
        parts = layers * (experts + heads)
        why = f"all blocks together have {parts} experts and heads, more than {_MOST_PARTS}; such models are not read"
        require(parts <= _MOST_PARTS, "model.num_layers", layers, why)

    def is_moe(self, block: int) -> bool:
        """Return whether a block has an MoE feed-forward."""
        return block >= self.dense_layers and self.moe_every > 0 and (block + 1) % self.moe_every == 0

    @property
    def is_dense(self) -> bool:
        """Whether no block has an MoE feed-forward."""
        return not any(map(self.is_moe, range(self.num_layers)))

    def fields(self) -> dict[str, Any]:
        """Return the fields of :meth:`sections` by dotted name, and :attr:`own`."""
        return dict(dotted(self.sections(), whole=("scaling",))) | dict(self.own)

    def sections(self) -> dict[str, Any]:
        """Return the fields of a run's configuration that the architecture determines, as nested mappings."""
        own = {
            name: value for name, value in vars(self).items() if name not in ("moe", "attention", "expert_bias", "own")
        }
        moe = {name: getattr(self.moe, name) for name in _MOE}
        router = {name: getattr(self.moe.router, name) for name in _ROUTER}
        return {
            "model": {name: value for name, value in own.items() if value is not None},
            "moe": moe | {"router": router},
            "attention": asdict(self.attention),
        }


def architecture(sections: dict[str, Any], expert_bias: bool, own: bool = False) -> Architecture:
    """Return the architecture of a run's configuration, given as nested mappings of at least the fields that matter.

    Two configurations that compute the same have equal architectures. Raises ValueError, KeyError or TypeError; without
    ``own``, also for a model that no model of transformers computes.
    """
    model, attention = sections["model"], dict(sections["attention"])
    scaling = attention.get("scaling")
    attention["scaling"] = None if scaling is None else RotaryScaling(**scaling)
    moe = {name: sections["moe"][name] for name in _MOE if name in sections["moe"]}
    given = sections["moe"].get("router", {})
    if not own:
        _refuse_unknown(sections)
    router = {name: value for name, value in given.items() if name in _ROUTER}
    sizes: dict[str, Any] = {
        "moe_every": 1,
        "dense_layers": 0,
        "intermediate_size": None,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
    }
    sizes |= {name: model[name] for name in (*sizes, "num_layers", "num_heads", "vocab_size") if name in model}
    return canonical(
        Architecture(
            **sizes,
            moe=MoEConfig(**moe, router=RouterConfig(**router)),
            attention=AttentionConfig(**attention),
            expert_bias=expert_bias,
            own=tuple(_not_plain(sections)) if own else (),
        )
    )


def _refuse_unknown(sections: dict[str, Any]) -> None:
    given = sections["moe"].get("router", {})
    for name, known in _KNOWN.items():
        value = given.get(name, known[0])
        require(value in known, f"moe.router.{name}", value, f"no model of transformers has such a router, {_REMEDY}")
    norm_head = sections["model"].get("norm_head", False)
    require(not norm_head, "model.norm_head", norm_head, f"no model of transformers has such a head, {_REMEDY}")
    for name in _UNKNOWN:
        value = sections["moe"].get(name)
        require(value is None, f"moe.{name}", value, f"no model of transformers has such experts, {_REMEDY}")


def _not_plain(sections: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of :data:`OWN` and :data:`OWN_CHOICES` that have other values, with these."""
    for name, plain in (OWN | OWN_CHOICES).items():
        *path, field = name.split(".")
        section = sections
        for part in path:
            section = section.get(part, {})
        if section.get(field, plain) != plain:
            yield name, section[field]


def canonical(found: Architecture) -> Architecture:
    """Write out defaults, and reset fields that have no effect."""
    a, moe, router, plain = found.attention, found.moe, found.moe.router, AttentionConfig()
    unused: tuple[str, ...] = ("num_kv_heads", "head_width", "qk_norm")
    if a.kind == "grouped":
        unused = ("q_lora_rank", "kv_lora_rank", "qk_nope_width", "qk_rope_width", "v_width")
        kv_heads, width = a.num_kv_heads or found.num_heads, a.head_width or moe.hidden_size // found.num_heads
        a = replace(a, num_kv_heads=kv_heads, head_width=width)
    a = replace(a, **{name: getattr(plain, name) for name in unused})
    if not a.qk_norm:
        a = replace(a, qk_norm_over="head")
    if a.window is None or a.window_from >= found.num_layers:
        a = replace(a, window=None, window_from=0)
    if a.scaling is not None:
        a = replace(a, scaling=_canonical_scaling(a.scaling))
    if router.softmax_after_topk and router.score == "softmax":  # the same as normalised softmax scores
        router = replace(router, softmax_after_topk=False, normalize_weights=True)
    if router.groups == 1:
        router = replace(router, group_worth="two_best")
    found = replace(found, attention=a, moe=replace(moe, router=router))
    if all(map(found.is_moe, range(found.num_layers))):
        found = replace(found, intermediate_size=None)
    if found.is_dense:
        found = replace(found, moe_every=0, dense_layers=0, moe=no_moe(moe.hidden_size, found.intermediate_size or 1))
    return found


def no_moe(hidden_size: int, width: int) -> MoEConfig:
    """Return the layer of a model that has no MoE layers. Only ``hidden_size`` has a meaning."""
    return MoEConfig(hidden_size, width, num_experts=8, top_k=2)


def _canonical_scaling(scaling: RotaryScaling) -> RotaryScaling:
    if scaling.kind != "linear":
        return replace(scaling, table_scale=scaling.magnitude)
    plain = RotaryScaling()
    unused = {name: getattr(plain, name) for name in ("original_length", "fast_turns", "slow_turns")}
    return replace(scaling, table_scale=scaling.magnitude, **unused)
