"""Optimizers that look at whole matrices, on weights of which a rank may hold a part.

E experts, e of them on this rank. A weight of three or more dimensions is a stack of experts [E, ...], and each expert
counts as a weight of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..checkpoint import box_of
from ..parallel.grad_norm import gradient_of, local_part, square_norms

#: coefficients of the odd polynomial of degree 5 that Newton-Schulz iterates, and the number of iterations (K. Jordan,
#: Muon, 2024): singular values between 0 and 1 end between about 0.7 and 1.2
POLYNOMIAL, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class _Moments(Optimizer):
    """Keeps the moments of AdamW under the names that it uses, so that checkpoints know them."""

    def __init__(self, params: Iterable[Any], **defaults: Any) -> None:
        super().__init__(params, defaults)

    def _trained(self) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        """Return (weight, its state, its group) of all weights with a gradient."""
        found = [
            (p, self.state[p], group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        for weight, state, group in found:
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state |= {name: torch.zeros_like(weight) for name in group["moments"]}
            state["step"] += 1
        return found

    def _run(self, closure: Callable[[], float] | None) -> float | None:
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()


def _adam_direction(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Update AdamW's moments, and return the direction of its step, m / (sqrt(v) + eps), for this rank's part."""
    (beta1, beta2), step = group["betas"], float(state["step"])
    grad, mean, square = _gradient(weight), local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
    return (mean / (1 - beta1**step)).div_(root)


class Lamb(_Moments):
    """LAMB (arXiv 1904.00962): AdamW whose step is as long as a fraction ``lr`` of the weight that it changes.

    With the direction r = m / (sqrt(v) + eps) + weight_decay * w, a weight w becomes w - lr * |w| / |r| * r. The
    2-norms are those of whole weights, and of every expert, however ranks share them; if one is zero, the step is
    lr * r. A step briefly needs the memory of another copy of the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        names = ("exp_avg", "exp_avg_sq")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, moments=names)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss, trained = self._run(closure), self._trained()
        weights = [weight for weight, _, _ in trained]
        steps = [
            _adam_direction(weight, state, group).add_(local_part(weight), alpha=group["weight_decay"])
            for weight, state, group in trained
        ]
        squares = square_norms([*weights, *(_as(step, weight) for step, weight in zip(steps, weights, strict=True))])
        for i, (weight, _, group) in enumerate(trained):
            of_weight, of_step = squares[i], squares[len(trained) + i]
            ratio = (of_weight / of_step).sqrt().where((of_weight > 0) & (of_step > 0), 1.0)
            local_part(weight).sub_(steps[i].mul_(ratio.to(weight.dtype)), alpha=group["lr"])
        return loss


class Muon(_Moments):
    """Muon (K. Jordan, 2024): the step of a matrix is its momentum with all singular values replaced by about 1.

    Groups with ``orthogonal=True`` are updated so, each expert of a stack by itself; all others by AdamW. A step is
    as long as AdamW's usual one, 0.2 * sqrt(max(rows, columns)) * lr (arXiv 2502.16982), so both can share learning
    rate and weight decay. Ranks that share a matrix gather its momentum, and each orthogonalizes all of it. torch's
    own optimizer of this name takes neither stacks nor parts of matrices. Computes in bf16, as torch's does, and in
    fp64 for fp64 weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        names = ("exp_avg", "exp_avg_sq")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, **defaults, orthogonal=False, moments=names)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("orthogonal"):
            param_group["moments"] = ("exp_avg",)
            if small := [tuple(p.shape) for p in param_group["params"] if p.dim() < 2]:
                raise ValueError(f"orthogonal=True: a weight of shape {small[0]} is no matrix; set it to False")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = self._run(closure)
        for weight, state, group in self._trained():
            direction = (_orthogonal_direction if group["orthogonal"] else _adam_direction)(weight, state, group)
            local_part(weight).mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        return loss


def _orthogonal_direction(weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """Update the momentum, and return the direction of Muon's step with Nesterov momentum, for this rank's part."""
    grad, mean = _gradient(weight), local_part(state["exp_avg"])
    mean.lerp_(grad, 1 - group["momentum"])
    matrices, own = _whole(_as(grad.lerp(mean, group["momentum"]), weight))
    rows = matrices.flatten(1, -2) if matrices.dim() > 2 else matrices  # expert tensor parallelism has [E, 2, F, D]
    scale = 0.2 * max(rows.shape[-2:]) ** 0.5
    return orthogonalized(rows).view_as(matrices)[own].to(weight.dtype).mul(scale)


def _gradient(weight: Tensor) -> Tensor:
    """Return the gradient of this rank's part of a weight."""
    grad = gradient_of(weight)
    assert grad is not None
    return local_part(grad)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return U V^T, approximately, for matrices [..., rows, columns] = U S V^T, by Newton-Schulz iterations."""
    a, b, c = POLYNOMIAL
    x = matrices if matrices.dtype == torch.float64 else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


def _as(local: Tensor, weight: Tensor) -> Tensor:
    """Return ``local`` as a tensor that is shared by ranks as ``weight`` is."""
    if not isinstance(weight, DTensor):
        return local
    mesh, placements, stride = weight.device_mesh, weight.placements, weight.stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=weight.shape, stride=stride)


def _whole(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Return a matrix, or this rank's experts of a stack, whole, and where in it this rank's part is."""
    if not isinstance(tensor, DTensor):
        return tensor, ()
    mesh, local = tensor.device_mesh, tensor.to_local()
    whole_rows = [tensor.dim() > 2 and getattr(p, "dim", None) == 0 for p in tensor.placements]
    names = [name for name, whole in zip(mesh.mesh_dim_names or (), whole_rows, strict=True) if not whole]
    if not names:
        return local, ()
    shape = torch.Size((len(local), *tensor.shape[1:])) if any(whole_rows) else tensor.shape
    stride = torch.empty(shape, device="meta").stride()
    placements = [p for p, whole in zip(tensor.placements, whole_rows, strict=True) if not whole]
    shared = DTensor.from_local(local, mesh[tuple(names)], placements, run_check=False, shape=shape, stride=stride)
    begin, size = box_of(shared)
    return shared.full_tensor(), tuple(slice(b, b + n) for b, n in zip(begin, size, strict=True))
