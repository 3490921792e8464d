"""Adds the expert gradients of a step's micro-batches in fp32, within the products that compute them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..experts import LoRAExperts
from ..layer import MoE
from ..parallel import Mesh
from ..parallel.grad_norm import local_part
from .reduce import like


class MainGrads:
    """Gives ``weights`` a ``main_grad`` for the duration of a step's backwards (see ``moe.experts.main_grads``).

    Autograd would keep each micro-batch's gradient in the dtype in which the experts compute, cast it to fp32, and add
    it. A step of one micro-batch has nothing to add and is left alone.
    """

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights

    @contextmanager
    def of_step(self, micro_batches: int) -> Iterator[None]:
        """Context for all micro-batches of a step. On exit each weight that was used has its gradient in ``.grad``."""
        weights = [w for w in self.weights if w.requires_grad] if micro_batches > 1 else []
        versions = {}
        for weight in weights:
            weight.main_grad = torch.zeros_like(local_part(weight.detach()))  # type: ignore[attr-defined]
            versions[weight] = weight.main_grad._version  # type: ignore[attr-defined]
        try:
            yield
            for weight, version in versions.items():
                if weight.main_grad._version != version:  # type: ignore[attr-defined]
                    weight.grad = like(weight, weight.main_grad)  # type: ignore[attr-defined]
        finally:
            for weight in weights:
                del weight.main_grad  # type: ignore[attr-defined]


def accumulating(
    parts: list[nn.Module], parameters: dict[str, nn.Parameter], reduced: set[str], mesh: Mesh | None
) -> MainGrads:
    """Return the main gradients of the fp32 expert weights whose gradients nothing else collects.

    FSDP collects those of the weights that it shards, and the reducer those named in ``reduced``. On a CPU no product
    adds to an fp32 tensor.
    """
    if mesh is not None and (mesh.degrees.data_parallel == "fsdp" or mesh.degrees.experts == "fssdp"):
        return MainGrads([])
    layers = [m for part in parts for m in part.modules() if isinstance(m, MoE)]
    routed = {p for layer in layers if not isinstance(layer.experts, LoRAExperts) for p in layer.experts.parameters()}
    found = [p for name, p in parameters.items() if p in routed and name not in reduced]
    return MainGrads([p for p in found if p.dtype == torch.float32 and p.device.type != "cpu"])
