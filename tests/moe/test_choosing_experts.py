"""Checks what only routers with competing tokens promise.  T tokens, B sequences, S positions, D hidden, E experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig, ZeroComputationConfig
from equimoe.moe.config.routing import Select
from equimoe.moe.model import Decoder
from equimoe.moe.routing import Router
from equimoe.moe.routing.expert_choice import choose_tokens
from equimoe.moe.serve import Sampling, generate
from tests.helpers import oracle, small

B, S, D, E, K = 4, 6, 16, 8, 2


def router_of(select: Select, **settings: Any) -> RouterConfig:
    seen = {"sees_future": True} if select == "expert_choice" else {}
    return RouterConfig(select=select, normalize_weights=False, **seen, **settings)


def config_of(select: Select, **settings: Any) -> MoEConfig:
    return MoEConfig(D, 8, E, K, router_of(select, **settings), BalanceConfig(coefficient=0.0), init_std=0.4)


def decoder_of(select: Select) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "seq_len": S, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return Decoder(**sizes, moe=config_of(select)).double()


@pytest.mark.parametrize("cap", [None, 3])
@pytest.mark.parametrize("high", [0.0, 3.0, 1000.0])
def test_every_expert_gets_exactly_its_number(cap: int | None, high: float) -> None:
    """N K / E tokens, rounded down, whatever the logits: random ones, one expert that all want, equal tokens."""
    for equal in (False, True):
        for tokens in (40, 37):
            logits_TE = torch.randn(1 if equal else tokens, E).expand(tokens, E).clone()
            logits_TE[:, 3] += high
            router = Router(D, E, K, router_of("expert_choice", cap=cap), 0.4, "torch")
            routing = router.routing(logits_TE, None, 1, None)
            assert routing.counts_BE.tolist() == [[tokens * K // E] * E]
            assert (routing.ids_TK >= 0).sum(1).max() <= (cap or E)


def test_a_tight_cap_leaves_few_places_empty() -> None:
    """Every token has at most K experts, which is also the mean of those places that there are."""
    torch.manual_seed(0)
    scores_GNE = (torch.randn(1, 1024, 16) + torch.randn(16)).softmax(-1)
    chosen_GNE = choose_tokens(scores_GNE, torch.ones(1, 1024, dtype=torch.bool), torch.tensor([128]), K)
    assert chosen_GNE.sum(2).max() == K and chosen_GNE.sum(1).max() == 128
    assert int(chosen_GNE.sum()) > 0.98 * 1024 * K


def test_outputs_and_gradients_of_the_layer() -> None:
    """Y[l] = sum of P[i, j, l] G[i, j] X_e[i, j], as the paper writes it; in fp64."""
    torch.manual_seed(0)
    layer, x_TD = MoE(config_of("expert_choice")).double(), torch.randn(B * S, D, dtype=torch.float64)
    w_ED, up_EFD, down_EDF = (p.detach().clone().requires_grad_() for p in layer.parameters())
    want_x = x_TD.clone().requires_grad_()
    scores_TE = (want_x @ w_ED.T).softmax(1)
    weights_EC, tokens_EC = scores_TE.T.topk(B * S * K // E)
    taken_ECT = F.one_hot(tokens_EC, B * S).double()
    gate_ECF, up_ECF = (taken_ECT @ want_x @ up_EFD.mT).chunk(2, -1)
    out_ECD = (F.silu(gate_ECF) * up_ECF) @ down_EDF.mT
    want_y = torch.einsum("ect,ec,ecd->td", taken_ECT, weights_EC, out_ECD)
    want_y.square().sum().backward()
    got_x = x_TD.clone().requires_grad_()
    y = layer(got_x)
    y.square().sum().backward()
    pairs = [(y, want_y), (got_x.grad, want_x.grad)]
    pairs += [(p.grad, w.grad) for p, w in zip(layer.parameters(), (w_ED, up_EFD, down_EDF), strict=True)]
    assert max(oracle.relative_error(got, want) for got, want in pairs) < 1e-12


def past_changed(select: Select) -> float:
    """Return how much the logits at earlier positions change if the tokens at the last position do."""
    model = decoder_of(select)
    ids_BS = torch.randint(32, (B, S), generator=torch.Generator().manual_seed(1))
    other_BS = ids_BS.clone()
    other_BS[:, -1] = (ids_BS[:, -1] + 7) % 32
    with torch.no_grad():
        return float((model(ids_BS) - model(other_BS))[:, :-1].abs().max())


def test_a_future_token_changes_a_past_one_unless_experts_choose_by_position() -> None:
    """The leak of expert choice in a decoder. It is why a decoder refuses it unless it is asked for by name."""
    assert past_changed("expert_choice") > 1e-3
    assert past_changed("expert_choice_by_position") < 1e-12


def test_a_decoder_refuses_to_see_the_future() -> None:
    moe = replace(config_of("expert_choice"), router=replace(router_of("expert_choice"), sees_future=False))
    message = r"router.select='expert_choice': decides about a token by later tokens too, .*router.sees_future=True"
    with pytest.raises(ValueError, match=message):
        Decoder(vocab_size=32, seq_len=S, num_layers=1, num_heads=2, intermediate_size=24, moe=moe)
    with pytest.raises(ValueError, match=rf"moe.{message}"):
        small.changed(small.CONFIG, router=moe.router, balance=moe.balance)
    MoE(moe)(torch.randn(3, D))


def test_too_few_sequences_to_choose_among_are_refused_in_training() -> None:
    router, balance = router_of("expert_choice_by_position"), BalanceConfig(coefficient=0.0)
    with pytest.raises(ValueError, match="data.micro_batch=2: .* set it to at least 4"):
        small.changed(small.CONFIG, router=router, balance=balance, num_experts=8)
    small.changed(small.CONFIG, router=router, balance=balance)
    with pytest.raises(ValueError, match="data.micro_batch=2: .* set it to at least 4"):
        small.changed(small.CONFIG, router=router, balance=balance, zero_computation=ZeroComputationConfig())


@pytest.mark.parametrize("select", ["expert_choice", "expert_choice_by_position"])
def test_few_tokens_have_their_best_experts(select: Select) -> None:
    """A single token, as in generation, has K experts, and not none or all."""
    layer = MoE(config_of(select)).eval()
    x = torch.randn(3, 1, D)
    routing = layer.router(x.flatten(0, 1), None, 3)
    scores_TE = (x.flatten(0, 1) @ layer.router.weight.T).softmax(1)
    assert torch.equal(routing.ids_TK[:, :K], scores_TE.topk(K).indices) and bool((routing.ids_TK[:, K:] == -1).all())


def test_generation_equals_the_whole_text_by_position() -> None:
    """A text alone is routed like its tokens one by one, because one sequence is too few for the experts to choose."""
    model = decoder_of("expert_choice_by_position")
    found = generate(model, [[3, 5]], Sampling(max_tokens=4, temperature=0))[0]
    text = [3, 5]
    with torch.no_grad():
        for _ in range(4):
            text.append(int(model.eval()(torch.tensor([text]))[0, -1].argmax()))
    assert [3, 5, *found] == text


def test_scores_of_one_token_do_not_depend_on_padding() -> None:
    """Masked tokens take no place of an expert, wherever they are."""
    layer = MoE(config_of("expert_choice")).double()
    x_TD = torch.randn(24, D, dtype=torch.float64)
    padded_TD: Tensor = torch.cat((torch.full((5, D), 9.0, dtype=torch.float64), x_TD))
    mask_T = torch.arange(29) >= 5
    torch.testing.assert_close(layer(padded_TD, mask_T)[5:], layer(x_TD))
