"""How ranks share the work: the degrees by the names that users know, and the choice of methods."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import check_choices, require

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT = ("edp", "ep", "etp")


@dataclass(frozen=True)
class ParallelConfig:
    """Two foldings of the same ranks, for the dense part and for the experts; -1 stands for what is left.

    The ranks are pp x dp_replicate x dp_shard x cp x tp to the one, and pp x edp x ep x etp to the other.
    """

    #: pipeline stages (ranks; a schedule may give each rank several)
    pp: int = 1
    #: groups of data-parallel ranks that each hold all weights (HSDP)
    dp_replicate: int = 1
    #: data-parallel ranks within such a group; they hold different sequences, as the groups do
    dp_shard: int = -1
    #: ranks that hold parts of the same sequences
    cp: int = 1
    #: ranks among which attention, dense feed-forwards, embedding and head are split
    tp: int = 1
    #: replicas of an expert
    edp: int = -1
    #: ranks among which the experts are split; -1 with edp=-1: as many as divide the number of experts evenly
    ep: int = 1
    #: ranks that split each expert
    etp: int = 1
    #: under tp, let each rank hold a part of the tokens between the split layers
    sequence_parallel: bool = True
    #: weights are replicated over data-parallel ranks ("ddp"), or split over dp_shard x cp ("fsdp", torch's FSDP2)
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    #: how attention reaches over cp: keys and values travel around, or are gathered
    context: Literal["ring", "all_gather"] = "ring"
    #: in which order a pipeline's stages work on the micro-batches
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    #: stages that each rank of a pipeline holds; none: as few as the schedule takes
    stages_per_rank: int | None = None
    #: seconds a collective may take before the run ends with an error
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for names in (DENSE, EXPERT):
            for name in names:
                value = getattr(self, name)
                require(value >= 1 or value == -1, f"parallel.{name}", value, "must be at least 1, or -1 for the rest")
            rest = [name for name in names if getattr(self, name) == -1]
            alone = len(rest) < 2 or rest == ["edp", "ep"]
            require(alone, f"parallel.{' and '.join(rest)}", -1, "only one of these can be the rest")
        check_choices(self, "parallel.")
        given = self.stages_per_rank
        require(given is None or given >= 1, "parallel.stages_per_rank", given, "must be at least 1")
        require(self.timeout_s > 0, "parallel.timeout_s", self.timeout_s, "must be positive")

    def resolve(self, world: int, num_experts: int = 0) -> ParallelConfig:
        """The same with every -1 replaced, for ``world`` ranks. Raises ValueError if the degrees do not fit.

        With ``ep`` and ``edp`` both at -1, ``ep`` is the largest degree that divides ``num_experts`` and the ranks of
        a pipeline stage; without ``num_experts``, all of those ranks.
        """
        dense = self._fill(DENSE, world, "the number of processes")
        what = "the number of processes" if dense["pp"] == 1 else "the number of processes of a pipeline stage"
        stage = world // dense["pp"]
        asked = self
        if self.edp == self.ep == -1:
            asked = replace(self, ep=1 if stage % self.etp else math.gcd(stage // self.etp, num_experts))
        return replace(self, **dense, **asked._fill(EXPERT, stage, what))

    def _fill(self, names: tuple[str, ...], total: int, what: str) -> dict[str, Any]:
        degrees = {name: getattr(self, name) for name in names}
        known = self._known(names)
        rest = [name for name, value in degrees.items() if value == -1]
        if rest and total % known == 0:
            degrees[rest[0]] = total // known
        elif rest or known != total:
            text = " * ".join(f"parallel.{name}={value}" for name, value in degrees.items() if value not in (1, -1))
            must = "must divide" if rest else "must be equal to, or have one at -1 and divide,"
            fitting = self.pp * math.lcm(self._known(DENSE[1:]), self._known(EXPERT)) if self.pp != -1 else known
            remedy = f"start a multiple of {fitting} processes, or set other degrees"
            raise ValueError(f"{text or 'parallel'}: {must} {what}, which is {total}; {remedy}")
        return degrees

    def _known(self, names: tuple[str, ...]) -> int:
        return math.prod(value for value in (getattr(self, name) for name in names) if value != -1)

    @property
    def stages_of_rank(self) -> int:
        """Pipeline stages that each rank holds."""
        return self.stages_per_rank or (1 if self.schedule in ("gpipe", "1f1b") else 2)

    @property
    def dp(self) -> int:
        """Ranks that hold different sequences, when resolved."""
        return self.dp_replicate * self.dp_shard
