"""Held-out loss and routing by domain.  N domains, L MoE layers, E experts."""

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
from ..parallel import Mesh
from ..routing import Router
from ..types import Routing
from .config import TrainConfig
from .data import Corpus, heldout_batches


def _seen(router: Router, x_TD: Tensor, routing: Routing) -> Tensor:
    """fp64 [B, E + 2]: choices, tokens, and the chosen experts' probabilities of each sequence."""
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
    """Held-out loss in nats per token, over all and by domain, and how each domain's tokens are routed.

    ``layers`` are this rank's MoE layers by their number in the decoder, ``numbers`` those of the whole model.
    Every rank calls it and gets the same answer, an ``eval`` record's fields: see :mod:`equimoe.moe.observe.metrics`.
    Padding is masked. With a capacity limit each sequence is evaluated alone and has its own limit, so the answer does
    not depend on how sequences are grouped (a padded exchange, capacity.pad, still has a limit for each rank's part).
    """
    cp, tp = (LOCAL, LOCAL) if mesh is None else (mesh["cp"], mesh["tp"])
    readers = LOCAL if mesh is None else mesh["dp"]
    place = {domain: i for i, domain in enumerate(corpus.domains)}
    sums_N2 = torch.zeros(len(place), 2, dtype=torch.float64, device=device)
    width = config.model.num_experts + 2
    seen_NLX = torch.zeros(len(place), len(numbers), width, dtype=torch.float64, device=device)
    rows = config.data.micro_batch if config.capacity is None else 1
    batches = heldout_batches(corpus, config.data.seq_len, config.log.eval_sequences, rows, readers.rank, readers.size)
    while several := list(islice(batches, config.micro_batches(readers.size))):
        with watch_routers(layers.values(), _seen) as routings, _capacity_of_each_sequence(layers.values(), mesh):
            found = engine.evaluate([Batch(*batch) for _, *batch in several])
        for (domain, _, _, mask_BS), nats_BS in zip(several, found, strict=False):  # none before the last stage
            if tp.rank == 0:  # the others of a tensor-parallel group have the same losses
                sums_N2[place[domain], 0] += nats_BS.double().sum()
                sums_N2[place[domain], 1] += mask_BS.sum() * (cp.rank == 0)
        for number, of_layer in zip(layers, routings, strict=True):
            for (domain, *_), seen_BX in zip(several, of_layer, strict=False):
                seen_NLX[place[domain], numbers.index(number)] += seen_BX.sum(0)
    return _summary(corpus.domains, _summed(sums_N2), _summed(seen_NLX))


@contextmanager
def _capacity_of_each_sequence(layers: Iterable[MoE], mesh: Mesh | None) -> Iterator[None]:
    """Limits are those of whole sequences, over the ranks that hold parts of them; not of a rank, or of all ranks."""
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
    nats, tokens = sums_N2.sum(0).tolist()
    there = {domain: i for i, domain in enumerate(domains) if sums_N2[i, 1]}
    routed = {domain: i for domain, i in there.items() if tokens_NL[i].sum()}
    routing = {domain: frequency_NLE[i].tolist() for domain, i in there.items()}
    return {
        "loss": nats / max(tokens, 1.0),
        "domains": {
            d: {"loss": float(sums_N2[i, 0] / sums_N2[i, 1]), "tokens": int(sums_N2[i, 1])} for d, i in there.items()
        },
        "routing": routing,
        "score_sum": {d: (chosen_NL[i] / tokens_NL[i]).tolist() for d, i in routed.items()},
        **domain_record({domain: routing[domain] for domain in routed}),
    }
