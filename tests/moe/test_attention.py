"""Compares attention with loops over positions and heads, and its split over ranks with one process."""

# B sequences, S positions, D hidden, N query heads, M key/value heads, H head width, R rotated width.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import MoE, MoEConfig
from equimoe.moe.config import AttentionConfig
from equimoe.moe.model import Decoder, numbered_moe_layers
from equimoe.moe.model.attention import ATTENTION, EPS
from equimoe.moe.parallel import ParallelConfig
from equimoe.moe.train.config import ModelConfig, TrainConfig
from tests.helpers import oracle, parity

GROUPED = AttentionConfig(num_kv_heads=2, head_width=6, qk_norm=True, rotary_base=500.0)
LATENT = AttentionConfig(
    "latent", q_lora_rank=6, kv_lora_rank=5, qk_nope_width=4, qk_rope_width=2, v_width=3, rotary_base=500.0
)
KINDS = {"grouped": GROUPED, "latent": LATENT}
B, S, D, N = 2, 7, 16, 4


def rotated(v: Tensor, position: int, base: float) -> Tensor:
    """Return a vector [R] whose pairs (i, i + R/2) are rotated as complex numbers."""
    half = v.shape[0] // 2
    angles = torch.tensor([position * base ** (-2 * i / v.shape[0]) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(v[:half], v[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag))


def rms(v: Tensor, weight: Tensor) -> Tensor:
    return v / (v.square().mean() + EPS).sqrt() * weight


def softmax_sum(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = torch.stack([q @ key for key in keys]) / math.sqrt(q.shape[0])
    return sum((p * value for p, value in zip(scores.softmax(0), values, strict=True)), torch.zeros_like(values[0]))


def slow_grouped(module: Any, c: AttentionConfig, x_SD: Tensor) -> Tensor:
    h, m = c.head_width or D // N, c.num_kv_heads or N
    g, rows = N // m, []
    for x in x_SD:
        found = module.qkv_proj.weight @ x
        rows.append([found[i * (g + 2) * h : (i + 1) * (g + 2) * h].view(g + 2, h) for i in range(m)])

    def normed(v: Tensor, norm: Any, s: int) -> Tensor:
        return rotated(rms(v, norm.weight) if c.qk_norm else v, s, c.rotary_base)

    out = []
    for s in range(len(rows)):
        heads = []
        for n in range(N):
            i = n // g
            keys = [normed(rows[t][i][g], module.k_norm, t) for t in range(s + 1)]
            q = normed(rows[s][i][n % g], module.q_norm, s)
            heads.append(softmax_sum(q, keys, [rows[t][i][g + 1] for t in range(s + 1)]))
        out.append(module.out_proj.weight @ torch.cat(heads))
    return torch.stack(out)


def slow_latent(module: Any, c: AttentionConfig, x_SD: Tensor) -> Tensor:
    nope, rope, v = c.qk_nope_width, c.qk_rope_width, c.v_width
    queries, keys, values = [], [], []
    for s, x in enumerate(x_SD):
        latent = rms(module.q_down_proj.weight @ x, module.q_norm.weight) if c.q_lora_rank else x
        q = (module.q_up_proj.weight @ latent).view(N, nope + rope)
        queries.append([torch.cat((head[:nope], rotated(head[nope:], s, c.rotary_base))) for head in q])
        found = module.kv_down_proj.weight @ x
        common = rotated(found[c.kv_lora_rank :], s, c.rotary_base)
        kv = (module.kv_up_proj.weight @ rms(found[: c.kv_lora_rank], module.kv_norm.weight)).view(N, nope + v)
        keys.append([torch.cat((head[:nope], common)) for head in kv])
        values.append([head[nope:] for head in kv])
    out = []
    for s in range(len(x_SD)):
        heads = [
            softmax_sum(queries[s][n], [keys[t][n] for t in range(s + 1)], [values[t][n] for t in range(s + 1)])
            for n in range(N)
        ]
        out.append(module.out_proj.weight @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize(
    ("config", "slow"),
    [
        (AttentionConfig(), slow_grouped),
        (AttentionConfig(num_kv_heads=1), slow_grouped),
        (GROUPED, slow_grouped),
        (LATENT, slow_latent),
        (AttentionConfig("latent", q_lora_rank=0, kv_lora_rank=3, qk_nope_width=2, v_width=8), slow_latent),
    ],
    ids=["multi_head", "multi_query", "grouped", "latent", "latent_without_query_latent"],
)
def test_values_and_gradients(config: AttentionConfig, slow: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    module = ATTENTION[config.kind](D, N, S, config).double()
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tp=2),
        ParallelConfig(cp=2),
        ParallelConfig(data_parallel="fsdp"),
        ParallelConfig(pp=2, dp_shard=1),
    ],
    ids=["tp", "cp", "fsdp", "pp"],
)
def test_two_ranks_are_one(kind: str, parallel: ParallelConfig) -> None:
    of = parity.Composition(2, parallel, attention=KINDS[kind])
    assert max(parity.compare(of).values()) < of.limit


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
