"""Compares whole training steps with those of transformers' Qwen3-MoE, on the CPU.

    python benchmarks/train_step.py [--rounds N] [--threads N] [--sizes NAME,...] [--out DIR]

A step is forward, loss, backward, clipping of the gradients' norm, and AdamW (torch's fused one) on fp32 weights; bf16
is autocast. Ours is the step of this package's engine, with its balance loss; transformers computes no balance loss,
which is its default, and runs with each of its implementations of the experts. All models begin with the same weights
and train on the same tokens. They run in one process and take turns; each round has new tokens and starts with another
one. A ratio is the median over rounds of their time divided by ours, with its quartiles: above 1, we are faster. A
model whose loss differs from ours in the first or the last round is left out and named.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import geometric_mean, quantiles
from typing import Any

# read when torch loads; oneDNN keeps code for 1024 shapes, fewer than all models together have, so that each would wait
# for code which the others have pushed out
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shared.options import CORES, Parser, positive, threads
from benchmarks.shared.records import OURS, as_lines, facts, load_averages, slug, spent, table, write
from benchmarks.shared.timing import Step, Timer, interleave
from equimoe.launch import loaded
from equimoe.launch.env import command
from equimoe.moe.engines import Batch, build_engine

LR, MAX_NORM = 1e-3, 1.0
#: implementations of the experts in transformers
WAYS = ("eager", "grouped_mm")
#: dtype -> largest relative difference of the first loss; and of the last one, as only ours trains on a balance loss
DTYPES = {"fp32": 1e-4, "bf16": 1e-2}
LAST = 0.02


@dataclass(frozen=True)
class Size:
    """A model, and the sequences of a step."""

    hidden: int
    width: int
    experts: int
    top_k: int
    layers: int
    heads: int
    vocabulary: int
    sequences: int
    length: int


TINY = "tiny"
SIZES = {
    "quickstart": Size(192, 192, 8, 2, 4, 6, 260, 8, 256),
    "many small experts": Size(256, 128, 32, 4, 4, 4, 4096, 4, 256),
    "few large experts": Size(512, 1024, 8, 2, 2, 8, 4096, 4, 256),
    TINY: Size(32, 16, 4, 2, 2, 2, 64, 2, 16),  # to try the command
}
#: trains on token ids, and returns their mean loss
Train = Callable[[Tensor], float]


def build(size: Size, precision: Callable[[], AbstractContextManager[Any]]) -> dict[str, Train]:
    """Return the step of every model by name, ours first."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=size.hidden,
        moe_intermediate_size=size.width,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.length,
    )
    kind = transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        kind.from_config(config).save_pretrained(folder)
        ours = loaded.build(loaded.find(Path(folder)), None, torch.device("cpu"), size.length, torch.float32)
        steps = {OURS: _ours(ours.requires_grad_(True).train(), precision)}
        for way in WAYS:
            model = kind.from_pretrained(folder, experts_implementation=way).train()
            steps[f"transformers, {way}"] = _theirs(model, precision)
    return steps


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def _ours(model: nn.Module, precision: Callable[[], AbstractContextManager[Any]]) -> Train:
    engine = build_engine(model, None, lambda named: _adamw([*named.values()]), max_norm=MAX_NORM, precision=precision)

    def train(ids_BS: Tensor) -> float:
        labels_BS = F.pad(ids_BS[:, 1:], (0, 1), value=-100)
        losses = engine.step([Batch(ids_BS, labels_BS)], LR).losses
        return float(torch.cat(losses).sum() / (labels_BS >= 0).sum())

    return train


def _theirs(model: nn.Module, precision: Callable[[], AbstractContextManager[Any]]) -> Train:
    parameters = [*model.parameters()]
    optimizer = _adamw(parameters)

    def train(ids_BS: Tensor) -> float:
        with precision():
            loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return train


def measure(size: Size, dtype: str, rounds: int) -> dict[str, Any]:
    """Train all models in turns; return seconds, ratios and losses by name, and who is missing and why."""
    precision = partial(torch.autocast, "cpu", torch.bfloat16) if dtype == "bf16" else nullcontext
    steps = build(size, precision)
    torch.manual_seed(1)
    batches = [torch.randint(size.vocabulary, (size.sequences, size.length)) for _ in range(rounds)]
    losses: dict[str, list[float]] = {name: [] for name in steps}
    runs, missing = interleave(
        Timer(torch.device("cpu")),
        {name: _timed(train, batches, losses[name]) for name, train in steps.items()},
        rounds,
        0.0,
        must=(OURS,),
    )
    for name in [*runs]:
        (first, last), (our_first, our_last) = (losses[one][:: len(losses[one]) - 1] for one in (name, OURS))
        if not (math.isclose(first, our_first, rel_tol=DTYPES[dtype]) and math.isclose(last, our_last, rel_tol=LAST)):
            missing[name] = f"disagrees: losses {first:.4f} and {last:.4f}, ours {our_first:.4f} and {our_last:.4f}"
            del runs[name]
    seconds = {name: [sum(parts) for parts in each] for name, each in runs.items()}
    ratios = {
        name: quantiles([a / b for a, b in zip(each, seconds[OURS], strict=True)], n=4)
        for name, each in seconds.items()
        if name != OURS
    }
    return {"seconds": seconds, "ratios": ratios, "losses": losses, "missing": missing}


def _timed(train: Train, batches: list[Tensor], losses: list[float]) -> Step:
    turns = cycle(batches)

    def step(mark: Callable[[], None]) -> None:
        ids_BS = next(turns)
        mark()
        losses.append(train(ids_BS))
        mark()

    return step


def least(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the median ratio to the fastest other model, by size and dtype."""
    return {
        name: min(middle for _, middle, _ in found["ratios"].values())
        for name, found in figures.items()
        if found["ratios"]
    }


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for name, found in result["figures"].items():
        for model, seconds in found["seconds"].items():
            low, middle, high = found["ratios"].get(model, (1.0, 1.0, 1.0))
            ratio = "" if model == OURS else f"{middle:.2f} ({low:.2f} to {high:.2f})"
            rows.append([name, model, f"{quantiles(seconds, n=4)[1] * 1e3:.0f}", ratio])
    smallest = result["least"]
    return "\n".join(
        [
            "# Whole training steps",
            "",
            *as_lines(result),
            "",
            *(
                f"{name}: {', '.join(f'{key} {value}' for key, value in one.items())}  "
                for name, one in result["sizes"].items()
            ),
            "",
            table(["size", "model", "median ms", "time/ours (quartiles)"], rows),
            "",
            *(
                f"absent: {name}: {model}: {why}  "
                for name, f in result["figures"].items()
                for model, why in f["missing"].items()
            ),
            "ratio to the faster transformers: "
            + ", ".join(f"{name} {value:.2f}" for name, value in smallest.items())
            + (f"; geometric mean {geometric_mean(smallest.values()):.2f}" if smallest else "none"),
            "",
        ]
    )


def sizes(text: str) -> list[str]:
    """Parse names of sizes."""
    chosen = list(dict.fromkeys(text.split(",")))
    if unknown := set(chosen) - SIZES.keys():
        raise ValueError(f"{','.join(sorted(unknown))}: choose from {', '.join(SIZES)}")
    return chosen


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=20, help="timed rounds per size and dtype (default 20)")
    parser.add_argument("--threads", type=threads, default=min(2, CORES), help="CPU threads (default %(default)s)")
    parser.add_argument("--sizes", metavar="NAME,...", help=f"of {', '.join(SIZES)} (default: all but {TINY})")
    parser.add_out()
    args = parser.parse_args(argv)
    try:
        chosen = [name for name in SIZES if name != TINY] if args.sizes is None else sizes(args.sizes)
    except ValueError as error:
        parser.error(f"--sizes={error}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    begin, before = time.perf_counter(), load_averages()
    figures = {}
    for name in chosen:
        for dtype in DTYPES:
            figures[f"{name}, {dtype}"] = measure(SIZES[name], dtype, max(args.rounds, 2))
            print(f"{name}, {dtype}: measured", file=sys.stderr, flush=True)
    result: dict[str, Any] = {
        "facts": facts("transformers"),
        "command": " ".join(["python benchmarks/train_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": {"rounds": max(args.rounds, 2), "threads": args.threads},
        "sizes": {name: asdict(SIZES[name]) for name in chosen},
        "figures": figures,
        "least": least(figures),
        **spent(begin, before),
    }
    text = markdown(result)
    name = f"train_step-{slug(args.sizes)}" if args.sizes else "train_step"
    print(text, "written: ", *write(result, text, args.out, name), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
