"""Parallel layers and models on GPUs: where tensors are, and the only places where the host waits.

One rank of several that do not exist: torch's fake process group moves nothing, and fake tensors have no values, so
every size that the host reads is the same number.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from equimoe.launch.env import pretended
from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoE, MoEConfig
from equimoe.moe.config import AttentionConfig
from equimoe.moe.engines import DataParallel
from equimoe.moe.model import Decoder
from equimoe.moe.parallel import Mesh, ParallelConfig, build_mesh, parallelize, share_of
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda, real_tensors

pytestmark = needs_fake_cuda

TOKENS, RANKS = 64, 4
#: the dropless exchange must know how many rows come from each rank
SPLITS = "moe/collectives/counts.py:splits"
#: ranks may have different numbers of tokens, and those of one expert must agree on them
SIZES = "moe/collectives/counts.py:exchange_sizes"

#: name -> dispatch, capacity, degrees, and all that the host waits for in a forward and backward of one layer
DISPATCHERS: dict[str, tuple[DispatchConfig, CapacityConfig | None, dict[str, int], list[str]]] = {
    "local": (DispatchConfig(), None, {"ep": 1}, []),
    "all_to_all": (DispatchConfig(), None, {"ep": 4}, [SPLITS]),
    "all_to_all, bf16 wire": (DispatchConfig(wire="bf16"), None, {"ep": 4}, [SPLITS]),
    "all_to_all, fp8 wire": (DispatchConfig(wire="fp8"), None, {"ep": 4}, [SPLITS]),
    "all_to_all, capacity": (DispatchConfig(), CapacityConfig(), {"ep": 4}, [SPLITS]),
    "all_to_all, padded": (DispatchConfig(), CapacityConfig(pad=True), {"ep": 4}, []),
    "overlapped": (DispatchConfig("overlapped", chunks=2), None, {"ep": 4}, [SPLITS]),
    "overlapped, padded": (DispatchConfig("overlapped", chunks=2), CapacityConfig(pad=True), {"ep": 4}, []),
    "hierarchical": (DispatchConfig("hierarchical", node_size=2), None, {"ep": 4}, [SPLITS, SPLITS]),
    "all_gather": (DispatchConfig("all_gather"), None, {"ep": 4}, [SIZES]),
    "all_gather, equal": (DispatchConfig("all_gather", equal_tokens=True), None, {"ep": 4}, []),
    "local, split width": (DispatchConfig(), None, {"ep": 1, "etp": 4}, [SIZES]),
    "local, split width, equal": (DispatchConfig(equal_tokens=True), None, {"ep": 1, "etp": 4}, []),
    "capacity of all ranks": (DispatchConfig(), CapacityConfig(scope="global"), {"ep": 1}, [SIZES]),
}


def mesh_of(**degrees: Any) -> Mesh:
    with real_tensors():
        return build_mesh(ParallelConfig(**degrees), "cuda", warm_up=False)


def watched(layer: torch.nn.Module, x: torch.Tensor) -> Watch:
    with Watch(reads=TOKENS) as watch, torch.autocast("cuda", torch.bfloat16):
        for _ in range(2):  # the first pass sums the layers' counts one by one, later ones all together
            watch.waits.clear()
            layer(x).float().square().sum().backward()
    return watch


def summary(watch: Watch) -> dict[str, list[str]]:
    return {"waits": watch.waits, "copies": watch.copies, "mixed": watch.mixed}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dispatchers_wait_for_their_sizes_alone(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")

    def one(dispatch: DispatchConfig, capacity: CapacityConfig | None, degrees: dict[str, int]) -> dict[str, Any]:
        config = MoEConfig(
            hidden_size=32,
            intermediate_size=48,
            num_experts=16,
            top_k=8,  # enough rows for any sizes that the host reads
            backend=backend,  # type: ignore[arg-type]
            shared_intermediate_size=16,
            dispatch=dispatch,
            capacity=capacity,
            balance=BalanceConfig(bias_update_rate=0.001),
        )
        with torch.device("cuda"):
            layer, x = MoE(config), torch.randn(TOKENS, 32, requires_grad=True)
        parallelize(layer, mesh_of(**degrees))
        return summary(watched(layer, x))

    def body() -> dict[str, dict[str, Any]]:
        found = {}
        for name, (*arguments, _) in DISPATCHERS.items():
            with pretended(0, RANKS, RANKS):
                found[name] = one(*arguments)
        return found

    expected = {name: {"waits": waits, "copies": [], "mixed": []} for name, (*_, waits) in DISPATCHERS.items()}
    assert on_fake_cuda(body) == expected
