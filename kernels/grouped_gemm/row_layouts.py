"""Products of all experts at once, without host synchronisation, for accelerators.

A row layout assigns each sorted row a place in the operands of a product. ``GroupedLayout`` keeps the rows as they are
and uses torch's grouped product, which takes bf16 and rows of a multiple of 16 bytes. ``BlockLayout`` serves all other
dtypes and widths: it pads each expert's rows to whole blocks of about R/E rows and multiplies all blocks as one batch.
There are at most 2E+1 blocks, whatever the routing.
"""

# R rows sorted by expert, E experts, P places of a layout, B blocks; I and O are the in and out width of a product.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clamp_offsets(offsets_E: Tensor, num_rows: int) -> Tensor:
    """Return offsets that never decrease and stay within 0..num_rows; valid offsets are unchanged.

    With invalid offsets a product would access memory outside its operands. Refusing them would make the host wait.
    """
    return offsets_E.clamp(0, num_rows).cummax(0).values


class GroupedLayout:
    """Each sorted row is its own place. Results past ``offsets[E]`` are undefined and must not be read."""

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        self.offsets_E = clamp_offsets(offsets_E, num_rows)
        self.ends_E = self.offsets_E[1:].to(torch.int32)

    def to_places(self, index_R: Tensor) -> Tensor:
        """Rearrange one entry per sorted row into one entry per place, [P]."""
        return index_R

    def places_of(self, rows: Tensor) -> Tensor:
        """Return the places of sorted rows; -1 stays -1."""
        return rows

    def product(self, rows_PI: Tensor, weight_EIO: Tensor) -> Tensor:
        product = _traced_grouped_mm if torch.compiler.is_compiling() else grouped_mm
        return product(rows_PI, weight_EIO, self.ends_E)

    def weight_grad(self, left_PO: Tensor, right_PI: Tensor) -> Tensor:
        """[E, O, I] left.T @ right by expert; zero for experts without rows."""
        grad_EOI = self.partial_weight_grad(left_PO, right_PI)
        return grad_EOI.masked_fill_((self.offsets_E.diff() == 0)[:, None, None], 0)

    def partial_weight_grad(self, left_PO: Tensor, right_PI: Tensor) -> Tensor:
        """Return :meth:`weight_grad`, but undefined for experts without rows, whose gradient torch does not write."""
        return F.grouped_mm(left_PO.t(), right_PI, offs=self.ends_E)


def _dense(weight_EIO: Tensor) -> Tensor:
    """Return the weight as torch's grouped product requires it: dense, and starting at a multiple of 16 bytes."""
    dense = weight_EIO.is_contiguous() or weight_EIO.mT.is_contiguous()
    if dense and weight_EIO.storage_offset() * weight_EIO.element_size() % 16 == 0:
        return weight_EIO
    return weight_EIO.clone(memory_format=torch.contiguous_format)


def grouped_mm(rows_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Return rows @ weight[e] by expert, [P, O]; ``ends_E`` is int32."""
    return F.grouped_mm(rows_PI, _dense(weight_EIO), offs=ends_E)


#: an op of its own, because dynamo cannot trace the look at the weight's address
_traced_grouped_mm = torch.library.custom_op("equimoe::grouped_mm", grouped_mm, mutates_args=())


@_traced_grouped_mm.register_fake
def _(rows_PI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    return rows_PI.new_empty(rows_PI.shape[0], weight_EIO.shape[2])


class BlockLayout:
    """Blocks of ``size`` places, each of one expert.

    Padding places hold a copy of some row. The weight gradients leave them out.
    """

    def __init__(self, offsets_E: Tensor, num_rows: int) -> None:
        device, self.experts = offsets_E.device, offsets_E.shape[0] - 1
        self.offsets_E = offsets_E = clamp_offsets(offsets_E, num_rows)
        self.size = -(-num_rows // (16 * self.experts)) * 16
        num_blocks = -(-num_rows // self.size) + self.experts
        counts_E = offsets_E.diff()
        blocks_E = (counts_E + self.size - 1) // self.size
        ends_E = blocks_E.cumsum(0)
        first_E = (ends_E - blocks_E) * self.size
        expert_B = torch.searchsorted(ends_E, torch.arange(num_blocks, device=device), right=True)
        self.expert_B = expert_B.clamp_(max=self.experts - 1)
        expert_P = self.expert_B.repeat_interleave(self.size)
        rank_P = torch.arange(num_blocks * self.size, device=device) - first_E[expert_P]
        self.filled_P = rank_P < counts_E[expert_P]
        self.row_P = (rank_P + offsets_E[expert_P]).clamp_(max=num_rows - 1)
        row_R = torch.arange(num_rows, device=device)
        expert_R = (torch.searchsorted(offsets_E, row_R, right=True) - 1).clamp_(0, self.experts - 1)
        self.place_R = row_R - offsets_E[expert_R] + first_E[expert_R]

    def to_places(self, index_R: Tensor) -> Tensor:
        return index_R[self.row_P]

    def places_of(self, rows: Tensor) -> Tensor:
        return torch.where(rows < 0, -1, self.place_R[rows.clamp(min=0)])

    def _batch(self, rows_PI: Tensor) -> Tensor:
        return rows_PI.view(-1, self.size, rows_PI.shape[1])

    def product(self, rows_PI: Tensor, weight_EIO: Tensor) -> Tensor:
        return torch.bmm(self._batch(rows_PI), weight_EIO[self.expert_B]).flatten(0, 1)

    def weight_grad(self, left_PO: Tensor, right_PI: Tensor) -> Tensor:
        left_PO, right_PI = (t.masked_fill(~self.filled_P[:, None], 0) for t in (left_PO, right_PI))
        wide = torch.float64 if left_PO.dtype == torch.float64 else torch.float32
        grad_BOI = torch.bmm(self._batch(left_PO).mT, self._batch(right_PI)).to(wide)
        # index_put sorts its indices, so it always adds in the same order
        grad_EOI = grad_BOI.new_zeros(self.experts, *grad_BOI.shape[1:])
        return grad_EOI.index_put_((self.expert_B,), grad_BOI, accumulate=True).to(left_PO.dtype)


def row_layout(offsets_E: Tensor, num_rows: int, dtype: torch.dtype, *widths: int) -> GroupedLayout | BlockLayout:
    """Choose the faster layout for this dtype and these matrix widths. Requires at least one row."""
    aligned = all(width % 8 == 0 for width in widths)
    return (GroupedLayout if dtype == torch.bfloat16 and aligned else BlockLayout)(offsets_E, num_rows)
