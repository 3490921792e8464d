"""The router equals Megatron-Core's TopKRouter bit for bit; the exceptions of its losses are measured.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402

from equimoe.moe.engines.megatron import MoELayer  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import Run, config_of, logged, megatron, run  # noqa: E402
from tests.helpers.megatron_tensors import Whole, joined  # noqa: E402

T, D = 67, 32
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = SIGMOID | {"moe_router_enable_expert_bias": True}
POST = {"moe_router_pre_softmax": False}


def groups(k: int, groups: int, kept: int) -> dict[str, Any]:
    return {"moe_router_topk": k, "moe_router_num_groups": groups, "moe_router_group_topk": kept}


SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax after top-k": POST,
    "softmax, scaled": {"moe_router_topk_scaling_factor": 2.5},
    "softmax after top-k, scaled": POST | {"moe_router_topk_scaling_factor": 2.5},
    "sigmoid": SIGMOID,
    "sigmoid, scaled": SIGMOID | {"moe_router_topk_scaling_factor": 1.5},
    "sigmoid, bias": BIAS,
    "top 1": {"moe_router_topk": 1},
    "sigmoid, top 1": SIGMOID | {"moe_router_topk": 1},
    "sigmoid, bias, top 1": BIAS | {"moe_router_topk": 1},
    "all experts": {"moe_router_topk": 16},
    "groups, 2 each": groups(4, 4, 2),
    "groups, 1 each": groups(2, 4, 2),
    "groups, 3 each": groups(6, 4, 2),
    "groups, 4 each": groups(4, 4, 1),
    "groups, uneven": groups(5, 4, 2),
    "groups, uneven, 1 each": groups(3, 4, 2),
    "groups, all kept": groups(4, 2, 2),
    "groups, softmax after top-k": POST | groups(4, 4, 2),
    "groups, 1 each, softmax after top-k": POST | groups(2, 4, 2),
    "groups, sigmoid": SIGMOID | groups(4, 4, 2),
    "groups, sigmoid, bias": BIAS | groups(4, 4, 2) | {"moe_router_topk_scaling_factor": 2.5},
    "groups, 3 each, sigmoid, bias": BIAS | groups(6, 4, 2),
}


def scattered(router: Any, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return gate weights and choices as Megatron-Core does, [T, E]."""
    routing = router(x_TD)
    zeros_TE, ids_TK = torch.zeros(len(x_TD), 16), routing.decision.chosen_TK
    return zeros_TE.scatter(1, ids_TK, routing.weights_TK), zeros_TE.scatter(1, ids_TK, 1).bool()


def outputs(how: dict[str, Any], rank: int, world: int) -> list[list[dict[str, Tensor]]]:
    """Return what our router and Megatron-Core's give for the same weights and tokens, in fp32 and bf16."""
    with megatron():
        return [_outputs(how, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _outputs(how: dict[str, Any], dtype: torch.dtype) -> list[dict[str, Tensor]]:
    config = config_of(
        **{"num_moe_experts": 16, "hidden_size": D, "moe_router_load_balancing_type": "none"} | how,
        moe_router_dtype="fp32",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    theirs = TopKRouter(config, get_default_pg_collection())
    ours: Any = MoELayer(config).router
    x_TD, push_TE = torch.randn(T, D, dtype=dtype), torch.randn(T, 16)
    found = []
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        if theirs.expert_bias is not None:
            theirs.expert_bias.normal_(0.0, 0.1)
            ours.expert_bias.copy_(theirs.expert_bias)
    for router in (ours, theirs):
        x_TD = x_TD.detach().requires_grad_()
        probs_TE, map_TE = scattered(router, x_TD) if router is ours else router(x_TD[:, None])
        (probs_TE * push_TE).sum().backward()
        found.append({"probs": probs_TE, "map": map_TE, "x": x_TD.grad, "weight": router.weight.grad})
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_numbers_of_megatrons_router(name: str) -> None:
    """Choices and weights are the same bits; gradients are computed in another order."""
    [of_dtypes] = run_ranks(partial(outputs, SETTINGS[name]), 1)
    for (ours, theirs), limit in zip(of_dtypes, (1e-6, 5e-3), strict=True):
        for part in ("probs", "map"):
            assert torch.equal(ours[part], theirs[part]), part
        for part in ("x", "weight"):
            apart, want = (ours[part] - theirs[part]).double().norm(), theirs[part].double().norm()
            assert apart <= limit * want, (part, float(apart / want))


# ---- auxiliary losses

SEQUENCE_PER_TOKEN = {"moe_router_load_balancing_type": "seq_aux_loss", "calculate_per_token_loss": True}
LOSSES: dict[str, dict[str, Any]] = {
    "none": {"moe_router_load_balancing_type": "none"},
    "micro-batch": {"moe_router_load_balancing_type": "aux_loss"},
    "sequence": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global": {"moe_router_load_balancing_type": "global_aux_loss"},
    "two": {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.3]},
    "three": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    },
    "one of two is off": {
        "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.0, 0.3],
    },
    "z": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.1},
    "global and z": {"moe_z_loss_coeff": 0.1},
    "global, sigmoid": SIGMOID,
    "global, softmax after top-k": POST,
    "global, top 1": {"moe_router_topk": 1},
    "micro-batch, padding": {"moe_router_load_balancing_type": "aux_loss", "padded": True},
    "z, padding": {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.1, "padded": True},
    "micro-batch, per token": {"moe_router_load_balancing_type": "aux_loss", "calculate_per_token_loss": True},
    "sequence, per token": SEQUENCE_PER_TOKEN | {"micro_batches": 4},
    "global and z, per token": {"moe_z_loss_coeff": 0.1, "calculate_per_token_loss": True},
    "micro-batch, padding, per token": {
        "moe_router_load_balancing_type": "aux_loss",
        "padded": True,
        "calculate_per_token_loss": True,
    },
}


def trained(rank: int = 0, world: int = 1, initial: Whole | None = None, **how: Any) -> Run:
    """Take one step with MoE layers alone. Without a GPU, Megatron-Core's layer runs with its all-gather only."""
    how = {"estimator": "rolling", "alone": True, "steps": 1, "moe_token_dispatcher_type": "allgather"} | how
    return run(rank, world, initial, **how)


def start(**how: Any) -> Whole:
    """Return initial weights, from within one rank."""
    return joined([trained(**how, steps=0).parts["initial"]])


def assert_gradients(found: Whole, wanted: Whole) -> None:
    """Assert that tensors are equal up to 1e-5 of their largest element."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert value.any()
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=1e-5 * float(value.abs().max()), msg=partial("{}: {}".format, key)
        )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_and_log_of_auxiliary_losses_are_megatrons(name: str) -> None:
    how = LOSSES[name]

    def body(rank: int, world: int) -> list[Run]:
        initial = start(**how)
        return [trained(initial=initial, router=router, **how) for router in ("equimoe", None)]

    [(ours, theirs)] = run_ranks(body, 1)
    assert_gradients(*(joined([r.parts["gradients"]]) for r in (ours, theirs)))
    assert ours.logged[0].keys() == theirs.logged[0].keys()
    for loss, value in theirs.logged[0].items():
        torch.testing.assert_close(ours.logged[0][loss], value, rtol=1e-6, atol=1e-6, msg=loss)


# ---- where Megatron-Core's numbers differ


def of_loss(rank: int, world: int, initial: Whole, **how: Any) -> Whole:
    """Return the part of the routers' gradients that comes from the auxiliary loss, from within a rank."""
    with_loss, without = (
        joined([trained(rank, world, initial, **(how | {"moe_aux_loss_coeff": c})).parts["gradients"]])
        for c in (20.0, 0.0)
    )
    return {key: value - without[key] for key, value in with_loss.items() if key.endswith("router.weight")}


def twice(gradients: Whole) -> Whole:
    return {key: value * 2 for key, value in gradients.items()}


def test_megatrons_global_aux_loss_has_half_the_gradient_on_two_data_parallel_ranks() -> None:
    def alone(rank: int, world: int) -> tuple[Whole, Whole]:
        initial = start()
        return initial, of_loss(rank, world, initial)

    def together(rank: int, world: int) -> list[Whole]:
        return [of_loss(rank, world, initial, router=router) for router in ("equimoe", None, "megatron")]

    [(initial, whole_batch)] = run_ranks(alone, 1)
    ours, theirs, by_name = run_ranks(together, 2)[0]
    assert_gradients(ours, whole_batch)
    assert_gradients(twice(theirs), whole_batch)
    assert_gradients(by_name, theirs)


def test_megatrons_sequence_loss_per_token_is_divided_by_the_sequences_of_a_micro_batch() -> None:
    how = SEQUENCE_PER_TOKEN

    def body(rank: int, world: int) -> list[Whole]:
        initial = start(**how)
        return [
            of_loss(rank, world, initial, **how, micro_batches=number, router=router)
            for number, router in ((4, "equimoe"), (2, "equimoe"), (2, None))
        ]

    [(of_each, ours, theirs)] = run_ranks(body, 1)
    assert_gradients(ours, of_each)
    assert_gradients(twice(theirs), of_each)


def counted_loss(how: dict[str, Any], rank: int, world: int) -> tuple[float, float, float, float]:
    """Return the logged loss of our layer and Megatron-Core's router, and those of actual and of plain choices."""
    with megatron():
        config = config_of(
            **{"num_moe_experts": 16, "hidden_size": D, "moe_router_load_balancing_type": "aux_loss"} | how,
            num_layers=1,
        )
        layer, theirs = MoELayer(config, layer_number=1), TopKRouter(config, get_default_pg_collection())
        theirs.set_layer_number(1)
        with torch.no_grad():
            theirs.weight.copy_(layer.router.weight)
            if config.moe_router_enable_expert_bias:
                theirs.expert_bias.normal_()
                layer.router.expert_bias.copy_(theirs.expert_bias)
        x_TD = torch.randn(T, 1, D)
        layer(x_TD)[0].sum().backward()
        ours = float(logged()["load_balancing_loss"][0])
        map_TE = theirs(x_TD)[1]
        scores_TE = layer.router.probabilities(x_TD[:, 0])
        plain_TE = torch.zeros_like(map_TE).scatter(1, scores_TE.topk(config.moe_router_topk).indices, True)
        assert not torch.equal(map_TE, plain_TE)
        actual, plain = (
            float((16 * chosen.sum(0) / (T * config.moe_router_topk) * scores_TE.mean(0)).sum())
            for chosen in (map_TE, plain_TE)
        )
        return ours, float(logged()["load_balancing_loss"][0]), actual, plain


@pytest.mark.parametrize("how", [BIAS, groups(4, 4, 2), BIAS | groups(4, 4, 2)], ids=["bias", "groups", "both"])
def test_losses_count_actual_choices_and_megatrons_those_without_bias_and_groups(how: dict[str, Any]) -> None:
    [(ours, theirs, actual, plain)] = run_ranks(partial(counted_loss, how), 1)
    assert ours == pytest.approx(actual, rel=1e-5)
    assert theirs == pytest.approx(plain, rel=1e-5)
    assert actual != pytest.approx(plain, rel=1e-3)
