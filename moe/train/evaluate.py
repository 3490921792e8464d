"""Held-out loss and routing by domain.  N domains, L MoE layers, E experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..collectives import LOCAL, sum_over, world_axis
from ..layer import MoE
from ..model import Decoder
from ..parallel import Mesh, share_of, token_nats, vocabulary_parallel
from ..types import Routing
from .config import TrainConfig
from .data import Corpus, heldout_batches
from .step import mixed_precision


@contextmanager
def watch_routing(layers: list[MoE]) -> Iterator[list[Routing]]:
    """Within it, the list holds each layer's routing of the last forward, of whatever kind that was."""
    seen: list[Any] = [None] * len(layers)

    def keep(place: int) -> Any:
        def hook(router: Any, inputs: Any, routing: Routing) -> None:
            seen[place] = routing

        return hook

    handles = [layer.router.register_forward_hook(keep(i)) for i, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def evaluate(
    model: Decoder, corpus: Corpus, config: TrainConfig, device: torch.device, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Held-out loss in nats per token, over all and by domain, and how often each domain's tokens choose each expert.

    Every rank calls it and gets the same answer: {"loss", "domains": {d: {"loss", "tokens"}}, "routing": {d: [L][E]}}.
    """
    data = LOCAL if mesh is None else mesh["dp"]
    layers = model.moe_layers()
    number = {domain: i for i, domain in enumerate(corpus.domains)}
    sums_N2 = torch.zeros(len(number), 2, dtype=torch.float64, device=device)
    counts_NLE = torch.zeros(len(number), len(layers), config.model.num_experts, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    batches = heldout_batches(
        corpus, config.data.seq_len, config.log.eval_sequences, config.data.micro_batch, data.rank, data.size
    )
    counted = mesh is None or mesh["tp"].rank == 0  # the others of a tensor-parallel group have the same losses
    with watch_routing(layers) as routings, vocabulary_parallel(mesh):
        for domain, *parts in batches:
            inputs_BS, labels_BS, mask_BS = (part.to(device) for part in parts)
            share = share_of(inputs_BS, labels_BS, mask_BS, mesh)
            assert share.mask is not None
            with mixed_precision(config, device):
                logits_BSV = model(share.inputs)
            nats = token_nats(logits_BSV, share).double().sum()
            sums_N2[number[domain]] += torch.stack((nats, share.mask.sum().double())) * counted
            whole_B = mask_BS.all(dim=1)  # sequences that are padded would count padding
            for i, routing in enumerate(routings):
                counts_NLE[number[domain], i] += routing.counts_BE[whole_B].sum(0)
    model.train(was_training)
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
