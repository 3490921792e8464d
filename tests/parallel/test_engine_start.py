"""Checks that a new engine refuses ranks that differ, and ties or refuses weights that are used in several places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe.model import Decoder
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.parallel.alike import _CHUNK, content_hash
from tests.helpers.fork import run_ranks
from tests.helpers.recorded import Recorded
from tests.helpers.slow import slow_but
from tests.helpers.trained import batches, engine_of, freeze, make, whole, worst


def refused(world: int, degrees: dict[str, Any], change: Any) -> list[str]:
    """Return every rank's error for a model that ``change(model, rank)`` has changed."""

    def script(rank: int, world: int) -> str:
        mesh, model = build_mesh(ParallelConfig(**degrees)), make()
        model = change(model, rank) or model
        with pytest.raises(ValueError) as error:
            engine_of(model, mesh)
        return str(error.value)

    return run_ranks(script, world)


# ---- ranks that start from different weights


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(2, {"tp": 2}), (4, {"ep": 2}), (4, {"dp_replicate": 2, "data_parallel": "fsdp"}), (4, {"pp": 2})],
    ids=str,
)
@pytest.mark.parametrize("name", ["blocks.1.mlp.experts.down_proj", "blocks.0.attention.out_proj.weight"])
def test_ranks_that_differ_in_one_bit_of_one_weight(world: int, degrees: dict[str, Any], name: str) -> None:
    def change(model: Decoder, rank: int) -> None:
        if rank == world - 1:
            weight = model.get_parameter(name).data.view(-1)
            weight[-1] = torch.nextafter(weight[-1], weight[-1] + 1)

    for text in refused(world, degrees, change):
        assert text.startswith(f"{name}: rank {world - 1} starts from different values from rank 0; ")


def test_ranks_that_differ_in_a_buffer_or_in_shape() -> None:
    def buffer(model: Decoder, rank: int) -> None:
        model.register_buffer("extra", torch.tensor([rank]))

    def shape(model: Decoder, rank: int) -> Decoder:
        return make(layers=4) if rank else model

    assert all(text.startswith("extra: rank 1 starts from") for text in refused(2, {}, buffer))
    assert all("model: rank 1 has different parameters from rank 0" in text for text in refused(2, {}, shape))


def test_ranks_that_train_different_weights() -> None:
    """Each would add its gradient to that of another weight."""

    def change(model: Decoder, rank: int) -> None:
        freeze(model, lambda name: ("blocks.1.attention_norm" if rank else "blocks.0.mlp_norm") in name)

    for degrees in ({}, {"data_parallel": "fsdp"}, {"tp": 2}):
        for text in refused(2, degrees, change):
            assert text.startswith("blocks.0.mlp_norm.weight: only one of the ranks 0 and 1 trains it"), text


def test_a_rank_without_values() -> None:
    """It does not leave the others waiting."""

    def change(model: Decoder, rank: int) -> Any:
        return model.to("meta") if rank else model

    assert all("model: either rank 0 or rank 1 has it on the meta device" in text for text in refused(2, {}, change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.cfloat])
def test_the_hash_sees_every_element_and_its_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(_CHUNK + 5).to(dtype) if dtype != torch.bool else torch.rand(_CHUNK + 5) < 0.5
    values[:2], values[-2:] = torch.tensor([0, 1]).to(dtype), torch.tensor([0, 1]).to(dtype)
    found = {int(content_hash(values))}
    assert int(content_hash(values.clone().view(1, -1))) in found
    for place in (0, _CHUNK - 1, _CHUNK, _CHUNK + 4):
        changed = values.clone()
        changed[place] = 3 if dtype == torch.int64 else not changed[place] if dtype == torch.bool else 0.3
        found.add(int(content_hash(changed)))
    for one, two in ((0, 1), (-2, -1), (0, -1)):
        swapped = values.clone()
        swapped[[one, two]] = values[[two, one]]
        found.add(int(content_hash(swapped)))
    assert len(found) == 8
    assert int(content_hash(values[:0])) == 0


def test_the_hash_sees_the_sign_of_zero() -> None:
    assert content_hash(torch.tensor([0.0])) != content_hash(torch.tensor([-0.0]))


# ---- weights that are used in several places


def head_tied(model: Decoder, rank: int = 0) -> None:
    model.head.weight = model.embedding.weight  # type: ignore[union-attr, assignment]


def attention_shared(model: Decoder, rank: int = 0) -> None:
    model.blocks["1"].attention = model.blocks["0"].attention  # type: ignore[union-attr]


def expert_module_shared(model: Decoder, rank: int = 0) -> Decoder:
    deep = make(layers=4)
    deep.blocks["3"].mlp.experts = deep.blocks["1"].mlp.experts  # type: ignore[union-attr]
    return deep


def blocks_shared(model: Decoder, rank: int = 0) -> Decoder:
    deep = make(layers=4)
    deep.blocks["2"], deep.blocks["3"] = deep.blocks["0"], deep.blocks["1"]
    return deep


def experts_shared(model: Decoder, rank: int = 0) -> Decoder:
    deep = make(layers=4)
    deep.blocks["3"].mlp.experts.down_proj = deep.blocks["1"].mlp.experts.down_proj  # type: ignore[union-attr]
    return deep


SHARED: list[tuple[Any, int, dict[str, Any]]] = [
    (head_tied, 2, {}),
    (head_tied, 2, {"tp": 2}),
    (head_tied, 2, {"tp": 2, "sequence_parallel": False}),
    (head_tied, 2, {"data_parallel": "fsdp"}),
    (head_tied, 4, {"tp": 2, "data_parallel": "fsdp"}),
    (attention_shared, 2, {}),
    (attention_shared, 2, {"tp": 2}),
    (attention_shared, 2, {"cp": 2}),
    (experts_shared, 2, {"ep": 2}),
    (experts_shared, 2, {"etp": 2}),
    (expert_module_shared, 2, {"ep": 2}),
    (expert_module_shared, 2, {"data_parallel": "fsdp"}),
    (expert_module_shared, 4, {"data_parallel": "fsdp", "ep": 2, "etp": 2}),
    (blocks_shared, 4, {"data_parallel": "fsdp", "tp": 2}),
]


@pytest.mark.parametrize(
    ("tie", "world", "degrees"),
    slow_but([SHARED[1], SHARED[3], SHARED[7], SHARED[8], SHARED[11]], SHARED),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_shared_weights_stay_one(tie: Any, world: int, degrees: dict[str, Any]) -> None:
    def script(rank: int, world: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        mesh, optimizer = build_mesh(ParallelConfig(**degrees)) if world > 1 else None, Recorded()
        model = make()
        engine = engine_of(tie(model) or model, mesh, optimizer)
        for step in range(2):
            engine.step(batches(mesh, step), lr=0.1)
        return optimizer.gradients[1], whole(engine)

    want = script(0, 1)
    for found in run_ranks(script, world):
        for got, expected in zip(found, want, strict=True):
            assert got.keys() == expected.keys() and worst(got, expected)[0] < 1e-8


@pytest.mark.parametrize(
    ("tie", "world", "degrees", "first", "other", "remedy"),
    [
        (head_tied, 2, {"pp": 2}, "embedding.weight", "head.weight", "parallel.pp=1"),
        (head_tied, 2, {"pp": 2, "schedule": "zbv"}, "embedding.weight", "head.weight", "parallel.pp=1"),
        (attention_shared, 2, {"pp": 2}, "blocks.0.attention.", "blocks.1.attention.", "parallel.pp=1"),
        (
            attention_shared,
            2,
            {"data_parallel": "fsdp"},
            "blocks.0.attention.",
            "blocks.1.attention.",
            "data_parallel='ddp'",
        ),
        (
            experts_shared,
            2,
            {"data_parallel": "fsdp"},
            "blocks.1.mlp.experts.down_proj",
            "blocks.3.mlp.experts.down_proj",
            "data_parallel='ddp'",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_shared_weights_that_cannot_stay_one_are_refused(
    tie: Any, world: int, degrees: dict[str, Any], first: str, other: str, remedy: str
) -> None:
    def change(model: Decoder, rank: int) -> Decoder:
        model = make(layers=4) if degrees.get("schedule") == "zbv" else model
        return tie(model) or model

    for text in refused(world, degrees, change):
        assert text.startswith(first) and f" and {other}" in text and remedy in text and "\n" not in text


def test_a_split_weight_and_a_plain_one_are_refused() -> None:
    def change(model: Decoder, rank: int) -> None:
        model.norm.weight = model.blocks["0"].mlp.gate_proj.weight  # type: ignore[union-attr]

    for text in refused(2, {"tp": 2}, change):
        assert "blocks.0.mlp.gate_proj.weight and norm.weight are one weight" in text
