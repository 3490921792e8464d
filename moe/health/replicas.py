"""Finds ranks whose copy of a tensor differs from the other copies.  N parts of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..collectives import Axis, device_of
from ..parallel.alike import content_hash
from ..parallel.grad_norm import local_part

#: smaller than every hash, for parts that a rank does not hold
_ABSENT = torch.iinfo(torch.int64).min


class Replicas:
    """Compares the copies of every tensor that ranks of ``axis`` hold, by hashes of their bits.

    ``tensors`` are this rank's weights, or others, by their names in the whole model, plain tensors or DTensors. Ranks
    hold copies of the same part if name and place agree, whatever shards the tensor. Every rank must create one and
    call its methods.
    """

    def __init__(self, tensors: Mapping[str, Tensor], axis: Axis) -> None:
        self._axis = axis
        mine = [(name, _place(tensor)) for name, tensor in tensors.items() if local_part(tensor).numel()]
        keys = [mine]
        if axis.size > 1:
            keys = [[] for _ in range(axis.size)]
            dist.all_gather_object(keys, mine, group=axis.group)
        held: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for rank, of_rank in enumerate(keys):
            for key in of_rank:
                held.setdefault(key, []).append(rank)
        #: parts that several ranks hold, in the same order on every rank: (name, place) -> ranks of the axis
        self.copies = {key: ranks for key, ranks in sorted(held.items()) if len(ranks) > 1}
        self._mine = {i: key[0] for i, key in enumerate(self.copies) if axis.rank in self.copies[key]}

    @torch.no_grad()
    def difference(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Return None if all copies are equal, else a sentence, the same on every rank, that names tensor and ranks.

        ``tensors`` have the names and places given before. Sends 16 bytes per part, and copies no tensor.
        """
        if not self.copies:
            return None
        device = device_of(self._axis)
        hashes_N = torch.full((len(self.copies),), _ABSENT, dtype=torch.int64, device=device)
        for i, name in self._mine.items():
            hashes_N[i] = content_hash(local_part(tensors[name])).clamp_min(_ABSENT + 1)
        # one MAX finds both extremes: ~ reverses the order without overflow
        extremes_2N = torch.stack((hashes_N, torch.where(hashes_N == _ABSENT, _ABSENT, ~hashes_N)))
        dist.all_reduce(extremes_2N, dist.ReduceOp.MAX, group=self._axis.group)
        different = (extremes_2N[0] != ~extremes_2N[1]).nonzero().flatten().tolist()
        if not different:
            return None
        everywhere = [torch.zeros_like(hashes_N) for _ in range(self._axis.size)]
        dist.all_gather(everywhere, hashes_N, group=self._axis.group)
        (name, _), ranks = list(self.copies.items())[different[0]]
        of_rank = {rank: int(everywhere[rank][different[0]]) for rank in ranks}
        return f"{name}: {_minority(of_rank)}{_more(len(different) - 1)}"


def _place(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset and shape of this rank's part in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return (*(0 for _ in tensor.shape), *tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return (*offset, *shape)


def _minority(hash_of_rank: Mapping[int, int]) -> str:
    """Name the ranks that differ from the value that most ranks have; without a majority, name all."""
    groups: dict[int, list[int]] = {}
    for rank, value in hash_of_rank.items():
        groups.setdefault(value, []).append(rank)
    most, *others = sorted(groups.values(), key=len, reverse=True)
    wrong = sorted(rank for group in others for rank in group)
    if len(most) > len(wrong):
        return f"{_ranks(wrong)} from the other {len(most)} that hold the same copy"
    return f"{_ranks(sorted(hash_of_rank))} from each other, although they hold the same copy"


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} differs" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} differ"


def _more(count: int) -> str:
    return f"; so do their copies of {count} more" if count else ""
