"""A small decoder that an engine trains in fp64 for a few steps, on any mesh."""

# G sequences of a step, S positions, V vocabulary.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.engines.torch import TorchEngine
from equimoe.moe.model import Decoder
from equimoe.moe.model.documents import document_numbers
from equimoe.moe.parallel import IGNORED, Mesh
from tests.helpers import oracle
from tests.helpers.recorded import Recorded, full

SEQUENCES, LENGTH, VOCABULARY, MICRO_BATCHES = 8, 8, 16, 2


def make(
    kind: type[Decoder] = Decoder,
    layers: int = 2,
    coefficient: float = 0.1,
    estimator: Any = "exact",
    bias_update_rate: float = 0.0,
    **how: Any,
) -> Any:
    """Build a decoder with experts in every second block; all weights are the same on every rank."""
    torch.manual_seed(0)
    balance = BalanceConfig(
        coefficient=coefficient,
        estimator=estimator,
        micro_batches=MICRO_BATCHES,
        bias_update_rate=bias_update_rate,
    )
    moe = MoEConfig(8, 4, num_experts=4, top_k=2, balance=balance, init_std=0.4)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "seq_len": LENGTH, "num_layers": layers, "num_heads": 2}
    return kind(**sizes, intermediate_size=8, moe=moe, moe_every=2, **how).double()


def engine_of(model: Decoder, mesh: Mesh | None, optimizer: Recorded | None = None, **how: Any) -> TorchEngine:
    """Build an engine, by default with AdamW and strong weight decay, so that a zero gradient differs from none."""
    dp = 1 if mesh is None else mesh["dp"].size
    shape = (SEQUENCES // dp // MICRO_BATCHES, LENGTH)
    adamw = Recorded(torch.optim.AdamW, weight_decay=0.5)
    return build_engine(model, mesh, optimizer or adamw, micro_batches=MICRO_BATCHES, shape=shape, **how)


def batches(mesh: Mesh | None, step: int = 0) -> list[Batch]:
    """Return this rank's micro-batches of a step."""
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size, mesh["dp"].rank)
    ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    mine = ids.chunk(dp)[rank].chunk(MICRO_BATCHES)
    return [Batch(part[:, :-1], part[:, 1:]) for part in mine]


def varied(given: list[Batch], step: int) -> list[Batch]:
    """Return the batches with, in step 1, several documents per sequence and some positions without a label; in step 2,
    with no label at all; and so on."""
    if step % 3 == 1:
        return [
            replace(
                batch,
                labels=batch.labels.masked_fill(batch.inputs % 3 == 0, IGNORED),
                documents=document_numbers(batch.inputs // 4, 0),  # ids 0 to 3 end a document
            )
            for batch in given
        ]
    return (
        [replace(batch, labels=torch.full_like(batch.labels, IGNORED)) for batch in given] if step % 3 == 2 else given
    )


def whole(engine: TorchEngine) -> dict[str, Tensor]:
    """Return all parameters of this rank, whole."""
    return {name: full(p) for name, p in engine.parameters.items()}


def freeze(engine_or_model: TorchEngine | nn.Module, which: Callable[[str], bool], frozen: bool = True) -> None:
    """Freeze, or unfreeze, the weights whose names match."""
    named = engine_or_model.parameters if isinstance(engine_or_model, TorchEngine) else None
    for name, p in (named or dict(engine_or_model.named_parameters())).items():  # type: ignore[union-attr]
        if which(name):
            p.requires_grad_(not frozen)


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error among the tensors of ``got``, and its name."""
    return max((oracle.relative_error(value.view_as(want[name]), want[name]), name) for name, value in got.items())


def disturb(
    engine: Any,
    batches_of: Callable[[int], list[Batch]],
    state: Callable[[Any], dict[str, Tensor]],
    last: str = "not finite",
) -> None:
    """Run an evaluation, steps that raise, one that is not finite, and one that is refused. All leave nothing behind.

    The steps that raise have two micro-batches, which are counted ahead, and break in the second training forward, or
    in its backward: at its start, or where nearly all weights have their gradients. ``last`` names what comes last, so
    that nothing cleans up after it: "not finite" or "raises".
    """
    engine.evaluate(batches_of(7))
    if last == "raises":
        _not_finite(engine, batches_of, state)

    def planted(*_: Any) -> None:
        raise ArithmeticError("planted")

    def in_the_backward(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(planted)

    whole = engine.parts[0]
    first = next(module for module in whole.modules() if list(module.parameters(recurse=False)))
    for module, broken in ((whole, planted), (whole, in_the_backward), (first, in_the_backward)):
        calls = iter(range(4))
        handle = module.register_forward_hook(
            lambda *given, calls=calls, broken=broken: broken(*given) if next(calls) == 3 else None
        )
        with pytest.raises(ArithmeticError, match="planted"):
            engine.step(batches_of(8), 0.01)
        handle.remove()
    if last == "not finite":
        _not_finite(engine, batches_of, state)


def _not_finite(
    engine: Any, batches_of: Callable[[int], list[Batch]], state: Callable[[Any], dict[str, Tensor]]
) -> None:
    before = state(engine)
    handle = engine.parts[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    result = engine.step(batches_of(9), 0.01)
    handle.remove()
    after = state(engine)
    assert not result.applied and not result.norm.isfinite()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    seen: list[Any] = []
    result = engine.step(batches_of(9), 0.01, lambda computed: bool(seen.append(computed)))
    after = state(engine)
    assert not result.applied and len(seen) == 1 and float(seen[0].norm) == float(result.norm) > 0
    assert all(torch.equal(after[name], value) for name, value in before.items())
