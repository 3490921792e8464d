"""Which tensor of a transformers model is which part of a tensor of this package's decoder.

Every tensor of the decoder consists of boxes, and each is a box of a tensor of transformers with the same values. So
conversion in both directions, by blocks and for any mesh, follows from one list.

V vocabulary, D hidden, N query heads, M key/value heads, G = N / M, H head width, R rotated width, C width of a latent,
E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .architecture import Architecture
from .families import Family

#: where experts are: one tensor per expert and projection (files of transformers 4, and what version 5 writes), or
#: those of all experts in one (version 5 in memory)
Layout = Literal["v4", "v5"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A box of a tensor of the decoder, whose values are those of some rows of one of transformers."""

    #: where the box begins in the decoder's tensor, and its shape there
    offsets: Shape
    sizes: Shape
    #: name of the tensor of transformers, and the first of its rows
    name: str
    row: int = 0
    #: the rows are pairs of channels as neighbours (0, R/2, 1, R/2 + 1, ...); the decoder has all first channels first
    interleaved: bool = False
    #: the box has a first dimension of 1 that the tensor of transformers does not have
    one_expert: bool = False


@dataclass(frozen=True)
class Ours:
    """A tensor of the decoder: its shape, and its parts in the order of their offsets."""

    shape: Shape
    parts: tuple[Part, ...]


def names(family: Family, a: Architecture, layout: Layout) -> dict[str, Ours]:
    """Return all tensors of the decoder by their names. A head that is tied to the embedding is not among them."""
    d = a.moe.hidden_size
    found = {"embedding.weight": _same("model.embed_tokens.weight", (a.vocab_size, d))}
    for block in range(a.num_layers):
        ours, theirs = f"blocks.{block}.", f"model.layers.{block}."
        found[f"{ours}attention_norm.weight"] = _same(f"{theirs}input_layernorm.weight", (d,))
        attention = _grouped(a, f"{theirs}self_attn.") if a.attention.kind == "grouped" else _latent(family, a, theirs)
        found |= {f"{ours}attention.{name}": tensor for name, tensor in attention.items()}
        found[f"{ours}mlp_norm.weight"] = _same(f"{theirs}post_attention_layernorm.weight", (d,))
        if a.is_moe(block):
            mlp = _moe(family, a, layout, f"{theirs}{family.block if layout == 'v4' else 'mlp'}.")
        else:
            mlp = _swiglu(f"{theirs}mlp.", d, a.intermediate_size or 0)
        found |= {f"{ours}mlp.{name}": tensor for name, tensor in mlp.items()}
    found["norm.weight"] = _same("model.norm.weight", (d,))
    if not a.tie_embeddings:
        found["head.weight"] = _same("lm_head.weight", (a.vocab_size, d))
    return found


def theirs(ours: dict[str, Ours]) -> dict[str, tuple[Shape, list[tuple[str, Part]]]]:
    """Return all tensors of transformers: their shapes, and (name of the decoder's tensor, part) in order of rows."""
    parts: dict[str, list[tuple[str, Part]]] = {}
    for name, tensor in ours.items():
        for part in tensor.parts:
            parts.setdefault(part.name, []).append((name, part))
    found = {}
    for name, of_name in parts.items():
        of_name.sort(key=lambda pair: pair[1].row)
        shapes = [part.sizes[1:] if part.one_expert else part.sizes for _, part in of_name]
        found[name] = ((sum(shape[0] for shape in shapes), *shapes[0][1:]), of_name)
    return found


def empty(family: Family, a: Architecture) -> dict[str, Shape]:
    """Return the tensors of transformers that no tensor of the decoder needs: of a shared expert without channels."""
    found: dict[str, Shape] = {}
    if family.empty_shared and not a.moe.shared_intermediate_size:
        for block in filter(a.is_moe, range(a.num_layers)):
            mlp, d = f"model.layers.{block}.mlp.", a.moe.hidden_size
            found |= {f"{mlp}{family.shared}.{name}": one.shape for name, one in _swiglu("", d, 0).items()}
            found[f"{mlp}{family.shared_gate}.weight"] = (1, d)
    return found


def _same(name: str, shape: Shape) -> Ours:
    return Ours(shape, (Part((0,) * len(shape), shape, name),))


def _joined(width: Shape, rows: Iterator[tuple[str, int, int, bool]]) -> Ours:
    """Return a tensor that consists of (name, first row, number of rows, interleaved), one after the other."""
    parts, first = [], 0
    for name, row, count, interleaved in rows:
        parts.append(Part((first, *(0 for _ in width)), (count, *width), name, row, interleaved))
        first += count
    return Ours((first, *width), tuple(parts))


def _grouped(a: Architecture, prefix: str) -> dict[str, Ours]:
    t, d = a.attention, a.moe.hidden_size
    kv_heads, width = t.num_kv_heads or a.num_heads, t.head_width or d // a.num_heads
    group = a.num_heads // kv_heads

    def qkv(leaf: str) -> Iterator[tuple[str, int, int, bool]]:
        for head in range(kv_heads):
            yield f"{prefix}q_proj.{leaf}", head * group * width, group * width, False
            yield f"{prefix}k_proj.{leaf}", head * width, width, False
            yield f"{prefix}v_proj.{leaf}", head * width, width, False

    found = {"qkv_proj.weight": _joined((d,), qkv("weight"))}
    if t.bias != "none":
        found["qkv_proj.bias"] = _joined((), qkv("bias"))
    found["out_proj.weight"] = _same(f"{prefix}o_proj.weight", (d, a.num_heads * width))
    if t.bias == "all":
        found["out_proj.bias"] = _same(f"{prefix}o_proj.bias", (d,))
    if t.qk_norm:
        for name, heads in (("q_norm", a.num_heads), ("k_norm", kv_heads)):
            joint = t.qk_norm_over == "all_heads"
            found[f"{name}.weight"] = _same(f"{prefix}{name}.weight", (heads * width if joint else width,))
    return found


def _latent(family: Family, a: Architecture, block: str) -> dict[str, Ours]:
    t, d, prefix, swapped = a.attention, a.moe.hidden_size, f"{block}self_attn.", family.interleaved
    plain, rotated, q_width = t.qk_nope_width, t.qk_rope_width, t.qk_nope_width + t.qk_rope_width
    q_name = f"{prefix}{'q_b_proj' if t.q_lora_rank else 'q_proj'}.weight"

    def queries() -> Iterator[tuple[str, int, int, bool]]:
        for head in range(a.num_heads):
            yield q_name, head * q_width, plain, False
            yield q_name, head * q_width + plain, rotated, swapped

    def keys(leaf: str) -> Iterator[tuple[str, int, int, bool]]:
        yield f"{prefix}kv_a_proj_with_mqa.{leaf}", 0, t.kv_lora_rank, False
        yield f"{prefix}kv_a_proj_with_mqa.{leaf}", t.kv_lora_rank, rotated, swapped

    found = {
        "q_up_proj.weight": _joined((t.q_lora_rank or d,), queries()),
        "kv_down_proj.weight": _joined((d,), keys("weight")),
        "kv_norm.weight": _same(f"{prefix}kv_a_layernorm.weight", (t.kv_lora_rank,)),
        "kv_up_proj.weight": _same(f"{prefix}kv_b_proj.weight", (a.num_heads * (plain + t.v_width), t.kv_lora_rank)),
        "out_proj.weight": _same(f"{prefix}o_proj.weight", (d, a.num_heads * t.v_width)),
    }
    if t.q_lora_rank:
        found["q_down_proj.weight"] = _same(f"{prefix}q_a_proj.weight", (t.q_lora_rank, d))
        found["q_norm.weight"] = _same(f"{prefix}q_a_layernorm.weight", (t.q_lora_rank,))
    if t.bias != "none":
        found["kv_down_proj.bias"] = _joined((), keys("bias"))
        if t.q_lora_rank:
            found["q_down_proj.bias"] = _same(f"{prefix}q_a_proj.bias", (t.q_lora_rank,))
    if t.bias == "all":
        found["out_proj.bias"] = _same(f"{prefix}o_proj.bias", (d,))
    return found


def _swiglu(prefix: str, hidden: int, width: int) -> dict[str, Ours]:
    sizes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return {f"{name}.weight": _same(f"{prefix}{name}.weight", shape) for name, shape in sizes.items()}


def _moe(family: Family, a: Architecture, layout: Layout, prefix: str) -> dict[str, Ours]:
    moe = a.moe
    d, f, experts = moe.hidden_size, moe.intermediate_size, moe.num_experts
    found = {"router.weight": _same(f"{prefix}gate.weight", (experts, d))}
    if family.expert_bias:
        found["router.bias_E"] = _same(f"{prefix}gate.e_score_correction_bias", (experts,))
    if layout == "v5":
        found["experts.gate_up_proj"] = _same(f"{prefix}experts.gate_up_proj", (experts, 2 * f, d))
        found["experts.down_proj"] = _same(f"{prefix}experts.down_proj", (experts, d, f))
    else:
        gate, up, down = family.expert
        both, downs = [], []
        for e in range(experts):
            one = f"{prefix}experts.{e}."
            both.append(Part((e, 0, 0), (1, f, d), f"{one}{gate}.weight", one_expert=True))
            both.append(Part((e, f, 0), (1, f, d), f"{one}{up}.weight", one_expert=True))
            downs.append(Part((e, 0, 0), (1, d, f), f"{one}{down}.weight", one_expert=True))
        found["experts.gate_up_proj"] = Ours((experts, 2 * f, d), tuple(both))
        found["experts.down_proj"] = Ours((experts, d, f), tuple(downs))
    if moe.shared_intermediate_size:
        shared = _swiglu(f"{prefix}{family.shared}.", d, moe.shared_intermediate_size)
        found |= {f"shared.mlp.{name}": tensor for name, tensor in shared.items()}
    if moe.shared_gate:
        found["shared.gate.weight"] = _same(f"{prefix}{family.shared_gate}.weight", (1, d))
    return found
