"""Held-out loss and routing by domain.  N domains, L MoE layers, E experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collectives import sum_over, world_axis
from ..layer import MoE
from ..parallel import share_of
from ..parallel.share import IGNORED
from ..types import Routing
from .data import heldout_batches

if TYPE_CHECKING:
    from .loop import Trainer


@contextmanager
def watch_routing(layers: Iterable[MoE]) -> Iterator[list[list[Routing]]]:
    """Within it, the list of a layer grows by its routing of every forward, of whatever kind that is."""
    handles, seen = [], []
    for layer in layers:
        found: list[Routing] = []
        # called with module, inputs and output
        handles.append(layer.router.register_forward_hook(lambda *of, found=found: found.append(of[2])))
        seen.append(found)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, Any]:
    """Held-out loss in nats per token, over all and by domain, and how often each domain's tokens choose each expert.

    Every rank calls it and gets the same answer: {"loss", "domains": {d: {"loss", "tokens"}}, "routing": {d: [L][E]}}.
    """
    corpus, config, mesh, device = trainer.corpus, trainer.config, trainer.mesh, trainer.device
    engine, numbers = trainer.engine, trainer.moe_numbers
    place = {domain: i for i, domain in enumerate(corpus.domains)}
    sums_N2 = torch.zeros(len(place), 2, dtype=torch.float64, device=device)
    counts_NLE = torch.zeros(len(place), len(numbers), config.model.num_experts, dtype=torch.float64, device=device)
    for part in engine.parts:
        part.eval()
    batches = heldout_batches(
        corpus,
        config.data.seq_len,
        config.log.eval_sequences,
        config.data.micro_batch,
        trainer.data.rank,
        trainer.data.size,
    )
    counted = mesh is None or mesh["tp"].rank == 0  # the others of a tensor-parallel group have the same losses
    while several := list(islice(batches, engine.at_once)):
        shares = [
            share_of(inputs_BS.to(device), labels_BS.to(device), mask_BS.to(device), mesh)
            for _, inputs_BS, labels_BS, mask_BS in several
        ]
        with watch_routing(trainer.layers.values()) as routings:
            found = engine.evaluate(shares)
        for (domain, *_), share, nats_BS in zip(several, shares, found, strict=False):  # none before the last stage
            tokens = (share.labels != IGNORED).sum()
            sums_N2[place[domain]] += torch.stack((nats_BS.double().sum(), tokens.double())) * counted
        for number, of_layer in zip(trainer.layers, routings, strict=True):
            for (domain, _, _, mask_BS), routing in zip(several, of_layer, strict=False):
                whole_B = mask_BS.all(dim=1).to(device)  # sequences that are padded would count padding
                counts_NLE[place[domain], numbers.index(number)] += routing.counts_BE[whole_B].sum(0)
    for part in engine.parts:
        part.train()
    return _summary(corpus.domains, _summed(sums_N2), _summed(counts_NLE))


def _summed(values: Tensor) -> Tensor:
    return sum_over(values, world_axis()).get().cpu()


def _summary(domains: tuple[str, ...], sums_N2: Tensor, counts_NLE: Tensor) -> dict[str, Any]:
    frequency_NLE = counts_NLE / counts_NLE.sum(-1, keepdim=True).clamp_min(1)
    rows = [(d, *sums, freq) for d, sums, freq in zip(domains, sums_N2.tolist(), frequency_NLE.tolist(), strict=True)]
    nats, tokens = sums_N2.sum(0).tolist()
    return {
        "loss": nats / max(tokens, 1.0),
        "domains": {d: {"loss": nats / tokens, "tokens": int(tokens)} for d, nats, tokens, _ in rows if tokens},
        "routing": {d: freq for d, _, tokens, freq in rows if tokens},
    }
