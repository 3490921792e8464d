"""Held-out loss and routing by domain.  N domains, L MoE layers, E experts."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collectives import sum_over, world_axis
from ..parallel import share_of
from ..parallel.share import IGNORED
from ..routing import Router
from ..types import Routing
from .data import heldout_batches
from .observe import chosen_probability, domain_record, watch_routers

if TYPE_CHECKING:
    from .loop import Trainer


def _seen(router: Router, x_TD: Tensor, routing: Routing) -> Tensor:
    """fp64 [B, E + 2]: choices, tokens, and the chosen experts' probabilities of each sequence."""
    chosen_B = chosen_probability(router, x_TD, routing)
    return torch.cat((routing.counts_BE.double(), routing.tokens_B[:, None], chosen_B[:, None]), dim=1)


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, Any]:
    """Held-out loss in nats per token, over all and by domain, and how each domain's tokens are routed.

    Every rank calls it and gets the same answer, an ``eval`` record's fields: see :mod:`equimoe.moe.train.metrics`.
    """
    corpus, config, mesh, device = trainer.corpus, trainer.config, trainer.mesh, trainer.device
    engine, numbers = trainer.engine, trainer.moe_numbers
    place = {domain: i for i, domain in enumerate(corpus.domains)}
    sums_N2 = torch.zeros(len(place), 2, dtype=torch.float64, device=device)
    seen_NLX = torch.zeros(len(place), len(numbers), config.model.num_experts + 2, dtype=torch.float64, device=device)
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
        with watch_routers(trainer.layers.values(), _seen) as routings:
            found = engine.evaluate(shares)
        for (domain, *_), share, nats_BS in zip(several, shares, found, strict=False):  # none before the last stage
            tokens = (share.labels != IGNORED).sum()
            sums_N2[place[domain]] += torch.stack((nats_BS.double().sum(), tokens.double())) * counted
        for number, of_layer in zip(trainer.layers, routings, strict=True):
            for (domain, _, _, mask_BS), seen_BX in zip(several, of_layer, strict=False):
                whole_B = mask_BS.all(dim=1).to(device)  # sequences that are padded would count padding
                seen_NLX[place[domain], numbers.index(number)] += seen_BX[whole_B].sum(0)
    for part in engine.parts:
        part.train()
    return _summary(corpus.domains, _summed(sums_N2), _summed(seen_NLX))


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
