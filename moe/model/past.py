"""What attention keeps of earlier positions while text is generated: the key/value cache.

B sequences, S new positions of each, L kept positions, M key/value heads, N query heads, G = N / M.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Positions:
    """The positions of one forward pass, which all layers share."""

    #: int64 [B, S]; rows may have different ones, for prompts of different lengths
    positions_BS: Tensor
    #: number of kept positions that any row may attend to: the largest position + 1
    reach: int
    #: int64 [B, S], the position at which each new position's document starts; None: the text is one document
    starts_BS: Tensor | None = None


@dataclass
class Past:
    """Room for ``length`` positions of one attention layer."""

    length: int
    now: Positions
    kept: list[Tensor] = field(default_factory=list)

    def extend(self, *new: Tensor) -> list[Tensor]:
        """Keep tensors [B, ..., S, X] of the new positions; return those of all positions so far, [B, ..., L, X].

        What lies beyond a row's own position is not that row's; :meth:`attend` does not see it.
        """
        if not self.kept:
            self.kept = [t.new_zeros(*t.shape[:-2], self.length, t.shape[-1]) for t in new]
        for t, kept in zip(new, self.kept, strict=True):
            places = self.now.positions_BS.view(t.shape[0], *[1] * (t.dim() - 3), t.shape[-2], 1)
            kept.scatter_(-2, places.expand_as(t), t)
        return [kept[..., : self.now.reach, :] for kept in self.kept]

    def attend(
        self, q_BNSH: Tensor, k_BMLH: Tensor, v_BMLW: Tensor, *, window: int | None = None, scale: float | None = None
    ) -> Tensor:
        """Attend from each new position to itself and all earlier ones, or the ``window - 1`` before it."""
        groups, length = q_BNSH.shape[1] // k_BMLH.shape[1], q_BNSH.shape[2]
        kept_L = torch.arange(k_BMLH.shape[2], device=q_BNSH.device)
        behind_BSL = self.now.positions_BS[..., None] - kept_L
        seen_BSL = behind_BSL >= 0 if window is None else (behind_BSL >= 0) & (behind_BSL < window)
        if self.now.starts_BS is not None:
            seen_BSL = seen_BSL & (kept_L >= self.now.starts_BS[..., None])
        # the queries of a group become rows, so that keys and values need not be repeated
        rows = q_BNSH.unflatten(1, (-1, groups)).flatten(2, 3)
        mask = seen_BSL.repeat(1, groups, 1)[:, None]
        out = F.scaled_dot_product_attention(rows, k_BMLH, v_BMLW, attn_mask=mask, scale=scale)
        return out.unflatten(2, (groups, length)).flatten(1, 2)
