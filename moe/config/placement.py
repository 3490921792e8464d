"""How experts are placed on ranks while training."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class PlacementConfig:
    """Which experts are replicated in a step, and when owners change, under ``parallel.experts='fssdp'``.

    The method is that of Hecate, "Unlocking Efficient Sparse Model Training via Fully Sharded Sparse Data Parallelism".
    """

    #: experts per layer that are replicated at most: as many as can be sent while the layer's attention computes
    overlap: int = 2
    #: memory for a layer's replicas on a rank, in MiB of weights; None: as much as ``overlap`` experts take
    memory_mb: int | None = None
    #: the load of a step is expected to be the mean of this many steps before it
    window: int = 5
    #: file that says which rank owns which expert at the start; None: equal runs of consecutive experts
    owners: str | None = None
    #: optimizer steps after which experts move to new owners if ranks then wait less for each other; 0: never
    reshard_every: int = 0
    #: free replicas after the forward, and copy them again in the backward; recomputation does so anyway
    rematerialize: bool = False
    #: after routing, add replicas for the real load where ``memory_mb`` leaves room, if the busiest rank saves more
    #: than this many rows per copy (as many as it computes in the time of one); the host then waits for every layer.
    #: None: never
    calibrate: int | None = None
    #: ranks per node, adjacent ones; None: those that the launcher says
    node_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("overlap", 0), ("window", 1), ("reshard_every", 0)):
            require(getattr(self, name) >= least, f"placement.{name}", getattr(self, name), f"must be at least {least}")
        named = self.owners is None or self.owners.strip() != ""
        require(named, "placement.owners", self.owners, "is empty; give a JSON file, or leave it out")
        possible = self.calibrate is None or self.calibrate >= 0
        require(possible, "placement.calibrate", self.calibrate, "must be at least 0, or left out")
        for name in ("memory_mb", "node_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"placement.{name}", value, "must be at least 1, or left out")
        finds_room = self.calibrate is None or (self.overlap > 0 and self.memory_mb is not None)
        remedy = "has no effect without placement.overlap and placement.memory_mb, with room for more replicas than "
        require(finds_room, "placement.calibrate", self.calibrate, remedy + "placement.overlap; set both")

    def replicas_per_rank(self, expert_bytes: int) -> int:
        """Return how many replicas of a layer fit on a rank. Raises ValueError if none does."""
        if self.memory_mb is None or not self.overlap:
            return self.overlap
        room = (self.memory_mb << 20) // expert_bytes
        if not room:
            raise ValueError(
                f"placement.memory_mb={self.memory_mb}: an expert takes {expert_bytes / (1 << 20):.1f} MiB; raise it, "
                "or set placement.overlap=0 to replicate nothing"
            )
        return room
