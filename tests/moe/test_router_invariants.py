"""Checks what the papers of each router promise, and what is refused.  T tokens, D hidden, E experts, K top-k."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig, Step
from equimoe.moe.balance.losses import sent_tokens
from equimoe.moe.config import ExtraLossConfig
from equimoe.moe.config.routing import Select
from equimoe.moe.placement import Owners
from equimoe.moe.routing import Router
from equimoe.moe.routing.assign import auction, balanced, sinkhorn
from equimoe.moe.routing.gates import GATES
from equimoe.moe.routing.selections import SELECTIONS
from equimoe.moe.types import Decision, Routing
from tests.helpers import oracle
from tests.helpers.router_rows import DEVICE, NO_LOSS, ROWS, D, E, Row, config_of, optimum, router_of, tasks

T = 21


def test_every_rank_of_moge_gets_equally_many_rows() -> None:
    """For logits that put all mass into one group, and others; with top_k, one rank would get them all."""
    router = router_of(Row(RouterConfig(select="each_group", groups=4)), 8)
    for seed, high in enumerate((0.0, 3.0, 80.0)):
        torch.manual_seed(seed)
        logits_TE = torch.randn(57, E, device=DEVICE)
        logits_TE[:, 3:6] += high
        ids_TK = router.routing(logits_TE, None, 1, None).ids_TK
        assert torch.bincount((ids_TK // 3).flatten(), minlength=4).tolist() == [57 * 2] * 4
        assert all(len(set(row)) == 8 for row in ids_TK.tolist())


def test_moge_balances_within_a_group() -> None:
    """If one expert of a group takes all of its tokens, the balance loss lowers this expert's logit."""
    layer = MoE(config_of(ROWS["MoGE"], 3, balance=BalanceConfig(coefficient=1.0)))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[4, 0] = 5.0
    x_TD = torch.randn(30, D).abs()
    (layer(x_TD) * 0).sum().backward()
    assert layer.router.weight.grad[4, 0] > 0 > layer.router.weight.grad[5, 0]


RANDOM = [n for n, row in ROWS.items() if row.codes is None and (row.config.jitter or row.config.gate == "noisy")]


@pytest.mark.parametrize("name", RANDOM)
def test_noise_is_for_training_only_and_follows_the_seed(name: str) -> None:
    row = ROWS[name]
    router, x_TD = router_of(row, 3), torch.randn(T, D, device=DEVICE)

    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return router(x_TD).weights_TK

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    state = torch.get_rng_state()
    router.probabilities(x_TD)  # observers call it in training
    assert torch.equal(torch.get_rng_state(), state)
    router.eval()
    assert torch.equal(weights(1), weights(2))
    plain = Router(D, E, 3, replace(row.config, jitter=0.0, gate="linear"), 0.4, "torch").to(DEVICE)
    plain.load_state_dict({"weight": router.weight})
    assert torch.equal(weights(1), plain(x_TD).weights_TK)


@pytest.mark.parametrize("name", ["noisy top-k", "X-MoE", "task", "MoE++, first layer"])
def test_a_wholly_random_step_ignores_the_hidden_states(name: str) -> None:
    """``random_steps`` acts on every gate: experts are drawn, in training only."""
    router = router_of(replace(ROWS[name], config=replace(ROWS[name].config, random_steps=4)), 3)

    def chosen(randomness: float) -> list[list[int]]:
        router.randomness, found = randomness, []
        for seed in (1, 2):
            x_TD = torch.randn(T, D, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed))
            torch.manual_seed(0)
            found.append(router(x_TD, None, 1, None, tasks(T)).ids_TK.flatten().tolist())
        return found

    router.begin_step(0)
    assert router.randomness == 1.0
    drawn, learned = chosen(1.0), chosen(0.0)
    assert drawn[0] == drawn[1] and learned[0] != learned[1]
    router.eval()
    assert chosen(1.0) == chosen(0.0)


def test_the_size_of_the_noise_is_trained() -> None:
    """softplus(0) = log 2 at first, so that there is noise at once."""
    torch.manual_seed(0)
    layer = MoE(config_of(ROWS["noisy top-k"], 3))
    assert not layer.router.noise_weight.any()
    layer(torch.randn(T, D)).square().sum().backward()
    assert layer.router.noise_weight.grad.norm() > 0


@pytest.mark.parametrize("scaled", ["hidden states", "experts"])
def test_lengths_do_not_matter_to_xmoe(scaled: str) -> None:
    router, x_TD = router_of(ROWS["X-MoE"], 3).double(), torch.randn(T, D, dtype=torch.float64, device=DEVICE)
    assert router.cosines(x_TD).abs().max() <= 1 + 1e-12
    before = router(x_TD)
    with torch.no_grad():
        if scaled == "experts":
            router.weight[5].mul_(10)
        else:
            x_TD[3] *= 10
    after = router(x_TD)
    assert torch.equal(after.ids_TK, before.ids_TK)
    torch.testing.assert_close(after.weights_TK, before.weights_TK, rtol=1e-12, atol=0)


def test_the_temperature_of_xmoe_is_learned_but_not_by_the_balance_loss() -> None:
    layer = MoE(config_of(ROWS["X-MoE"], 3, balance=BalanceConfig(coefficient=1.0)))
    assert float(layer.router.log_scale.detach().exp()) == pytest.approx(1 / 0.3)
    (layer(torch.randn(T, D)) * 0).sum().backward()
    assert float(layer.router.log_scale.grad) == 0 < layer.router.projection.grad.norm()
    layer(torch.randn(T, D)).square().sum().backward()
    assert float(layer.router.log_scale.grad) != 0
    with torch.no_grad():
        layer.router.log_scale.fill_(99.0)
    assert layer.router.logits(torch.randn(T, D)).abs().max() <= 100.01


def test_sinkhorn_evens_the_columns() -> None:
    """The matrix's rows sum to 1 and its columns to T/E, so its best experts have nearly equal loads."""
    for scale in (0.1, 1.0, 10.0):
        torch.manual_seed(0)
        logits_TE = torch.randn(500, E, device=DEVICE).double() * scale
        logits_TE[:, 0] += 3 * scale
        ids_TK = sinkhorn(logits_TE, logits_TE, None, 1, 1)
        load_E = torch.bincount(ids_TK[:, 0], minlength=E)
        assert load_E.max() < 1.5 * 500 / E
        assert torch.bincount(logits_TE.argmax(1), minlength=E).max() > 10 * 500 / E


def test_sinkhorn_needs_no_similar_logits() -> None:
    """Experts whose logits differ by more than exp can express get equal loads; masked tokens may hold anything."""
    torch.manual_seed(0)
    logits_TE, valid_T = torch.randn(4096, 4), torch.arange(4096) % 8 != 1
    far_TE = torch.where(valid_T[:, None], logits_TE + torch.tensor([1e5, -1e5, 0.0, 0.0]), float("nan"))
    for mask_T, given_TE in ((None, far_TE.nan_to_num()[valid_T]), (valid_T, far_TE)):
        ids_TK = sinkhorn(given_TE, given_TE, mask_T, 1, 1)
        load_E = torch.bincount(ids_TK[... if mask_T is None else mask_T].flatten(), minlength=4)
        assert load_E.max() < 1.1 * load_E.double().mean()
        assert int(load_E.sum()) == int(valid_T.sum())


def test_the_auction_finds_the_best_assignment() -> None:
    """To 1/1000 of the range of the scores; with scipy, also for many tokens."""
    for seed, (tokens, experts) in enumerate([(1, 3), (6, 3), (7, 3), (9, 2), (12, 4), (5, 5), (11, 4)] * 4):
        torch.manual_seed(seed)
        scores_TE = torch.randn(tokens, experts, dtype=torch.float64)
        if seed % 2:
            scores_TE = scores_TE.round() + 3 * (torch.arange(experts) == 1)  # ties, and an expert that all want
        found = auction(scores_TE)
        want = torch.tensor(optimum(scores_TE, torch.ones(tokens, dtype=torch.bool), 1))[:, 0]
        lacks = float(scores_TE.gather(1, want[:, None]).sum() - scores_TE.gather(1, found[:, None]).sum())
        assert -1e-9 <= lacks <= 1e-3 * float(scores_TE.max() - scores_TE.min())
        assert torch.bincount(found, minlength=experts).max() <= -(-tokens // experts)


def test_tokens_that_are_not_finite_do_not_stop_the_auction() -> None:
    logits_TE = torch.randn(9, 3, device=DEVICE)
    logits_TE[2], logits_TE[4, 1] = float("nan"), float("inf")
    found_T = balanced(logits_TE, logits_TE, None, 1)[:, 0]
    keep = [t for t in range(9) if t not in (2, 4)]
    assert torch.equal(found_T[keep], balanced(logits_TE[keep], logits_TE[keep], None, 1)[:, 0])


@pytest.mark.skipif(not find_spec("scipy"), reason="needs scipy")
def test_the_auction_equals_scipy() -> None:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    scores_TE = torch.randn(240, E, dtype=torch.float64)
    rows, columns = linear_sum_assignment(scores_TE.repeat_interleave(20, dim=1).numpy(), maximize=True)
    want, found = scores_TE[rows, columns // 20].sum(), scores_TE.gather(1, auction(scores_TE)[:, None]).sum()
    assert abs(float(want - found)) < 1e-3 * float(scores_TE.max() - scores_TE.min())


@pytest.mark.parametrize("select", ["sinkhorn", "base"])
def test_a_balanced_choice_is_for_training_and_does_not_weigh(select: Any) -> None:
    """In evaluation, a token's experts depend on itself; in both, its weights are its scores."""
    config = RouterConfig("sigmoid", normalize_weights=False, select=select)
    router = router_of(Row(config, layer={"balance": BalanceConfig(coefficient=0.0)}), 1).double()
    x_TD = torch.randn(36, D, dtype=torch.float64, device=DEVICE)
    scores_TE = (x_TD @ router.weight.T).sigmoid()
    training = router(x_TD)
    assert torch.bincount(training.ids_TK[:, 0], minlength=E).max() < 6
    router.eval()
    evaluation = router(x_TD)
    assert torch.equal(evaluation.ids_TK[:, 0], scores_TE.argmax(1))
    for routing in (training, evaluation):
        torch.testing.assert_close(routing.weights_TK, scores_TE.gather(1, routing.ids_TK))
    assert not torch.equal(training.ids_TK, evaluation.ids_TK)


@pytest.mark.parametrize("wrong", [{}, {"extra": ExtraLossConfig(micro=0.1)}, {"bias_update_rate": 0.001}])
def test_a_second_way_to_balance_is_refused(wrong: dict[str, Any]) -> None:
    balance = BalanceConfig(**{"coefficient": 0.0} | wrong) if wrong else BalanceConfig()
    field = next(iter(wrong), "coefficient").replace("extra", "extra.micro")
    with pytest.raises(ValueError, match=rf"balance.{field}=.*: router.select='sinkhorn' balances the load itself"):
        MoEConfig(D, 8, E, 2, RouterConfig(select="sinkhorn"), balance)


def test_gshard_keeps_second_choices_in_proportion_to_their_weights() -> None:
    """All first choices, the share 2 g of the second ones in training, and all in evaluation."""
    router = Router(D, E, 2, RouterConfig(random_second=True), 0.3, "torch").to(DEVICE)
    routing = router(torch.randn(20000, D, device=DEVICE))
    second_T = routing.weights_TK[:, 1]
    assert bool((routing.ids_TK[:, 0] >= 0).all())
    for low in (0.1, 0.2, 0.3, 0.4):
        near_T = (second_T - low - 0.05).abs() < 0.05
        kept, want = (routing.ids_TK[near_T, 1] >= 0).double().mean(), 2 * second_T[near_T].mean()
        assert abs(kept - want) < 0.04
    assert int(routing.counts_BE.sum()) == 40000  # the loss counts choices before any are dropped
    assert bool((router.eval()(torch.randn(500, D, device=DEVICE)).ids_TK >= 0).all())


def test_top_p_needs_more_experts_for_even_scores() -> None:
    router = Router(4, 4, 3, RouterConfig(select="top_p", top_p=0.6), 0.3, "torch")
    scores_TE = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.35, 0.3, 0.2, 0.15], [0.25, 0.25, 0.25, 0.25]])
    routing = router.routing(scores_TE.log(), None, 1, None)
    assert routing.ids_TK.tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]
    torch.testing.assert_close(routing.weights_TK[1], torch.tensor([0.35, 0.3, 0.0]) / 0.65)
    assert routing.counts_BE.tolist() == [[3, 2, 1, 0]]


def test_the_entropy_loss_is_the_mean_over_the_step_and_lowers_the_entropy() -> None:
    """HMoE prints the loss with the opposite sign, which would raise it."""
    router = RouterConfig(select="top_p", entropy_loss=0.3)
    balance = BalanceConfig(coefficient=0.0, estimator="exact")
    layer = MoE(MoEConfig(D, 8, E, 4, router, balance, init_std=0.4)).double()
    parts = [torch.randn(n, D, dtype=torch.float64) for n in (5, 16)]

    def entropy() -> Tensor:
        probs_TE = (torch.cat(parts) @ layer.router.weight.T).softmax(1)
        return -(probs_TE * probs_TE.log()).sum(1).mean()

    layer.zero_grad()
    step = Step.of(layer)
    step.begin(tokens=21)
    for number, part in enumerate(parts):
        with step.micro_batch(number):
            y = layer(part)
        (y * 0).sum().backward()
    assert layer.stats.losses["entropy"] > 0
    step.end()
    want = torch.autograd.grad(0.3 * entropy(), layer.router.weight)[0]
    assert oracle.relative_error(layer.router.weight.grad, want) < 1e-12
    before = entropy()
    with torch.no_grad():
        layer.router.weight -= layer.router.weight.grad
    assert entropy() < before


def test_a_choice_that_a_token_does_not_need_is_sent_nowhere() -> None:
    chosen_TK = torch.tensor([[0, -1], [3, 2], [2, -1]])
    routing = Routing(Decision(chosen_TK, chosen_TK), *[torch.zeros(1)] * 5)
    owners = Owners.consecutive(4, 2)
    assert sent_tokens(routing, None, owners).tolist() == [1, 2]
    assert sent_tokens(routing, torch.tensor([True, True, False]), owners).tolist() == [1, 1]


def test_every_selection_and_gate_has_a_row() -> None:
    selects, gates = ({getattr(row.config, name) for row in ROWS.values()} for name in ("select", "gate"))
    assert selects | {"top_k"} == set(SELECTIONS) == set(get_args(Select))
    assert gates | {"hash", "slots"} == set(GATES) == set(get_args(get_type_hints(RouterConfig)["gate"]))


MISTAKES: dict[str, tuple[dict[str, Any], int, str]] = {
    "choices per group": ({"select": "each_group", "groups": 4}, 3, "router.groups=4: must divide top_k=3"),
    "jitter": ({"jitter": 1.0}, 3, "router.jitter=1.0: must be at least 0 and less than 1"),
    "temperature": ({"gate": "cosine", "temperature": 0.0}, 3, "router.temperature=0.0: must be positive"),
    "projection": ({"gate": "cosine", "projection": 0}, 3, "router.projection=0: must be an integer of at least 1"),
    "half a projection": ({"gate": "cosine", "projection": 2.0}, 3, "router.projection=2.0: must be an integer"),
    "unused projection": ({"projection": 4}, 3, "router.projection=4: has no effect with router.gate='linear'"),
    "choices of BASE": ({"select": "base"}, 2, "top_k=2: must be 1 for router.select='base'"),
    "groups of Sinkhorn": ({"select": "sinkhorn", "groups": 2}, 2, "router.groups=2: has no effect"),
    "three choices": (
        {"random_second": True},
        3,
        "router.random_second=True: is a rule for two choices; set top_k to 2",
    ),
    "top-p": ({"select": "top_p", "top_p": 0.0}, 2, "router.top_p=0.0: must be above 0 and at most 1"),
    "top-p of sigmoids": (
        {"select": "top_p", "score": "sigmoid"},
        2,
        "router.score='sigmoid': router.select='top_p' sums",
    ),
    "weights of expert choice": (
        {"select": "expert_choice"},
        2,
        "router.normalize_weights=True: router.select='expert_choice' weights experts by their scores; set it to False",
    ),
    "cap": (
        {"select": "expert_choice", "normalize_weights": False, "cap": 1},
        2,
        "router.cap=1: must be from top_k=2, the experts of a token on average, to the 12 experts",
    ),
    "cap without expert choice": ({"cap": 4}, 2, "router.cap=4: has no effect with router.select='top_k'"),
    "nothing to allow": ({"sees_future": True}, 2, "router.sees_future=True: has no effect with"),
    "tasks": ({"gate": "task"}, 2, "router.tasks=None: router.gate='task' needs it"),
    "number of tasks": ({"gate": "task", "tasks": 0}, 2, "router.tasks=0: must be an integer of at least 1"),
    "tasks of another gate": ({"tasks": 3}, 2, "router.tasks=3: has no effect with router.gate='linear'"),
    "scores of hash": ({"gate": "hash", "score": "sigmoid"}, 2, "router.score='sigmoid': has no effect with .*'hash'"),
    "entropy": ({"entropy_loss": -1.0}, 2, "router.entropy_loss=-1.0: must not be negative"),
    "kept groups": (
        {"select": "each_group", "groups": 4, "kept_groups": 2},
        4,
        "router.kept_groups=2: has no effect with router.select",
    ),
}


@pytest.mark.parametrize(("fields", "k", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(fields: dict[str, Any], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(D, 8, E, k, RouterConfig(**fields), NO_LOSS)


def test_pieces_without_a_kernel_are_named_at_construction() -> None:
    pieces = {"group_worth='best'": {"groups": 2, "group_worth": "best", "kept_groups": 1}}
    pieces |= {f"select='{name}'": {"select": name} for name in ("each_group", "top_p")}
    pieces["select='expert_choice'"] = {"select": "expert_choice", "normalize_weights": False}
    pieces |= {"gate='hash'": {"gate": "hash", "vocabulary": 9}, "gate='slots'": {"gate": "slots"}}
    pieces |= {"random_second=True": {"random_second": True}}
    for piece, fields in pieces.items():
        k = 1 if "slots" in piece else 2
        config = MoEConfig(D, 8, E, k, RouterConfig(**fields), NO_LOSS, backend="triton")  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match=rf"backend='triton': router\.{piece} has no Triton kernel") as found:
            MoE(config)
        assert len(found) == 1
