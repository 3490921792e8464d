"""Checks SoftMoE against its definition.  B sequences, S tokens, D hidden, E experts, X slots of all experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoE, MoEConfig, RouterConfig, recompute
from equimoe.moe.collectives import world_axis
from equimoe.moe.model import Decoder
from equimoe.moe.placement import Placement
from equimoe.moe.serve import Sampling, generate
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.router_rows import NO_LOSS

B, S, D, E = 3, 7, 10, 6
SLOTS = RouterConfig(gate="slots", sees_future=True)


def layer_of(slots: int = 2, **settings: Any) -> MoE:
    torch.manual_seed(0)
    router = replace(SLOTS, slots=slots)
    return MoE(MoEConfig(D, 4, E, 1, router, NO_LOSS, init_std=0.4, **settings)).double()


def softmax(values: list[Tensor]) -> list[Tensor]:
    total = sum(value.exp() for value in values)
    return [value.exp() / total for value in values]


def defined(layer: MoE, x_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return the output, computed slot by slot and token by token, and the weights that it depends on."""
    phi_XD, up_EFD, down_EDF = weights = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    rows = []
    for x_SD, mask_S in zip(x_BSD, mask_BS, strict=True):
        tokens = [t for t in range(len(x_SD)) if mask_S[t]]
        results = []
        for slot, phi_D in enumerate(phi_XD):
            shares = softmax([x_SD[t] @ phi_D for t in tokens])
            mixed_D = sum((share * x_SD[t] for share, t in zip(shares, tokens, strict=True)), torch.zeros(D).double())
            e = slot // layer.config.router.slots
            gate, up = (up_EFD[e] @ mixed_D).chunk(2)
            results.append(down_EDF[e] @ (F.silu(gate) * up))
        for t, x_D in enumerate(x_SD):
            shares = softmax([x_D @ phi_D for phi_D in phi_XD])
            y_D = sum(share * result for share, result in zip(shares, results, strict=True))
            rows.append(y_D if t in tokens else x_D * 0)
    return torch.stack(rows).view(x_BSD.shape), list(weights)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("again", [False, True], ids=["", "recomputed"])
def test_outputs_and_gradients_are_as_defined(slots: int, masked: bool, again: bool) -> None:
    """In fp64, also for a sequence without a valid token."""
    layer, x_BSD = layer_of(slots), torch.randn(B, S, D, dtype=torch.float64)
    mask_BS = torch.arange(S) < torch.tensor([[5], [0], [7]]) if masked else torch.ones(B, S, dtype=torch.bool)
    want_x, got_x = (x_BSD.clone().requires_grad_() for _ in range(2))
    want_y, weights = defined(layer, want_x, mask_BS)
    (want_y**2).sum().backward()
    args = (got_x, mask_BS) if masked else (got_x,)
    y = recompute(layer, *args) if again else layer(*args)
    (y**2).sum().backward()
    pairs = [(y, want_y), (got_x.grad, want_x.grad)]
    pairs += [(p.grad, w.grad) for p, w in zip(layer.parameters(), weights, strict=True)]
    assert max(oracle.relative_error(got, want) for got, want in pairs) < 1e-12
    assert layer.stats.counts.tolist() == [slots * (2 if masked else 3)] * E and int(layer.stats.dropped_choices) == 0
    assert int(layer.stats.tokens) == int(mask_BS.sum())


def test_rows_and_columns_sum_to_one() -> None:
    """A slot is a mean of tokens, and an output a mean of results; each sequence has its own slots."""
    router, x_TD = layer_of().router, 30 * torch.randn(B * S, D, dtype=torch.float64)
    mask_BS = torch.arange(S) < torch.tensor([[5], [2], [7]])
    dispatch_BSX, combine_BSX = router(x_TD, mask_BS.flatten(), B).mixing
    assert dispatch_BSX.shape == combine_BSX.shape == (B, S, 2 * E)
    torch.testing.assert_close(dispatch_BSX.sum(1), torch.ones(B, 2 * E).double())
    torch.testing.assert_close(combine_BSX.sum(2), mask_BS.double())
    assert not dispatch_BSX[~mask_BS].any() and bool((dispatch_BSX >= 0).all())
    probs_TE = router.probabilities(x_TD)
    torch.testing.assert_close(probs_TE.sum(1), torch.ones(B * S).double())


def test_tokens_may_come_in_any_order() -> None:
    layer, x_BSD = layer_of(), torch.randn(B, S, D, dtype=torch.float64)
    order_S = torch.randperm(S)
    torch.testing.assert_close(layer(x_BSD)[:, order_S], layer(x_BSD[:, order_S]))


def test_every_token_depends_on_every_other_of_its_sequence() -> None:
    """Also an earlier one on a later one, which is why a decoder refuses it; but not on other sequences."""
    layer, x_BSD = layer_of(), torch.randn(B, S, D, dtype=torch.float64)
    changed_BSD = x_BSD.clone()
    changed_BSD[1, -1] += 1
    change_BS = (layer(changed_BSD) - layer(x_BSD)).abs().amax(2)
    assert bool((change_BS[1] > 1e-6).all()) and not change_BS[[0, 2]].any()


def decoder() -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "seq_len": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return Decoder(**sizes, moe=MoEConfig(16, 8, 4, 1, SLOTS, NO_LOSS, init_std=0.4))


def test_a_decoder_that_asks_for_it_generates() -> None:
    """A single token is the mixture of itself, so its output is a mean of all experts."""
    found = generate(decoder(), [[3, 5], [4]], Sampling(max_tokens=4, temperature=0))
    assert [len(found[n]) for n in (0, 1)] == [4, 4]


@pytest.mark.parametrize("wire", ["all_to_all", "all_gather", "hierarchical"])
@pytest.mark.parametrize("ep", [2, 4])
def test_experts_on_several_ranks_equal_one_process(wire: Any, ep: int) -> None:
    """Ranks have different numbers of sequences, of different lengths; every rank gets a fixed share of the slots."""
    torch.manual_seed(1)
    inputs = [torch.randn(rank % 3, 3 + rank, D, dtype=torch.float64) for rank in range(1, ep + 1)]

    def script(rank: int, world: int) -> list[Tensor]:
        layer = layer_of(dispatch=DispatchConfig(wire, node_size=2 if wire == "hierarchical" else None))
        layer = MoE(replace(layer.config, num_experts=4)).double()
        with torch.no_grad():
            for weight in layer.parameters():
                weight.copy_(torch.linspace(-1, 1, weight.numel()).sin().view(weight.shape))
        whole = [p.detach().clone() for p in layer.experts.parameters()]
        if world > 1:
            for (name, _), weight in zip(list(layer.experts.named_parameters()), whole, strict=True):
                setattr(layer.experts, name, torch.nn.Parameter(weight.chunk(world)[rank].clone()))
            layer.place(Placement(tokens=world_axis(), ep=world_axis()))
        found, gradients = [], []
        for x in inputs[rank : rank + 1] if world > 1 else inputs:
            x = x.clone().requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            found += [y.detach(), x.grad]
        gradients = [p.grad for p in layer.experts.parameters()]
        return [*found, layer.router.weight.grad, *gradients]

    (*want, want_phi, want_up, want_down), results = run_ranks(script, 1)[0], run_ranks(script, ep)
    for rank, (y, x_grad, _, up, down) in enumerate(results):
        pairs = [(y, want[2 * rank]), (x_grad, want[2 * rank + 1])]
        pairs += [(up, want_up.chunk(ep)[rank]), (down, want_down.chunk(ep)[rank])]
        assert max(oracle.relative_error(got, part) for got, part in pairs) < 1e-12
    assert oracle.relative_error(sum(result[2] for result in results), want_phi) < 1e-12


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"router.gate='slots': decides about a token by later tokens too, .* another"):
        moe = MoEConfig(16, 8, 4, 1, RouterConfig(gate="slots"), NO_LOSS)
        Decoder(vocab_size=32, seq_len=8, num_layers=1, num_heads=2, intermediate_size=24, moe=moe)
    for wrong, message in (
        ({"top_k": 2}, "top_k=2: must be 1 for router.gate='slots'"),
        ({"balance": BalanceConfig()}, "balance.coefficient=0.01: router.gate='slots' gives every expert equally many"),
        ({"capacity": CapacityConfig()}, "capacity=.*: the router gives every expert equally many rows"),
        ({"balance": BalanceConfig("sequence", 0.0)}, "balance.scope='sequence': router.gate='slots' makes no choices"),
    ):
        given: dict[str, Any] = {"top_k": 1, "num_experts": E, "balance": NO_LOSS}
        with pytest.raises(ValueError, match=message):
            MoEConfig(D, 4, router=SLOTS, **given | wrong)
    with pytest.raises(ValueError, match="router.slots=0: must be an integer of at least 1"):
        replace(SLOTS, slots=0)
    with pytest.raises(ValueError, match="router.weight_scale=2.0: has no effect with router.gate='slots'"):
        replace(SLOTS, weight_scale=2.0)
    with pytest.raises(ValueError, match="router.slots=2: has no effect with router.gate='linear'"):
        RouterConfig(slots=2)

    def script(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match="router.gate='slots': mixes the tokens of whole sequences"):
            layer_of().place(Placement(tokens=world_axis(), sequence=world_axis()))

    run_ranks(script, 2)
