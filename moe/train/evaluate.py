"""Evaluation: held-out loss and routing by domain.  N domains, L MoE layers, E experts, B sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..collectives import LOCAL, sum_over, world_axis
from ..engines import Batch, Engine
from ..layer import MoE
from ..observe import chosen_probability, domain_record, watch_routers
from ..parallel import IGNORED, Mesh
from ..routing import Router
from ..types import Routing
from .build import documents_of
from .config import TrainConfig
from .data import Corpus, heldout_batches


def _seen(router: Router, x_TD: Tensor, routing: Routing) -> Tensor:
    """Return fp64 [B, E + 2] per sequence: choices of each expert, tokens, probability of the chosen experts."""
    chosen_B = chosen_probability(router, x_TD, routing)
    return torch.cat((routing.counts_BE.double(), routing.tokens_B[:, None], chosen_B[:, None]), dim=1)


@torch.no_grad()
def evaluate(
    engine: Engine,
    layers: Mapping[int, MoE],
    numbers: Sequence[int],
    corpus: Corpus,
    config: TrainConfig,
    mesh: Mesh | None,
    device: torch.device,
) -> dict[str, Any]:
    """Measure the held-out loss in nats per token, and how tokens are routed, overall and by domain.

    ``layers`` maps block numbers to this rank's MoE layers; ``numbers`` are the block numbers of all MoE layers of the
    model. Every rank must call this function, and all get the same result: the fields of an ``eval`` record, see
    :mod:`equimoe.moe.observe.metrics`. Padding is masked. Positions without a label have no loss; they are routed.

    With a capacity, each sequence is evaluated alone with a capacity of its own, so the result does not depend on how
    sequences are batched. Under ``capacity.pad`` each rank's part of a sequence still has its own capacity.
    """
    cp, tp = (LOCAL, LOCAL) if mesh is None else (mesh["cp"], mesh["tp"])
    readers = LOCAL if mesh is None else mesh["dp"]
    place = {domain: i for i, domain in enumerate(corpus.domains)}
    sums_N2 = torch.zeros(len(place), 2, dtype=torch.float64, device=device)
    width = config.moe.num_experts + 2
    seen_NLX = torch.zeros(len(place), len(numbers), width, dtype=torch.float64, device=device)
    rows = config.data.micro_batch if config.moe.capacity is None else 1
    batches = heldout_batches(corpus, config.data.seq_len, config.log.eval_sequences, rows, readers.rank, readers.size)
    while several := list(islice(batches, config.micro_batches(readers.size))):
        with watch_routers(layers.values(), _seen) as routings, _capacity_of_each_sequence(layers.values(), mesh):
            found = engine.evaluate([Batch(x, y, m, documents_of(x, config, corpus)) for _, x, y, m in several])
        for (domain, _, labels_BS, mask_BS), losses_BS in zip(
            several, found, strict=False
        ):  # empty before the last stage
            if tp.rank == 0:  # all ranks of a tensor-parallel group have the same losses
                sums_N2[place[domain], 0] += losses_BS.double().sum()
                sums_N2[place[domain], 1] += (mask_BS & (labels_BS != IGNORED)).sum() * (cp.rank == 0)
        for number, of_layer in zip(layers, routings, strict=True):
            for (domain, *_), seen_BX in zip(several, of_layer, strict=False):
                seen_NLX[place[domain], numbers.index(number)] += seen_BX.sum(0)
    return _summary(corpus.domains, _summed(sums_N2), _summed(seen_NLX))


@contextmanager
def _capacity_of_each_sequence(layers: Iterable[MoE], mesh: Mesh | None) -> Iterator[None]:
    """Within the block, give every sequence its own capacity, over all ranks that hold parts of it."""
    axis = LOCAL if mesh is None else mesh["sequence"]
    with ExitStack() as stack:
        for layer in layers:
            if layer.capacity is not None and not layer.capacity.pads:
                stack.enter_context(layer.capacity.of_sequences(axis))
        yield


def _summed(values: Tensor) -> Tensor:
    return sum_over(values, world_axis()).get().cpu()


def _summary(domains: tuple[str, ...], sums_N2: Tensor, seen_NLX: Tensor) -> dict[str, Any]:
    counts_NLE, tokens_NL, chosen_NL = seen_NLX[..., :-2], seen_NLX[..., -2], seen_NLX[..., -1]
    frequency_NLE = counts_NLE / counts_NLE.sum(-1, keepdim=True).clamp_min(1)
    loss, tokens = sums_N2.sum(0).tolist()
    evaluated = {domain: i for i, domain in enumerate(domains) if sums_N2[i, 1]}
    routed = {domain: i for domain, i in evaluated.items() if tokens_NL[i].sum()}
    routing = {domain: frequency_NLE[i].tolist() for domain, i in evaluated.items()}
    return {
        "loss": loss / max(tokens, 1.0),
        "domains": {
            d: {"loss": float(sums_N2[i, 0] / sums_N2[i, 1]), "tokens": int(sums_N2[i, 1])}
            for d, i in evaluated.items()
        },
        "routing": routing,
        "score_sum": {d: (chosen_NL[i] / tokens_NL[i]).tolist() for d, i in routed.items()},
        **domain_record({domain: routing[domain] for domain in routed}),
    }
