"""Takes a rank's part of a micro-batch, and computes the loss on it.  B sequences, S positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional as F

from ..model.documents import document_starts
from .context import shard_sequence
from .mesh import Mesh

#: label of a position that the loss ignores, as in ``torch.nn.functional.cross_entropy``
IGNORED = -100

#: (outputs of the model, labels) of a micro-batch -> loss of each position [B, S]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LocalBatch:
    """One rank's part of a micro-batch."""

    #: int64 [B, S / cp]
    inputs: Tensor
    #: int64 [B, S / cp], :data:`IGNORED` where a token is not valid; or floats [B, S / cp, ...], unchanged
    labels: Tensor
    #: bool, True where a token is valid; [B, S / cp], or under sequence parallelism [B, S / cp / tp]
    mask: Tensor | None = None
    #: int64 [B, S / cp], the position in the whole sequence at which each position's document starts; None: the
    #: sequence is one document
    starts: Tensor | None = None
    #: int64, the numbers that routers read, of the mask's shape
    codes: Tensor | None = None


def take_local_batch(
    inputs_BS: Tensor,
    labels_BS: Tensor,
    mask_BS: Tensor | None = None,
    documents_BS: Tensor | None = None,
    mesh: Mesh | None = None,
    codes_BS: Tensor | None = None,
) -> LocalBatch:
    """Take this rank's part of a micro-batch. All context- and tensor-parallel peers must pass the same sequences.

    Raises ValueError for a sequence length that the degrees do not divide, for ``documents`` of another shape, and for
    a micro-batch without sequences under tensor parallelism.
    """
    starts_BS = None if documents_BS is None else _starts(documents_BS, inputs_BS)
    if mask_BS is not None and not labels_BS.is_floating_point():
        labels_BS = labels_BS.masked_fill(~mask_BS, IGNORED)
    if mesh is None:
        return LocalBatch(inputs_BS, labels_BS, mask_BS, starts_BS, codes_BS)
    cp, tp = mesh["cp"], mesh["tp"]
    pieces = tp.size if mesh.degrees.sequence_parallel else 1
    if inputs_BS.shape[1] % (cp.size * pieces):
        degrees = f"parallel.cp * parallel.tp = {cp.size} * {pieces}"
        raise ValueError(f"data.seq_len={inputs_BS.shape[1]}: must be a multiple of {degrees}; change one of them")
    if tp.size > 1 and len(inputs_BS) == 0:  # a DTensor without rows makes torch 2.13 loop without end
        raise ValueError(
            "batch.inputs: has no sequence, which tensor parallelism cannot compute; give it one with mask=False "
            f"everywhere, or set parallel.tp={tp.size} to 1"
        )
    if cp.size > 1:
        inputs_BS, labels_BS = (shard_sequence(t, 1, cp.size, cp.rank) for t in (inputs_BS, labels_BS))
        mask_BS, starts_BS, codes_BS = (
            None if t is None else shard_sequence(t, 1, cp.size, cp.rank) for t in (mask_BS, starts_BS, codes_BS)
        )
    if pieces > 1:
        mask_BS, codes_BS = (None if t is None else t.chunk(pieces, dim=1)[tp.rank] for t in (mask_BS, codes_BS))
    return LocalBatch(inputs_BS, labels_BS, mask_BS, starts_BS, codes_BS)


def _starts(documents_BS: Tensor, inputs_BS: Tensor) -> Tensor:
    if documents_BS.shape != inputs_BS.shape[:2] or documents_BS.is_floating_point():
        raise ValueError(
            f"documents: {documents_BS.dtype} of shape {tuple(documents_BS.shape)}; give integers of shape "
            f"{tuple(inputs_BS.shape[:2])}, the number of each position's document"
        )
    return document_starts(documents_BS)


def vocabulary_parallel(mesh: Mesh | None) -> AbstractContextManager[None]:
    """Return a context for loss and backward in which logits stay sharded over the vocabulary under tp."""
    return nullcontext() if mesh is None or mesh["tp"].size == 1 else loss_parallel()


def token_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Compute the cross-entropy of each token [B, S], in nats; zero where the label is :data:`IGNORED`.

    The result is fp32 (fp64 for fp64 logits). If logits are sharded over the vocabulary, call this within
    :func:`vocabulary_parallel`; all tp ranks then get the same values, which count once in the step's loss.
    """
    logits_BSV = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    losses = F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), reduction="none", ignore_index=IGNORED)
    return (losses.to_local() if isinstance(losses, DTensor) else losses).view(labels_BS.shape)
