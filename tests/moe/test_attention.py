"""Compares attention with loops over positions and heads, and its split over ranks with one process."""

# B sequences, S positions, D hidden, N query heads, M key/value heads, H head width, R rotated width.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import MoE, MoEConfig
from equimoe.moe.config import AttentionConfig, RotaryScaling
from equimoe.moe.model import Decoder, numbered_moe_layers
from equimoe.moe.model.attention import ATTENTION, EPS, causal_attention
from equimoe.moe.model.rotary import rotary_tables
from equimoe.moe.parallel import ParallelConfig
from equimoe.moe.train.build import build_model
from equimoe.moe.train.config import ModelConfig, TrainConfig
from tests.helpers import oracle, parity
from tests.helpers.slow import slow_but

GROUPED = AttentionConfig(num_kv_heads=2, head_width=6, qk_norm=True, rotary_base=500.0)
LATENT = AttentionConfig(
    "latent", q_lora_rank=6, kv_lora_rank=5, qk_nope_width=4, qk_rope_width=2, v_width=3, rotary_base=500.0
)
KINDS = {"grouped": GROUPED, "latent": LATENT}
B, S, D, N = 2, 7, 16, 4
#: changes the scores, but not the rotary tables
SCALED = RotaryScaling("linear", factor=1.0, score_scale=1.5)


def rotated(v: Tensor, position: int, base: float) -> Tensor:
    """Return a vector [R] whose pairs (i, i + R/2) are rotated as complex numbers."""
    half = v.shape[0] // 2
    angles = torch.tensor([position * base ** (-2 * i / v.shape[0]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag))


def rms(v: Tensor, weight: Tensor) -> Tensor:
    return v / (v.square().mean() + EPS).sqrt() * weight


def linear(module: Any, x: Tensor) -> Tensor:
    return module.weight @ x if module.bias is None else module.weight @ x + module.bias


def softmax_sum(c: AttentionConfig, q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    keys, values = (seen[-c.window :] if c.window else seen for seen in (keys, values))
    scores = torch.stack([q @ key for key in keys]) / math.sqrt(q.shape[0])
    scores = scores * c.scaling.score_scale if c.scaling else scores
    return sum((p * value for p, value in zip(scores.softmax(0), values, strict=True)), torch.zeros_like(values[0]))


def slow_grouped(module: Any, c: AttentionConfig, x_SD: Tensor) -> Tensor:
    h, m = c.head_width or D // N, c.num_kv_heads or N
    g, rows = N // m, []
    for x in x_SD:
        found = linear(module.qkv_proj, x)
        heads = [found[i * (g + 2) * h : (i + 1) * (g + 2) * h].view(g + 2, h) for i in range(m)]
        if c.qk_norm and c.qk_norm_over == "all_heads":
            queries = rms(torch.cat([head[:g].flatten() for head in heads]), module.q_norm.weight).view(m, g, h)
            keys = rms(torch.cat([head[g] for head in heads]), module.k_norm.weight).view(m, 1, h)
            heads = [torch.cat((q, k, head[g + 1 :])) for q, k, head in zip(queries, keys, heads, strict=True)]
        rows.append(heads)

    def normed(v: Tensor, norm: Any, s: int) -> Tensor:
        each = c.qk_norm and c.qk_norm_over == "head"
        return rotated(rms(v, norm.weight) if each else v, s, c.rotary_base)

    out = []
    for s in range(len(rows)):
        heads = []
        for n in range(N):
            i = n // g
            keys = [normed(rows[t][i][g], module.k_norm, t) for t in range(s + 1)]
            q = normed(rows[s][i][n % g], module.q_norm, s)
            heads.append(softmax_sum(c, q, keys, [rows[t][i][g + 1] for t in range(s + 1)]))
        out.append(linear(module.out_proj, torch.cat(heads)))
    return torch.stack(out)


def slow_latent(module: Any, c: AttentionConfig, x_SD: Tensor) -> Tensor:
    nope, rope, v = c.qk_nope_width, c.qk_rope_width, c.v_width
    queries, keys, values = [], [], []
    for s, x in enumerate(x_SD):
        latent = rms(linear(module.q_down_proj, x), module.q_norm.weight) if c.q_lora_rank else x
        q = (module.q_up_proj.weight @ latent).view(N, nope + rope)
        queries.append([torch.cat((head[:nope], rotated(head[nope:], s, c.rotary_base))) for head in q])
        found = linear(module.kv_down_proj, x)
        common = rotated(found[c.kv_lora_rank :], s, c.rotary_base)
        kv = (module.kv_up_proj.weight @ rms(found[: c.kv_lora_rank], module.kv_norm.weight)).view(N, nope + v)
        keys.append([torch.cat((head[:nope], common)) for head in kv])
        values.append([head[nope:] for head in kv])
    out = []
    for s in range(len(x_SD)):
        heads = [
            softmax_sum(c, queries[s][n], [keys[t][n] for t in range(s + 1)], [values[t][n] for t in range(s + 1)])
            for n in range(N)
        ]
        out.append(linear(module.out_proj, torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("config", "slow"),
    [
        (AttentionConfig(), slow_grouped),
        (AttentionConfig(num_kv_heads=1), slow_grouped),
        (GROUPED, slow_grouped),
        (LATENT, slow_latent),
        (AttentionConfig("latent", q_lora_rank=0, kv_lora_rank=3, qk_nope_width=2, v_width=8), slow_latent),
        (replace(GROUPED, bias="all"), slow_grouped),
        (replace(GROUPED, bias="inputs", window=3), slow_grouped),
        (replace(GROUPED, qk_norm_over="all_heads", scaling=SCALED), slow_grouped),
        (replace(LATENT, bias="all"), slow_latent),
        (replace(LATENT, window=1, scaling=SCALED), slow_latent),
    ],
    ids=[
        *("multi_head", "multi_query", "grouped", "latent", "latent_without_query_latent"),
        *("biases", "window", "joint_norm", "latent_biases", "latent_window"),
    ],
)
def test_values_and_gradients(config: AttentionConfig, slow: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    module = ATTENTION[config.kind](D, N, S, config).double()
    if config.window:
        module.see_only(config.window)
    for name, weight in module.named_parameters():
        nn.init.normal_(weight, mean=float("norm" in name), std=0.4)
    module.cos_SR, module.sin_SR = (t.double() for t in exact_rotary(module, config))
    x_BSD = torch.randn(B, S, D, dtype=torch.float64, requires_grad=True)
    carrier = torch.randn(B, S, D, dtype=torch.float64)
    leaves = [x_BSD, *module.parameters()]
    got, want = module(x_BSD), torch.stack([slow(module, config, x_SD) for x_SD in x_BSD])
    assert oracle.relative_error(got, want) < 1e-12
    found = torch.autograd.grad((got * carrier).sum(), leaves)
    for mine, theirs in zip(found, torch.autograd.grad((want * carrier).sum(), leaves), strict=True):
        assert oracle.relative_error(mine, theirs) < 1e-11


def exact_rotary(module: Any, config: AttentionConfig) -> tuple[Tensor, Tensor]:
    """Make the rotary tables, which are fp32, as exact as the comparison."""
    width = 2 * module.cos_SR.shape[1]
    angles = [[s * config.rotary_base ** (-2 * i / width) for i in range(width // 2)] for s in range(S)]
    exact = torch.tensor(angles, dtype=torch.float64)
    assert oracle.relative_error(module.cos_SR, exact.cos()) < 1e-7
    return exact.cos(), exact.sin()


def frequencies_of(scaling: RotaryScaling, width: int, base: float) -> list[float]:
    """Compute the formulas of the papers, pair by pair."""
    found = []
    for i in range(width // 2):
        plain = base ** (-2 * i / width)
        turns = scaling.original_length * plain / (2 * math.pi)
        if scaling.kind == "linear":
            fast = 0.0
        elif scaling.kind == "llama3":
            fast = (turns - scaling.slow_turns) / (scaling.fast_turns - scaling.slow_turns)
        else:  # numbers of the pairs that turn so often, rounded outwards
            first, last = (
                width / 2 * math.log(scaling.original_length / (2 * math.pi * t), base)
                for t in (scaling.fast_turns, scaling.slow_turns)
            )
            fast = 1 - (i - math.floor(first)) / (math.ceil(last) - math.floor(first))
        fast = min(max(fast, 0.0), 1.0)
        found.append(plain * fast + plain / scaling.factor * (1 - fast))
    return found


@pytest.mark.parametrize(
    ("scaling", "magnitude"),
    [
        (RotaryScaling("linear", 3.0), 1.0),
        (RotaryScaling("yarn", 8.0, original_length=1024), 0.1 * math.log(8) + 1),
        (RotaryScaling("yarn", 8.0, original_length=64, fast_turns=4.0, table_scale=1.25), 1.25),
        (RotaryScaling("llama3", 8.0, original_length=64, fast_turns=4.0), 1.0),
    ],
)
def test_scaled_rotary_tables(scaling: RotaryScaling, magnitude: float) -> None:
    width, base = 16, 500.0
    cos, sin = rotary_tables(9, width, base, scaling)
    frequencies = frequencies_of(scaling, width, base)
    stretched = {round(f * base ** (2 * i / width), 6) for i, f in enumerate(frequencies)}
    assert len(stretched) > 1 or scaling.kind == "linear"
    angles = torch.tensor([[s * f for f in frequencies] for s in range(9)], dtype=torch.float64)
    assert torch.allclose(cos.double(), magnitude * angles.cos(), atol=1e-6)
    assert torch.allclose(sin.double(), magnitude * angles.sin(), atol=1e-6)


def test_a_window_of_some_blocks() -> None:
    moe, attention = MoEConfig(8, 4, 4, 2), AttentionConfig(window=2, window_from=1)
    sizes: dict[str, Any] = {"vocab_size": 8, "num_layers": 3, "num_heads": 2, "intermediate_size": 8}
    model = Decoder(**sizes, seq_len=4, moe=moe, attention=attention)
    assert [block.attention.window for block in model.blocks.values()] == [None, 2, 2]
    short = Decoder(**sizes, seq_len=2, moe=moe, attention=attention)  # no sequence is longer than the window
    assert all(block.attention.attend is causal_attention for block in short.blocks.values())


def test_the_epsilon_reaches_every_norm() -> None:
    for attention in (GROUPED, LATENT, replace(GROUPED, qk_norm_over="all_heads")):
        run = TrainConfig(model=ModelConfig(norm_eps=0.25), moe=MoEConfig(16, 4, 4, 2), attention=attention)
        assert {m.eps for m in build_model(run, 8).modules() if isinstance(m, nn.RMSNorm)} == {0.25}


def test_equal_heads_are_what_they_were() -> None:
    """Multi-head attention must give the bits of an earlier version, whose weight had no groups."""
    torch.manual_seed(0)
    module = ATTENTION["grouped"](D, N, S, AttentionConfig())
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "qkv_proj.weight": (3 * D, D),
        "out_proj.weight": (D, D),
    }
    x_BSD = torch.randn(B, S, D, requires_grad=True)
    q, k, v = module.qkv_proj(x_BSD).unflatten(-1, (-1, 3, D // N)).permute(3, 0, 2, 1, 4).unbind(0)
    out = nn.functional.scaled_dot_product_attention(module._rotate(q), module._rotate(k), v, is_causal=True)
    want = module.out_proj(out.transpose(1, 2).flatten(2))
    leaves = [x_BSD, *module.parameters()]
    got = module(x_BSD)
    assert torch.equal(got, want)
    gradients = (torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


#: what parallelism may get wrong: biases, scaled tables and scores, windows, norms over all heads
SPLIT = {
    "grouped": GROUPED,
    "latent": LATENT,
    "biases": AttentionConfig(num_kv_heads=2, bias="all", scaling=RotaryScaling(original_length=8, score_scale=1.5)),
    "latent_biases": replace(LATENT, bias="all", scaling=RotaryScaling(original_length=8, score_scale=1.5)),
}


RANKS = {
    "tp": ParallelConfig(tp=2),
    "cp": ParallelConfig(cp=2),
    "fsdp": ParallelConfig(data_parallel="fsdp"),
    "pp": ParallelConfig(pp=2, dp_shard=1),
}


@pytest.mark.parametrize(
    ("ranks", "kind"),
    slow_but(
        [("tp", "grouped"), ("tp", "latent_biases"), ("cp", "biases"), ("fsdp", "latent"), ("pp", "grouped")],
        product(RANKS, SPLIT),
    ),
)
def test_two_ranks_are_one(ranks: str, kind: str) -> None:
    of = parity.Composition(2, RANKS[ranks], attention=SPLIT[kind])
    assert max(parity.compare(of).values()) < of.limit


@pytest.mark.parametrize(
    ("parallel", "joint"),
    [
        (ParallelConfig(tp=2), False),
        (ParallelConfig(data_parallel="fsdp"), True),
        (ParallelConfig(pp=2, dp_shard=1), True),
    ],
)
def test_windows_and_joint_norms_on_two_ranks(parallel: ParallelConfig, joint: bool) -> None:
    over = "all_heads" if joint else "head"
    attention = replace(GROUPED, window=5, window_from=1, qk_norm_over=over)
    of = parity.Composition(2, parallel, attention=attention)
    assert max(parity.compare(of).values()) < of.limit


@pytest.mark.parametrize(
    ("world", "parallel"),
    slow_but(
        [(2, ParallelConfig(tp=2))],
        [(2, ParallelConfig(tp=2)), (4, ParallelConfig(tp=2, ep=2, data_parallel="fsdp"))],
    ),
)
def test_a_tied_weight_on_several_ranks(world: int, parallel: ParallelConfig) -> None:
    of = parity.Composition(world, parallel, tied=True)
    assert max(parity.compare(of).values()) < of.limit


@pytest.mark.parametrize(
    ("attention", "parallel", "message"),
    [
        (AttentionConfig(window=4), ParallelConfig(cp=2), "attention.window=4: cannot span the ranks of context "),
        (
            AttentionConfig(qk_norm=True, qk_norm_over="all_heads"),
            ParallelConfig(tp=2),
            "attention.qk_norm_over='all_heads': tensor parallelism gives each rank some of the heads; ",
        ),
    ],
)
def test_splits_that_attention_cannot_have(attention: AttentionConfig, parallel: ParallelConfig, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parity.on_ranks(parity.Composition(2, parallel, attention=attention))


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_that_hold_the_same_positions(kind: str) -> None:
    of = parity.Composition(2, ParallelConfig(tp=2, sequence_parallel=False), attention=KINDS[kind], moe_every=0)
    assert max(parity.compare(of).values()) < of.limit


def test_first_layers_can_be_dense() -> None:
    moe = MoEConfig(8, 4, 4, 2)
    sizes: dict[str, Any] = {"vocab_size": 8, "seq_len": 4, "num_layers": 5, "num_heads": 2, "intermediate_size": 8}
    for every, dense, want in ((1, 3, [3, 4]), (2, 2, [3]), (1, 0, [0, 1, 2, 3, 4]), (0, 0, []), (1, 5, [])):
        model = Decoder(**sizes, moe=moe, moe_every=every, dense_layers=dense)
        assert list(numbered_moe_layers([model])) == want
        assert all(isinstance(model.blocks[str(i)].mlp, MoE) == (i in want) for i in range(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig("linear"), "attention.kind='linear': use one of grouped, latent"),
        (lambda: AttentionConfig(num_kv_heads=0), "attention.num_kv_heads=0: must be at least 1"),
        (lambda: AttentionConfig(head_width=5), "attention.head_width=5: must be even; channels turn in pairs"),
        (lambda: AttentionConfig(qk_rope_width=3), "attention.qk_rope_width=3: must be even; channels turn in pairs"),
        (lambda: AttentionConfig(q_lora_rank=-1), "attention.q_lora_rank=-1: must not be negative; 0: no latent"),
        (lambda: AttentionConfig(rotary_base=1.0), "attention.rotary_base=1.0: must be more than 1; 10000 is usual"),
        (lambda: AttentionConfig(window=0), "attention.window=0: must be at least 1"),
        (lambda: AttentionConfig(bias="output"), "attention.bias='output': use one of none, inputs, all"),
        (lambda: RotaryScaling(factor=0.5), "attention.scaling.factor=0.5: must be at least 1"),
        (lambda: RotaryScaling(fast_turns=1.0), "attention.scaling.fast_turns=1.0: must be more than slow_turns=1.0"),
        (lambda: RotaryScaling(table_scale=0.0), "attention.scaling.table_scale=0.0: must be positive"),
        (lambda: ModelConfig(norm_eps=0.0), "model.norm_eps=0.0: must be positive; 1e-5 and 1e-6 are usual"),
        (
            lambda: TrainConfig(model=ModelConfig(tie_embeddings=True), parallel=ParallelConfig(pp=2)).degrees(2),
            "model.tie_embeddings=True: embedding and head are in different stages of parallel.pp=2; set ",
        ),
        (lambda: TrainConfig(attention=AttentionConfig(num_kv_heads=3)), "attention.num_kv_heads=3: must divide "),
        (lambda: TrainConfig(model=ModelConfig(num_heads=3)), "model.num_heads=3: 2 * num_heads must divide "),
        (lambda: ModelConfig(dense_layers=5), "model.dense_layers=5: must be between 0 and model.num_layers=4"),
    ],
)
def test_mistakes(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_tensor_parallelism_refuses_heads_that_do_not_divide() -> None:
    of = parity.Composition(4, ParallelConfig(tp=4), attention=GROUPED)
    with pytest.raises(Exception, match=r"parallel.tp=4: must divide attention.num_kv_heads=2"):
        parity.on_ranks(of)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_the_rotary_tables_lack_are_refused(kind: str) -> None:
    """Shorter sequences are correct, unless context parallelism has given this rank some positions of whole ones."""
    module = ATTENTION[KINDS[kind].kind](D, N, 8, KINDS[kind])
    assert module(torch.randn(B, 3, D)).shape == (B, 3, D)
    with pytest.raises(ValueError, match="sequences of 9 positions, .* seq_len=8; give it sequences of at most that"):
        module(torch.randn(B, 9, D))
    module.hold(torch.tensor([0, 1, 6, 7]))
    assert module(torch.randn(B, 4, D)).shape == (B, 4, D)
    for length in (2, 5):
        with pytest.raises(ValueError, match=f"of {2 * length} positions, .* seq_len=8; .* exactly that length"):
            module(torch.randn(B, length, D))
