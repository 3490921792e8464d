"""Checks wire formats, and the bytes that every dispatcher sends against the closed formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.moe import BalanceConfig, DispatchConfig, MoE
from equimoe.moe.collectives import LOCAL, exchange_rows, record_traffic, start_exchange, world_axis
from equimoe.moe.collectives.packing import Packing
from equimoe.moe.dispatch import DropDuplicates, build_dispatcher
from equimoe.moe.dispatch.codecs import WIRES, BFloat16, Float8
from equimoe.moe.placement import Placement
from equimoe.moe.plan import traffic_formulas as traffic
from equimoe.moe.plan.traffic_formulas import RoutedTokens
from equimoe.moe.types import Decision
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.wire import CONFIG, SPREADS, D, E, K, Passed, T, cases, measure, routing

# ---- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_error_of_a_round_trip(dtype: torch.dtype) -> None:
    rows = (torch.randn(64, 48) * 10.0 ** torch.randint(-6, 6, (64, 1))).to(dtype)
    largest = rows.abs().amax(-1, keepdim=True)
    for codec, relative, absolute in ((BFloat16(), 2.0**-8, 0.0), (Float8(), 2.0**-4, 2.0**-10 / 448)):
        payload = codec.encode(rows)
        back = codec.decode(payload, dtype)
        assert back.dtype == dtype and payload.shape[0] == 64
        bound = rows.abs() * (relative * 1.01) + largest * absolute
        assert bool(((back - rows).abs() <= bound).all())
    assert Float8().encode(rows).dtype == torch.uint8 and Float8().encode(rows).shape == (64, 48 + 4)
    assert float((Float8().decode(Float8().encode(rows), dtype) - rows).abs().max()) > 0


@pytest.mark.parametrize("codec", [BFloat16(), Float8()])
def test_rows_that_need_care(codec: BFloat16 | Float8) -> None:
    """Empty, zero, tiny and huge rows must survive; a row that is not finite must arrive so, and affect no other."""
    assert codec.decode(codec.encode(torch.zeros(0, 5)), torch.float32).shape == (0, 5)
    rows = torch.ones(7, 5)
    rows[0], rows[1], rows[2] = 0.0, 1e-40, 3e38
    rows[3, 2], rows[4, 0], rows[5, 1] = float("inf"), float("nan"), -float("inf")
    back = codec.decode(codec.encode(rows), torch.float32)
    assert bool((back[0] == 0).all()) and bool((back[1].abs() < 1e-38).all())
    assert oracle.relative_error(back[2] / 3e38, rows[2] / 3e38) < 0.01 and bool((back[6] == 1).all())
    assert [bool(back[i].isfinite().all()) for i in range(7)] == [True, True, True, False, False, False, True]


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("name", ["all_to_all", "hierarchical", "overlapped", "all_gather"])
def test_a_layer_with_rounded_rows_is_near_the_exact_one(name: str, wire: str) -> None:
    """Outputs and gradients must differ by the format's rounding, and must differ; gate weights are sent exactly."""
    bound = {"compute": 1e-6, "bf16": 1.2e-2, "fp8": 6e-2}[wire]

    def script(rank: int, world: int, wire: str) -> list[Tensor]:
        config = replace(CONFIG, dispatch=DispatchConfig(name, wire=wire), balance=BalanceConfig(coefficient=0.0))
        torch.manual_seed(0)
        layer, axis = MoE(config), world_axis()
        for key, weight in list(layer.experts.named_parameters()):
            setattr(layer.experts, key, torch.nn.Parameter(weight.detach().chunk(2)[rank].clone()))
        layer.dispatcher = build_dispatcher(config, Placement(ep=axis))
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]

    for got, want in zip(run_ranks(script, 2, wire), run_ranks(script, 2, "compute"), strict=True):
        errors = [oracle.relative_error(a, b) for a, b in zip(got, want, strict=True)]
        assert max(errors) < bound and (wire == "compute" or min(errors[:2]) > bound / 100)


def test_gradients_take_their_own_format() -> None:
    """Rows are sent to the experts as fp8, and their gradients returned as bf16."""

    def script(rank: int, world: int) -> tuple[Tensor, Tensor]:
        rows = torch.linspace(0.1, 1, 2 * 5).view(2, 5).requires_grad_()
        out = exchange_rows(rows, [1, 1], [1, 1], world_axis(), WIRES["fp8"][0])
        out.backward(torch.linspace(0.1, 1, 2 * 5).view(2, 5))
        return out.detach(), rows.grad

    rows = torch.linspace(0.1, 1, 2 * 5).view(2, 5)
    for rank, (out, grad) in enumerate(run_ranks(script, 2)):
        small = Float8().decode(Float8().encode(rows), torch.float32)
        assert torch.equal(out, small[rank].expand(2, 5)) and not torch.equal(small, rows)
        # both ranks' gradients for this rank's two rows: row `rank` of each
        assert torch.equal(grad, rows[rank].bfloat16().float().expand(2, 5))


# ---- tensors that travel together ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "width"), [(0, 6), (1, 1), (5, 7), (3, 8)])
def test_packed_rows_keep_every_bit(dtype: torch.dtype, rows: int, width: int) -> None:
    """NaN with any payload, infinity and -0.0 must arrive as they are, aligned, in rows of a multiple of 16 bytes."""
    odd = torch.tensor([0x7FC00001, 0x7F800000, -(1 << 31), 1, 0x3F800001], dtype=torch.int32).view(torch.float32)
    tensors = [
        torch.randn(rows, width).to(dtype),
        odd.repeat(rows * 2)[: rows * 3].view(rows, 3),
        torch.arange(rows, dtype=torch.int32) - 1,
        torch.arange(rows * 4, dtype=torch.int64).view(rows, 2, 2) << 40,
    ]
    packing = Packing(tensors)
    payload = packing.pack([tensors[0].t().contiguous().t(), *tensors[1:]])  # in any memory layout
    assert payload.dtype == torch.uint8 and payload.shape[0] == rows and payload.shape[1] % 16 == 0
    for got, want in zip(packing.unpack(payload), tensors, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(_bits(got), _bits(want))
    assert Packing(tensors[:1]).pack(tensors[:1]) is tensors[0]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_rows_and_weights_travel_together(trained: tuple[bool, bool]) -> None:
    """One exchange each way, for what is trained; weights and their gradients are not rounded to the rows' format."""

    def script(rank: int, world: int) -> tuple[list[Any], list[str]]:
        rows = torch.full((2, 3), 1.0 + rank, dtype=torch.bfloat16).requires_grad_(trained[0])
        weights = torch.tensor([[1.0 + 2.0**-20], [3.0]], requires_grad=trained[1])
        ids = torch.tensor([4, 5], dtype=torch.int32) + 2 * rank
        with record_traffic() as entries:
            pending = start_exchange(rows, [1, 1], [1, 1], world_axis(), WIRES["bf16"][0], (weights, ids))
            got, factors, numbers = pending.wait_all()
            (got.float() * factors * (1 + 2.0**-20)).sum().backward()
        assert (got.requires_grad, factors.requires_grad, numbers.requires_grad) == (*trained, False)
        found = [got.detach(), factors.detach(), numbers, rows.grad, weights.grad]
        return found, [entry.verb for entry in entries]

    for rank, (found, verbs) in enumerate(run_ranks(script, 2)):
        got, factors, numbers, of_rows, of_weights = found
        assert verbs == ["exchange_rows"] * 2
        factor = (1.0 + 2.0**-20, 3.0)
        assert got[:, 0].tolist() == [1.0, 2.0] and factors.flatten().tolist() == [factor[rank]] * 2
        assert numbers.tolist() == [4 + rank, 6 + rank]
        assert (of_rows is None, of_weights is None) == (not trained[0], not trained[1])
        if of_rows is not None:
            want = torch.tensor(factor, dtype=torch.float32) * (1 + 2.0**-20)
            assert torch.equal(of_rows, want.bfloat16()[:, None].expand(2, 3))
        if of_weights is not None:
            assert of_weights.flatten().tolist() == [3.0 * (1 + rank) * (1 + 2.0**-20)] * 2


# ---- bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("spread", SPREADS)
def test_exchanges_and_bytes_equal_the_closed_formulas(wire: str, spread: str) -> None:
    """A layer's forward and backward have four exchanges: gate weights, ids and their gradients travel with rows."""
    expected = cases(wire, spread)

    def script(rank: int, world: int) -> list[list[Passed]]:
        return [measure(rank, world, *case, spread) for *case, _, _ in expected]

    for result in run_ranks(script, 4):
        assert result == [[Passed(exchanges, sent) for sent in want] for *_, exchanges, want in expected]


def test_formula_of_the_paper() -> None:
    """Forward sends K T h [2 (e - 1)/e + 2 (g - 1)] values, not counting gate weights and ids."""
    for ep, etp in ((1, 1), (4, 1), (2, 4), (8, 2)):
        load = RoutedTokens(tokens=64, hidden=1 << 20, top_k=3, value=2, weight=0)
        rows = 3 * 64 * (1 << 20) * (2 * (ep - 1) / ep + 2 * (etp - 1))
        assert traffic.all_to_all(load, ep, etp).forward == pytest.approx(rows * 2, rel=1e-5)


def test_hierarchical_sends_a_row_at_most_once_to_a_node() -> None:
    """With random routing, rows sent between nodes must equal the pairs of a token and another node that it uses."""

    def script(rank: int, world: int) -> tuple[int, int]:
        config = replace(CONFIG, top_k=5, dispatch=DispatchConfig("hierarchical", node_size=2))
        dispatcher = build_dispatcher(config, Placement(ep=replace(world_axis(), name="ep")))
        generator = torch.Generator().manual_seed(rank)
        ids_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :5]
        made = replace(routing("nodes", torch.float32), decision=Decision(ids_TK, ids_TK), weights_TK=torch.ones(T, 5))
        with record_traffic() as entries, torch.no_grad():
            dispatcher.finish(dispatcher.send(torch.randn(T, D), made), lambda rows, plan: rows)
        between = [e.sent for e in entries if e.axis == "ep.across" and e.verb == "exchange_rows"]
        other = [[int(i) for i in row if int(i) // 4 != rank // 2] for row in ids_TK]
        return between[0], sum(bool(row) for row in other) * (D * 4 + 5 * 4 + 5 * 4)  # with 5 weights and 5 ids

    for sent, want in run_ranks(script, 4):
        assert sent == want > 0


def test_dropped_duplicates_exchange_a_share() -> None:
    """The all-to-all sends 1/tp of the rows; gathering the outputs comes on top."""

    def script(rank: int, world: int, drop: bool) -> tuple[int, int]:
        axis = world_axis()
        dispatcher, duplicates = build_dispatcher(CONFIG, Placement(ep=axis)), DropDuplicates(axis if drop else LOCAL)
        x = torch.randn(T, D, requires_grad=True)
        made = routing("nodes", torch.float32)
        with record_traffic() as entries:
            (share,) = duplicates.split(x)
            ids_TK = made.ids_TK[rank * T // world : (rank + 1) * T // world] if drop else made.ids_TK
            own = replace(made, decision=Decision(ids_TK, ids_TK), weights_TK=torch.ones(len(ids_TK), K))
            y = dispatcher.finish(dispatcher.send(share, own), lambda rows, plan: rows)
            duplicates.join(y, x.shape).sum().backward()
        sums = [sum(e.sent for e in entries if e.verb == verb) for verb in ("exchange_rows", "all_gather_rows")]
        return sums[0], sums[1]

    whole, share = run_ranks(script, 4, False), run_ranks(script, 4, True)
    want = traffic.drop_duplicates(RoutedTokens(T, D, K, value=4), 4)
    for (all_rows, none), (rows, gathered) in zip(whole, share, strict=True):
        assert all_rows == 4 * rows > 0 and none == 0 and gathered == want.forward + want.backward


def test_nothing_is_recorded_when_nobody_asks() -> None:
    from equimoe.moe.collectives import traffic as recorded

    with record_traffic() as entries:
        pass
    assert entries == [] and recorded._record is None
