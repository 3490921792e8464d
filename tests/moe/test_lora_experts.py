"""LoRA experts over one frozen MLP: the same as experts with whole weights, on any mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from equimoe.moe.engines import build_engine
from equimoe.moe.experts import LOW_RANK, LoRAExperts, SwiGLU
from equimoe.moe.model import Decoder, mix_lora
from equimoe.moe.parallel import ParallelConfig, build_mesh
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import full
from tests.helpers.slow import slow_but
from tests.helpers.trained import LENGTH, MICRO_BATCHES, SEQUENCES, VOCABULARY, batches, worst

D, WIDTH, E, RANK, ALPHA = 7, 5, 4, 3, 6.0


def layer(k: int = 2, trained: bool = True) -> MoE:
    torch.manual_seed(0)
    balance = BalanceConfig(coefficient=0.0, micro_batches=1)
    found = MoE(MoEConfig(D, WIDTH, E, k, balance=balance, init_std=0.5)).double()
    found.experts = LoRAExperts(SwiGLU(D, WIDTH, 0.5).double(), E, RANK, ALPHA)
    if trained:
        for name, weight in found.experts.named_parameters():
            if name.endswith("_b"):
                torch.nn.init.normal_(weight)
    return found


def by_token(moe: MoE, x_TD: Tensor, mask_T: Tensor | None) -> Tensor:
    """Every token through its experts, written with whole matrices."""
    own, base, scale = moe.experts, moe.experts.base, ALPHA / RANK
    scores_TE = (x_TD @ moe.router.weight.T).softmax(1)
    rows = []
    for t, x in enumerate(x_TD):
        y = torch.zeros_like(x)
        chosen, ids = scores_TE[t].topk(moe.config.top_k)
        for weight, e in zip(chosen / chosen.sum(), ids.tolist(), strict=True):
            gate = base.gate_proj.weight + scale * own.gate_b[e] @ own.gate_up_a[e, :RANK]
            up = base.up_proj.weight + scale * own.up_b[e] @ own.gate_up_a[e, RANK:]
            down = base.down_proj.weight + scale * own.down_b[e] @ own.down_a[e]
            y = y + weight * (down @ (F.silu(gate @ x) * (up @ x)))
        rows.append(y if mask_T is None or bool(mask_T[t]) else y * 0)
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [2, E])
def test_outputs_and_gradients_are_as_defined(k: int, masked: bool) -> None:
    moe = layer(k)
    mask_T = torch.arange(11) % 3 > 0 if masked else None
    results = []
    for compute in (moe, lambda x, mask: by_token(moe, x, mask)):
        x = torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = compute(x, mask_T)
        trained = [p for p in moe.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_new_experts_compute_what_their_base_does_and_leave_it_alone() -> None:
    moe, x = layer(trained=False), torch.randn(9, D, dtype=torch.float64)
    base = moe.experts.base
    torch.testing.assert_close(moe(x), base(x))
    moe(x).square().sum().backward()
    assert all(weight.grad is None for weight in base.parameters())
    assert bool(moe.experts.down_b.grad.any()) and not bool(moe.experts.down_a.grad.any())


def test_the_router_gets_a_gradient_once_experts_differ() -> None:
    x = torch.randn(9, D, dtype=torch.float64)
    for trained in (False, True):
        moe = layer(trained=trained)
        moe(x).square().sum().backward()
        assert bool((moe.router.weight.grad.abs() > 1e-9).any()) == trained


def test_merged_experts_compute_the_same() -> None:
    moe, x = layer(), torch.randn(9, D, dtype=torch.float64)
    want = moe(x)
    moe.experts = moe.experts.merged()
    torch.testing.assert_close(moe(x), want)


def mixed(experts: str = "lora", **how: Any) -> Decoder:
    torch.manual_seed(0)
    config = MoEConfig(8, 6, E, 2, balance=BalanceConfig(coefficient=0.1, estimator="exact"), init_std=0.4)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": 2, "num_heads": 2}
    model = Decoder(**sizes, intermediate_size=6, moe=config, moe_every=0, **how).double()
    return mix_lora(model, config, 2, 16.0, experts, **({"shards": 2} if experts == "shards" else {}))


def trained(rank: int, world: int, degrees: dict[str, Any], experts: str = "lora") -> dict[str, Tensor]:
    mesh = build_mesh(ParallelConfig(**degrees)) if world > 1 else None
    shape = (SEQUENCES // (1 if mesh is None else mesh["dp"].size) // MICRO_BATCHES, LENGTH)
    optimizer = lambda named: torch.optim.AdamW(named.values(), weight_decay=0.5)  # noqa: E731
    engine = build_engine(
        mixed(experts, recompute_blocks=world > 1),
        mesh,
        optimizer,
        micro_batches=MICRO_BATCHES,
        shape=shape,
        max_norm=0.5,
    )
    for step in range(3):
        engine.step(batches(mesh, step), lr=0.05)
    return {name: full(p) for name, p in engine.parameters.items()}


MESHES: list[tuple[int, dict[str, Any]]] = [
    (2, {"ep": 2}),
    (2, {"data_parallel": "fsdp", "ep": 2}),
    (4, {"ep": 4}),
    (4, {"data_parallel": "fsdp", "ep": 2}),
    (2, {"tp": 2, "ep": 2}),
]


@pytest.mark.parametrize("experts", LOW_RANK)
@pytest.mark.parametrize(("world", "degrees"), slow_but(MESHES[:2], MESHES), ids=str)
def test_steps_equal_those_of_one_process(world: int, degrees: dict[str, Any], experts: str) -> None:
    want, before = trained(0, 1, {}, experts), dict(mixed(experts).named_parameters())
    for got in run_ranks(trained, world, degrees, experts):
        assert worst(got, want)[0] < 1e-8
        for name, value in got.items():
            moves = "router" in name or ("experts" in name and "base" not in name)
            assert torch.equal(value, before[name]) != moves, name


def test_what_cannot_be_split_is_refused() -> None:
    def body(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match="parallel.etp=2, .*: LoRA experts are whole on their rank; use etp=1"):
            trained(rank, world, {"tp": 2, "etp": 2})

    run_ranks(body, 2)
    config = MoEConfig(8, 7, E, 2)
    model = Decoder(vocab_size=9, seq_len=4, num_layers=1, num_heads=2, intermediate_size=6, moe=config, moe_every=0)
    with pytest.raises(ValueError, match="moe.intermediate_size=7: the feed-forward of block 0 has 6"):
        mix_lora(model, config)
    with pytest.raises(ValueError, match="rank=0: must be at least 1"):
        LoRAExperts(SwiGLU(4, 4, 0.1), 2, 0, 1.0)


@pytest.mark.parametrize("gate", ["hash", "residual"])
def test_layers_over_a_dense_model_get_what_their_routers_read(gate: Any) -> None:
    """Although the dense model was built for other routers: the result is that of one that was built for them."""
    plain = MoEConfig(8, 6, E, 2, balance=BalanceConfig(coefficient=0.0), init_std=0.4)
    config = replace(plain, router=RouterConfig(gate=gate))
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": 2, "num_heads": 2}
    models = [Decoder(**sizes, intermediate_size=6, moe=moe, moe_every=0) for moe in (plain, config)]
    mixed, built = (mix_lora(model, config, rank=2) for model in models)
    torch.manual_seed(0)
    for weight in mixed.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    built.load_state_dict(mixed.state_dict())
    ids = torch.randint(VOCABULARY, (2, LENGTH))
    for model in (mixed, built):
        model(ids).square().sum().backward()
    for (name, got), want in zip(mixed.named_parameters(), built.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if got.grad is not None:
            assert torch.equal(got.grad, want.grad)
            assert "residual_weight" not in name or "blocks.1" not in name or bool(got.grad.any())


def test_routers_that_do_not_fit_a_decoder_are_refused() -> None:
    balance = BalanceConfig(coefficient=0.0)
    plain = MoEConfig(8, 6, E, 2, balance=balance)
    sizes: dict[str, Any] = {"vocab_size": 9, "seq_len": 4, "num_layers": 2, "num_heads": 2, "intermediate_size": 6}
    sees = RouterConfig(select="expert_choice", normalize_weights=False)
    with pytest.raises(ValueError, match="router.select='expert_choice': decides about a token by later tokens"):
        mix_lora(Decoder(**sizes, moe=plain, moe_every=0), replace(plain, router=sees))
    half = Decoder(**sizes, moe=plain, dense_layers=1)
    with pytest.raises(ValueError, match="moe.router.gate='residual': the decoder's other MoE layers have 'linear'"):
        mix_lora(half, replace(plain, router=RouterConfig(gate="residual")))
