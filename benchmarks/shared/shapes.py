"""The shapes of the layers that the suites measure, in order of importance, and their random inputs."""

# T tokens, D hidden, F expert width, E experts, K top-k, R = T*K routed rows.

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

ROUTINGS = ("uniform", "zipf")
#: number of elements of the random block that fills large CPU tensors; odd, so that no matrix tile holds equal rows
_BLOCK = (1 << 22) + 1


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer and its number of tokens; ``source`` says who published them."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int
    source: str = ""

    @property
    def rows(self) -> int:
        return self.T * self.K

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the experts' three products, 2 per multiply-add."""
        return 6 * self.rows * self.F * self.D

    @property
    def backward_flops(self) -> int:
        return 2 * self.forward_flops

    @property
    def weights(self) -> int:
        """Number of parameters of the experts."""
        return 3 * self.E * self.F * self.D

    def with_tokens(self, tokens: int) -> Shape:
        return replace(self, T=tokens)


_SONIC = "SonicMoE, arXiv 2512.14080"
_MODEL = "model configuration"
#: measured in this order until the time is used up
ALL = (
    Shape("30B-b", 32768, 4096, 512, 128, 8, _SONIC),
    Shape("7B-a", 24576, 1536, 256, 128, 8, _SONIC),
    Shape("Qwen3-30B-8k", 8192, 2048, 768, 128, 8, _MODEL),
    Shape("Mixtral-8x7B-8k", 8192, 4096, 14336, 8, 2, _MODEL),
    Shape("Qwen3-30B-32k", 32768, 2048, 768, 128, 8, _MODEL),
    Shape("OLMoE-32k", 32768, 2048, 1024, 64, 8, _MODEL),
    Shape("gpt-oss-20b-32k", 32768, 2880, 2880, 32, 4, _MODEL),
    Shape("Qwen3-235B-32k", 32768, 4096, 1536, 128, 8, _MODEL),
    Shape("1.4B-a", 40960, 768, 256, 128, 8, _SONIC),
    Shape("30B-a", 32768, 4096, 256, 256, 16, _SONIC),
    Shape("120B-b", 32768, 4096, 1024, 128, 8, _SONIC),
    Shape("7B-b", 24576, 1536, 512, 64, 4, _SONIC),
    Shape("30B-c", 32768, 4096, 1024, 64, 4, _SONIC),
    Shape("120B-a", 32768, 4096, 512, 256, 16, _SONIC),
    Shape("1.4B-b", 40960, 768, 512, 64, 4, _SONIC),
    Shape("7B-c", 24576, 1536, 1024, 32, 2, _SONIC),
    Shape("1.4B-c", 40960, 768, 1024, 32, 2, _SONIC),
    Shape("120B-c", 32768, 4096, 2048, 64, 4, _SONIC),
    Shape("DeepSeek-V3-32k", 32768, 7168, 2048, 256, 8, _MODEL),
)
#: for trying out the command; not part of the defaults
TINY = (Shape("tiny-a", 48, 32, 16, 4, 2), Shape("tiny-b", 40, 16, 24, 8, 3))
BY_NAME = {shape.name: shape for shape in (*ALL, *TINY)}
#: limits for a CPU, so that a shape takes seconds: operations of a step, number of weights; and the fewest tokens
CPU_FLOPS, CPU_WEIGHTS, CPU_TOKENS = 3e10, 6e7, 64


def for_cpu(shape: Shape) -> Shape:
    """Return a shape with the same widths, fewer experts (at least 2K) and fewer tokens (a multiple of 64)."""
    experts = min(shape.E, max(2 * shape.K, int(CPU_WEIGHTS / (3 * shape.F * shape.D))))
    wanted = CPU_FLOPS / (18 * shape.K * shape.F * shape.D)
    return replace(shape, E=experts, T=min(shape.T, max(CPU_TOKENS, int(wanted) // 64 * 64)))


def parse(names: str | None) -> list[Shape]:
    """Return the shapes of a comma-separated list, in its order; all shapes for None."""
    if names is None:
        return list(ALL)
    unknown = [name for name in names.split(",") if name not in BY_NAME]
    if unknown:
        raise ValueError(f"--shapes={','.join(unknown)}: choose from {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names.split(",")]


def unit_random(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    """Return normal random numbers of standard deviation ``scale``. Large CPU tensors repeat one random block."""
    count = torch.Size(size).numel()
    if device.type != "cpu" or count <= _BLOCK:
        return torch.randn(size, dtype=dtype, device=device).mul_(scale)
    block, out = torch.randn(_BLOCK).mul_(scale).to(dtype), torch.empty(count, dtype=dtype)
    for start in range(0, count, _BLOCK):
        out[start : start + _BLOCK].copy_(block[: count - start])
    return out.view(size)


def expert_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[nn.Parameter, nn.Parameter]:
    """Return random gate_up [E, 2F, D] and down [E, D, F], of standard deviation 1 / sqrt(input width)."""
    gate_up = unit_random((shape.E, 2 * shape.F, shape.D), dtype, device, shape.D**-0.5)
    down = unit_random((shape.E, shape.D, shape.F), dtype, device, shape.F**-0.5)
    return nn.Parameter(gate_up), nn.Parameter(down)


def spread_logits(shape: Shape, device: torch.device) -> Tensor:
    """Return fp32 logits [T, E], evenly spaced for each token: nearly equal logits could have equal fp32 scores."""
    rank_TE = torch.rand(shape.T, shape.E, device=device).argsort(1)
    return (rank_TE.float() * (6 / shape.E) - 3).requires_grad_()


@dataclass(frozen=True)
class Batch:
    """Inputs of one step. ``dy_TD`` is the gradient of the output."""

    x_TD: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    dy_TD: Tensor

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the tensors by the names that error messages use."""
        given = {"x": self.x_TD, "weights": self.weights_TK, "ids": self.ids_TK, "gradient": self.dy_TD}
        return {prefix + name: value for name, value in given.items()}


def route(shape: Shape, routing: str, device: torch.device) -> Tensor:
    """Return random expert ids, int64 [T, K], all different for each token.

    ``uniform``: every expert is equally likely. ``zipf``: the r-th expert of a random order has probability ~ 1 / r.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing={routing!r}: use one of {', '.join(ROUTINGS)}")
    # the K largest values of log p + Gumbel noise are a sample without replacement
    keys_TE = -torch.log(torch.empty(shape.T, shape.E, device=device).exponential_().clamp_min_(1e-30))
    if routing == "zipf":
        rank_E = torch.randperm(shape.E, device=device) + 1
        keys_TE -= rank_E.log()
    return keys_TE.topk(shape.K, dim=1).indices


def make_batch(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device) -> Batch:
    """Return random inputs of unit scale, with fp32 weights that sum to 1 for each token."""
    x_TD = unit_random((shape.T, shape.D), dtype, device).requires_grad_()
    weights_TK = torch.rand(shape.T, shape.K, device=device).add_(0.1)
    weights_TK = (weights_TK / weights_TK.sum(1, keepdim=True)).requires_grad_()
    return Batch(x_TD, weights_TK, route(shape, routing, device), unit_random((shape.T, shape.D), dtype, device))
