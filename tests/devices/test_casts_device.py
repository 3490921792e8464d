"""What it costs on a GPU to cast the experts' weights, over the micro-batches of a step, and where no cast is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from equimoe.moe import MoE, MoEConfig, Step, cast_once, recompute
from tests.helpers.casts import Casts, always_cast
from tests.helpers.fake_cuda import Watch, needs_fake_cuda, on_fake_cuda

pytest.importorskip("triton", reason="needs triton, which is not to be had on this system")
pytestmark = needs_fake_cuda

BF16 = partial(torch.autocast, "cuda", torch.bfloat16)
D, F, E = 4096, 512, 128  # 30B-b
LARGE = MoEConfig(hidden_size=D, intermediate_size=F, num_experts=E, top_k=8)
SMALL = MoEConfig(hidden_size=64, intermediate_size=64, num_experts=4, top_k=2)


def on_cuda(config: MoEConfig) -> Any:
    with torch.device("cuda"):
        return MoE(config)


@pytest.mark.parametrize(("recomputes", "before"), [(False, 4), (True, 8)])
def test_a_step_of_four_micro_batches(recomputes: bool, before: int) -> None:
    """A layer of the size of 30B-b: to cast all its weights reads and writes 4.8 GB."""

    def one(kept: bool) -> tuple[int, int, int]:
        layer, x = on_cuda(LARGE), torch.empty(2048, D, device="cuda", requires_grad=True)
        step = Step.of(layer)
        with cast_once(layer), Watch() as watch, Casts(layer) as casts:
            for _ in range(4):
                with step.micro_batch():
                    with BF16():
                        y = recompute(layer, x) if recomputes else layer(x)
                    y.sum().backward()
            assert not watch.waits and not watch.mixed
        return casts.count, casts.bytes, watch.bytes

    def both() -> list[tuple[int, int, int]]:
        found = [one(True)]
        with always_cast():
            return [*found, one(False)]

    kept, always = on_fake_cuda(both)
    print(f"\nrecomputation {recomputes}: casts {always[0]} -> {kept[0]}, their GB {always[1] / 1e9:.1f} -> ", end="")
    print(f"{kept[1] / 1e9:.1f}, all GB {always[2] / 1e9:.1f} -> {kept[2] / 1e9:.1f}")
    of_all = 6 * 3 * E * F * D
    assert kept[:2] == (2, of_all) and always[:2] == (2 * before, before * of_all)
    assert always[2] - kept[2] == (before - 1) * of_all


def test_neither_a_captured_graph_nor_another_stream_reads_a_kept_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    def casts_of(layer: Any) -> int:
        with torch.no_grad(), BF16(), Casts(layer) as casts:
            layer(torch.empty(8, 64, device="cuda"))
        return casts.count

    def body() -> list[int]:
        layer, found = on_cuda(SMALL), []
        streams = [lambda *_, name=name: name for name in ("first", "second", "third")]
        monkeypatch.setattr(torch.cuda, "current_stream", streams[0])
        with cast_once(layer):
            for capturing in (False, False, True, True, False):
                monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda it=capturing: it)
                found.append(casts_of(layer))
            for stream in (streams[0], streams[1], streams[1], streams[2]):
                monkeypatch.setattr(torch.cuda, "current_stream", stream)
                found.append(casts_of(layer))
        return found

    assert on_fake_cuda(body) == [2, 0, 2, 2, 0, 0, 2, 0, 2]
