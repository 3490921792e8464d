"""S source rows, K choices per row, R = S*K routed rows, E experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.slow import slow_but

pytest.importorskip("triton")

from equimoe.kernels.permute import combine  # noqa: E402
from equimoe.kernels.sort_by_expert import sort_by_expert  # noqa: E402
from equimoe.kernels.topk_gate import topk_gate  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU, Triton's interpreter runs the kernels


def check(ids_SK: Tensor, num_experts: int) -> None:
    found = sort_by_expert(ids_SK, num_experts, backend="triton")
    expected = sort_by_expert(ids_SK, num_experts, backend="torch")
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b), name


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("ids", "num_experts"),
    [
        (torch.zeros(0, 2, dtype=torch.int64), 3),
        (torch.zeros(4, 0, dtype=torch.int64), 3),
        (torch.zeros(5, 2, dtype=torch.int64), 1),
        (torch.ones(1, 1, dtype=torch.int64), 2),
        (torch.full((5, 2), -1), 4),
        (torch.full((600, 2), 2), 4),
        (torch.tensor([[3, -1], [0, 3], [-1, -1], [3, 3]]), 4),
        (torch.tensor([[1, 0, 2], [0, 1, -1]]).t(), 3),
    ],
    ids=["no rows", "no choices", "one expert", "one row", "all dropped", "all on one", "duplicates", "not contiguous"],
)
def test_edges(ids: Tensor, num_experts: int) -> None:
    check(ids.to(DEVICE), num_experts)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("sources", "choices", "experts"),
    slow_but(
        [(513, 1, 7), (1400, 2, 513), (40, 8, 4096)],
        [(512, 1, 7), (513, 1, 7), (511, 3, 60), (2048, 2, 512), (1400, 2, 513), (1025, 1, 2500), (40, 8, 4096)],
    ),
)
def test_many_rows(sources: int, choices: int, experts: int) -> None:
    """Sizes around the edges of a block and of a tile of bins, for both block sizes."""
    check(torch.randint(-1, experts, (sources, choices), device=DEVICE), experts)


@pytest.mark.usefixtures("poison")
def test_prefixes_carry_over_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from equimoe.kernels.sort_by_expert import triton_ops

    monkeypatch.setattr(triton_ops, "_PREFIX_BLOCKS", 2)  # otherwise a second step needs 131073 rows or 1024 experts
    monkeypatch.setattr(triton_ops, "_PREFIX_ALL", 4)
    check(torch.randint(-1, 9, (5 * 512 + 3, 1), device=DEVICE), 9)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sources=st.integers(0, 12), choices=st.integers(1, 4), num_experts=st.integers(1, 6))
def test_any(data: st.DataObject, sources: int, choices: int, num_experts: int) -> None:
    size = sources * choices
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=size, max_size=size))
    check(torch.tensor(ids, dtype=torch.int64, device=DEVICE).view(sources, choices), num_experts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_as_one_graph(backend: str) -> None:
    compiled = torch.compile(sort_by_expert, fullgraph=True, backend="aot_eager")
    for sources in (9, 14):
        ids_SK = torch.randint(-1, 5, (sources, 2), device=DEVICE)
        found, expected = compiled(ids_SK, 5, backend=backend), sort_by_expert(ids_SK, 5, backend="torch")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_repeats_bit_for_bit() -> None:
    ids_SK = torch.randint(-1, 700, (1500, 2), device=DEVICE)
    first, second = (sort_by_expert(ids_SK, 700, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("experts", [1, 4])
def test_tensors_without_values_are_not_read(experts: int) -> None:
    """In a dry run or a trace there are no values, so none are checked."""
    with FakeTensorMode():
        ids_SK = torch.zeros(5, 2, dtype=torch.int64)
        order = sort_by_expert(ids_SK, experts, backend="triton")
        assert order.offsets_E.shape == (experts + 1,)
        assert combine(torch.zeros(10, 3), order, backend="triton").shape == (5, 3)
        logits_TE = torch.zeros(5, experts)
        assert topk_gate(logits_TE, 1, ids_TK=ids_SK[:, :1], backend="triton").weights_TK.shape == (5, 1)
    with pytest.raises(ValueError, match=r"ids_SK in \[0, 7\]"):
        sort_by_expert(torch.tensor([[0, 7]]), experts)
