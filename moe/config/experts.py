"""Configuration of experts that are not MLPs."""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require


@dataclass(frozen=True)
class ZeroComputationConfig:
    """Experts that compute next to nothing, beyond the ``num_experts`` MLPs (MoE++, arXiv 2410.07348).

    Every rank holds them all and computes them where the token is, so that nothing is sent for them. Their ids follow
    those of the MLPs, in the order of these fields.
    """

    #: number of zero experts: E(x) = 0
    zero: int = 1
    #: number of copy experts: E(x) = x
    copy: int = 1
    #: number of constant experts: E(x) = a x + b v with a learned vector v, and [a, b] = softmax(W x)
    constant: int = 2
    #: load of an MLP relative to that of one of these experts: it weighs their loads in the balance losses, and divides
    #: their capacity. With less, tokens choose fewer MLPs
    tau: float = 0.75

    @property
    def number(self) -> int:
        """Number of these experts."""
        return self.zero + self.copy + self.constant

    def __post_init__(self) -> None:
        for name in ("zero", "copy", "constant"):
            value = getattr(self, name)
            require(type(value) is int and value >= 0, f"zero_computation.{name}", value, "must be an integer from 0")
        require(
            self.number > 0, "zero_computation.copy", self.copy, "there is no expert; set a number, or leave it out"
        )
        require(0 < self.tau <= 1, "zero_computation.tau", self.tau, "must be above 0 and at most 1; 0.75 is usual")
