"""A decoder whose feed-forwards are merged linear experts: it sees no later token, and trains alike on every mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import MoEConfig
from equimoe.moe.experts import MergedSwiGLU
from equimoe.moe.model import Decoder, merge_experts
from equimoe.moe.parallel import ParallelConfig, build_mesh
from equimoe.moe.serve.generate import generate
from equimoe.moe.serve.sample import Sampling
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but
from tests.helpers.trained import LENGTH, VOCABULARY, batches, engine_of, whole, worst
from tests.moe.test_merged_linear import mixture


def decoder(segment: int | None = 3, sees_future: bool = False, **how: Any) -> Decoder:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": 2, "num_heads": 2}
    moe = MoEConfig(8, 4, 4, 2, init_std=0.4)
    model = Decoder(**sizes, intermediate_size=6, moe=moe, moe_every=0, **how).double()
    return merge_experts(model, 4, 2, segment, sees_future)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("segment", [None, 3])
def test_the_feed_forward_is_that_of_mixed_outputs(segment: int | None, masked: bool) -> None:
    torch.manual_seed(0)
    merged, results = MergedSwiGLU(6, 5, 4, 2, segment, 0.7).double(), []
    mask = torch.arange(24).view(3, 8) % 5 > 1 if masked else None

    def by_token(x: Tensor, mask: Tensor | None) -> Tensor:
        gate, up = mixture(merged.gate_proj, x, mask), mixture(merged.up_proj, x, mask)
        return mixture(merged.down_proj, F.silu(gate) * up, mask)

    for compute in (merged, by_token):
        x = torch.randn(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = compute(x, mask)
        gradients = torch.autograd.grad(y.square().sum(), [x, *merged.parameters()], allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("segment", "leaks"), [(1, False), (3, False), (None, True)])
def test_a_later_token_changes_earlier_outputs_only_without_segments(segment: int | None, leaks: bool) -> None:
    model = decoder(segment, sees_future=segment is None)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :-1], after[:, :-1]) != leaks
    assert not torch.equal(before[:, -1], after[:, -1])


def test_a_decoder_passes_its_mask_on() -> None:
    """Padding between the tokens of a sequence changes nothing for later ones, and without the mask it does."""
    model = decoder(1)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(LENGTH).expand(2, -1) % 4 > 0
    x = model.embedding(ids)
    changed, block = x + 3.0 * ~mask[..., None], model.blocks["0"]
    with torch.no_grad():
        for given, alike in ((mask, True), (None, False)):
            before, after = (block._feed_forward(t, given, None, None) for t in (x, changed))
            assert torch.equal(before[mask], after[mask]) == alike


def trained(rank: int, world: int, degrees: dict[str, Any]) -> dict[str, Tensor]:
    mesh = build_mesh(ParallelConfig(**degrees)) if world > 1 else None
    engine = engine_of(decoder(recompute_blocks=world > 1), mesh)
    for step in range(2):
        engine.step(batches(mesh, step), lr=0.05)
    return whole(engine)


MESHES: list[tuple[int, dict[str, Any]]] = [(2, {}), (2, {"data_parallel": "fsdp"}), (2, {"pp": 2})]


@pytest.mark.parametrize(("world", "degrees"), slow_but(MESHES[1:2], MESHES), ids=str)
def test_steps_equal_those_of_one_process(world: int, degrees: dict[str, Any]) -> None:
    want, before = trained(0, 1, {}), dict(decoder().named_parameters())
    for got in run_ranks(trained, world, degrees):
        assert worst(got, want)[0] < 1e-8
        assert not any(torch.equal(value, before[name]) for name, value in got.items())


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="segment=None: lets each position see later ones, .*; give a length, or set"):
        decoder(None)
    with pytest.raises(ValueError, match="model: merged linear experts read whole sequences, and have no cache"):
        generate(decoder(), [[1, 2]], Sampling(max_tokens=2))

    def body(rank: int, world: int) -> None:
        with pytest.raises(ValueError, match="parallel.tp=2, parallel.cp=1: merged linear experts read whole sequen"):
            trained(rank, world, {"tp": 2})

    run_ranks(body, 2)
