"""Checks that models built on the meta device, and modules that are reset, get the weights of a normal construction."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from equimoe.moe import BalanceConfig, MoE, MoEConfig
from equimoe.moe.config import AttentionConfig
from equimoe.moe.model import Attention, Decoder
from equimoe.moe.parallel import ParallelConfig, build_mesh, parallelize
from tests.conftest import poison_
from tests.helpers.fork import run_ranks

LAYER = MoEConfig(
    hidden_size=16,
    intermediate_size=24,
    num_experts=4,
    top_k=2,
    shared_intermediate_size=12,
    shared_gate=True,
    balance=BalanceConfig(bias_update_rate=0.001),
)
ATTENTION = {
    "grouped": AttentionConfig(num_kv_heads=2, qk_norm=True),
    "biases": AttentionConfig(bias="all"),
    "latent": AttentionConfig("latent", q_lora_rank=8, kv_lora_rank=8, qk_nope_width=8, qk_rope_width=4, v_width=8),
}


def decoder(attention: str = "grouped") -> Decoder:
    return Decoder(
        vocab_size=32,
        seq_len=16,
        num_layers=2,
        num_heads=4,
        intermediate_size=20,
        moe=LAYER,
        dense_layers=1,
        attention=ATTENTION[attention],
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "decoder": decoder,
    "decoder, latent": lambda: decoder("latent"),
    "decoder, biases": lambda: decoder("biases"),
    "layer": lambda: MoE(LAYER),
    "router": lambda: MoE(LAYER).router,
    "experts": lambda: MoE(LAYER).experts,
    "shared": lambda: MoE(LAYER).shared,
    "block": lambda: decoder().blocks["1"],
    "attention": lambda: decoder().blocks["1"].attention,
}
WHOLE = ("decoder", "decoder, latent", "decoder, biases", "layer")


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all tensors of a module, including the rotary tables."""
    return {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make()


@pytest.mark.usefixtures("poison")
def test_poisoned_memory_is_where_it_is_asked_for() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta and MoE(LAYER).router.weight.is_meta


@pytest.mark.parametrize("name", WHOLE)
def test_meta_then_to_empty_gives_the_weights_of_a_construction(name: str) -> None:
    want, after = tensors(seeded(MAKERS[name])), torch.rand(1)
    with torch.device("meta"):
        module = MAKERS[name]()
    assert all(t.is_meta for t in tensors(module).values())
    module.to_empty(device="cpu")
    for t in (*module.parameters(), *module.buffers()):
        poison_(t)
    torch.manual_seed(3)
    module.reset_parameters()  # type: ignore[operator]
    torch.testing.assert_close(tensors(module), want, rtol=0, atol=0)
    assert torch.equal(torch.rand(1), after), "the random stream goes on as after a construction"


@pytest.mark.parametrize("name", MAKERS)
def test_every_part_can_start_again(name: str) -> None:
    """A reset must overwrite every tensor."""
    module = MAKERS[name]()
    spread = {name: t.float().std() for name, t in module.named_parameters()}
    for t in (*module.parameters(), *module.buffers()):
        poison_(t)
    module.reset_parameters()  # type: ignore[operator]
    assert all(t.isfinite().all() for t in tensors(module).values())
    if name not in ("block", "attention"):  # whose weights a decoder scales
        for key, t in module.named_parameters():
            torch.testing.assert_close(t.float().std(), spread[key], rtol=0.4, atol=1e-6)


def test_positions_of_context_parallelism_are_kept() -> None:
    attention = decoder().blocks["0"].attention
    assert isinstance(attention, Attention)
    attention.hold(torch.tensor([0, 1, 14, 15]))
    want = attention.cos_SR.clone()
    poison_(attention.cos_SR)
    attention.reset_parameters()
    assert torch.equal(attention.cos_SR, want)


def whole(module: nn.Module) -> dict[str, Tensor]:
    found = tensors(module)
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}


def test_the_usual_recipe_of_fsdp2() -> None:
    want = tensors(seeded(decoder))

    def body(rank: int, world: int) -> dict[str, Tensor]:
        with torch.device("meta"):
            model = decoder()
        for block in model.blocks.values():
            fully_shard(block)
        fully_shard(model)
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        model.reset_parameters()
        model(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
        for module in model.modules():
            if hasattr(module, "reshard"):
                module.reshard()  # type: ignore[operator]
        return whole(model)

    for found in run_ranks(body, 2):
        torch.testing.assert_close(found, want, rtol=0, atol=0)


@pytest.mark.parametrize(
    "degrees", [{"tp": 2, "ep": 2}, {"ep": 2, "data_parallel": "fsdp"}, {"ep": 1, "etp": 2}], ids=str
)
def test_a_model_that_was_split_on_the_meta_device(degrees: dict) -> None:
    want = tensors(seeded(decoder))
    ranks = 4 if "data_parallel" in degrees else 2

    def body(rank: int, world: int) -> dict[str, Tensor]:
        mesh = build_mesh(ParallelConfig(**degrees))
        with torch.device("meta"):
            model = decoder()
        model = parallelize(model, mesh, reduced=True)
        model.to_empty(device="cpu")
        torch.manual_seed(3)
        model.reset_parameters()
        return whole(model)

    for found in run_ranks(body, ranks):
        found = {name: t.view_as(want[name]) for name, t in found.items()}
        torch.testing.assert_close(found, want, rtol=0, atol=0)
