"""Checks the DeepEP dispatcher with a stand-in for package deep_ep that has its signatures and sends rows by gloo."""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from equimoe.moe import BalanceConfig, DispatchConfig, MoE, MoEConfig
from equimoe.moe.collectives import Axis, world_axis
from equimoe.moe.dispatch import AllToAllDispatcher, build_dispatcher
from equimoe.moe.placement import Placement
from tests.helpers import oracle
from tests.helpers.fork import run_ranks

CONFIG = MoEConfig(
    hidden_size=8,
    intermediate_size=4,
    num_experts=8,
    top_k=3,
    balance=BalanceConfig(coefficient=0.0),
    shared_intermediate_size=4,
    dispatch=DispatchConfig("deepep"),
    init_std=0.5,
)


class Event:
    """Records that it was waited for."""

    def current_stream_wait(self) -> None:
        Buffer.calls.append("wait")


class Sizes:
    @staticmethod
    def get_nvl_buffer_size_hint(hidden_bytes: int, num_ranks: int) -> int:
        return hidden_bytes * num_ranks

    @staticmethod
    def get_rdma_buffer_size_hint(hidden_bytes: int, num_ranks: int) -> int:
        return 0


class Buffer:
    """Stands in for ``deep_ep.Buffer`` as documented: sends a token once to each rank; ids count from 0 there, -1 is
    none.
    """

    calls: list[str] = []

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.world, self.calls = dist.get_world_size(group), Buffer.calls
        self.calls.append("buffer")

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Sizes:
        return Sizes()

    get_combine_config = get_dispatch_config

    @staticmethod
    def capture() -> str:
        return "event"

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any = None, async_finish: bool = False
    ) -> tuple:
        self.calls.append("layout")
        self.each = num_experts // self.world
        to = torch.where(topk_idx >= 0, topk_idx // self.each, -1)
        in_rank = torch.stack([(to == rank).any(1) for rank in range(self.world)], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, Event()

    def _send(self, t: Tensor, sent: list[int], received: list[int]) -> Tensor:
        out = t.new_empty(sum(received), *t.shape[1:])
        dist.all_to_all_single(out, t.contiguous(), received, sent, group=self.group)
        return out

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        previous_event: Any = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple:
        self.calls.append("dispatch" if handle is None else "dispatch by handle")
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        assert not allocate_on_comm_stream or (previous_event is not None and async_finish)
        if handle is not None:
            assert topk_idx is None and topk_weights is None
            token, sent, received, _ = handle
            return self._send(x[token], sent, received), None, None, None, None, Event()
        assert num_tokens_per_rank is not None and is_token_in_rank is not None and topk_weights is not None
        assert num_tokens_per_expert is not None and topk_idx is not None and topk_weights.dtype == torch.float32
        rank_of, token = is_token_in_rank.T.nonzero(as_tuple=True)
        counts = num_tokens_per_rank.long()
        theirs = torch.empty_like(counts)
        dist.all_to_all_single(theirs, counts, group=self.group)
        sent, received = counts.tolist(), theirs.tolist()
        local = topk_idx[token] - rank_of[:, None] * self.each
        here = (local >= 0) & (local < self.each)
        ids = self._send(torch.where(here, local, -1), sent, received)
        weights = self._send(torch.where(here, topk_weights[token], 0.0), sent, received)
        rows = self._send(x[token], sent, received)
        handle = (token, sent, received, len(x))
        return rows, ids, weights, [0] * self.each, handle, Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple:
        self.calls.append("combine" if topk_weights is None else "combine with weights")
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        token, sent, received, tokens = handle
        y = torch.zeros(tokens, x.shape[1]).index_add_(0, token, self._send(x, received, sent).float())
        weights = None
        if topk_weights is not None:
            home = self._send(topk_weights, received, sent)
            weights = torch.zeros(tokens, home.shape[1]).index_add_(0, token, home)
        return y.bfloat16(), weights, Event()


def run(rank: int, name: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = replace(CONFIG, dispatch=DispatchConfig(name))  # type: ignore[arg-type]
    layer, axis = MoE(config), world_axis()
    for key, weight in list(layer.experts.named_parameters()):
        own = weight.detach().chunk(axis.size)[axis.rank].clone()
        setattr(layer.experts, key, torch.nn.Parameter(own))
    layer.dispatcher = build_dispatcher(config, Placement(ep=axis))
    layer = layer.to(dtype)
    layer.shared.register_forward_pre_hook(lambda *_: Buffer.calls.append("shared"))
    x = torch.randn((5, 0, 3, 7)[rank], 8, generator=torch.Generator().manual_seed(rank)).to(dtype).requires_grad_()
    y = layer(x)
    y.float().square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {key: p.grad for key, p in layer.named_parameters()}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", module)


@pytest.mark.usefixtures("installed")
def test_equals_the_all_to_all_in_the_documented_sequence_of_calls() -> None:
    def script(rank: int, world: int, name: str) -> tuple[dict[str, Tensor], list[str]]:
        return run(rank, name), Buffer.calls

    for (got, calls), (want, _) in zip(run_ranks(script, 4, "deepep"), run_ranks(script, 4, "all_to_all"), strict=True):
        for key, value in want.items():
            assert oracle.relative_error(got[key], value) < 2e-2, key
        forward = ["buffer", "layout", "dispatch", "shared", "wait", "combine"]
        assert calls == [*forward, "dispatch by handle", "combine with weights"]


@pytest.mark.usefixtures("installed")
def test_rows_that_are_not_bf16_are_refused() -> None:
    def script(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match=r"'deepep': rows are torch.float32, but deep_ep sends only bf16"):
            run(rank, "deepep", torch.float32)

    run_ranks(script, 2)


@pytest.mark.usefixtures("installed")
def test_layers_share_a_buffer_that_grows() -> None:
    def script(rank: int, world: int) -> list[int]:
        from equimoe.moe.dispatch.deepep import buffer_for

        rows = [torch.zeros(1, width, dtype=torch.bfloat16) for width in (8, 8, 4, 16)]
        return [buffer_for(Buffer, world_axis(), x).num_nvl_bytes for x in rows] + [Buffer.calls.count("buffer")]

    assert run_ranks(script, 2) == [[32, 32, 32, 64, 2]] * 2


@pytest.mark.parametrize("module", [None, types.ModuleType("deep_ep")], ids=["absent", "without Buffer"])
def test_falls_back_with_a_warning(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    with pytest.warns(UserWarning, match="dispatch.name='deepep': .*deep_ep.*; using 'all_to_all' instead"):
        dispatcher = build_dispatcher(CONFIG, Placement(ep=Axis("ep", None, 2, 0)))
    assert type(dispatcher) is AllToAllDispatcher and dispatcher.axis.size == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one rank dispatches nothing, so nothing is warned about
        MoE(CONFIG)
