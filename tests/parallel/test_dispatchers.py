"""Checks that every dispatcher, with ep and etp, equals one process that holds all experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, CapacityConfig, DispatchConfig, MoE, MoEConfig, recompute
from equimoe.moe.collectives import (
    LOCAL,
    Axis,
    all_gather_rows,
    axis_of,
    exchange_sizes,
    record_traffic,
    reduce_scatter_rows,
    split_axis,
    start_exchange,
    world_axis,
)
from equimoe.moe.dispatch import DISPATCHERS, LocalDispatcher, build_dispatcher
from equimoe.moe.dispatch.exchange_plan import dropless
from equimoe.moe.placement import Placement
from tests.helpers import oracle
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

CONFIG = MoEConfig(
    hidden_size=6,
    intermediate_size=4,
    num_experts=8,
    top_k=3,
    balance=BalanceConfig(coefficient=0.0),
    shared_intermediate_size=4,
    init_std=0.5,
)
PADDED = CapacityConfig(factor=8.0, pad=True, max_tokens=9)


def variants(ep: int) -> dict[str, tuple[DispatchConfig, CapacityConfig | None]]:
    found: dict[str, tuple[DispatchConfig, CapacityConfig | None]] = {
        name: (DispatchConfig(name), None) for name in ("all_gather", "all_to_all")
    }
    for size in (1, 2, 4):
        if ep % size == 0:
            found[f"nodes of {size}"] = DispatchConfig("hierarchical", node_size=size), None
    for chunks in (1, 2, 4, 8):
        found[f"{chunks} chunks"] = DispatchConfig("overlapped", chunks=chunks), None
    found["padded"] = DispatchConfig(), PADDED
    found["padded, 3 chunks"] = DispatchConfig("overlapped", chunks=3), PADDED
    return found


def collapse(layer: MoE) -> None:
    """Make all tokens with positive entries choose the first four experts, in the same order."""
    with torch.no_grad():
        layer.router.weight.copy_(-torch.arange(8.0)[:, None].expand(8, 6))


def untouched(layer: MoE) -> None:
    """Leave the router as initialised."""


#: tokens per rank (in turn), change to the router, whether some tokens are masked
CASES: dict[str, tuple[tuple[int, ...], Callable[[MoE], None], bool]] = {
    "unequal": ((5, 2, 9, 1), untouched, False),
    "zero": ((0, 7), untouched, False),
    "nothing": ((0,), untouched, False),
    "one rank's experts": ((4, 3), collapse, False),
    "masked": ((6, 5), untouched, True),
}


def make(config: MoEConfig, prepare: Callable[[MoE], None]) -> MoE:
    torch.manual_seed(0)
    layer = MoE(config).double()
    prepare(layer)
    return layer


def batch(rank: int, lengths: tuple[int, ...], masked: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rank)
    x_TD = torch.rand(lengths[rank % len(lengths)], 6, dtype=torch.float64, generator=generator) - 0.2
    return x_TD, torch.arange(len(x_TD)) % 3 != rank % 2 if masked else None


def shard(layer: MoE, ep: Axis, etp: Axis) -> None:
    """Keep this rank's experts, and its part of their width."""
    experts = layer.experts
    gate_up = experts.gate_up_proj.detach().chunk(ep.size)[ep.rank].unflatten(1, (2, -1))
    down = experts.down_proj.detach().chunk(ep.size)[ep.rank]
    experts.gate_up_proj = nn.Parameter(gate_up.chunk(etp.size, 2)[etp.rank].flatten(1, 2).clone())
    experts.down_proj = nn.Parameter(down.chunk(etp.size, 2)[etp.rank].clone())


def assemble(parts: list[Tensor], ep: int, etp: int, width_dim: int) -> Tensor:
    """Assemble whole weights (or gradients) from the ranks' parts, etp innermost."""
    rows = [torch.cat(parts[p * etp : (p + 1) * etp], dim=width_dim) for p in range(ep)]
    return torch.cat(rows)


def axes(ep: int, etp: int) -> tuple[Axis, Axis]:
    """Return the axes (ep, etp): etp has blocks of ``etp`` adjacent ranks, ep the ranks that are ``etp`` apart."""
    across, within = split_axis(world_axis(), etp)
    return replace(across, name="ep"), replace(within, name="etp")


def backward(layer: MoE, x_TD: Tensor, mask_T: Tensor | None) -> dict[str, Tensor]:
    x_TD = x_TD.clone().requires_grad_()
    y_TD = layer(x_TD, mask_T)
    y_TD.mul(torch.linspace(-1, 2, 6, dtype=torch.float64)).square().sum().backward()
    return {"y": y_TD.detach(), "x": x_TD.grad} | {n: p.grad for n, p in layer.named_parameters()}


def alone(world: int, case: str) -> dict[str, Tensor]:
    lengths, prepare, masked = CASES[case]
    batches = [batch(rank, lengths, masked) for rank in range(world)]
    mask = torch.cat([m for _, m in batches]) if masked else None
    return backward(make(replace(CONFIG, backend="reference"), prepare), torch.cat([x for x, _ in batches]), mask)


def on_ranks(rank: int, world: int, ep: int, etp: int, case: str) -> dict[str, dict[str, Tensor]]:
    lengths, prepare, masked = CASES[case]
    axis, etp_axis = axes(ep, etp)
    found = {}
    for name, (dispatch, capacity) in variants(ep).items():
        config = replace(CONFIG, dispatch=dispatch, capacity=capacity)
        layer = make(config, prepare)
        shard(layer, axis, etp_axis)
        layer.dispatcher = build_dispatcher(config, Placement(ep=axis, etp=etp_axis))
        found[name] = backward(layer, *batch(rank, lengths, masked))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("ep", "etp"), slow_but([(2, 1), (1, 2), (4, 1)], [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]))
@pytest.mark.usefixtures("poison")
def test_equals_one_process(ep: int, etp: int, case: str) -> None:
    compare(run_ranks(on_ranks, ep * etp, ep, etp, case), alone(ep * etp, case), ep, etp)


@pytest.mark.slow
def test_eight_ranks() -> None:
    """Eight ranks as four nodes of two, as two nodes of four, and with ep=4 and etp=2."""
    compare(run_ranks(on_ranks, 8, 8, 1, "unequal"), alone(8, "unequal"), 8, 1)
    compare(run_ranks(on_ranks, 8, 4, 2, "zero"), alone(8, "zero"), 4, 2)


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (2, 2)])
def test_same_collectives_on_every_rank(ep: int, etp: int) -> None:
    """torch's checker must find the same collectives on every rank, also on one without tokens."""
    compare(run_ranks(on_ranks, ep * etp, ep, etp, "zero", detail=True), alone(ep * etp, "zero"), ep, etp)


def compare(results: list[dict[str, dict[str, Tensor]]], want: dict[str, Tensor], ep: int, etp: int) -> None:
    for variant in results[0]:
        parts = {name: [result[variant][name] for result in results] for name in want}
        got = {
            name: torch.stack(grads).sum(0) for name, grads in parts.items() if name.startswith(("router", "shared"))
        }
        gate_up = [part.unflatten(1, (2, -1)) for part in parts["experts.gate_up_proj"]]
        got |= {
            "y": torch.cat(parts["y"]),
            "x": torch.cat(parts["x"]),
            "experts.gate_up_proj": assemble(gate_up, ep, etp, 2).flatten(1, 2),
            "experts.down_proj": assemble(parts["experts.down_proj"], ep, etp, 2),
        }
        for name, value in want.items():
            assert got[name].shape == value.shape, (variant, name)
            assert oracle.relative_error(got[name], value) < 1e-10, (variant, name)


# ---- collectives of rows ------------------------------------------------------------------------------------------


def test_gather_and_reduce_scatter() -> None:
    """Parts may be uneven or empty; each collective is the other's backward; sums are in rank order."""

    def script(rank: int, world: int, lengths: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        axis = world_axis()
        x = (torch.arange(lengths[rank] * 2).view(-1, 2) + 10.0 * rank).to(dtype).requires_grad_()
        sizes = exchange_sizes(x, axis)
        whole = all_gather_rows(x, sizes, axis)
        part = reduce_scatter_rows(whole * 1.5**rank, sizes, axis)
        (part * (rank + 1)).sum().backward()
        return {"x": x.detach(), "whole": whole.detach(), "part": part.detach(), "grad": x.grad}

    for lengths in ((3, 0, 2, 1), (2, 2, 2, 2), (0, 0, 0, 0)):
        for dtype in (torch.float64, torch.bfloat16):
            results = run_ranks(script, 4, lengths, dtype)
            whole = torch.cat([r["x"] for r in results])
            factor = sum(1.5**rank for rank in range(4))
            for rank, r in enumerate(results):
                assert torch.equal(r["whole"], whole) and r["part"].dtype == dtype
                tolerance = 1e-12 if dtype == torch.float64 else 5e-3
                assert oracle.relative_error(r["part"], r["x"].double() * factor) < tolerance
                assert oracle.relative_error(r["grad"], torch.full_like(r["x"], factor * (rank + 1))) < tolerance


def test_sums_of_16_bit_rows_are_made_in_fp32() -> None:
    """256 + 1 + 1 + 1 is 259, which bf16 rounds to 260; sums in bf16 would stay at 256."""

    def script(rank: int, world: int) -> float:
        rows = torch.full((4, 1), 256.0 if rank == 0 else 1.0, dtype=torch.bfloat16)
        return float(reduce_scatter_rows(rows, [1] * 4, world_axis()))

    assert run_ranks(script, 4) == [260.0] * 4


def test_sizes_that_do_not_fit_are_refused_before_anything_moves() -> None:
    def script(rank: int, world: int) -> list[str]:
        errors = []
        for verb in (all_gather_rows, reduce_scatter_rows):
            try:
                verb(torch.zeros(3, 2), [4, 4], world_axis())
            except ValueError as error:
                errors.append(str(error))
        return errors

    want = ["sizes=[4, 4]: do not fit axis 'world' of size 2 and rows=3; give each rank's number of rows"] * 2
    assert run_ranks(script, 2) == [want, want]


def test_one_rank_is_the_identity() -> None:
    x = torch.ones(3, 2)
    assert all_gather_rows(x, [3], LOCAL) is x and reduce_scatter_rows(x, [3], LOCAL) is x
    assert start_exchange(x, [3], [3], LOCAL).wait() is x and exchange_sizes(x, LOCAL) == [3]


def test_exchange_is_under_way_while_others_compute() -> None:
    """Two exchanges start before either is waited for, in forward and backward; both must arrive intact."""

    def script(rank: int, world: int) -> tuple[list[str], Tensor]:
        log: list[str] = []
        real = dist.all_to_all_single

        def spy(*args: Any, **kwargs: Any) -> Any:
            log.append("start")
            work = real(*args, **kwargs)
            return Noted(work)

        class Noted:
            def __init__(self, work: Any) -> None:
                self.work = work

            def wait(self) -> None:
                log.append("wait")
                self.work.wait()

        dist.all_to_all_single = spy
        x = torch.full((2, 1), float(rank), requires_grad=True)
        axis = world_axis()
        first, second = (start_exchange(x * f, [1, 1], [1, 1], axis) for f in (1, 2))
        y = second.wait() + first.wait()
        log.append("backward")
        (y * torch.tensor([[1.0], [3.0]])).sum().backward()
        return log, x.grad

    for rank, (log, grad) in enumerate(run_ranks(script, 2)):
        both = ["start", "start", "wait", "wait"]
        assert log == [*both, "backward", *both]
        assert grad.tolist() == [[3.0 * (1 + 2 * rank)]] * 2


def test_chunks_overlap_forward_and_backward() -> None:
    """All chunks are sent before the first is computed; each chunk's results and gradients, before the next one is."""

    def script(rank: int, world: int) -> tuple[list[str], list[str]]:
        log: list[str] = []
        real = dist.all_to_all_single

        def spy(out: Tensor, *args: Any, **kwargs: Any) -> Any:
            log.append("other" if out.dtype == torch.int64 else "start")
            return real(out, *args, **kwargs)

        config = replace(CONFIG, dispatch=DispatchConfig("overlapped", chunks=2))
        layer = make(config, untouched)
        shard(layer, world_axis(), LOCAL)
        layer.dispatcher = build_dispatcher(config, Placement(ep=world_axis()))
        layer.experts.register_forward_pre_hook(lambda *_: log.append("experts"))
        layer.shared.register_forward_pre_hook(lambda *_: log.append("shared"))
        layer.experts.register_full_backward_pre_hook(lambda *_: log.append("experts"))
        dist.all_to_all_single = spy
        x = batch(rank, (5, 3), False)[0].requires_grad_()
        y = layer(x)
        forward = [entry for entry in log if entry != "other"]
        log.clear()
        y.sum().backward()
        return forward, [entry for entry in log if entry != "other"]

    for forward, backward in run_ranks(script, 2):
        assert forward == ["start", "start", "shared", "experts", "start", "experts", "start"]
        assert backward == ["start", "start", "experts", "start", "experts", "start"]


def test_chunks_have_equally_many_rows_of_every_expert() -> None:
    """Chunks must have the same number of rows of every expert, however uneven the experts' counts are."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = (torch.rand(40, 8, generator=generator) + torch.arange(8) / 8).argsort(1, descending=True)[:, :3]
    ids_TK[5:9] = -1
    routing = make(CONFIG, untouched).router(torch.zeros(40, 6, dtype=torch.float64))
    routing = replace(routing, decision=routing.decision._replace(ids_TK=ids_TK))
    load = dropless(routing.ids_TK, 8, LOCAL, 4, "auto")
    counts_CE = load.order.offsets_E.diff().view(4, 8)
    assert counts_CE.sum(0).tolist() == torch.bincount(ids_TK[ids_TK >= 0], minlength=8).tolist()
    assert int((counts_CE.amax(0) - counts_CE.amin(0)).max()) == 1 and int(counts_CE.sum(0).amax()) > 20


# ---- other parts of a layer ---------------------------------------------------------------------------------------


def test_degrees_that_do_not_fit() -> None:
    four = Axis("ep", None, 4, 0)
    with pytest.raises(ValueError, match="num_experts=6: must be divisible by parallel.ep=4"):
        DISPATCHERS["all_to_all"](6, four)
    with pytest.raises(ValueError, match="dispatch.name='local': experts are on 4 ranks; use 'all_to_all'"):
        LocalDispatcher(8, four)
    with pytest.raises(ValueError, match="dispatch.node_size=3: must divide parallel.ep=4; use a divisor"):
        DISPATCHERS["hierarchical"](8, four, config=DispatchConfig("hierarchical", node_size=3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "fast"}, "dispatch.name='fast': use one of all_to_all, hierarchical"),
        ({"chunks": 2}, "dispatch.chunks=2: dispatch.name='all_to_all' does not split rows"),
        ({"name": "overlapped", "chunks": 0}, "dispatch.chunks=0: must be between 1 and 64"),
        ({"node_size": 2}, "dispatch.node_size=2: must be at least 1 and needs dispatch.name='hierarchical'"),
        ({"wire": "fp4"}, "dispatch.wire='fp4': use one of compute, bf16, fp8"),
        (
            {"name": "deepep", "wire": "fp8"},
            "dispatch.wire='fp8': dispatch.name='deepep' sends rows in the dtype they are computed in",
        ),
    ],
)
def test_config_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DispatchConfig(**fields)


def test_node_size_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks with the same value of rank // LOCAL_WORLD_SIZE are on one node; nodes must have equal blocks."""

    def script(rank: int, world: int, per_node: str, first: int) -> int | str:
        import os

        from equimoe.moe.dispatch.hierarchical import node_size

        os.environ["LOCAL_WORLD_SIZE"] = per_node
        group = dist.new_group(list(range(first, world)))
        try:
            return node_size(axis_of("ep", group)) if rank >= first else 0
        except ValueError as error:
            return str(error)

    assert run_ranks(script, 4, "2", 0) == [2] * 4 and run_ranks(script, 4, "8", 0) == [4] * 4
    assert "are not blocks of equal size on nodes of 2" in run_ranks(script, 4, "2", 1)[3]


@pytest.mark.parametrize("world", slow_but([2], [2, 4]))
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (3, 1, 6), (0, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_duplicate_tokens_are_dropped(world: int, shape: tuple[int, ...], masked: bool) -> None:
    """All ranks hold the same tokens and route only a share; y and the gradient of x are whole on every rank."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(x[..., 0].numel()).view(shape[:-1]) % 3 != 1 if masked else None

    def script(rank: int, world: int) -> dict[str, Any]:
        layer = make(CONFIG, untouched)
        axis = world_axis()
        shard(layer, axis, LOCAL)
        layer.dispatcher = build_dispatcher(CONFIG, Placement(ep=axis))
        layer.duplicates.axis = axis
        return backward(layer, x, mask) | {"tokens": int(layer.stats.tokens)}

    want = backward(make(CONFIG, untouched), x, mask)
    results = run_ranks(script, world)
    valid = x[..., 0].numel() if mask is None else int(mask.sum())
    assert sum(result.pop("tokens") for result in results) == valid
    for name, value in want.items():
        parts = [result[name] for result in results]
        if name in ("y", "x"):
            got = parts
        elif name.startswith("experts"):
            got = [torch.cat(parts)]
        else:
            got = [torch.stack(parts).sum(0)]
        for part in got:
            assert part.shape == value.shape and oracle.relative_error(part, value) < 1e-10, name


@pytest.mark.parametrize("name", ["all_to_all", "hierarchical", "overlapped", "all_gather"])
def test_autocast_sends_rows_in_its_dtype(name: str) -> None:
    """Rows and results are sent in bf16, forward and backward; gate weights travel with the rows, in fp32."""

    def script(rank: int, world: int) -> tuple[Tensor, Tensor, set[str]]:
        seen: set[str] = set()

        def spying(real: Callable[..., Any]) -> Callable[..., Any]:
            def spy(out: Tensor, *args: Any, **kwargs: Any) -> Any:
                if out.dtype != torch.int64:
                    seen.add(f"{out.dtype} {out.shape[-1]}")
                return real(out, *args, **kwargs)

            return spy

        for verb in ("all_to_all_single", "all_gather_into_tensor"):
            setattr(dist, verb, spying(getattr(dist, verb)))
        fields: dict[str, Any] = {"hierarchical": {"node_size": 2}, "overlapped": {"chunks": 2}}.get(name, {})
        config = replace(CONFIG, top_k=2, dispatch=DispatchConfig(name, **fields))  # type: ignore[arg-type]
        layer = make(config, untouched).float()
        exact = copy.deepcopy(layer)
        shard(layer, world_axis(), LOCAL)
        layer.dispatcher = build_dispatcher(config, Placement(ep=world_axis()))
        x = batch(rank, (5, 3, 4, 6), False)[0].float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        y.sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32
        return y.detach(), exact(x).detach(), seen

    for got, want, seen in run_ranks(script, 4):
        # 12 bytes of a row with one weight; or with two weights and two ids, padded to a multiple of 16
        packed = {"all_to_all": 12 + 4, "overlapped": 12 + 4}.get(name, 32)
        assert seen == {"torch.bfloat16 6", f"torch.uint8 {packed}"}
        assert 0 < oracle.relative_error(got, want) < 2e-2


# ---- recomputation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all_to_all", "hierarchical", "overlapped", "all_gather"])
def test_recomputation_that_keeps_exchanges_repeats_none(name: str) -> None:
    recompute(torch.nn.Identity(), torch.ones(1))  # imported by torch for this: once here, instead of once per rank

    def script(rank: int, world: int) -> dict[str, tuple[dict[str, Tensor], int, int]]:
        fields: dict[str, Any] = {"hierarchical": {"node_size": 2}, "overlapped": {"chunks": 2}}.get(name, {})
        config = replace(CONFIG, dispatch=DispatchConfig(name, **fields))  # type: ignore[arg-type]
        axis, etp = axes(4, 1) if name == "hierarchical" else axes(2, 2)
        hows: dict[str, Callable[..., Tensor]] = {
            "plain": lambda layer, x: layer(x),
            "again": recompute,
            "kept": partial(recompute, keep_exchanges=True),
        }
        found = {}
        for how, run in hows.items():
            layer = make(config, untouched)
            shard(layer, axis, etp)
            layer.dispatcher = build_dispatcher(config, Placement(ep=axis, etp=etp))
            x = batch(rank, (5, 0, 3, 4), False)[0].requires_grad_()
            with record_traffic() as traffic:
                y = run(layer, x)
                y.square().sum().backward()
            # rows as wide as the layer, not weights or ids
            rows = sum(entry.verb == "exchange_rows" for entry in traffic)
            grads = {name: p.grad for name, p in layer.named_parameters()}
            found[how] = {"y": y.detach(), "x": x.grad} | grads, len(traffic), rows
        return found

    for result in run_ranks(script, 4):
        want, plain, plain_rows = result["plain"]
        assert result["kept"][1:] == (plain, plain_rows) and result["again"][1] > plain
        for how in ("again", "kept"):
            for key, value in want.items():
                assert torch.equal(result[how][0][key], value), (how, key)


def test_exchanges_of_rows_per_recomputed_layer() -> None:
    """A layer has four exchanges, dispatch and combine forward and backward; recomputed without keeping them, six."""
    recompute(torch.nn.Identity(), torch.ones(1))

    def script(rank: int, world: int, keep: bool) -> int:
        count = 0
        real = dist.all_to_all_single

        def spy(out: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += out.dtype != torch.int64  # all but the counts
            return real(out, *args, **kwargs)

        layer = make(CONFIG, untouched)
        shard(layer, world_axis(), LOCAL)
        layer.dispatcher = build_dispatcher(CONFIG, Placement(ep=world_axis()))
        dist.all_to_all_single = spy

        def block(x: Tensor) -> Tensor:  # the next module needs the layer's output again
            return layer(x).square()

        recompute(block, batch(rank, (5, 3), False)[0].requires_grad_(), keep_exchanges=keep).sum().backward()
        return count

    assert run_ranks(script, 2, True) == [4, 4] and run_ranks(script, 2, False) == [6, 6]
