"""The compositions of parallelisms that are compared with one process, in the order of the table."""

from __future__ import annotations

from typing import Any

from equimoe.moe import CapacityConfig, RouterConfig, ZeroComputationConfig
from equimoe.moe import DispatchConfig as D
from equimoe.moe.config import RecomputeConfig as R
from equimoe.moe.parallel import ParallelConfig as P
from equimoe.moe.parallel.stages import SCHEDULES, SPLITS_BACKWARD
from tests.helpers.parity import Composition as C

BF16 = "bfloat16"
SLOTS = RouterConfig(gate="slots", slots=2, sees_future=True)
BY_EXPERTS: dict[str, Any] = {"normalize_weights": False, "sees_future": True}
WIDTHS = "12,4,4,4,8,16,6,10"
MOEPP: dict[str, Any] = {
    "router": RouterConfig(gate="residual", z_loss=0.01),
    "zero_computation": ZeroComputationConfig(1, 1, 2, tau=0.5),
    "top_k": 3,
}

COMPOSITIONS: dict[str, C] = {
    # data and expert parallelism
    "dp 2": C(2, tokens="equal"),
    "dp 2, no tokens on a rank": C(2, tokens="zero"),
    "dp 4, ep 4": C(4, P(ep=4)),
    "dp 4, ep 2, recompute": C(4, P(ep=2), recompute=True),
    "dp 4, ep 2, no tokens on a rank": C(4, P(ep=2), tokens="zero"),
    "dp 8, ep 4, edp 2": C(8, P(ep=4), micro_batches=1),
    "dp 2, ep 2, micro scope": C(2, P(ep=2), scope="micro"),
    "dp 2, ep 2, sequence scope": C(2, P(ep=2), scope="sequence"),
    "dp 2, ep 2, capacity": C(2, P(ep=2), capacity=CapacityConfig(1.0), tokens="equal"),
    "dp 2, ep 2, bf16": C(2, P(ep=2), dtype=BF16),
    # fully sharded sparse data parallelism: other replicas in every step
    "fssdp, dp 2": C(2, P(experts="fssdp")),
    "fssdp, dp 4, recompute": C(4, P(experts="fssdp"), recompute=True),
    "fssdp, dp 4, no tokens on a rank": C(4, P(experts="fssdp"), tokens="zero"),
    "fssdp, dp 8, three experts": C(8, P(experts="fssdp"), experts=3, micro_batches=1),
    "fssdp, dp 2, micro scope": C(2, P(experts="fssdp"), scope="micro"),
    "fssdp, dp 2, capacity": C(2, P(experts="fssdp"), capacity=CapacityConfig(1.0), tokens="equal"),
    "fssdp, dp 2, padded capacity": C(2, P(experts="fssdp"), capacity=CapacityConfig(1.0, pad=True), tokens="equal"),
    "fssdp, dp 2, bf16": C(2, P(experts="fssdp"), dtype=BF16),
    "fssdp, fsdp 2, bf16": C(2, P(experts="fssdp", data_parallel="fsdp"), dtype=BF16),
    "fssdp, fsdp 4, five experts, recompute": C(4, P(experts="fssdp", data_parallel="fsdp"), experts=5, recompute=True),
    "fssdp, hsdp 2 x 2": C(4, P(experts="fssdp", dp_replicate=2, data_parallel="fsdp"), tokens="zero"),
    "fssdp, tp 2, dp 2": C(4, P(experts="fssdp", tp=2)),
    "fssdp, tp 2, no sp": C(2, P(experts="fssdp", tp=2, sequence_parallel=False)),
    "fssdp, cp 2, dp 2, no tokens on a rank": C(4, P(experts="fssdp", cp=2), tokens="zero"),
    "fssdp, pp 2, dp 2, recompute": C(4, P(experts="fssdp", pp=2), recompute=True),
    "fssdp, etp 2, dp 4": C(4, P(experts="fssdp", etp=2)),
    "fssdp, hierarchical, 2 nodes, dp 4": C(4, P(experts="fssdp"), dispatch=D("hierarchical", node_size=2)),
    "fssdp, all_gather, dp 4": C(4, P(experts="fssdp"), dispatch=D("all_gather")),
    "fssdp, overlapped 2, dp 2, recompute, exchanges kept": C(
        2, P(experts="fssdp"), dispatch=D("overlapped", chunks=2), recompute=R(keep_exchanges=True)
    ),
    "fssdp, dp 4, replicas freed": C(4, P(experts="fssdp"), rematerialize=True),
    "fssdp, fsdp 2, bf16, overlapped 2, replicas freed": C(
        2, P(experts="fssdp", data_parallel="fsdp"), dtype=BF16, dispatch=D("overlapped", chunks=2), rematerialize=True
    ),
    "fssdp, dp 4, calibrated, recompute": C(4, P(experts="fssdp"), recompute=True, calibrate=True),
    "fssdp, fsdp 2, bf16, calibrated, replicas freed": C(
        2, P(experts="fssdp", data_parallel="fsdp"), dtype=BF16, rematerialize=True, calibrate=True
    ),
    "fssdp, cp 2, overlapped 2, calibrated, recompute, exchanges kept": C(
        2,
        P(experts="fssdp", cp=2),
        dispatch=D("overlapped", chunks=2),
        recompute=R(keep_exchanges=True),
        calibrate=True,
    ),
    "fssdp, dp 2, little memory": C(2, P(experts="fssdp"), dispatch=D(memory_mb=1)),
    # recomputation
    "dp 2, ep 2, recompute attention": C(2, P(ep=2), recompute=R("attention")),
    "dp 2, ep 2, recompute feed-forward": C(2, P(ep=2), recompute=R("feed_forward")),
    "fsdp 4, ep 4, recompute two blocks": C(4, P(ep=4, data_parallel="fsdp"), recompute=R(layers=2)),
    "fsdp 2, tp 2, ep 4, recompute, exchanges kept": C(
        4, P(tp=2, ep=4, data_parallel="fsdp"), recompute=R(keep_exchanges=True)
    ),
    "overlapped 2, dp 2, ep 2, recompute, exchanges kept": C(
        2, P(ep=2), dispatch=D("overlapped", chunks=2), recompute=R(keep_exchanges=True)
    ),
    "hierarchical, pp 2, dp 4, ep 4, recompute, exchanges kept": C(
        8,
        P(pp=2, ep=4),
        dispatch=D("hierarchical", node_size=2),
        recompute=R("feed_forward", keep_exchanges=True),
    ),
    # sharded data parallelism
    "fsdp 2": C(2, P(data_parallel="fsdp")),
    "fsdp 4, ep 2": C(4, P(data_parallel="fsdp", ep=2)),
    "fsdp 4, ep 4, recompute": C(4, P(data_parallel="fsdp", ep=4), recompute=True),
    "hsdp 2 x 2": C(4, P(dp_replicate=2, data_parallel="fsdp")),
    "hsdp 2 x 2, ep 2": C(4, P(dp_replicate=2, data_parallel="fsdp", ep=2), tokens="zero"),
    "hsdp 2 x 2, ep 4": C(4, P(dp_replicate=2, data_parallel="fsdp", ep=4)),
    "fsdp 4, two experts each": C(4, P(data_parallel="fsdp", ep=1), experts=2, tokens="zero"),
    "fsdp 8, ep 2, one expert each": C(8, P(data_parallel="fsdp", ep=2), experts=2, micro_batches=1),
    "fsdp 4, etp 2, one expert for two ranks": C(4, P(data_parallel="fsdp", etp=2), experts=3, tokens="zero"),
    "fsdp 2, ep 2, bf16": C(2, P(data_parallel="fsdp", ep=2), dtype=BF16),
    # tensor and sequence parallelism; expert parallelism spans tp ranks
    "tp 2": C(2, P(tp=2)),
    "tp 2, ep 2 > dp 1": C(2, P(tp=2, ep=2)),
    "tp 4, ep 4 > dp 1, recompute": C(4, P(tp=4, ep=4), recompute=True),
    "tp 2, fsdp 2, ep 4 > dp 2": C(4, P(tp=2, data_parallel="fsdp", ep=4)),
    "tp 2, dp 2, ep 2, no tokens on a rank": C(4, P(tp=2, ep=2), tokens="zero"),
    "tp 2, hsdp 2 x 2, ep 2": C(8, P(tp=2, dp_replicate=2, data_parallel="fsdp", ep=2), micro_batches=1),
    "tp 2, ep 2, micro scope": C(2, P(tp=2, ep=2), scope="micro"),
    "tp 2, ep 2, sequence scope": C(2, P(tp=2, ep=2), scope="sequence"),
    "tp 2, ep 2, bf16": C(2, P(tp=2, ep=2), dtype=BF16),
    # context parallelism; expert parallelism spans cp ranks
    "cp 2, ring": C(2, P(cp=2)),
    "cp 2, gathered, ep 2 > dp 1": C(2, P(cp=2, ep=2, context="all_gather")),
    "cp 4, ep 4 > dp 1": C(4, P(cp=4, ep=4)),
    "cp 2, fsdp 2, ep 2": C(4, P(cp=2, data_parallel="fsdp", ep=2), recompute=True),
    "cp 2, dp 2, ep 4, no tokens on a rank": C(4, P(cp=2, ep=4), tokens="zero"),
    "cp 2, ep 2, sequence scope": C(2, P(cp=2, ep=2), scope="sequence"),
    "cp 2, tp 2, ep 4 > dp 1": C(4, P(cp=2, tp=2, ep=4)),
    "cp 2, tp 2, fsdp 2, ep 4 > dp 2": C(8, P(cp=2, tp=2, data_parallel="fsdp", ep=4), micro_batches=1),
    "cp 2, tp 2, hsdp 2 x 1, ep 4": C(
        8, P(cp=2, tp=2, dp_replicate=2, data_parallel="fsdp", ep=4), micro_batches=1, tokens="zero"
    ),
    "cp 2, tp 2, dp 2, ep 8 > dp 2": C(8, P(cp=2, tp=2, ep=8), micro_batches=1, recompute=True),
    # expert tensor parallelism
    "dp 2, etp 2": C(2, P(etp=2)),
    "tp 2, etp 2, bf16": C(2, P(tp=2, etp=2), dtype=BF16),
    "dp 4, ep 2, etp 2, recompute": C(4, P(ep=2, etp=2), recompute=True),
    "tp 2, fsdp 2, ep 2, etp 2": C(4, P(tp=2, data_parallel="fsdp", ep=2, etp=2)),
    "hsdp 2 x 2, etp 2": C(4, P(dp_replicate=2, dp_shard=2, data_parallel="fsdp", etp=2), tokens="zero"),
    # tensor parallelism without sequence parallelism: each token is dispatched once
    "tp 2, no sp, ep 2": C(2, P(tp=2, ep=2, sequence_parallel=False)),
    "tp 4, no sp, ep 4, recompute": C(4, P(tp=4, ep=4, sequence_parallel=False), recompute=True),
    "tp 2, no sp, fsdp 2, ep 4": C(4, P(tp=2, ep=4, sequence_parallel=False, data_parallel="fsdp"), tokens="zero"),
    "tp 2, no sp, dp 2, etp 2": C(4, P(tp=2, etp=2, sequence_parallel=False)),
    # dispatchers and wire formats
    "all_gather, dp 4, ep 4": C(4, P(ep=4), dispatch=D("all_gather")),
    "all_gather, tp 2, cp 2, ep 4": C(4, P(tp=2, cp=2, ep=4), dispatch=D("all_gather"), recompute=True),
    "hierarchical, 2 nodes, dp 4, ep 4": C(4, P(ep=4), dispatch=D("hierarchical", node_size=2)),
    "hierarchical, 2 nodes, tp 2, fsdp 4, ep 8": C(
        8,
        P(tp=2, ep=8, data_parallel="fsdp"),
        dispatch=D("hierarchical", node_size=4),
        micro_batches=1,
        recompute=True,
    ),
    "hierarchical, 2 nodes, no tokens on a rank": C(4, P(ep=4), dispatch=D("hierarchical", node_size=2), tokens="zero"),
    "overlapped 2, dp 2, ep 2": C(2, P(ep=2), dispatch=D("overlapped", chunks=2)),
    "overlapped 4, fsdp 4, ep 2, etp 2": C(
        4, P(ep=2, etp=2, data_parallel="fsdp"), dispatch=D("overlapped", chunks=4), tokens="zero"
    ),
    "overlapped 8, dp 4, ep 4, recompute": C(4, P(ep=4), dispatch=D("overlapped", chunks=8), recompute=True),
    "bf16 on the wire, dp 4, ep 4": C(4, P(ep=4), dispatch=D(wire="bf16"), dtype=BF16),
    # limited capacity
    "capacity, padded, dp 2, ep 2": C(2, P(ep=2), capacity=CapacityConfig(2.0, pad=True), tokens="equal"),
    "capacity of all ranks, dp 4, ep 4": C(4, P(ep=4), capacity=CapacityConfig(1.0, scope="global"), micro_batches=1),
    "capacity of the sequence by position, cp 2, tp 2, ep 4": C(
        4, P(cp=2, tp=2, ep=4), capacity=CapacityConfig(0.75, "position", scope="sequence"), micro_batches=1
    ),
    "capacity of the sequence, cp 2, tp 2, ep 4": C(
        4, P(cp=2, tp=2, ep=4), capacity=CapacityConfig(1.0, scope="sequence"), micro_batches=2
    ),
    "cp 2, ep 2, bf16": C(2, P(cp=2, ep=2), dtype=BF16),
    # routers
    "groups of equal load (MoGE), dp 2, ep 2": C(2, P(ep=2), router=RouterConfig(select="each_group", groups=2)),
    "groups of equal load (MoGE), no sizes, fsdp 4, ep 4, recompute": C(
        4,
        P(data_parallel="fsdp", ep=4),
        router=RouterConfig(select="each_group", groups=4),
        top_k=4,
        recompute=R(keep_exchanges=True),
        dispatch=D("overlapped", chunks=2, equal_tokens=True),
        tokens="zero",
    ),
    "groups of equal load (MoGE), dp 4, ep 4, recompute, no tokens on a rank": C(
        4, P(ep=4), router=RouterConfig(select="each_group", groups=4), top_k=4, recompute=True, tokens="zero"
    ),
    "jitter, dp 4, ep 2, recompute": C(4, P(ep=2), router=RouterConfig(jitter=0.3, z_loss=0.01), recompute=True),
    "noisy top-k, dp 2, ep 2": C(2, P(ep=2), router=RouterConfig(gate="noisy", z_loss=0.01)),
    "noisy top-k, tp 2, fsdp 2, ep 4 > dp 2": C(
        4, P(tp=2, data_parallel="fsdp", ep=4), router=RouterConfig(gate="noisy"), tokens="zero"
    ),
    "noisy top-k, pp 2, dp 2, ep 2, recompute": C(
        4, P(pp=2, ep=2), router=RouterConfig(gate="noisy"), micro_batches=4, recompute=True
    ),
    "cosine (X-MoE), dp 2, ep 2, recompute": C(
        2, P(ep=2), router=RouterConfig(gate="cosine", z_loss=0.01), recompute=True
    ),
    "cosine (X-MoE), tp 2, fsdp 2, ep 4 > dp 2": C(
        4, P(tp=2, data_parallel="fsdp", ep=4), router=RouterConfig(gate="cosine"), tokens="zero"
    ),
    "Sinkhorn, dp 2, ep 2": C(2, P(ep=2), router=RouterConfig(select="sinkhorn", z_loss=0.01)),
    "Sinkhorn, dp 4, ep 2, recompute, no tokens on a rank": C(
        4, P(ep=2), router=RouterConfig(select="sinkhorn"), recompute=True, tokens="zero"
    ),
    "BASE, fsdp 2, ep 2, recompute": C(
        2,
        P(data_parallel="fsdp", ep=2),
        router=RouterConfig("sigmoid", normalize_weights=False, select="base"),
        top_k=1,
        recompute=True,
    ),
    "expert choice, dp 2, ep 2, recompute": C(
        2, P(ep=2), router=RouterConfig(select="expert_choice", **BY_EXPERTS), recompute=True
    ),
    "expert choice, capped, fsdp 4, ep 4, no tokens on a rank": C(
        4,
        P(data_parallel="fsdp", ep=4),
        router=RouterConfig(select="expert_choice", cap=3, z_loss=0.01, **BY_EXPERTS),
        tokens="zero",
    ),
    "expert choice by position, cp 2, dp 2, ep 4 > dp 2": C(
        4, P(cp=2, ep=4), router=RouterConfig(select="expert_choice_by_position", normalize_weights=False)
    ),
    "expert choice by position, capped, pp 2, tp 2, ep 2 > dp 1, recompute": C(
        4,
        P(pp=2, tp=2, ep=2),
        router=RouterConfig(select="expert_choice_by_position", cap=4, normalize_weights=False),
        micro_batches=4,
        recompute=True,
    ),
    "hash, dp 4, ep 4, recompute": C(4, P(ep=4), router=RouterConfig(gate="hash"), recompute=True),
    "hash, cp 2, tp 2, fsdp 2, ep 4 > dp 2": C(
        8, P(cp=2, tp=2, data_parallel="fsdp", ep=4), router=RouterConfig(gate="hash"), micro_batches=1, tokens="zero"
    ),
    "hash, pp 2, tp 2, ep 2 > dp 1, recompute": C(
        4, P(pp=2, tp=2, ep=2), router=RouterConfig(gate="hash"), micro_batches=4, recompute=True
    ),
    "hash, cp 2, ep 2": C(2, P(cp=2, ep=2), router=RouterConfig(gate="hash")),
    "hash, tp 2, no sp, ep 2": C(2, P(tp=2, ep=2, sequence_parallel=False), router=RouterConfig(gate="hash")),
    "hash, pp 2, interleaved 1f1b": C(
        2, P(pp=2, schedule="interleaved_1f1b"), router=RouterConfig(gate="hash"), micro_batches=4
    ),
    "task, dp 2, ep 2, recompute": C(
        2, P(ep=2), router=RouterConfig(gate="task", tasks=3, z_loss=0.01), recompute=True
    ),
    "task, cp 2, fsdp 2, ep 4 > dp 2": C(
        4, P(cp=2, data_parallel="fsdp", ep=4), router=RouterConfig(gate="task", tasks=3), tokens="zero"
    ),
    "task, pp 2, tp 2, ep 2 > dp 1, recompute": C(
        4, P(pp=2, tp=2, ep=2), router=RouterConfig(gate="task", tasks=3), micro_batches=4, recompute=True
    ),
    "slots (SoftMoE), dp 2, ep 2, recompute": C(2, P(ep=2), router=SLOTS, top_k=1, recompute=True),
    "slots (SoftMoE), fsdp 4, ep 4, hierarchical, no tokens on a rank": C(
        4,
        P(data_parallel="fsdp", ep=4),
        router=SLOTS,
        top_k=1,
        dispatch=D("hierarchical", node_size=2),
        tokens="zero",
    ),
    "slots (SoftMoE), pp 2, dp 2, etp 2": C(4, P(pp=2, etp=2), router=SLOTS, top_k=1, micro_batches=4),
    "slots (SoftMoE), fssdp, dp 2": C(2, P(experts="fssdp"), router=SLOTS, top_k=1),
    "GShard, dp 4, ep 2, recompute": C(
        4,
        P(ep=2),
        router=RouterConfig(random_second=True),
        capacity=CapacityConfig(1.0, "choice", scope="global"),
        counts="first",
        recompute=True,
        micro_batches=1,
    ),
    "top-p (HMoE), dp 2, ep 2, recompute": C(
        2, P(ep=2), router=RouterConfig(select="top_p", entropy_loss=0.03), top_k=4, recompute=True
    ),
    "top-p (HMoE), fsdp 2, hierarchical, 2 nodes, ep 4": C(
        4,
        P(ep=4, data_parallel="fsdp"),
        router=RouterConfig(select="top_p", entropy_loss=0.03, z_loss=0.01),
        dispatch=D("hierarchical", node_size=2),
        top_k=4,
        tokens="zero",
    ),
    # experts
    "zero-computation experts (MoE++), dp 2, ep 2, recompute": C(2, P(ep=2), recompute=True, **MOEPP),
    "zero-computation experts (MoE++), dp 4, ep 4, capacity of all ranks": C(
        4, P(ep=4), capacity=CapacityConfig(0.8, scope="global"), micro_batches=1, **MOEPP
    ),
    "zero-computation experts (MoE++), fsdp 2, tp 2, ep 4, recompute feed-forward": C(
        4, P(data_parallel="fsdp", tp=2, ep=4), recompute=R("feed_forward"), tokens="zero", **MOEPP
    ),
    "zero-computation experts (MoE++), tp 2, no sp, ep 2": C(2, P(tp=2, ep=2, sequence_parallel=False), **MOEPP),
    "zero-computation experts (MoE++), fsdp 2, ep 2, bf16": C(
        2, P(data_parallel="fsdp", ep=2), dtype=BF16, **MOEPP | {"top_k": 2}
    ),
    "zero-computation experts (MoE++), fssdp, cp 2, calibrated": C(
        2, P(experts="fssdp", cp=2), calibrate=True, **MOEPP
    ),
    "zero-computation experts (MoE++), hierarchical, 2 nodes, dp 4, ep 4, micro scope": C(
        4, P(ep=4), dispatch=D("hierarchical", node_size=2), scope="micro", **MOEPP
    ),
    # the layers of several stages have no residuals
    "zero-computation experts (MoE++), pp 2, dp 2, ep 2": C(
        4, P(pp=2, ep=2), micro_batches=4, zero_computation=MOEPP["zero_computation"]
    ),
    "unequal widths (HMoE), dp 2, ep 2, recompute": C(2, P(ep=2), recompute=True, widths=WIDTHS, top_k=3),
    "unequal widths (HMoE), dp 4, ep 4": C(4, P(ep=4), widths=WIDTHS),
    "unequal widths (HMoE), tp 2, fsdp 2, ep 4, top-p": C(
        4,
        P(tp=2, data_parallel="fsdp", ep=4),
        router=RouterConfig(select="top_p", entropy_loss=0.03),
        top_k=4,
        widths=WIDTHS,
        tokens="zero",
    ),
    "unequal widths (HMoE), dp 4, ep 2, etp 2, recompute, exchanges kept": C(
        4, P(ep=2, etp=2), widths=WIDTHS, recompute=R(keep_exchanges=True)
    ),
    "unequal widths (HMoE), fsdp 2, bf16": C(2, P(data_parallel="fsdp"), dtype=BF16, widths=WIDTHS),
    "unequal widths (HMoE), hierarchical, 2 nodes, dp 4, ep 4, capacity": C(
        4,
        P(ep=4),
        dispatch=D("hierarchical", node_size=2),
        capacity=CapacityConfig(1.0),
        tokens="equal",
        widths=WIDTHS,
    ),
    "unequal widths (HMoE), pp 2, dp 2, ep 2": C(4, P(pp=2, ep=2), micro_batches=4, widths=WIDTHS),
    # pipelines
    "pp 2, gpipe": C(2, P(pp=2, schedule="gpipe"), micro_batches=4),
    "pp 2, 1f1b, recompute": C(2, P(pp=2), micro_batches=4, recompute=True),
    "pp 4, 1f1b": C(4, P(pp=4), micro_batches=8, tokens="zero"),
    "pp 2, interleaved 1f1b": C(2, P(pp=2, schedule="interleaved_1f1b"), micro_batches=4),
    "pp 2, interleaved zero bubble": C(2, P(pp=2, schedule="interleaved_zero_bubble"), micro_batches=4),
    "pp 2, zero bubble v": C(2, P(pp=2, schedule="zbv"), micro_batches=4),
    "pp 2, dp 2, ep 2": C(4, P(pp=2, ep=2), micro_batches=4),
    "pp 2, fsdp 2, ep 2": C(4, P(pp=2, ep=2, data_parallel="fsdp"), micro_batches=4, recompute=True),
    "pp 2, interleaved 1f1b, fsdp 2": C(4, P(pp=2, schedule="interleaved_1f1b", data_parallel="fsdp"), micro_batches=4),
    "pp 2, zero bubble v, dp 2, ep 2": C(4, P(pp=2, ep=2, schedule="zbv"), micro_batches=4, tokens="zero"),
    "pp 2, tp 2, ep 2 > dp 1": C(4, P(pp=2, tp=2, ep=2), micro_batches=4),
    "pp 2, cp 2, ep 2 > dp 1": C(4, P(pp=2, cp=2, ep=2, schedule="interleaved_1f1b"), micro_batches=4),
    "pp 4, dp 2, ep 2": C(8, P(pp=4, ep=2), micro_batches=4),
    "pp 2, tp 2, fsdp 2, ep 4 > dp 2": C(8, P(pp=2, tp=2, ep=4, data_parallel="fsdp"), micro_batches=2),
    "pp 2, cp 2, tp 2, ep 2, etp 2": C(8, P(pp=2, cp=2, tp=2, ep=2, etp=2), micro_batches=2, recompute=True),
    "pp 2, dp 2, ep 2, bf16": C(4, P(pp=2, ep=2), micro_batches=4, dtype=BF16),
    # several documents per sequence, and positions without a label
    "documents, dp 2, ep 2, few labels": C(2, P(ep=2), documents=True, labels="few"),
    "documents, dp 2, recompute attention": C(2, recompute=R("attention"), documents=True, labels="some"),
    "documents, fsdp 2, recompute": C(2, P(data_parallel="fsdp"), recompute=True, documents=True, labels="some"),
    "documents, fsdp 2, ep 2, bf16": C(2, P(data_parallel="fsdp", ep=2), dtype=BF16, documents=True, labels="some"),
    "documents, tp 2, few labels": C(2, P(tp=2), documents=True, labels="few"),
    "documents, tp 2, no sp, ep 2": C(2, P(tp=2, ep=2, sequence_parallel=False), documents=True, labels="some"),
    "documents, cp 2, ring, few labels": C(2, P(cp=2), documents=True, labels="few"),
    "documents, cp 2, gathered, recompute": C(
        2, P(cp=2, context="all_gather"), recompute=True, documents=True, labels="some"
    ),
    "documents, cp 4, ep 4 > dp 1": C(4, P(cp=4, ep=4), documents=True, labels="some"),
    "documents, cp 2, ep 2, bf16": C(2, P(cp=2, ep=2), dtype=BF16, documents=True, labels="some"),
    "documents, pp 2, 1f1b, recompute, few labels": C(
        2, P(pp=2), micro_batches=4, recompute=True, documents=True, labels="few"
    ),
    "documents, pp 2, zero bubble v": C(2, P(pp=2, schedule="zbv"), micro_batches=4, documents=True, labels="some"),
    "documents, pp 2, cp 2, tp 2, ep 2, etp 2": C(
        8, P(pp=2, cp=2, tp=2, ep=2, etp=2), micro_batches=2, documents=True, labels="few"
    ),
    "documents, fssdp, dp 2": C(2, P(experts="fssdp"), documents=True, labels="few"),
}


def runs(parallel: P) -> bool:
    """Return whether the installed torch can run the schedule."""
    return SPLITS_BACKWARD or not SCHEDULES[parallel.schedule].split_backward


COMPOSITIONS = {name: of for name, of in COMPOSITIONS.items() if runs(of.parallel)}
