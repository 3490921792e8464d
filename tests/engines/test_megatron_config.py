"""Settings that the layer does not have, and process groups that do not fit: one line with field, value and remedy."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from megatron.core import parallel_state  # noqa: E402
from megatron.core.transformer.enums import CudaGraphScope  # noqa: E402

from equimoe.moe.engines.megatron import MoELayer, moe_config, moe_layer_spec  # noqa: E402
from equimoe.moe.engines.megatron.config import _NAMES, _ONLY, _ONLY_OUR_ROUTER  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import config_of, megatron  # noqa: E402

MEGATRON = " here, or use router='megatron'"
LOSSES = "use aux_loss, seq_aux_loss, global_aux_loss or none; router='megatron' also has sinkhorn"
#: fields, and the error
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"add_bias_linear": True}, "add_bias_linear=True: the experts have no biases; set it to False"),
    ({"moe_apply_probs_on_input": True}, "moe_apply_probs_on_input=True: gate weights are applied to the experts'"),
    ({"moe_latent_size": 8}, "moe_latent_size=8: there are no latent projections; leave it out"),
    ({"moe_token_dropping": True}, "moe_token_dropping=True: Megatron-Core does not implement it; use moe_expert_cap"),
    (
        {"moe_shared_expert_overlap": True},
        "moe_shared_expert_overlap=True: shared experts are computed after the exchange",
    ),
    ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm=True: layers cannot be split"),
    ({"delay_wgrad_compute": True}, "delay_wgrad_compute=True: weight gradients are computed in the backward; set it"),
    ({"fp8": "e4m3"}, "fp8='e4m3': the experts compute in the dtype of their weights; leave it out"),
    ({"fp4": "e2m1"}, "fp4='e2m1': the experts compute in the dtype of their weights; leave it out"),
    ({"glu_linear_offset": 1.0}, "glu_linear_offset=1.0: the experts' GLU has no offset; set it to 0"),
    ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value=7.0: the experts' activation is not clamped"),
    ({"use_te_activation_func": True}, "use_te_activation_func=True: the activation is fused into the experts; set"),
    (
        {"moe_router_dtype": "fp64"},
        f"moe_router_dtype='fp64': this router always computes in fp32; use 'fp32'{MEGATRON}",
    ),
    ({"moe_input_jitter_eps": 0.1}, f"moe_input_jitter_eps=0.1: this router adds no noise; leave it out{MEGATRON}"),
    ({"moe_router_force_load_balancing": True}, "moe_router_force_load_balancing=True: this router does not draw"),
    (
        {"moe_enable_routing_replay": True},
        "moe_enable_routing_replay=True: this router cannot replay; set it to False",
    ),
    ({"activation_func_fp8_input_store": True}, "activation_func_fp8_input_store=True: activations are kept in"),
    ({"quant_recipe": "x"}, "quant_recipe='x': the experts compute in the dtype of their weights; leave it out"),
    ({"use_kitchen": True}, "use_kitchen=True: the experts compute in the dtype of their weights; set it to False"),
    ({"num_moe_experts": None}, "num_moe_experts=None: an MoE layer needs experts; set it, or use a dense layer spec"),
    ({"moe_router_topk": 5}, "moe_router_topk=5: must be at most num_moe_experts=4"),
    ({"moe_router_topk": 0}, "moe_router_topk=0: must be an integer of at least 1"),
    ({"moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size=0: must be an integer of at least 1"),
    ({"moe_router_load_balancing_type": "sinkhorn"}, f"moe_router_load_balancing_type='sinkhorn': {LOSSES}"),
    (
        {"moe_router_load_balancing_type": ["aux"], "moe_aux_loss_coeff": [0.1]},
        "moe_router_load_balancing_type='aux': ",
    ),
    ({"moe_aux_loss_coeff": -1.0}, "moe_aux_loss_coeff=-1.0: must not be negative"),
    ({"moe_z_loss_coeff": -1.0}, "moe_z_loss_coeff=-1.0: must not be negative"),
    (
        {"moe_router_num_groups": 3, "moe_router_group_topk": 2},
        "moe_router_num_groups=3: must divide num_moe_experts=4",
    ),
    (
        {"moe_router_num_groups": 4, "moe_router_group_topk": 1},
        "moe_router_group_topk=1: the number of experts in the kept groups, 1, is less than moe_router_topk=2; keep",
    ),
    ({"moe_router_score_function": "tanh"}, "moe_router_score_function='tanh': use one of softmax, sigmoid"),
    ({"moe_token_dispatcher_type": "x"}, "moe_token_dispatcher_type='x': use one of allgather, alltoall, flex"),
    (
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
        "moe_flex_dispatcher_backend='hybridep': only 'deepep' is available; use it, or moe_token_dispatcher_type=",
    ),
    ({"activation_func": torch.nn.functional.relu}, "activation_func=relu: use one of silu, gelu, squared_relu"),
    ({"moe_expert_capacity_factor": 0.0}, "moe_expert_capacity_factor=0.0: must be positive; 1.25 is usual"),
    (
        {"moe_expert_capacity_factor": 1.0, "moe_token_drop_policy": "last"},
        "moe_token_drop_policy='last': this layer would keep the tokens of the first sequences, and Megatron-Core",
    ),
    (
        {
            "moe_expert_capacity_factor": 1.0,
            "moe_pad_expert_input_to_capacity": True,
            "moe_token_dispatcher_type": "allgather",
        },
        "moe_token_dispatcher_type='allgather': it does not pad, and moe_pad_expert_input_to_capacity=True; use 'allto",
    ),
    (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_scope": [CudaGraphScope.attn, CudaGraphScope.moe_router]},
        "cuda_graph_scope=['attn', 'moe_router']: this layer cannot be captured; use ['attn']",
    ),
    (
        {"cuda_graph_impl": "local", "cuda_graph_scope": []},
        "cuda_graph_scope=[]: this layer cannot be captured; use ['attn']",
    ),
    (
        {"fine_grained_activation_offloading": True, "offload_modules": ["core_attn", "expert_fc1"]},
        "offload_modules=['core_attn', 'expert_fc1']: the experts offload nothing; leave out expert_fc1 and moe_act",
    ),
]


def with_fields(fields: dict[str, Any]) -> Any:
    """Set fields after TransformerConfig's own checks, some of which would stop them."""
    config = config_of()
    for name, value in fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    return config


def error_of(call: Any) -> str:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller compares the text)
        call()
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("fields", "text"), REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_setting_that_the_layer_does_not_have(fields: dict[str, Any], text: str) -> None:
    assert error_of(lambda: moe_config(with_fields(fields))).startswith(text)
    assert error_of(lambda: moe_layer_spec(with_fields(fields))).startswith(text)


def test_every_refusal_is_tested() -> None:
    tested = {name for fields, _ in REFUSED for name in fields}
    assert {name for name, *_ in (*_ONLY, *_ONLY_OUR_ROUTER)} <= tested
    for name in {*_NAMES.values()} - {"moe_router_topk_scaling_factor"}:
        assert name in tested


@pytest.mark.parametrize("name", [name for name, *_ in _ONLY_OUR_ROUTER])
def test_megatrons_router_has_its_settings(name: str) -> None:
    value = next(fields[name] for fields, _ in REFUSED if name in fields)
    moe_config(with_fields({name: value}), router="megatron")


def test_routers_and_estimators() -> None:
    config = config_of()
    wrong: Any = "exact "
    assert error_of(lambda: moe_config(config, wrong)) == "router='exact ': use one of equimoe, megatron"
    assert (
        error_of(lambda: moe_config(config, estimator=wrong))
        == "estimator='exact ': use one of rolling, carry, adaptive, exact"
    )
    assert error_of(lambda: moe_config(config, "megatron", "exact")) == (
        "estimator='exact': Megatron-Core's router has only 'rolling'; use router='equimoe'"
    )
    padded = with_fields({"moe_pad_expert_input_to_capacity": True})
    assert error_of(lambda: moe_config(padded, "megatron")).startswith(
        "moe_pad_expert_input_to_capacity=True: with rou"
    )


def test_settings_arrive() -> None:
    moe = moe_config(
        with_fields(
            {
                "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss", "none"],
                "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
                "moe_z_loss_coeff": 0.01,
                "moe_router_topk_scaling_factor": 2.5,
                "moe_expert_capacity_factor": 1.5,
                "moe_token_drop_policy": "probs",
                "moe_pad_expert_input_to_capacity": True,
            }
        ),
        estimator="carry",
    )
    assert (moe.balance.scope, moe.balance.coefficient, moe.balance.extra.sequence) == ("global", 0.2, 0.1)
    assert (moe.balance.estimator, moe.router.z_loss, moe.router.weight_scale) == ("carry", 0.01, 2.5)
    assert moe.capacity is not None
    assert (moe.capacity.factor, moe.capacity.drop, moe.capacity.pad) == (1.5, "probability", True)
    assert moe_config(with_fields({"moe_router_load_balancing_type": "none"})).balance.coefficient == 0


TP, CP, EP, ETP = (
    "tensor_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def refused(groups: dict[str, Any], fields: dict[str, Any], rank: int, world: int) -> str:
    with megatron(**groups):
        return error_of(lambda: MoELayer(config_of(**(groups | fields))))


@pytest.mark.parametrize(
    ("groups", "fields", "text"),
    [
        *(
            ({}, {name: 2}, f"{name}=2: the process groups have 1; give TransformerConfig and ")
            for name in (TP, CP, EP, ETP)
        ),
        (
            {EP: 2},
            {EP: 1},
            f"{EP}=1: the process groups have 2; give TransformerConfig and initialize_model_parallel()",
        ),
        ({EP: 2}, {"num_moe_experts": 3}, f"{EP}=2: must divide num_moe_experts=3; change one of them"),
        ({ETP: 2}, {"moe_ffn_hidden_size": 25}, f"{ETP}=2: must divide moe_ffn_hidden_size=25; change one of them"),
    ],
)
def test_groups_that_do_not_fit(groups: dict[str, Any], fields: dict[str, Any], text: str) -> None:
    for found in run_ranks(partial(refused, groups, fields), 2 if groups else 1):
        assert found.startswith(text)


def test_without_process_groups() -> None:
    assert not parallel_state.is_initialized()
    assert error_of(lambda: MoELayer(config_of())) == (
        "parallel_state: not initialised; call initialize_model_parallel() before building a model"
    )


def test_a_layer_in_parts() -> None:
    def body(rank: int, world: int) -> str:
        with megatron():
            layer = MoELayer(config_of())
            return error_of(lambda: layer(torch.randn(4, 1, 16), intermediate_tensors=()))

    assert run_ranks(body, 1) == ["intermediate_tensors: this layer cannot be captured in part; leave it out"]


def test_users_are_told_of_the_exact_gradient() -> None:
    def body(rank: int, world: int) -> list[str]:
        with megatron(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            MoELayer(config_of(), router="megatron")
            MoELayer(config_of(moe_router_load_balancing_type="aux_loss"))
            MoELayer(config_of())
            return [str(w.message) for w in caught if "global_aux_loss" in str(w.message)]

    for world in (1, 2):
        for found in run_ranks(body, world):
            assert len(found) == (1 if world == 2 else 0)
            assert all("divides it by the 2 data-parallel ranks" in text for text in found)


@pytest.mark.parametrize("name", ["attention_dropout", "hidden_dropout"])
def test_an_exact_estimate_needs_no_dropout(name: str) -> None:
    config = with_fields({name: 0.1, "moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1})
    text = error_of(lambda: moe_config(config, estimator="exact"))
    assert text.startswith(f"{name}=0.1: with estimator='exact', the counting pass would draw another dropout")
    moe_config(config, estimator="rolling")
