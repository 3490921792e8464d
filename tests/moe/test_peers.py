"""Checks that the same weights in another library's block give the same output and gradients."""

from __future__ import annotations

import pytest
import torch

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig
from tests.helpers import oracle

transformers = pytest.importorskip("transformers", reason="needs transformers, which `make bench` installs")
pytestmark = pytest.mark.peers

SHAPE = {"hidden_size": 32, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


def block(name: str) -> torch.nn.Module:
    if name == "Qwen3Moe":
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = transformers.Qwen3MoeConfig(**SHAPE, num_experts=8, norm_topk_prob=True)
        kind = Qwen3MoeSparseMoeBlock
    else:
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = transformers.MixtralConfig(
            hidden_size=32, intermediate_size=24, num_experts_per_tok=2, num_local_experts=8
        )
        kind = MixtralSparseMoeBlock
    config._experts_implementation = "eager"
    module = kind(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_hugging_face_weights_load_as_they_are(name: str) -> None:
    theirs = block(name)
    router = RouterConfig(softmax_after_topk=name == "Mixtral")
    ours = MoE(MoEConfig(32, 24, 8, 2, router=router, balance=BalanceConfig(coefficient=0.0)))
    weights = {key.replace("gate.weight", "router.weight"): value for key, value in theirs.state_dict().items()}
    assert ours.load_state_dict(weights) is not None
    x = torch.randn(3, 11, 32)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = theirs(two)
    out = out[0] if isinstance(out, tuple) else out
    ours(one).square().sum().backward()
    out.square().sum().backward()
    assert oracle.relative_error(ours(x), out) < 1e-5
    assert oracle.relative_error(one.grad, two.grad) < 1e-5
    for name, p in theirs.named_parameters():
        mine = ours.get_parameter(name.replace("gate.weight", "router.weight"))
        assert oracle.relative_error(mine.grad, p.grad) < 1e-5, name
