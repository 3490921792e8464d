"""Settings of Megatron-Core's MoE layer have the effect that they have in its own layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import Run, assert_same_training, run  # noqa: E402
from tests.helpers.megatron_tensors import joined  # noqa: E402

TP, EP, ETP = "tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size"
#: with one expert-tensor-parallel rank, Megatron-Core would not sum the gradients of its experts over these ranks
SEQUENCE = {TP: 2, ETP: 2, "sequence_parallel": True}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = SIGMOID | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.1}
RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
MLPS = RECOMPUTE | {"recompute_modules": ["mlp"]}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def both(world: int, router: str, **how: Any) -> tuple[list[Run], list[Run]]:
    """Train with our layer, and with Megatron-Core's own. Without a GPU, it runs with its all-gather only."""
    theirs = partial(run, estimator="rolling", router=None, moe_token_dispatcher_type="allgather", **how)
    [first] = run_ranks(partial(theirs, steps=0, **{TP: 1, EP: 1, ETP: 1, "sequence_parallel": False}), 1)
    initial = joined([first.parts["initial"]])

    def body(rank: int, world: int) -> tuple[Run, Run]:
        ours = run(rank, world, initial, estimator="rolling", router=router, **how)
        return ours, theirs(rank, world, initial)

    found = run_ranks(body, world)
    return [ours for ours, _ in found], [theirs for _, theirs in found]


def assert_same(ours: list[Run], theirs: list[Run]) -> None:
    assert_same_training(ours, theirs)
    for got, wanted in zip(ours[0].logged, theirs[0].logged, strict=True):
        assert got.keys() == wanted.keys()
        for loss, value in wanted.items():
            torch.testing.assert_close(got[loss], value, rtol=1e-5, atol=1e-6, msg=loss)


MEGATRON: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {"moe_z_loss_coeff": 0.1}),
    "ep": (2, {EP: 2, "moe_router_load_balancing_type": "seq_aux_loss"}),
    "sequence parallel": (2, SEQUENCE),
    "bias, recompute": (2, BIAS | RECOMPUTE),
    "global, recompute": (2, RECOMPUTE),
    "bias, recompute MLPs": (2, BIAS | MLPS),
    "bias, recompute all": (2, BIAS | FULL),
    "groups, bias": (1, BIAS | {"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    "sinkhorn": (1, {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}),
    "capacity": (1, {"moe_expert_capacity_factor": 1.0}),
    "per token": (1, {"calculate_per_token_loss": True, "alone": True}),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_megatrons_router_gives_the_numbers_of_megatrons_layer(name: str) -> None:
    world, how = MEGATRON[name]
    assert_same(*both(world, "megatron", **how))


OURS: dict[str, tuple[int, dict[str, Any]]] = {
    "top 1": (1, {"moe_router_topk": 1}),
    "squared ReLU": (1, {"activation_func": None, "gated_linear_unit": False}),
    "GELU": (1, {"activation_func": torch.nn.functional.gelu}),
    "shared experts": (1, {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}),
    "bias, recompute": (2, BIAS | RECOMPUTE | {"moe_router_load_balancing_type": "none"}),
    "bias, recompute all": (2, BIAS | FULL | {"moe_router_load_balancing_type": "none"}),
    "bias, sequence parallel": (2, BIAS | SEQUENCE | {"moe_router_load_balancing_type": "none"}),
    "bias, groups": (
        1,
        BIAS
        | {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_topk_scaling_factor": 2.5}
        | {"moe_router_load_balancing_type": "none"},
    ),
    "capacity": (1, {"moe_expert_capacity_factor": 0.8}),
    "capacity, padded": (1, {"moe_expert_capacity_factor": 0.8, "moe_pad_expert_input_to_capacity": True}),
    "micro-batch loss, ep": (2, {EP: 2, "moe_router_load_balancing_type": "aux_loss"}),
    "sequence loss, sequence parallel": (
        2,
        SEQUENCE | {"moe_router_load_balancing_type": "seq_aux_loss"},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_router_gives_the_numbers_of_megatrons_layer(name: str) -> None:
    world, how = OURS[name]
    if "activation_func" in how and how["activation_func"] is None:
        from megatron.core.activations import squared_relu

        how = how | {"activation_func": squared_relu}
    assert_same(*both(world, "equimoe", **how))
