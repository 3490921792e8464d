"""Tests the adapters of other projects' kernels with stand-ins that have the same signatures and layouts.

The real kernels need a GPU. These tests cover our side: layouts, order of arguments, conversion of gradients.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.layer import foreign, peers
from benchmarks.shared import agreement, shapes

SHAPE = shapes.Shape("s", 48, 16, 8, 4, 2)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "_needs_cuda", lambda tensor, what: None)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def by_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute the experts in a loop: gate_up [E, 2F, D], down [E, D, F]."""
    return peers.build_loop(SHAPE, gate_up, down).run(x, weights, ids)


def check(build: Any) -> None:
    gate_up, down = shapes.expert_weights(SHAPE, torch.float32, torch.device("cpu"))
    batch = shapes.make_batch(SHAPE, "zipf", torch.float32, torch.device("cpu"))
    found = build(SHAPE, gate_up, down).step(batch)
    agreement.compare(found, agreement.reference(batch, gate_up, down), agreement.NAMES, torch.float32)


def test_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor):
            assert top_k_index.dtype == torch.int32 and top_k_weights.dtype == x.dtype
            return by_experts(x, top_k_weights, top_k_index.long(), gate_up_proj, down_proj)

    for name in ("liger_kernel", "liger_kernel.ops"):
        plant(monkeypatch, name)
    plant(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=LigerFusedMoEFunction)
    check(foreign.build_liger)


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"


def sonic(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: None, w2: Tensor,
    b2: None, E: int, stream_id: int, activation_type: ActivationType, is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, None]:  # fmt: skip
    """w1 (2F, D, E) with alternating gate and up rows unless ``concat_layout``, w2 (D, F, E); token indices ascend."""
    assert token_indices.dtype == expert_indices.dtype == torch.int32 and bool((token_indices.diff() >= 0).all())
    assert activation_type is ActivationType.SWIGLU and not is_inference_mode_enabled and E == SHAPE.E
    gate_up = w1.permute(2, 0, 1)
    if not concat_layout:
        gate_up = torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], 1)
    ids, weights = expert_indices.long().view(SHAPE.T, -1), router_scores.view(SHAPE.T, -1)
    return by_experts(x, weights, ids, gate_up, w2.permute(2, 0, 1)), None


def older_sonic(x, scores, tokens, experts, w1, b1, w2, b2, E, stream_id, activation_type, inference=False):
    return sonic(x, scores, tokens, experts, w1, b1, w2, b2, E, stream_id, activation_type, inference)


@pytest.mark.parametrize("version", [sonic, older_sonic])
def test_sonicmoe_in_both_layouts(version: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        cuda_stream = 0

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream)
    plant(monkeypatch, "sonicmoe")
    plant(monkeypatch, "sonicmoe.enums", ActivationType=ActivationType)
    plant(monkeypatch, "sonicmoe.functional", moe_general_routing_inputs=version)
    check(foreign.build_sonicmoe)


def test_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    class GroupedLinear(nn.Module):
        def __init__(self, num_gemms: int, in_features: int, out_features: int, bias: bool, **options: Any) -> None:
            super().__init__()
            self.num_gemms = num_gemms
            for index in range(num_gemms):
                weight = torch.empty(out_features, in_features, device=options["device"])
                self.register_parameter(f"weight{index}", nn.Parameter(weight))

        def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
            parts = inp.split(m_splits)
            return torch.cat([part @ getattr(self, f"weight{i}").T for i, part in enumerate(parts)])

    def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int, max_token_num: int, map_type: str):
        assert map_type == "index" and routing_map.dtype == torch.int32
        row_id_map = routing_map.reshape(-1).argsort(stable=True)
        return inp[row_id_map // routing_map.shape[1]], row_id_map

    def moe_unpermute(inp: Tensor, row_id_map: Tensor, merging_probs: Tensor, map_type: str) -> Tensor:
        assert map_type == "index" and merging_probs.dtype == torch.float32
        rows = torch.zeros_like(inp).index_copy(0, row_id_map, inp)
        return (rows.view(*merging_probs.shape, -1) * merging_probs[:, :, None]).sum(1)

    plant(monkeypatch, "transformer_engine")
    members = {"GroupedLinear": GroupedLinear, "moe_permute": moe_permute, "moe_unpermute": moe_unpermute}
    plant(monkeypatch, "transformer_engine.pytorch", **members)
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]
    check(foreign.build_transformer_engine)


def test_scattermoe(monkeypatch: pytest.MonkeyPatch) -> None:
    def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        experts, scattered = expert_idxs.flatten().sort()
        return experts, scattered, expert_idxs.flatten().bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(
        inputs: Tensor, expert_weights: Tensor, k: int, experts: Tensor, scattered: Tensor, ends: Tensor,
        expert_biases: None = None, gates: Tensor | None = None, grouped_in: bool = False, grouped_out: bool = False,
    ) -> Tensor:  # fmt: skip
        """Weights [E, in, out]; grouped rows are in expert order, others in the order of the tokens' choices."""
        rows = inputs if grouped_in else inputs[scattered // k]
        out = torch.einsum("ri,rio->ro", rows, expert_weights[experts])
        if not grouped_out:
            out = torch.zeros_like(out).index_copy(0, scattered, out)
        return out if gates is None else (gates[:, None] @ out.view(*gates.shape, -1)).squeeze(1)

    plant(monkeypatch, "scattermoe", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear)
    check(foreign.build_scattermoe)


@pytest.mark.peers
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_transformers(implementation: str) -> None:
    pytest.importorskip("transformers")
    check(lambda *given: foreign.build_transformers(*given, implementation=implementation))


def test_what_is_not_there_is_named() -> None:
    builders = foreign.find([])
    given = shapes.expert_weights(SHAPE, torch.float32, torch.device("cpu"))
    _, absent = peers.build_all({"sonicmoe": builders["sonicmoe"]}, SHAPE, *given)
    assert absent == {"sonicmoe": "not installed (sonicmoe)"}
