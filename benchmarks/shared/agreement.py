"""Checks that precede every measurement: outputs and all gradients are compared with fp64.

Inputs have unit scale, so that a wrong output cannot hide below a tolerance. Two errors are limited: that of the whole
tensor by norm, and that of the worst row relative to its own norm (or to the root mean square of all rows, if larger),
which finds one wrong row among thousands. NaN never passes. An op must not write to its inputs, and every timed run
must return the checked result bit by bit.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.shared.shapes import Batch, Shape
from equimoe.kernels.sort_by_expert import ExpertOrder
from equimoe.kernels.topk_gate import GateOutput

#: dtype -> largest error by norm, and of the worst row
TOLERANCE = {
    torch.bfloat16: (1e-2, 4e-2),
    torch.float16: (2e-3, 2e-2),
    torch.float32: (1e-5, 1e-4),
}
NAMES = ("output", "x", "weights", "gate_up", "down")
#: limits for the fp64 reference on each device: bytes of weights and their gradients, and operations
_BYTES = {"cpu": 1 << 30, "cuda": 24 << 30}
_FLOPS = {"cpu": 3e9, "cuda": 4e12}
_MOST_TOKENS = 512
#: number of rows that are compared at a time
_ROWS = 1 << 14

#: name -> (error by norm, error of the worst row)
Errors = dict[str, tuple[float, float]]


class WrongResult(Exception):
    """A result is wrong; the message says which one, and by how much."""


def brief(error: Exception) -> str:
    """Return the type of an error and its first line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


class Tally:
    """Accumulates the errors of one tensor from its parts. Rows run along the last dimension."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Add a part. Raise WrongResult if the shapes differ."""
        if found.shape != expected.shape:
            raise WrongResult(f"shape {list(found.shape)}, expected {list(expected.shape)}")
        width = expected.shape[-1] if expected.dim() else 1
        found, expected = found.detach().reshape(-1, width), expected.detach().reshape(-1, width)
        for f, e in zip(found.split(_ROWS), expected.split(_ROWS), strict=True):
            e = e.double()
            self._parts.append(torch.stack([(f.double() - e).norm(dim=1), e.norm(dim=1)]))

    def errors(self) -> tuple[float, float]:
        """Return the error by norm and that of the worst row."""
        apart_N, expected_N = torch.cat(self._parts, 1)
        total = float(expected_N.norm())
        if total == 0:
            return float(apart_N.norm()), float(apart_N.norm())
        rms = total / max(expected_N.numel(), 1) ** 0.5
        return float(apart_N.norm()) / total, float((apart_N / expected_N.clamp_min(rms)).max())


def errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """Return the error of a whole tensor by norm, and that of its worst row."""
    tally = Tally()
    tally.add(found, expected)
    return tally.errors()


def judge(tallies: Mapping[str, Tally], dtype: torch.dtype, slack: float = 1.0) -> Errors:
    """Return the errors by name. Raise WrongResult if one exceeds ``slack`` times the tolerance of ``dtype``."""
    most = [slack * limit for limit in TOLERANCE[dtype]]
    seen = {name: tally.errors() for name, tally in tallies.items()}
    wrong = {name: pair for name, pair in seen.items() if not (pair[0] <= most[0] and pair[1] <= most[1])}
    if wrong:
        errors = ", ".join(f"{name} error {norm:.1e} (worst row {row:.1e})" for name, (norm, row) in wrong.items())
        raise WrongResult(f"{errors}; limit {most[0]:.0e} ({most[1]:.0e})")
    return seen


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype, slack: float = 1.0
) -> Errors:
    """Return the errors by name. Raise WrongResult as :func:`judge` does, or if shapes differ."""
    tallies = {name: Tally() for name in names}
    for name, f, e in zip(names, found, expected, strict=True):
        try:
            tallies[name].add(f, e)
        except WrongResult as error:
            raise WrongResult(f"{name} {error}") from None
    return judge(tallies, dtype, slack)


@contextmanager
def checking(op: str, backend: str, shape: Shape, dtype: torch.dtype) -> Iterator[None]:
    """Turn any exception raised inside into a WrongResult whose message names the op and the shape."""
    try:
        yield
    except Exception as error:
        size = f"T{shape.T} D{shape.D} F{shape.F} E{shape.E} K{shape.K}"
        kind = str(dtype).removeprefix("torch.")
        what = str(error) if isinstance(error, WrongResult) else f"fails: {brief(error)}"
        raise WrongResult(f"{op}, backend={backend}, shape={shape.name} ({size}, {kind}): {what}") from error


def check_dtype(found: Tensor, expected: torch.dtype, name: str = "output") -> None:
    """Raise WrongResult if the dtypes differ. Comparisons of values convert to fp64, so they would not notice."""
    if found.dtype != expected:
        raise WrongResult(f"{name} dtype {found.dtype}, expected {expected}")


def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of each tensor's bits and row order, int64 [N], without waiting for the device."""
    return torch.stack([_digest(t.detach()) for t in tensors])


def _digest(t: Tensor) -> Tensor:
    rows = t.contiguous().reshape(t.shape[0] if t.dim() else 1, -1).view(torch.uint8)
    # eight bytes at a time, to avoid a wider copy
    rows = rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows.to(torch.int64)
    return (rows.sum(1) * torch.arange(1, len(rows) + 1, device=t.device)).sum()


class Watch:
    """Records the results of every run of several steps, and whether a run wrote to the shared ``inputs``."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = inputs
        self._last = digest(inputs.values())
        self._results: dict[str, list[Tensor]] = {}
        self._changes: dict[str, list[Tensor]] = {}

    def see(self, name: str, made: Any) -> None:
        """Record one run of the step ``name``; ``made`` is any nesting of tuples of tensors."""
        now = digest(self._inputs.values())
        self._changes.setdefault(name, []).append(now != self._last)
        self._results.setdefault(name, []).append(digest(tree_leaves(made)))
        self._last = now

    def check_inputs(self, name: str) -> None:
        """Raise WrongResult if a run of ``name`` wrote to an input.

        Call this for all steps before you check results: a changed input also makes other steps' results wrong.
        """
        if name not in self._changes:
            return
        changed = torch.stack(self._changes[name]).any(0).tolist()
        if any(changed):
            names = (given for given, differs in zip(self._inputs, changed, strict=True) if differs)
            raise WrongResult(f"it wrote to its inputs: {', '.join(names)}; limit 0")

    def check_results(self, name: str, last: int = 1) -> None:
        """Raise WrongResult if a run of ``name`` returned something other than each of its ``last`` runs.

        The caller compares these last runs with fp64.
        """
        if name not in self._results:
            return
        results = [tuple(row) for row in torch.stack(self._results[name]).tolist()]
        if apart := sum(row not in results[-last:] for row in results):
            raise WrongResult(f"{apart} of {len(results)} runs returned other results than the checked run; limit 0")


def reduced(shape: Shape, device: torch.device) -> Shape:
    """Return the shape with fewer tokens (and if necessary experts and width), so that an fp64 reference fits."""
    per_expert = 2 * 8 * 3 * shape.F * shape.D
    experts = min(shape.E, max(_BYTES[device.type] // per_expert, shape.K, 2))
    small = replace(shape, E=experts)
    while 16 * small.weights > 2 * _BYTES[device.type] and small.F > 64:
        small = replace(small, F=small.F // 2)
    tokens = int(_FLOPS[device.type] / (18 * small.K * small.F * small.D))
    return small.with_tokens(min(max(tokens, 16), _MOST_TOKENS, shape.T))


def reference(batch: Batch, gate_up_EFD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute output and gradients in fp64, expert by expert, by formula, in the order of NAMES.

    Gradients of 16-bit weights are returned in fp32, because fp64 for all experts may not fit on a GPU.
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


def check_choice(found: GateOutput, dlogits_TE: Tensor | None, logits_TE: Tensor, dweights_TK: Tensor) -> Errors:
    """Check all results of softmax, top-k and normalisation, and the logits' gradient unless it is None."""
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
    for name, value in zip(names, made, strict=True):
        check_dtype(value, torch.float32, name)
    if dlogits_TE is not None:
        made.append(dlogits_TE)
        names.append("gradient of logits")
        right += torch.autograd.grad(chosen_TK, wide, dweights_TK.double(), retain_graph=True)
    return compare(made, right, names, torch.float32)


def right_order(ids_TK: Tensor, experts: int) -> ExpertOrder:
    """Return the order of torch's stable sort. No id may be dropped."""
    flat_R = ids_TK.reshape(-1).argsort(stable=True)
    inverse_R = torch.empty_like(flat_R).scatter_(0, flat_R, torch.arange(flat_R.numel(), device=flat_R.device))
    counts = ids_TK.reshape(-1).bincount(minlength=experts)
    return ExpertOrder(flat_R, inverse_R.view_as(ids_TK), torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def check_order(found: ExpertOrder, expected: ExpertOrder) -> None:
    """Raise WrongResult if the orders differ."""
    for name, one, other in zip(expected._fields, found, expected, strict=True):
        _equal(name, one, other)


def _equal(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise WrongResult(f"{name} shape {list(found.shape)}, expected {list(expected.shape)}")
    check_dtype(found, expected.dtype, name)
    if wrong := int((found != expected).sum()):
        raise WrongResult(f"{name} error: {wrong} of {expected.numel()} differ; limit 0")
