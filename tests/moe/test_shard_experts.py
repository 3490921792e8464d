"""LoRA experts that share their weights in shards, against their definition written shard by shard in fp64.

The meshes of ``test_lora_experts.py`` train them too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.experts import LoRAExperts, ShardedLoRAExperts, SwiGLU
from equimoe.moe.model import Decoder, mix_lora

D, WIDTH, E, RANK, ALPHA = 8, 12, 3, 5, 6.0
SIZES: dict[str, int] = {"equivalent": 3, "private": 2, "shards": 2}


def layer(k: int = 2, trained: bool = True, **sizes: int) -> MoE:
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=0.0, micro_batches=1)
    router = RouterConfig(normalize_weights=k > 1)
    found = MoE(MoEConfig(D, WIDTH, E, k, router, balance, init_std=0.5)).double()
    found.experts = ShardedLoRAExperts(SwiGLU(D, WIDTH, 0.5).double(), E, RANK, ALPHA, **SIZES | sizes)
    if trained:
        for name, weight in found.experts.named_parameters():
            if name.endswith("_b"):
                torch.nn.init.normal_(weight)
    return found


def vectors(own: ShardedLoRAExperts, name: str, e: int) -> list[Tensor]:
    """The vectors of an expert that come from a pool, each joined from its shards."""
    pool, rows = own.pool.get_parameter(name), own.pool.choices[list(own.pool.lengths).index(name), e].tolist()
    shards = own.pool.lengths[name] // pool.shape[1]
    return [torch.cat([pool[row] for row in rows[i : i + shards]]) for i in range(0, len(rows), shards)]


def delta(own: ShardedLoRAExperts, part: str, e: int) -> Tensor:
    """alpha / r * the sum of the outer products of the columns of B and the rows of A of an expert."""
    private_a = {"gate": own.gate_up_a[e].chunk(2)[0], "up": own.gate_up_a[e].chunk(2)[1], "down": own.down_a[e]}[part]
    a = [*private_a, *vectors(own, f"{part}_a", e)]
    b = [*getattr(own, f"{part}_b")[e].T, *vectors(own, f"{part}_b", e)]
    assert len(a) == len(b) == RANK
    return ALPHA / RANK * sum(torch.outer(column, row) for column, row in zip(b, a, strict=True))


def by_token(moe: MoE, x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    own, base = moe.experts, moe.experts.base
    rows = []
    for t, x in enumerate(x_TD):
        y = torch.zeros_like(x)
        chosen, ids = (moe.router.weight @ x).softmax(0).topk(moe.config.top_k)
        weights = chosen / chosen.sum() if moe.config.top_k > 1 else chosen
        for weight, e in zip(weights, ids.tolist(), strict=True):
            gate, up, down = (
                getattr(base, f"{part}_proj").weight + delta(own, part, e) for part in ("gate", "up", "down")
            )
            y = y + weight * (down @ (F.silu(gate @ x) * (up @ x)))
        rows.append(y if mask_T is None or bool(mask_T[t]) else y * 0)
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("k", "sizes"), [(1, {}), (2, {"private": 1, "shards": 4}), (E, {"shards": 1})])
def test_outputs_and_gradients_are_as_defined(k: int, sizes: dict[str, int], masked: bool) -> None:
    moe, found = layer(k, **sizes), []
    mask_T = torch.arange(11) % 3 > 0 if masked else None
    for compute in (moe, lambda x, mask: by_token(moe, x, mask)):
        x = torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = compute(x, mask_T)
        trained = [p for p in moe.parameters() if p.requires_grad]
        assert len(trained) == 1 + 5 + 6  # the router, what is private, the pools
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_new_experts_compute_what_their_base_does() -> None:
    moe, x = layer(trained=False), torch.randn(9, D, dtype=torch.float64)
    torch.testing.assert_close(moe(x), moe.experts.base(x))
    moe(x).square().sum().backward()
    assert all(weight.grad is None for weight in moe.experts.base.parameters())
    pool = moe.experts.pool
    assert bool(pool.down_b.grad.any()) and not bool(pool.down_a.grad.any())


def test_merged_experts_compute_the_same() -> None:
    moe, x = layer(), torch.randn(9, D, dtype=torch.float64)
    want = moe(x)
    moe.experts = moe.experts.merged()
    torch.testing.assert_close(moe(x), want)


def test_they_have_the_weights_of_a_lower_rank() -> None:
    def count(experts: torch.nn.Module) -> int:
        return sum(p.numel() for p in experts.parameters() if p.requires_grad)

    assert count(layer().experts) == count(LoRAExperts(SwiGLU(D, WIDTH, 0.5), E, SIZES["equivalent"], ALPHA))


def test_the_choices_are_fixed_and_differ() -> None:
    """An expert has no shard twice; the pairs of A and B are dissociated; the choices survive new weights."""
    first, second = layer(), layer()
    torch.manual_seed(1)
    second.experts.reset_parameters()
    choices = first.experts.pool.choices
    assert torch.equal(choices, second.experts.pool.choices)
    assert not torch.equal(first.experts.pool.gate_a, second.experts.pool.gate_a)
    assert all(len(set(rows)) == len(rows) for pool in choices.tolist() for rows in pool)
    assert len({tuple(map(tuple, pool)) for pool in choices.tolist()}) == len(choices)
    assert len({tuple(rows) for rows in choices[0].tolist()}) == E


def test_mistakes() -> None:
    base = SwiGLU(D, WIDTH, 0.5)
    for wrong, message in (
        ({"private": 0}, "private=0, equivalent=3, rank=5: each must be at least 1, private below equivalent"),
        ({"equivalent": 6}, "private=2, equivalent=6, rank=5: each must be at least 1"),
        ({"shards": 3}, "shards=3: must divide the hidden width 8 and the experts' width 12"),
    ):
        with pytest.raises(ValueError, match=message):
            ShardedLoRAExperts(base, E, RANK, ALPHA, **SIZES | wrong)
    with pytest.raises(ValueError, match="rank=9: an expert takes 8 vectors from pools of 3; lower it, or raise"):
        ShardedLoRAExperts(base, E, 9, ALPHA)
    sizes: dict[str, Any] = {"vocab_size": 9, "seq_len": 4, "num_layers": 1, "num_heads": 2, "intermediate_size": 12}
    config = MoEConfig(8, 12, E, 2)
    with pytest.raises(ValueError, match="experts='mos': must be one of lora, shards"):
        mix_lora(Decoder(**sizes, moe=config, moe_every=0), config, experts="mos")
