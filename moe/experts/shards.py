"""LoRA experts that share their weights in shards (Mixture of Shards, arXiv 2410.00938).

E experts, e of them on this rank, F width, D hidden, r rank, p private rank, V vectors that an expert has from a pool,
C shards of a vector, L length of a vector.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..collectives import fill_normal, first_row, reset
from .lora import LoRAExperts
from .shared import SwiGLU


class ShardedLoRAExperts(LoRAExperts):
    """LoRA experts of rank r with as many weights as :class:`LoRAExperts` of rank ``equivalent`` have.

    A row of A and a column of B is a vector. The first p = ``private`` of an expert are its own; each of the others is
    ``shards`` shards from a pool that the experts of this layer share, one after the other. There is a pool for each A
    and each B. Which shards an expert has is random and fixed, and it has none twice.

    The paper shares a pool between layers as well. Here, each layer has its own, so that FSDP and pipelines can hold
    layers apart. Every expert-parallel rank holds the pools.
    """

    def __init__(
        self,
        base: SwiGLU,
        num_experts: int,
        rank: int,
        alpha: float,
        backend: str = "auto",
        *,
        equivalent: int = 2,
        private: int = 1,
        shards: int = 4,
    ) -> None:
        if not 1 <= private < equivalent <= rank:
            raise ValueError(
                f"private={private}, equivalent={equivalent}, rank={rank}: each must be at least 1, private below "
                "equivalent, and equivalent at most rank; 1, 2 and 8 are usual"
            )
        (width, hidden), like = base.gate_proj.weight.shape, base.gate_proj.weight
        if shards < 1 or width % shards or hidden % shards:
            raise ValueError(
                f"shards={shards}: must divide the hidden width {hidden} and the experts' width {width}; 1 leaves "
                "vectors whole"
            )
        each, held = rank - private, num_experts * (equivalent - private)
        if each > held:
            raise ValueError(
                f"rank={rank}: an expert takes {each} vectors from pools of {held}; lower it, or raise equivalent"
            )
        super().__init__(base, num_experts, private, alpha, backend)
        self.scale = alpha / rank
        lengths = {"gate_a": hidden, "gate_b": width, "up_a": hidden, "up_b": width, "down_a": width, "down_b": hidden}
        self.pool = ShardPool(lengths, num_experts, each, held, shards, like)

    def reset_parameters(self) -> None:
        """Initialize each A with new random values, and each B with zero. The base stays."""
        super().reset_parameters()
        for part in self.children():
            if part is not self.base:
                reset(part)

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`LoRAExperts.weights`."""
        gate_up_a, gate_b, up_b, down_a, down_b = super().weights()
        gate_a, up_a = gate_up_a.chunk(2, dim=1)
        of = self.pool(first_row(self.gate_b), len(gate_b))
        return (
            torch.cat((gate_a, of["gate_a"], up_a, of["up_a"]), dim=1),
            torch.cat((gate_b, of["gate_b"].mT), dim=2),
            torch.cat((up_b, of["up_b"].mT), dim=2),
            torch.cat((down_a, of["down_a"]), dim=1),
            torch.cat((down_b, of["down_b"].mT), dim=2),
        )


class ShardPool(nn.Module):
    """Pools of ``held`` vectors [L] in C shards each, of which every expert has V vectors.

    ``lengths`` has the L of each pool by name; the names of B end with "_b". A pool is a parameter [held * C, L / C].
    ``choices`` int64 [pools, E, V * C] are the rows of each pool that an expert has.
    """

    choices: Tensor

    def __init__(
        self, lengths: dict[str, int], num_experts: int, each: int, held: int, shards: int, like: Tensor
    ) -> None:
        super().__init__()
        self.lengths, self.each = lengths, each
        for name, length in lengths.items():
            self.register_parameter(name, nn.Parameter(like.new_empty(held * shards, length // shards)))
        rows = torch.empty(len(lengths), num_experts, each * shards, dtype=torch.int64, device=like.device)
        self.register_buffer("choices", rows, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the pools of each A with new random values, those of each B with zero, and the choices."""
        for name, length in self.lengths.items():
            pool = self.get_parameter(name)
            if name.endswith("_b"):
                nn.init.zeros_(pool)
            else:
                fill_normal(pool, 1 / math.sqrt(length))
        # the same in every run and on every rank; independent for each pool, which dissociates the pairs of A and B
        (pools, experts, chosen), rows = self.choices.shape, self.get_parameter(name).shape[0]
        order = torch.rand(pools, experts, rows, generator=torch.Generator().manual_seed(0), device="cpu").argsort(-1)
        self.choices.copy_(order[..., :chosen])

    def forward(self, first: int, experts: int) -> dict[str, Tensor]:
        """Return the vectors [e, V, L] of experts ``first`` to ``first + experts - 1`` from each pool."""
        return {
            name: F.embedding(rows_EV[first : first + experts], self.get_parameter(name)).view(
                experts, self.each, length
            )
            for rows_EV, (name, length) in zip(self.choices, self.lengths.items(), strict=True)
        }


#: name -> class of experts of low rank over one frozen MLP
LOW_RANK: dict[str, Any] = {"lora": LoRAExperts, "shards": ShardedLoRAExperts}
