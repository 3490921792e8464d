"""Checks that a user's own mixed precision does not silently round the router's weight."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from equimoe.moe import MoE, MoEConfig
from tests.helpers.fork import run_ranks

CONFIG = MoEConfig(hidden_size=16, intermediate_size=24, num_experts=8, top_k=2)
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = MoE(CONFIG), MoE(CONFIG)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def said(model: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Return the warnings of two training forwards."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.randn(4, 16, dtype=dtype)).float().sum().backward()
    return [str(w.message) for w in found if "router" in str(w.message)]


def test_a_policy_that_rounds_routers_is_named_with_its_remedy() -> None:
    def body(rank: int, world: int) -> tuple[list[str], list[str]]:
        rounded, exact = Model(), Model()
        fully_shard(rounded, mp_policy=BF16)
        for layer in (exact.first, exact.second):
            fully_shard(layer.router, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        fully_shard(exact, mp_policy=BF16)
        return said(rounded), said(exact)

    for rounded, exact in run_ranks(body, 2):
        assert len(rounded) == 2, "once for each router"
        assert "a copy in torch.bfloat16" in rounded[0] and "fully_shard(layer.router, mp_policy=" in rounded[0]
        assert exact == []


def converted_later(model: Model) -> Model:
    model(torch.randn(4, 16)).sum().backward()
    return model.bfloat16()


def loaded(model: Model) -> Model:
    model.load_state_dict({name: t.bfloat16() for name, t in model.state_dict().items()}, assign=True)
    return model


CONVERSIONS: dict[str, tuple[Callable[[Model], nn.Module], torch.dtype]] = {
    "fp32": (lambda model: model, torch.float32),
    "bfloat16()": (Model.bfloat16, torch.bfloat16),
    "bfloat16() after a forward": (converted_later, torch.bfloat16),
    "half()": (Model.half, torch.float16),
    "double()": (Model.double, torch.float64),
    "loaded by assignment": (loaded, torch.bfloat16),
    "a copy": (lambda model: copy.deepcopy(model.bfloat16()), torch.bfloat16),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_model_that_was_converted_is_taken_as_it_is(name: str) -> None:
    convert, dtype = CONVERSIONS[name]
    assert said(convert(Model()), dtype) == []


def test_a_model_that_is_bf16_all_over_may_be_sharded() -> None:
    def body(rank: int, world: int) -> list[str]:
        model = Model().bfloat16()
        fully_shard(model, mp_policy=BF16)
        return said(model, torch.bfloat16)

    assert run_ranks(body, 2) == [[], []]
