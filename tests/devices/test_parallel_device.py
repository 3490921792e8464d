"""Checks parallel layers and models on GPUs: the device of every tensor, and the only places where the host waits.

Each test is one rank of several that do not exist. torch's fake process group moves no data, and fake tensors have no
values, so every size that the host reads is the same number.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoE, MoEConfig, Step
from equimoe.moe.config import AttentionConfig
from equimoe.moe.model import Decoder, attend
from equimoe.moe.model.documents import Documents, document_numbers, document_starts
from equimoe.moe.parallel import (
    Mesh,
    ParallelConfig,
    build_mesh,
    clip_grad_norm_,
    parallelize,
    take_local_batch,
    token_losses,
    vocabulary_parallel,
)
from equimoe.moe.plan import pretended
from equimoe.moe.train.config import OptimConfig
from equimoe.moe.train.optim import build_optimizer
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda, real_tensors
from tests.helpers.slow import slow_but

pytestmark = needs_fake_cuda

TOKENS, RANKS = 64, 4
LATENT = AttentionConfig("latent", q_lora_rank=8, kv_lora_rank=8, qk_nope_width=8, qk_rope_width=4, v_width=8)
#: the dropless exchange must know the number of rows from each rank
SPLITS = "moe/collectives/no_gradient.py:on_host"
#: ranks may have different numbers of tokens, and the etp ranks of an expert must know them
SIZES = "moe/collectives/no_gradient.py:exchange_sizes"

#: name -> dispatch, capacity, degrees, and every wait of the host in a layer's forward and backward
DISPATCHERS: dict[str, tuple[DispatchConfig, CapacityConfig | None, dict[str, int], list[str]]] = {
    "local": (DispatchConfig(), None, {"ep": 1}, []),
    "all_to_all": (DispatchConfig(), None, {"ep": 4}, [SPLITS]),
    "all_to_all, bf16 wire": (DispatchConfig(wire="bf16"), None, {"ep": 4}, [SPLITS]),
    "all_to_all, fp8 wire": (DispatchConfig(wire="fp8"), None, {"ep": 4}, [SPLITS]),
    "all_to_all, capacity": (DispatchConfig(), CapacityConfig(), {"ep": 4}, [SPLITS]),
    "all_to_all, padded": (DispatchConfig(), CapacityConfig(pad=True), {"ep": 4}, []),
    "all_to_all, budget": (DispatchConfig(memory_mb=64), None, {"ep": 4}, [SPLITS]),
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
        for _ in range(2):  # in the first pass, layers without an engine check that all ranks have the same sums
            watch.waits.clear()
            watch.copies.clear()
            layer(x).float().square().sum().backward()
    return watch


def summary(watch: Watch) -> dict[str, list[str]]:
    return {"waits": watch.waits, "copies": watch.copies, "mixed": watch.mixed}


@pytest.mark.parametrize("backend", slow_but(["torch"], ["torch", "triton"]))
def test_dispatchers_wait_for_their_sizes_alone(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")

    def one(dispatch: DispatchConfig, capacity: CapacityConfig | None, degrees: dict[str, int]) -> dict[str, Any]:
        config = MoEConfig(
            hidden_size=32,
            intermediate_size=48,
            num_experts=16,
            top_k=16,  # enough rows for any size that the host reads
            backend=backend,  # type: ignore[arg-type]
            shared_intermediate_size=16,
            dispatch=dispatch,
            capacity=capacity,
            balance=BalanceConfig(bias_update_rate=0.001),
        )
        with torch.device("cuda"):
            layer, x = MoE(config), torch.randn(TOKENS, 32, requires_grad=True)
        parallelize(layer, mesh_of(**degrees), reduced=True)
        return summary(watched(layer, x))

    def body() -> dict[str, dict[str, Any]]:
        found = {}
        for name, (*arguments, _) in DISPATCHERS.items():
            with pretended(0, RANKS, RANKS):
                found[name] = one(*arguments)
        return found

    expected = {name: {"waits": waits, "copies": [], "mixed": []} for name, (*_, waits) in DISPATCHERS.items()}
    assert on_fake_cuda(body) == expected


#: name -> degrees of two ranks, kind of attention, and every wait of the host in the layer's forward and backward
MODELS: dict[str, tuple[dict[str, Any], AttentionConfig, list[str]]] = {
    "cp, ring": ({"cp": 2, "ep": 1}, AttentionConfig(qk_norm=True), [SIZES]),
    "cp, all-gather": ({"cp": 2, "ep": 1, "context": "all_gather"}, LATENT, [SIZES]),
    "tp": ({"tp": 2, "ep": 1}, AttentionConfig(), [SIZES]),
    "tp without sp": ({"tp": 2, "ep": 1, "sequence_parallel": False}, LATENT, [SIZES]),
    "cp and ep": ({"cp": 2, "ep": 2}, AttentionConfig(), [SIZES, SPLITS]),
}


def test_documents_are_told_apart_without_waiting() -> None:
    """The masks of all ways that run on a GPU are made there."""

    def body() -> dict[str, Any]:
        ids = torch.zeros(2, 300, dtype=torch.int64, device="cuda")
        with Watch() as watch:
            documents = Documents(document_starts(document_numbers(ids, 0)))
            documents.seen(5)
            documents.block_mask(5)
        return summary(watch)

    assert on_fake_cuda(body) == {"waits": [], "copies": [], "mixed": []}


@pytest.mark.parametrize(
    ("name", "packed"),
    slow_but([("cp, ring", True), ("tp without sp", False), ("cp and ep", False)], product(MODELS, [False, True])),
)
def test_a_parallel_decoder_and_its_optimizer_are_on_the_device(name: str, packed: bool) -> None:
    """A parallel decoder and its optimizer must be entirely on the device.

    The capacity limit covers whole sequences, so it orders tokens by the positions that context parallelism sets.
    """
    degrees, attention, waits = MODELS[name]
    limit = CapacityConfig(scope="sequence")
    moe = MoEConfig(hidden_size=32, intermediate_size=48, num_experts=4, top_k=2, capacity=limit)

    def step() -> dict[str, Any]:
        mesh = mesh_of(**degrees)
        model = Decoder(
            vocab_size=64, seq_len=64, num_layers=1, num_heads=2, intermediate_size=48, moe=moe, attention=attention
        )
        # the model is built and split on the host, and all of it must follow to the device
        model = parallelize(model, mesh, reduced=True).to("cuda")
        parameters = list(model.parameters())
        optimizer = build_optimizer(dict(model.named_parameters()), OptimConfig())
        ids = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
        batch = take_local_batch(ids, ids, ids == 0, ids if packed else None, mesh=mesh)
        attend.WITHIN["blocks"] = attend.WITHIN["mask"]  # its kernels cannot be compiled here
        with Watch(reads=TOKENS), torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            model(batch.inputs, batch.mask, batch.starts)  # here the positions move to the device, once
        balance = Step.of(model)  # as an engine drives it
        with Watch(reads=TOKENS) as watch:
            with balance.micro_batch(), vocabulary_parallel(mesh), torch.autocast("cuda", torch.bfloat16):
                token_losses(model(batch.inputs, batch.mask, batch.starts), batch.labels).sum().backward()
            found = list(watch.waits)
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            balance.end()
        return summary(watch) | {"waits": found}

    def body() -> dict[str, Any]:
        with pretended(0, 2, 2):
            return step()

    assert on_fake_cuda(body) == {"waits": waits, "copies": [], "mixed": []}
