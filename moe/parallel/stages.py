"""Which blocks each pipeline stage has, and the schedules that run stages.

Importing torch's own schedules takes a second, which only runs with a pipeline spend: see :mod:`.pipeline`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import count

import torch
from torch import nn

from ..config import require
from ..model import Decoder

#: Before torch 2.13, the weight half of a split backward fails because it does not find the nodes of custom ops.
SPLITS_BACKWARD = torch.__version__ >= "2.13"
#: Since torch 2.15, schedules free the logits of a micro-batch as soon as they have its loss.
FREES_LOGITS = torch.__version__ >= "2.15"


@dataclass(frozen=True)
class Schedule:
    """A schedule: the order in which a rank runs the forwards and backwards of its stages."""

    #: name in ``torch.distributed.pipelining.schedules``
    torch_class: str
    #: allowed numbers of stages per rank
    stages_per_rank: range
    #: rank 0 of P holds stages 0 and 2P-1 (down and back up a V), instead of 0 and P
    v_shaped: bool = False
    #: computes the gradients of activations first, and fills idle time with those of weights
    split_backward: bool = False
    #: runs every forward of a step before its first backward, which therefore knows all counts
    forwards_first: bool = False
    #: needs at least as many micro-batches as stages
    fills_stages: bool = False
    #: runs micro-batches in equal rounds of at least one per rank
    rounds: bool = False


_MANY = range(2, 1 << 16)

SCHEDULES: dict[str, Schedule] = {
    # arXiv 1811.06965
    "gpipe": Schedule("ScheduleGPipe", range(1, 2), forwards_first=True),
    # arXiv 1806.03377
    "1f1b": Schedule("Schedule1F1B", range(1, 2), fills_stages=True),
    # arXiv 2104.04473
    "interleaved_1f1b": Schedule("ScheduleInterleaved1F1B", _MANY, rounds=True),
    # arXiv 2401.10241, ZB1P and ZB-V
    "interleaved_zero_bubble": Schedule("ScheduleInterleavedZeroBubble", _MANY, split_backward=True, rounds=True),
    "zbv": Schedule("ScheduleZBVZeroBubble", range(2, 3), v_shaped=True, split_backward=True),
}


def check_pipeline(
    schedule: str, pp: int, stages_per_rank: int, micro_batches: int, num_layers: int, micro_batch: int = 1
) -> None:
    """Raise ValueError for a pipeline that cannot run. ``micro_batch`` is the number of sequences per micro-batch."""
    require(schedule in SCHEDULES, "parallel.schedule", schedule, f"use one of {', '.join(SCHEDULES)}")
    kind, stages = SCHEDULES[schedule], pp * stages_per_rank
    require(
        not kind.split_backward or SPLITS_BACKWARD,
        "parallel.schedule",
        schedule,
        f"torch {torch.__version__} cannot split this backward; use torch 2.13 or later, or 'interleaved_1f1b'",
    )
    require(pp >= 2, "parallel.pp", pp, "a pipeline needs at least 2 ranks; set 2 or more")
    allowed = "2 or more" if kind.stages_per_rank is _MANY else kind.stages_per_rank[0]
    require(
        stages_per_rank in kind.stages_per_rank,
        "parallel.stages_per_rank",
        stages_per_rank,
        f"parallel.schedule={schedule!r} takes {allowed}; set that",
    )
    require(
        num_layers >= stages,
        "model.num_layers",
        num_layers,
        f"fewer than the {stages} stages of parallel.pp={pp} x parallel.stages_per_rank={stages_per_rank}; lower one",
    )
    least = stages if kind.fills_stages else pp if kind.rounds else 1

    def rounds(number: int) -> int:
        return max(1, number // pp) if kind.rounds else 1

    def fits(number: int) -> bool:
        return number >= least and number % rounds(number) == 0

    if not fits(micro_batches):
        why = f"needs at least {least} with parallel.pp={pp}"
        if micro_batches >= least:
            why = f"runs {rounds(micro_batches)} equal rounds; use a multiple of parallel.pp={pp}"
        remedy = _other_micro_batches(micro_batches, micro_batch, lambda n: fits(n) and not (kind.rounds and n % pp))
        require(False, "micro_batches", micro_batches, f"parallel.schedule={schedule!r} {why}: {remedy}")


def _other_micro_batches(number: int, micro_batch: int, fits: Callable[[int], bool]) -> str:
    """Suggest how to get a number of micro-batches that fits: change their size, or else the global batch."""
    each = number * micro_batch
    for size in range(micro_batch - 1, 0, -1):
        if each % size == 0 and fits(each // size):
            return f"set data.micro_batch={size}, which makes it {each // size}"
    more = next(n for n in count(number + 1) if fits(n))
    return f"multiply data.global_batch by {Fraction(more, number)}, which makes it {more}"


def stage_ids(schedule: str, pp_size: int, pp_rank: int, stages_per_rank: int) -> list[int]:
    """Return the stages of a rank, in the order in which a micro-batch passes through them."""
    if SCHEDULES[schedule].v_shaped:
        return [pp_rank, 2 * pp_size - 1 - pp_rank]
    return [pp_rank + i * pp_size for i in range(stages_per_rank)]


def split(model: Decoder, num_stages: int, stage: int) -> Decoder:
    """Return one pipeline stage of a decoder: some of its blocks; the first stage has the embedding, the last the head.

    Parameters keep their names and are shared with ``model``, not copied. If the blocks do not divide evenly, earlier
    stages get one more, because the last also has norm and head. Raises ValueError for fewer blocks than stages.
    """
    names = list(model.blocks)
    require(len(names) >= num_stages, "model.num_layers", len(names), f"fewer than the {num_stages} pipeline stages")
    require(0 <= stage < num_stages, "stage", stage, f"must be at least 0 and less than {num_stages}")
    require(
        num_stages == 1 or not model.passes_logits,
        "moe.router.gate",
        "residual",
        f"passes logits from layer to layer, but {num_stages} pipeline stages exchange hidden states only; use "
        "'linear', or set parallel.pp=1",
    )
    each, more = divmod(len(names), num_stages)
    start = stage * each + min(stage, more)
    own = names[start : start + each + (stage < more)]
    part = copy.copy(model)
    tables = {key: copy.copy(table) for key, table in vars(model).items() if isinstance(table, (dict, set))}
    vars(part).update(tables)  # a shallow copy would share the module's tables of children and hooks
    part.blocks = nn.ModuleDict({name: model.blocks[name] for name in own})
    if stage > 0:
        part.embedding = None
    if stage < num_stages - 1:
        part.norm = part.head = None
    return part
