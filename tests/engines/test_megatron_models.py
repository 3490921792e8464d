"""GPTModels of Megatron-Core on several ranks equal one process: losses, gradients, weights and Adam's moments."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import Run, assert_same_training, run  # noqa: E402
from tests.helpers.megatron_tensors import Whole, joined  # noqa: E402

_known: dict[str, list[Run]] = {}


def one_process(**how: Any) -> list[Run]:
    """Train with a micro-batch for each of the step's four sequences."""
    if str(how) not in _known:
        _known[str(how)] = run_ranks(partial(run, **({"micro_batches": 4} | how)), 1)
    return _known[str(how)]


def initial(**how: Any) -> Whole:
    return joined([r.parts["initial"] for r in one_process(**how)])


TP, CP, PP, VPP, EP, ETP = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "dp": (2, {}),
    "ep": (2, {EP: 2}),
    "ep, distributed optimizer": (2, {EP: 2, "distributed_optimizer": True}),
    "tp": (2, {TP: 2}),
    "tp, sequence parallel": (2, {TP: 2, "sequence_parallel": True}),
    "tp and ep folded": (2, {TP: 2, EP: 2}),
    "etp": (2, {ETP: 2}),
    "tp and etp": (2, {TP: 2, ETP: 2, "sequence_parallel": True}),
    "pp": (2, {PP: 2, "micro_batches": 4}),
    "pp, virtual stages": (2, {PP: 2, VPP: 2, "num_layers": 4, "micro_batches": 4}),
    "pp and dp": (4, {PP: 2}),
    "tp and ep": (4, {TP: 2, EP: 2, "sequence_parallel": True, "distributed_optimizer": True}),
    "tp without sequence parallelism, ep": (4, {TP: 2, EP: 4, "micro_batches": 1}),
    "recompute, tp and pp": (
        4,
        {TP: 2, PP: 2, "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "recompute the layer": (2, {TP: 2, "recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "recompute the layer, pp": (2, {PP: 2, "recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "recompute MLPs, pp": (2, {PP: 2, "recompute_granularity": "selective", "recompute_modules": ["mlp"]}),
    "recompute MLPs and the layer": (
        2,
        {TP: 2, "recompute_granularity": "selective", "recompute_modules": ["mlp", "moe"]},
    ),
    "recompute the norm": (2, {EP: 2, "recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"]}),
    "recompute the activation": (
        2,
        {EP: 2, "moe_grouped_gemm": True, "recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_one_process(case: str) -> None:
    world, how = CASES[case]
    model = {"num_layers": how["num_layers"]} if "num_layers" in how else {}
    runs = run_ranks(partial(run, initial=initial(**model), **how), world)
    # of gradients, a rank's part of a distributed optimizer holds only its own
    kinds = ("weights", "exp_avg", "exp_avg_sq") if how.get("distributed_optimizer") else None
    assert_same_training(runs, one_process(**model), kinds)


SHARED = {"moe_shared_expert_intermediate_size": 16}
GATED = SHARED | {"moe_shared_expert_gate": True}
#: settings of the model, and of the ranks
SHARED_CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SHARED, {TP: 2}),
    (SHARED, {TP: 2, "sequence_parallel": True}),
    (GATED, {EP: 2}),
    (GATED, {TP: 2, "sequence_parallel": True}),
    (GATED, {TP: 2, "recompute_granularity": "selective", "recompute_modules": ["moe", "shared_experts"]}),
]


@pytest.mark.parametrize(("model", "how"), SHARED_CASES)
def test_shared_experts_equal_one_process(model: dict[str, Any], how: dict[str, Any]) -> None:
    runs = run_ranks(partial(run, initial=initial(**model), **model, **how), 2)
    assert_same_training(runs, one_process(**model))


ALONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "context parallel": ({}, {CP: 2}),
    "context parallel, ep": ({}, {CP: 2, EP: 2}),
    "sequence loss, context parallel": ({"moe_router_load_balancing_type": "seq_aux_loss"}, {CP: 2}),
    "padding, tp": ({"padded": True}, {TP: 2, "micro_batches": 4}),
    "padding, context parallel": ({"padded": True}, {CP: 2, "micro_batches": 4}),
    "padding, per token, two per micro-batch": (
        {"padded": True, "calculate_per_token_loss": True},
        {EP: 2, "micro_batches": 1},
    ),
    "padding, per token, tp": ({"padded": True, "calculate_per_token_loss": True}, {TP: 2, "micro_batches": 2}),
    "padding, per token, context parallel": (
        {"padded": True, "calculate_per_token_loss": True},
        {CP: 2, "micro_batches": 2},
    ),
    "z-loss, per token": ({"moe_z_loss_coeff": 0.1, "padded": True, "calculate_per_token_loss": True}, {EP: 2}),
    "three losses": (
        {
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
            "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
            "moe_z_loss_coeff": 0.1,
        },
        {EP: 2},
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_layers_alone_equal_one_process(case: str) -> None:
    model, how = ALONE[case]
    model = model | {"alone": True}
    runs = run_ranks(partial(run, initial=initial(**model), **(model | how)), 2)
    assert_same_training(runs, one_process(**model))


@pytest.mark.parametrize("estimator", ["rolling", "carry"])
@pytest.mark.parametrize("how", [{EP: 2}, {TP: 2}], ids=["ep", "tp"])
def test_estimates_equal_one_process(estimator: str, how: dict[str, Any]) -> None:
    """With as many micro-batches, each of which has the same sequences."""
    same = {"estimator": estimator, "micro_batches": 2}
    runs = run_ranks(partial(run, initial=initial(), **same, **how), 2)
    assert_same_training(runs, one_process(**same))
