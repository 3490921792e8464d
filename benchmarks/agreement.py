"""The gate in front of every figure: forward and all gradients against fp64, by norm and by the worst row.

Inputs have unit scale, so that a wrong output cannot hide below a tolerance, and every row is measured by itself, or
against the root mean square of all rows where that is more, so that one wrong row among thousands is found. NaN never
passes.
"""

# T tokens, D hidden, F expert width, E experts, K top-k.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from peers import Contestant
from shapes import Batch, Shape
from torch import Tensor

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


class Red(Exception):
    """A result that is wrong; the message says which and by how much."""


def errors(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """(by norm, of the worst row); rows are those of the last dimension."""
    expected = expected.double()
    expected = expected.reshape(-1, expected.shape[-1])
    apart = found.double().reshape(expected.shape) - expected
    total = float(expected.norm())
    if total == 0:
        return float(apart.norm()), float(apart.norm())
    rms = total / max(expected.shape[0], 1) ** 0.5
    rows = apart.norm(dim=1) / expected.norm(dim=1).clamp_min(rms)
    return float(apart.norm()) / total, float(rows.max())


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str], dtype: torch.dtype
) -> dict[str, tuple[float, float]]:
    """The errors by name. Raises Red where one is beyond the tolerance of ``dtype``."""
    most = TOLERANCE[dtype]
    seen = {name: errors(f, e) for name, f, e in zip(names, found, expected, strict=True)}
    wrong = {name: pair for name, pair in seen.items() if not (pair[0] <= most[0] and pair[1] <= most[1])}
    if wrong:
        told = ", ".join(f"{name} {norm:.1e} (worst row {row:.1e})" for name, (norm, row) in wrong.items())
        raise Red(f"{told}; allowed {most[0]:.0e} ({most[1]:.0e})")
    return seen


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
    """Output and gradients (see NAMES) in fp64, expert by expert, by formula."""
    x, weights, dy = batch.x_TD.detach().double(), batch.weights_TK.detach().double(), batch.dy_TD.double()
    y, dx, dweights = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(weights)
    dgate_up, ddown = (torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in (gate_up_EFD, down_EDF))
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


def check_gate(
    found: Sequence[Tensor], logits_TE: Tensor, k: int, dweights_TK: Tensor
) -> dict[str, tuple[float, float]]:
    """Ids, weights and the logits' gradient of softmax, top-k and normalisation. Raises Red."""
    ids_TK, weights_TK, dlogits_TE = found
    wide = logits_TE.detach().double().requires_grad_()
    chosen_TK, expected_TK = F.softmax(wide, 1).topk(k, 1)
    if not torch.equal(ids_TK, expected_TK):
        raise Red(f"{int((ids_TK != expected_TK).sum())} of {ids_TK.numel()} experts are not those of the top {k}")
    chosen_TK = chosen_TK / chosen_TK.sum(1, keepdim=True)
    (expected_dlogits,) = torch.autograd.grad(chosen_TK, wide, dweights_TK.double())
    return compare(
        (weights_TK.detach(), dlogits_TE), (chosen_TK.detach(), expected_dlogits), ("weights", "logits"), torch.float32
    )
