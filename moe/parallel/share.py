"""A rank's share of a batch, and its loss.  B sequences, S positions, V vocabulary."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from .context import shard_sequence
from .mesh import Mesh


@dataclass(frozen=True)
class Share:
    """What one rank reads of a micro-batch."""

    #: int64 [B, S / cp]
    inputs: Tensor
    labels: Tensor
    #: [B, S / cp], True where a token is valid
    mask: Tensor | None = None
    #: the mask of the positions that this rank holds between its split layers
    layer_mask: Tensor | None = None


def share_of(inputs_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor | None = None, mesh: Mesh | None = None) -> Share:
    """This rank's share of sequences that all its context- and tensor-parallel peers are given alike.

    Raises ValueError for a length that the degrees do not divide.
    """
    if mesh is None:
        return Share(inputs_BS, labels_BS, mask_BS, mask_BS)
    cp, tp = mesh["cp"], mesh["tp"]
    split = tp if mesh.degrees.sequence_parallel else None
    length = inputs_BS.shape[1]
    if split is not None and length % (cp.size * split.size):
        degrees = f"parallel.cp * parallel.tp = {cp.size} * {split.size}"
        raise ValueError(f"data.seq_len={length}: must be a multiple of {degrees}, or set sequence_parallel=false")
    if cp.size > 1:
        inputs_BS, labels_BS = (shard_sequence(t, 1, cp.size, cp.rank) for t in (inputs_BS, labels_BS))
        mask_BS = None if mask_BS is None else shard_sequence(mask_BS, 1, cp.size, cp.rank)
    held = mask_BS if mask_BS is None or split is None else mask_BS.chunk(split.size, dim=1)[split.rank]
    return Share(inputs_BS, labels_BS, mask_BS, held)


def vocabulary_parallel(mesh: Mesh | None) -> AbstractContextManager[None]:
    """Around loss and backward, so that no rank needs the logits of the whole vocabulary."""
    return nullcontext() if mesh is None or mesh["tp"].size == 1 else loss_parallel()


def token_nats(logits_BSV: Tensor, share: Share) -> Tensor:
    """[B, S] cross-entropy of each token in fp32 (fp64 for fp64), zero where it is not valid.

    With logits split over the vocabulary call it within :func:`vocabulary_parallel`; ranks of a tensor-parallel group
    then find the same values, which are one share of the step's loss and not several.
    """
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    nats = F.cross_entropy(logits_BSV.flatten(0, 1), share.labels.flatten(), reduction="none")
    if isinstance(nats, DTensor):
        nats = nats.to_local()
    nats_BS = nats.view(share.labels.shape)
    return nats_BS if share.mask is None else torch.where(share.mask, nats_BS, 0.0)
