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

#: the label of a position that is not predicted
IGNORED = -100


@dataclass(frozen=True)
class Share:
    """What one rank reads of a micro-batch."""

    #: int64 [B, S / cp]
    inputs: Tensor
    #: the same, :data:`IGNORED` where a token is not valid; or real numbers [B, S / cp, ...], as they were given
    labels: Tensor
    #: True where a token is valid, for the positions that this rank holds between split layers
    mask: Tensor | None = None


def share_of(inputs_BS: Tensor, labels_BS: Tensor, mask_BS: Tensor | None = None, mesh: Mesh | None = None) -> Share:
    """This rank's share of sequences that all its context- and tensor-parallel peers are given alike.

    Raises ValueError for a length that the degrees do not divide.
    """
    if mask_BS is not None and not labels_BS.is_floating_point():
        labels_BS = labels_BS.masked_fill(~mask_BS, IGNORED)
    if mesh is None:
        return Share(inputs_BS, labels_BS, mask_BS)
    cp, tp = mesh["cp"], mesh["tp"]
    pieces = tp.size if mesh.degrees.sequence_parallel else 1
    if inputs_BS.shape[1] % (cp.size * pieces):
        degrees = f"parallel.cp * parallel.tp = {cp.size} * {pieces}"
        raise ValueError(f"data.seq_len={inputs_BS.shape[1]}: must be a multiple of {degrees}")
    if cp.size > 1:
        inputs_BS, labels_BS = (shard_sequence(t, 1, cp.size, cp.rank) for t in (inputs_BS, labels_BS))
        mask_BS = None if mask_BS is None else shard_sequence(mask_BS, 1, cp.size, cp.rank)
    if mask_BS is not None and pieces > 1:
        mask_BS = mask_BS.chunk(pieces, dim=1)[tp.rank]
    return Share(inputs_BS, labels_BS, mask_BS)


def vocabulary_parallel(mesh: Mesh | None) -> AbstractContextManager[None]:
    """Around loss and backward, so that no rank needs the logits of the whole vocabulary."""
    return nullcontext() if mesh is None or mesh["tp"].size == 1 else loss_parallel()


def token_nats(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """[B, S] cross-entropy of each token in fp32 (fp64 for fp64), zero where the label is :data:`IGNORED`.

    With logits split over the vocabulary call it within :func:`vocabulary_parallel`; ranks of a tensor-parallel group
    then find the same values, which are one share of the step's loss and not several.
    """
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    nats = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none", ignore_index=IGNORED)
    return (nats.to_local() if isinstance(nats, DTensor) else nats).view(labels_BS.shape)
