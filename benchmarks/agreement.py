"""What stands in front of every figure: forward and all gradients against fp64, by norm and by the worst row.

Inputs have unit scale, so that a wrong output cannot hide below a tolerance, and every row is measured by itself, or
against the root mean square of all rows where that is more, so that one wrong row among thousands is found. NaN never
passes.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from peers import Contestant
from shapes import Batch, Shape
from torch import Tensor

from equimoe.kernels.sort_by_expert import ExpertOrder
from equimoe.kernels.topk_gate import GateOutput

#: by dtype: the error by norm, and that of the worst row
TOLERANCE = {
    torch.bfloat16: (1e-2, 4e-2),
    torch.float16: (2e-3, 2e-2),
    torch.float32: (1e-5, 1e-4),
}
NAMES = ("output", "x", "weights", "gate_up", "down")
#: bytes that fp64 weights and their gradients may take, and operations the reference may cost: CPU, GPU
_BYTES = {"cpu": 1 << 30, "cuda": 24 << 30}
_FLOPS = {"cpu": 3e9, "cuda": 4e12}
_MOST_TOKENS = 512
#: rows that are compared at a time
_ROWS = 1 << 14

#: (by norm, of the worst row) by name
Errors = dict[str, tuple[float, float]]


class Red(Exception):
    """A result that is wrong; the message says which and by how much."""


class Tally:
    """The errors of one tensor, to which parts of it are added; rows are those of the last dimension."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Raises Red for another shape."""
        if found.shape != expected.shape:
            raise Red(f"shape {list(found.shape)}, expected {list(expected.shape)}")
        width = expected.shape[-1] if expected.dim() else 1
        found, expected = found.detach().reshape(-1, width), expected.detach().reshape(-1, width)
        for f, e in zip(found.split(_ROWS), expected.split(_ROWS), strict=True):
            e = e.double()
            self._parts.append(torch.stack([(f.double() - e).norm(dim=1), e.norm(dim=1)]))

    def errors(self) -> tuple[float, float]:
        """(by norm, of the worst row)."""
        apart_N, expected_N = torch.cat(self._parts, 1)
        total = float(expected_N.norm())
        if total == 0:
            return float(apart_N.norm()), float(apart_N.norm())
        rms = total / max(expected_N.numel(), 1) ** 0.5
        return float(apart_N.norm()) / total, float((apart_N / expected_N.clamp_min(rms)).max())


def errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(by norm, of the worst row) of a whole tensor."""
    tally = Tally()
    tally.add(found, expected)
    return tally.errors()


def judge(tallies: Mapping[str, Tally], dtype: torch.dtype, slack: float = 1.0) -> Errors:
    """The errors by name. Raises Red where one is beyond ``slack`` times the tolerance of ``dtype``."""
    most = [slack * limit for limit in TOLERANCE[dtype]]
    seen = {name: tally.errors() for name, tally in tallies.items()}
    wrong = {name: pair for name, pair in seen.items() if not (pair[0] <= most[0] and pair[1] <= most[1])}
    if wrong:
        told = ", ".join(f"{name} error {norm:.1e} (worst row {row:.1e})" for name, (norm, row) in wrong.items())
        raise Red(f"{told}; limit {most[0]:.0e} ({most[1]:.0e})")
    return seen


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype, slack: float = 1.0
) -> Errors:
    """The errors by name. Raises Red as :func:`judge` does, and for another shape."""
    tallies = {name: Tally() for name in names}
    for name, f, e in zip(names, found, expected, strict=True):
        try:
            tallies[name].add(f, e)
        except Red as error:
            raise Red(f"{name} {error}") from None
    return judge(tallies, dtype, slack)


@contextmanager
def about(op: str, backend: str, shape: Shape, dtype: torch.dtype) -> Iterator[None]:
    """What is checked within; the message of Red names it."""
    try:
        yield
    except Red as error:
        size = f"T{shape.T} D{shape.D} F{shape.F} E{shape.E} K{shape.K}"
        kind = str(dtype).removeprefix("torch.")
        raise Red(f"{op}, backend={backend}, shape={shape.name} ({size}, {kind}): {error}") from None


def reduced(shape: Shape, device: torch.device) -> Shape:
    """The shape with as many tokens, and if need be experts and width, as a reference in fp64 can be afforded for."""
    per_expert = 2 * 8 * 3 * shape.F * shape.D
    experts = min(shape.E, max(_BYTES[device.type] // per_expert, shape.K, 2))
    small = replace(shape, E=experts)
    while 16 * small.weights > 2 * _BYTES[device.type] and small.F > 64:
        small = replace(small, F=small.F // 2)
    tokens = int(_FLOPS[device.type] / (18 * small.K * small.F * small.D))
    return small.with_tokens(min(max(tokens, 16), _MOST_TOKENS, shape.T))


def reference(batch: Batch, gate_up_EFD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients (see NAMES) in fp64, expert by expert, by formula.

    The gradients of 16-bit weights are kept in fp32, because for all experts fp64 could be too large for a GPU.
    """
    keep = torch.float64 if gate_up_EFD.dtype in (torch.float32, torch.float64) else torch.float32
    x, weights, dy = batch.x_TD.detach().double(), batch.weights_TK.detach().double(), batch.dy_TD.double()
    y, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    dgate_up, ddown = (torch.zeros(w.shape, dtype=keep, device=w.device) for w in (gate_up_EFD, down_EDF))
    for expert in range(down_EDF.shape[0]):
        t_N, k_N = (batch.ids_TK == expert).nonzero(as_tuple=True)
        if not t_N.numel():
            continue
        gate_up, down = gate_up_EFD[expert].detach().double(), down_EDF[expert].detach().double()
        w_N1, x_ND, dy_ND = weights[t_N, k_N, None], x[t_N], dy[t_N]
        gate, up = (x_ND @ gate_up.T).chunk(2, 1)
        sigmoid = torch.sigmoid(gate)
        h = gate * sigmoid * up
        y.index_add_(0, t_N, w_N1 * (h @ down.T))
        dh = dy_ND @ down
        dweights[t_N, k_N] = (dh * h).sum(1)
        ddown[expert] = (w_N1 * dy_ND).T @ h
        dh = dh * w_N1
        dpre = torch.cat([dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid], 1)
        dgate_up[expert] = dpre.T @ x_ND
        dx.index_add_(0, t_N, dpre @ gate_up)
    return y, dx, dweights, dgate_up, ddown


def step(one: Contestant, batch: Batch) -> tuple[Tensor, ...]:
    """Output and gradients of a contestant, in the order of NAMES."""
    y_TD = one.run(batch.x_TD, batch.weights_TK, batch.ids_TK)
    dx, dweights, *rest = torch.autograd.grad(y_TD, (batch.x_TD, batch.weights_TK, *one.leaves), batch.dy_TD)
    return y_TD.detach(), dx, dweights, *one.restore(rest)


def check_choice(found: GateOutput, dlogits_TE: Tensor | None, logits_TE: Tensor, dweights_TK: Tensor) -> Errors:
    """All results of softmax, top-k and normalisation, and the logits' gradient unless it is None. Raises Red."""
    (tokens, experts), k = logits_TE.shape, dweights_TK.shape[1]
    wide = logits_TE.detach().double().requires_grad_()
    scores_TE = F.softmax(wide, 1)
    chosen_TK, expected_TK = scores_TE.topk(k, 1)
    _equal("ids", found.ids_TK, expected_TK)
    _equal("counts", found.counts_BE, expected_TK.reshape(-1).bincount(minlength=experts)[None])
    _equal("tokens", found.tokens_B, torch.full_like(found.tokens_B, tokens))
    chosen_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
    right = [chosen_TK, scores_TE.sum(0, keepdim=True), wide.logsumexp(1).square().sum()]
    made, names = [found.weights_TK, found.prob_sums_BE, found.z_sum], ["weights", "prob_sums", "z_sum"]
    if dlogits_TE is not None:
        made.append(dlogits_TE)
        names.append("gradient of logits")
        right += torch.autograd.grad(chosen_TK, wide, dweights_TK.double(), retain_graph=True)
    return compare(made, right, names, torch.float32)


def right_order(ids_TK: Tensor, experts: int) -> ExpertOrder:
    """The order of a stable sort by torch; none of the ids may be dropped."""
    flat_R = ids_TK.reshape(-1).argsort(stable=True)
    inverse_R = torch.empty_like(flat_R).scatter_(0, flat_R, torch.arange(flat_R.numel(), device=flat_R.device))
    counts = ids_TK.reshape(-1).bincount(minlength=experts)
    return ExpertOrder(flat_R, inverse_R.view_as(ids_TK), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def check_order(found: ExpertOrder, expected: ExpertOrder) -> None:
    """Raises Red where they differ."""
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        _equal(name, one, other)


def _equal(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise Red(f"{name} shape {list(found.shape)}, expected {list(expected.shape)}")
    if wrong := int((found != expected).sum()):
        raise Red(f"{name} error: {wrong} of {expected.numel()} differ; limit 0")
