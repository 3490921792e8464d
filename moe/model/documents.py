"""The documents of packed sequences.  B sequences, S positions."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def document_numbers(ids_BS: Tensor, end: int) -> Tensor:
    """Return int64 [B, S], the number of each position's document in its sequence. Id ``end`` ends a document, and
    belongs to it."""
    ends_BS = (ids_BS == end).long()
    return ends_BS.cumsum(1) - ends_BS


def document_starts(numbers_BS: Tensor) -> Tensor:
    """Return int64 [B, S], the position at which each position's document starts. Neighbours with the same number are
    in the same document."""
    positions_S = torch.arange(numbers_BS.shape[1], device=numbers_BS.device)
    first_BS = torch.ones_like(numbers_BS, dtype=torch.bool)
    first_BS[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
    return torch.where(first_BS, positions_S, 0).cummax(1).values


class Documents:
    """The documents of a micro-batch, in the forms in which attention needs them.

    Each form is computed once, on first use, and shared by all layers.
    """

    def __init__(self, starts_BS: Tensor) -> None:
        #: int64 [B, S], the position at which each position's document starts
        self.starts_BS = starts_BS
        self._made: dict[tuple[Callable[..., Any], int | None], Any] = {}

    @cached_property
    def lengths(self) -> list[int]:
        """The lengths of all documents, sequence by sequence. Waits for the device."""
        first_BS = self.starts_BS == torch.arange(self.starts_BS.shape[1], device=self.starts_BS.device)
        starts = first_BS.flatten().nonzero().flatten()
        return starts.diff(append=starts.new_tensor([first_BS.numel()])).tolist()

    def seen(self, window: int | None = None) -> Tensor:
        """Return bool [B, 1, S, S], True where a query (third dimension) attends to a key (last dimension)."""
        return self._once(_seen, window)

    def block_mask(self, window: int | None = None) -> Any:
        """Return the same as a ``BlockMask`` of FlexAttention."""
        return self._once(_block_mask, window)

    def _once(self, make: Callable[[Tensor, int | None], Any], window: int | None) -> Any:
        if (make, window) not in self._made:
            self._made[make, window] = make(self.starts_BS, window)
        return self._made[make, window]


def _seen(starts_BS: Tensor, window: int | None) -> Tensor:
    key_S = torch.arange(starts_BS.shape[1], device=starts_BS.device)
    query_S1 = key_S[:, None]
    seen_BSS = (key_S >= starts_BS[..., None]) & (key_S <= query_S1)
    if window is not None:
        seen_BSS &= query_S1 - key_S < window
    return seen_BSS[:, None]


def _block_mask(starts_BS: Tensor, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask  # imported late: it imports torch's compiler

    def seen(b: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = (key >= starts_BS[b, query]) & (key <= query)
        return found if window is None else found & (query - key < window)

    count, length = starts_BS.shape
    return create_block_mask(seen, count, None, length, length, device=starts_BS.device)
