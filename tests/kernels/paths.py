"""The paths of an op: its backends, and the torch backend as it runs on an accelerator (here on the CPU)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from equimoe.kernels.expert_mlp import torch_ops as mlp_ops
from equimoe.kernels.grouped_gemm import torch_ops as gemm_ops
from equimoe.kernels.permute import torch_ops as permute_ops
from equimoe.kernels.sort_by_expert import torch_ops as sort_ops
from equimoe.kernels.topk_gate import torch_ops as gate_ops

PATHS = ("reference", "torch", "accelerator", "triton")


@contextmanager
def on(path: str) -> Iterator[str]:
    """Enable a path, and give the backend to pass to the op."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "accelerator":
            for module in (permute_ops, sort_ops, gate_ops, gemm_ops):
                patch.setattr(module, "readable", lambda t: False)
            patch.setattr(gate_ops, "_ONE_BY_ONE", 0)
            patch.setattr(mlp_ops, "on_host", lambda t: False)
        yield "torch" if path == "accelerator" else path


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the error of the worst row, relative to its norm (but at least a hundredth of the rows' mean norm)."""
    found, expected = (torch.atleast_2d(t.detach().double()).flatten(1) for t in (found, expected))
    assert found.shape == expected.shape and bool(found.isfinite().all())
    if not found.numel():
        return 0.0
    error, scale = (found - expected).norm(dim=1), expected.norm(dim=1)
    return float((error / scale.maximum(0.01 * scale.mean()).clamp_min(1e-30)).max())
