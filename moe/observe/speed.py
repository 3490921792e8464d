"""Speed and memory of training: operations per token, MFU, and the memory of a rank."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..layer import MoE
from ..model import Attention, Decoder, LatentAttention

#: torch's name of a GPU -> dense bf16 operations per second, without sparsity, from the vendor's data sheet
PEAK_FLOPS = {
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), 312e12),  # NVIDIA A100 data sheet
    **dict.fromkeys(("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), 312e12),
    "NVIDIA H100 80GB HBM3": 989.4e12,  # NVIDIA H100 data sheet: SXM, PCIe, NVL
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    **dict.fromkeys(("NVIDIA H200", "NVIDIA GH200 480GB"), 989.4e12),  # NVIDIA H200 data sheet
    "NVIDIA B200": 2250e12,  # NVIDIA DGX B200 data sheet: 72 PFLOP/s of sparse FP8 for 8 GPUs, a quarter in dense bf16
    "NVIDIA L4": 121e12,  # NVIDIA L4 data sheet
    "NVIDIA L40S": 362e12,  # NVIDIA L40S data sheet
    "AMD Instinct MI300X": 1307.4e12,  # AMD Instinct MI300X data sheet
}


def forward_flops(model: Decoder, masked: bool = False) -> dict[str, float]:
    """Return the floating-point operations per token of a forward pass, by part of the model.

    A multiply-add counts as two operations. Counted are products with weight matrices and, for attention, the pairs of
    positions in a sequence of full length that causal attention and its window let see each other: (S + 1) / 2 per
    token without a window. ``masked`` also counts the pairs that a window hides, because the kernel computes them.
    Attention inside documents counts as attention over the whole sequence. A routed expert counts for the tokens that
    choose it, before any drop; if there are zero-computation experts, for those of a balanced load. Norms, activations,
    rotary positions, softmax and the embedding count as nothing.
    """
    parts = dict.fromkeys(("attention", "dense", "router", "experts", "shared", "head"), 0.0)
    block: Any
    for block in model.blocks.values():
        parts["attention"] += _products(block.attention) + _scores(block.attention, masked)
        if isinstance(block.mlp, MoE):
            router, experts, shared = block.mlp.parts()
            parts["router"] += _products(router)
            parts["experts"] += _products(experts) * block.mlp.config.mlps_per_token / block.mlp.config.num_experts
            parts["shared"] += _products(shared) + _products(block.mlp.local)
        else:
            parts["dense"] += _products(block.mlp)
    parts["head"] = _products(model.head)
    return parts


def step_flops(model: Decoder) -> float:
    """Return the operations per token of a training step: three times those of a forward pass.

    The backward pass multiplies twice as often as the forward. Recomputation and counting passes are not work of the
    model and do not count.
    """
    return 3 * sum(forward_flops(model).values())


def _products(part: Any) -> float:
    return 0.0 if not isinstance(part, nn.Module) else 2.0 * sum(w.numel() for w in part.parameters() if w.dim() >= 2)


def _scores(attention: Attention, masked: bool) -> float:
    # total width of all heads' values; except in latent attention, queries are as wide
    values = attention.get_parameter("out_proj.weight").shape[1]
    queries = attention.q_up_proj.out_features if isinstance(attention, LatentAttention) else values
    length, window = attention.seq_len, attention.window or attention.seq_len
    seen = length * (length + 1) // 2 - (length - window) * (length - window + 1) // 2
    if masked and attention.window is not None:
        seen = length * length
    return 2.0 * seen / length * (queries + values)


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bf16 operations per second of a device; None if unknown, as for every CPU."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def speed_record(tokens_per_s: float, devices: int, flops_per_token: float, peak: float | None) -> dict[str, float]:
    """Return the fields of a ``train`` record about speed."""
    per_device = tokens_per_s / devices
    record = {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": per_device,
        "tflops_per_device": per_device * flops_per_token / 1e12,
    }
    return record if peak is None else record | {"mfu": per_device * flops_per_token / peak}


def memory_in_use(device: torch.device) -> int:
    """Return this rank's bytes of memory: on a GPU the peak of torch's allocations since the last call.

    On a CPU it is the resident memory of the process now, or its peak where the system does not tell.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
