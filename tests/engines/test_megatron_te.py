"""The layer in Megatron-Core's specs with TransformerEngine, whose modules are stood in for on a CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="needs Megatron-Core, which `make engines` installs")
pytestmark = pytest.mark.engines

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.transformer.spec_utils import build_module  # noqa: E402

from equimoe.moe.engines.megatron import moe_layer_spec  # noqa: E402
from tests.helpers.fork import run_ranks  # noqa: E402
from tests.helpers.megatron_models import Run, assert_same_training, config_of, megatron, run  # noqa: E402
from tests.helpers.megatron_te import stand_ins  # noqa: E402
from tests.helpers.megatron_tensors import joined  # noqa: E402

SPLIT = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}


def with_engine(rank: int, world: int, **how: Any) -> Run:
    with stand_ins():
        return run(rank, world, engine=True, **how)


@pytest.mark.parametrize(("world", "how"), [(1, {}), (2, SPLIT)], ids=["one rank", "tp, ep, sequence parallel"])
def test_training_is_that_of_the_specs_without_it(world: int, how: dict[str, Any]) -> None:
    """Norms are fused into the attention's linear layer; the norm before the experts is a module of its own."""
    wanted = run_ranks(run, 1)
    initial = joined([wanted[0].parts["initial"]])
    assert_same_training(run_ranks(partial(with_engine, initial=initial, **how), world), wanted)


@pytest.mark.parametrize("engine", [True, False])
def test_a_spec_whose_norm_is_a_part_of_the_dense_mlp_is_refused(engine: bool) -> None:
    def body(rank: int, world: int) -> None:
        with megatron(), stand_ins():
            config = config_of(num_layers=1)
            layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()  # without num_experts
            layer.submodules.mlp = moe_layer_spec(config)
            if not engine:  # a layer of the user's own may do without a norm
                layer.submodules.self_attention = gpt_layer_specs.get_gpt_layer_local_spec().submodules.self_attention
                build_module(layer, config=config)
                return
            with pytest.raises(
                ValueError, match="^pre_mlp_layernorm: this layer has no norm .*; pass num_experts to get_"
            ):
                build_module(layer, config=config)

    run_ranks(body, 1)


def test_other_experts_are_refused() -> None:
    """A spec of Megatron's with this package's layer as its module."""

    def body(rank: int, world: int) -> None:
        with megatron(), stand_ins():
            config = config_of(num_layers=1)
            spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(num_experts=config.num_moe_experts)
            spec.submodules.mlp.module = moe_layer_spec(config).module
            with pytest.raises(
                ValueError, match=r"^submodules.experts: the experts are this package's own; use moe_laye"
            ):
                build_module(spec.submodules.mlp, config=config)

    run_ranks(body, 1)
