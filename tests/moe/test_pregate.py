"""One router for all layers: the same experts everywhere, no look ahead, and it learns from a dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, MoEConfig, RouterConfig
from equimoe.moe.interop.domains import distillation_loss
from equimoe.moe.model import Decoder
from equimoe.moe.model.pregate import PreGated
from equimoe.moe.observe.routers import watch_routers

B, S, V, E = 3, 10, 20, 6


def pregated(coefficient: float = 0.01, moe_every: int = 1, **router: Any) -> PreGated:
    torch.manual_seed(0)
    moe = MoEConfig(16, 8, E, 2, RouterConfig(**router), BalanceConfig(coefficient=coefficient), init_std=0.3)
    sizes = {"vocab_size": V, "seq_len": S, "num_layers": 3, "num_heads": 2, "intermediate_size": 8}
    return PreGated(Decoder(**sizes, moe=moe, moe_every=moe_every), num_heads=2, seq_len=S)


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(seed))


def test_all_layers_of_a_token_use_the_same_experts() -> None:
    model, ids = pregated(), tokens()
    with watch_routers(model.decoder.moe_layers(), lambda router, x, routing, _: routing.ids_TK.clone()) as seen:
        model(ids)
    assert len(seen) == 3
    for (of_layer,) in seen:
        assert torch.equal(of_layer.view(B, S, 2), model.choices(ids))
    assert len(model.choices(ids).flatten().unique()) > 2


def test_a_choice_does_not_depend_on_later_tokens() -> None:
    model, ids = pregated(), tokens()
    before, output = model.logits(ids), model(ids)
    for t in range(1, S):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 7) % V
        after = model.logits(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model(changed)[:, :t], output[:, :t], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(after[:, t], before[:, t])


def test_the_gate_is_trained_by_all_layers_and_leaves_the_embedding_alone() -> None:
    model, ids = pregated(coefficient=0.0), tokens()
    model(ids).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in model.gate.parameters())
    names = [name for name, _ in model.named_parameters()]
    assert sum("router" in name for name in names) == 0 and "gate.head.weight" in names  # one router, not one per layer
    model.zero_grad()
    model.logits(ids).sum().backward()
    assert model.decoder.embedding.weight.grad is None


def test_the_balance_loss_reaches_the_gate() -> None:
    gradients = []
    for coefficient in (0.0, 1.0):
        model = pregated(coefficient)
        model(tokens()).sum().backward()
        gradients.append(model.gate.head.weight.grad)
    assert not torch.allclose(gradients[0], gradients[1])


def test_it_learns_the_domains() -> None:
    """Two domains use different halves of the vocabulary; the others of six never occur."""
    model, halves = pregated(), torch.arange(B) % 2
    optimizer = torch.optim.Adam(model.gate.parameters(), lr=1e-2)
    for step in range(40):
        ids = tokens(step) // 2 + V // 2 * halves[:, None]
        targets = torch.nn.functional.one_hot(halves, E)[:, None].expand(B, S, E).float()
        optimizer.zero_grad()
        distillation_loss(model.logits(ids), halves, targets).backward()
        optimizer.step()
    chosen = model.choices(tokens(99) // 2 + V // 2 * halves[:, None])
    assert bool((chosen[..., 0] == halves[:, None]).all())


def test_a_dense_decoder_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder: needs MoE layers"):
        pregated(moe_every=0)


@pytest.mark.parametrize(
    ("router", "message"), [({"gate": "cosine"}, "gate='cosine'"), ({"jitter": 0.1}, "jitter=0.1")]
)
def test_a_router_that_the_gate_replaces_is_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"router.{message}: has no effect with a gate before the decoder"):
        pregated(**router)
