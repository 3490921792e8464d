"""The parallelism degrees, under the names that users know, and how each one works."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import check_literals, require

#: degrees of the two grids of ranks, outermost first
DENSE_DEGREES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_DEGREES = ("edp", "ep", "etp")


@dataclass(frozen=True)
class ParallelConfig:
    """Two factorizations of the same ranks: one for the dense weights, one for the experts.

    The number of ranks is pp * dp_replicate * dp_shard * cp * tp for the dense weights, and pp * edp * ep * etp for the
    experts. -1 means all ranks that the other degrees leave.
    """

    #: pipeline ranks; a schedule may give each rank several stages
    pp: int = 1
    #: groups of data-parallel ranks; each group holds all weights (HSDP)
    dp_replicate: int = 1
    #: data-parallel ranks of a group; all ranks of all groups hold different sequences
    dp_shard: int = -1
    #: ranks that hold parts of the same sequences
    cp: int = 1
    #: ranks that split attention, dense feed-forwards, embedding and head
    tp: int = 1
    #: replicas of each expert
    edp: int = -1
    #: ranks that the experts are distributed over; -1 (with edp=-1): as many as divide the experts evenly
    ep: int = 1
    #: ranks that split each expert's width
    etp: int = 1
    #: "ep" gives each expert edp replicas, with optimizer states on each. "fssdp" (fully sharded sparse data
    #: parallelism) gives it one owner, and copies the busiest experts' weights to the other ranks in every step
    experts: Literal["ep", "fssdp"] = "ep"
    #: with tp > 1, shard the tokens over the tp ranks outside the layers that tp splits
    sequence_parallel: bool = True
    #: "ddp" replicates weights over data-parallel ranks; "fsdp" (torch's FSDP2) shards them over dp_shard x cp
    data_parallel: Literal["ddp", "fsdp"] = "ddp"
    #: how attention sees the keys and values of all cp ranks: they travel around a ring, or are gathered
    context: Literal["ring", "all_gather"] = "ring"
    #: the order in which pipeline stages process the micro-batches
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = "1f1b"
    #: pipeline stages per rank; None: the fewest that the schedule accepts
    stages_per_rank: int | None = None
    #: seconds in which a step may make no progress before the run ends and names the silent ranks; ranks get three
    #: times as long to join, and ten times for setup, evaluation and saving. In your own loop: a collective's limit
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for names in (DENSE_DEGREES, EXPERT_DEGREES):
            for name in names:
                value = getattr(self, name)
                require(value >= 1 or value == -1, f"parallel.{name}", value, "must be at least 1, or -1 for the rest")
            rest = [name for name in names if getattr(self, name) == -1]
            alone = len(rest) < 2 or rest == ["edp", "ep"]
            require(alone, f"parallel.{' and '.join(rest)}", -1, "only one of these can be -1; set the others")
        check_literals(self, "parallel.")
        given = self.stages_per_rank
        require(given is None or given >= 1, "parallel.stages_per_rank", given, "must be at least 1")
        remedy = "must be between 0.1 and 100000; 60 is usual"
        require(0.1 <= self.timeout_s <= 100_000, "parallel.timeout_s", self.timeout_s, remedy)

    def resolve(self, world: int, num_experts: int = 0) -> ParallelConfig:
        """Return the degrees for ``world`` ranks, with every -1 replaced. Raises ValueError if they do not fit.

        If ``ep`` and ``edp`` are both -1, ``ep`` becomes the largest degree that divides both ``num_experts`` and the
        ranks of a pipeline stage (over ``etp``); without ``num_experts``, all of those ranks.
        """
        dense = self._fill(DENSE_DEGREES, world, "the number of processes")
        what = "the number of processes" if dense["pp"] == 1 else "the number of processes of a pipeline stage"
        stage = world // dense["pp"]
        asked = self
        if self.experts == "fssdp":
            asked = self._one_owner(stage)
        elif self.edp == self.ep == -1:
            asked = replace(self, ep=1 if stage % self.etp else math.gcd(stage // self.etp, num_experts))
        return replace(self, **dense, **asked._fill(EXPERT_DEGREES, stage, what))

    def _one_owner(self, stage: int) -> ParallelConfig:
        """Distribute the experts over all ranks of a pipeline stage that do not split them."""
        ranks = stage // self.etp
        for name, value, only in (("ep", self.ep, ranks), ("edp", self.edp, 1)):
            if value not in (1, -1, only):
                raise ValueError(
                    f"parallel.{name}={value}: with parallel.experts='fssdp' each expert has one owner among all "
                    f"{ranks} ranks of a pipeline stage over etp; leave it out"
                )
        return replace(self, ep=max(ranks, 1), edp=-1)

    def _fill(self, names: tuple[str, ...], total: int, what: str) -> dict[str, Any]:
        degrees = {name: getattr(self, name) for name in names}
        known = self._known(names)
        rest = [name for name, value in degrees.items() if value == -1]
        if rest and total % known == 0:
            degrees[rest[0]] = total // known
        elif rest or known != total:
            text = " * ".join(f"parallel.{name}={value}" for name, value in degrees.items() if value not in (1, -1))
            must = "must divide" if rest else "must equal (or divide, with one degree at -1)"
            fitting = known
            if self.pp != -1:
                fitting = self.pp * math.lcm(self._known(DENSE_DEGREES[1:]), self._known(EXPERT_DEGREES))
            remedy = f"make the number of processes a multiple of {fitting}, or change the degrees"
            raise ValueError(f"{text or 'parallel'}: {must} {what}, which is {total}; {remedy}")
        return degrees

    def _known(self, names: tuple[str, ...]) -> int:
        return math.prod(value for value in (getattr(self, name) for name in names) if value != -1)

    @property
    def stages_of_rank(self) -> int:
        """Number of pipeline stages per rank."""
        return self.stages_per_rank or (1 if self.schedule in ("gpipe", "1f1b") else 2)

    @property
    def dp(self) -> int:
        """Number of ranks that hold different sequences. Only valid after :meth:`resolve`."""
        return self.dp_replicate * self.dp_shard
