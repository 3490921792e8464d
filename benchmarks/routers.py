"""Compares routers at one size: held-out loss, load, specialisation and the time of a step.

    python benchmarks/routers.py [--quick] [--seeds 3] [--steps N] [--arms top-2,hash] [--out DIR]

Every arm trains a small model on the text that comes with Python. All have equally many parameters, and compute equally
many per token: arms that choose one expert have half as many, twice as wide. Runs of one seed see the same sequences.
One run follows the other, all arms of a seed before the next seed, so that a machine that is slow for a while does not
favour an arm; the time of a step is CPU time. If the command is interrupted, the same command does the missing runs. It
writes a table (.md) and all numbers (.json) into DIR.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent)
    import checkout  # noqa: F401

import torch

from benchmarks.checkout import ROOT
from benchmarks.shared.options import Parser
from benchmarks.shared.records import as_lines, facts, load_averages, spent, table, write
from equimoe.launch.env import command
from equimoe.moe import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from equimoe.moe.config import ZeroComputationConfig
from equimoe.moe.observe.metrics import write_atomically
from equimoe.moe.train.config import DataConfig, LogConfig, ModelConfig, OptimConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer


@dataclass(frozen=True)
class Size:
    """Size of the model and of the training runs."""

    steps: int = 300
    layers: int = 2
    hidden: int = 96
    #: width and number of experts where a token has two of them
    width: int = 96
    experts: int = 16
    seq_len: int = 32
    batch: int = 64
    micro_batch: int = 32
    lr: float = 3e-3
    init_std: float = 0.05
    #: number of held-out sequences per domain
    heldout: int = 128
    bytes_per_domain: int = 1_000_000


FULL = Size()
QUICK = Size(steps=12, hidden=32, width=32, experts=8, heldout=8, bytes_per_domain=100_000)

#: no loss: the router balances the load by itself
ITSELF = BalanceConfig(coefficient=0.0)


@dataclass(frozen=True)
class Arm:
    """One way to route and to balance."""

    label: str
    router: dict[str, Any] = field(default_factory=dict)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    #: further fields of the layer
    layer: dict[str, Any] = field(default_factory=dict)
    #: experts of a token; more than two only if the router mostly chooses fewer
    top_k: int = 2


ARMS: dict[str, Arm] = {
    "top-2": Arm("softmax, two experts, global-batch loss"),
    "micro": Arm("the same, micro-batch loss", balance=BalanceConfig(scope="micro")),
    "none": Arm("the same, not balanced", balance=ITSELF),
    "bias": Arm(
        "sigmoid, expert bias (DeepSeek-V3)",
        {"score": "sigmoid"},
        BalanceConfig(scope="sequence", coefficient=1e-4, bias_update_rate=0.01),
    ),
    "limited": Arm("both of one of four groups (DeepSeek-V2's limit)", {"groups": 4, "group_worth": "best"}),
    "each-group": Arm("one of each group (MoGE)", {"select": "each_group", "groups": 2}),
    "noisy": Arm("noisy top-2 (Shazeer)", {"gate": "noisy"}),
    "gshard": Arm(
        "random second choice, capacity 1.25 (GShard)",
        {"random_second": True},
        BalanceConfig(scope="micro", counts="first"),
        {"capacity": CapacityConfig(drop="choice")},
    ),
    "moe++": Arm(
        "gating residuals, four experts without computation (MoE++)",
        {"gate": "residual"},
        BalanceConfig(scope="micro"),
        {"zero_computation": ZeroComputationConfig(), "capacity": CapacityConfig(factor=1.1)},
    ),
    "top-p": Arm("scores sum to 0.4, at most four (HMoE's rule)", {"select": "top_p", "top_p": 0.4}, top_k=4),
    "task": Arm("task-aware gating, a task per domain", {"gate": "task", "tasks": 5}),
    "sinkhorn": Arm("Sinkhorn (S-BASE)", {"select": "sinkhorn"}, ITSELF),
    "by-position": Arm(
        "expert choice by position", {"select": "expert_choice_by_position", "normalize_weights": False}, ITSELF
    ),
    "expert-choice": Arm(
        "expert choice", {"select": "expert_choice", "normalize_weights": False, "sees_future": True}, ITSELF
    ),
    "switch": Arm("one expert, jitter (Switch)", {"normalize_weights": False, "jitter": 0.01}, top_k=1),
    "xmoe": Arm("one expert, cosine (X-MoE)", {"gate": "cosine", "normalize_weights": False}, top_k=1),
    "base": Arm(
        "one expert, assignment (BASE)",
        {"select": "base", "score": "sigmoid", "normalize_weights": False},
        ITSELF,
        top_k=1,
    ),
    "hash": Arm("one expert, by token id (hash)", {"gate": "hash"}, ITSELF, top_k=1),
    "slots": Arm("slots (SoftMoE)", {"gate": "slots", "sees_future": True}, ITSELF, top_k=1),
}


def configure(arm: Arm, size: Size, seed: int) -> TrainConfig:
    """Return the configuration of a run."""
    experts, width = (size.experts // 2, 2 * size.width) if arm.top_k == 1 else (size.experts, size.width)
    slots = {"slots": max(size.seq_len // experts, 1)} if arm.router.get("gate") == "slots" else {}
    return TrainConfig(
        steps=size.steps,
        seed=seed,
        model=ModelConfig(size.layers, num_heads=4, intermediate_size=2 * size.width),
        moe=MoEConfig(
            size.hidden,
            width,
            experts,
            arm.top_k,
            router=RouterConfig(**arm.router, **slots),
            balance=arm.balance,
            init_std=size.init_std,
            **arm.layer,
        ),
        data=DataConfig(
            seq_len=size.seq_len,
            global_batch=size.batch,
            micro_batch=size.micro_batch,
            builtin_bytes_per_domain=size.bytes_per_domain,
        ),
        optim=OptimConfig(lr=size.lr, warmup_steps=max(size.steps // 20, 3)),
        log=LogConfig(eval_sequences=size.heldout, trackers=None),
    )


def run(name: str, size: Size, seed: int, folder: Path) -> dict[str, Any]:
    """Do one run, unless it has been done, and return its record, which is also written to the folder."""
    file = folder / f"{name}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    config = configure(ARMS[name], size, seed)
    trainer = Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))
    times, loads, begin = [], [], time.perf_counter()
    while trainer.step < config.steps:
        start = time.process_time()  # other jobs of the machine do not count
        norm = trainer.train_step(observed=False)
        times.append(time.process_time() - start)
        if trainer.step > config.steps // 2:
            loads.append(mean(layer["max_over_mean"] for layer in trainer.record(norm)["layers"]))
    found = trainer.evaluate()
    record = {
        "arm": name,
        "seed": seed,
        "loss": mean(domain["loss"] for domain in found["domains"].values()),
        "load": mean(loads),
        "heldout_load": heldout_load(found),
        "divergence": mean(found["divergence"]),
        "step_ms": 1000 * median(times),
        "parameters": trainer.parameters,
        "active": trainer.active_parameters,
        "seconds": time.perf_counter() - begin,
    }
    write_atomically(file, json.dumps(record).encode())
    return record


def heldout_load(found: dict[str, Any]) -> float:
    """Return the load of the busiest expert on held-out text of all domains, over the mean, mean over layers."""
    routing_DLE = torch.tensor(list(found["routing"].values()))
    load_LE = routing_DLE.mean(0)
    return float((load_LE.amax(-1) / load_LE.mean(-1)).mean())


# ---- the table

COLUMNS = (
    ("loss", "held-out loss", ".4f"),
    ("load", "busiest expert, training", ".2f"),
    ("heldout_load", "busiest expert, held out", ".2f"),
    ("divergence", "divergence of domains", ".3f"),
    ("step_ms", "CPU ms per step", ".0f"),
)


def spread(values: Sequence[float], spec: str) -> str:
    """Return mean +- standard deviation."""
    text = format(mean(values), spec)
    return f"{text} \u00b1 {stdev(values):{spec}}" if len(values) > 1 else text


def rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of the table, in the order of the arms; those that see later tokens have a mark."""
    found = []
    for name, arm in ARMS.items():
        of_arm = [record for record in records if record["arm"] == name]
        if of_arm:
            mark = " *" if arm.router.get("sees_future") else ""
            cells = [spread([record[key] for record in of_arm], spec) for key, _, spec in COLUMNS]
            found.append([f"`{name}`: {arm.label}{mark}", *cells])
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    s = result["settings"]
    return "\n".join(
        [
            "# Routers at one size",
            "",
            *as_lines(result),
            "",
            f"{s['layers']} layers of {s['experts']} experts of width {s['width']}, two per token, or of half as many "
            f"of twice the width, one per token; {s['steps']} steps of {s['batch']} sequences of {s['seq_len']} bytes, "
            f"in micro-batches of {s['micro_batch']}, on one process. Loss in nats per token of held-out text, mean "
            "over domains. Busiest expert: its choices over the mean, in the steps of the second half of training, and "
            "in all held-out text. Divergence in bits: how differently domains are routed. \u00b1 standard deviation "
            "over seeds. `top-p` computes up to four experts per token. \\* sees later tokens, so its loss is too low "
            "for a language model.",
            "",
            table(["router", *(title for _, title, _ in COLUMNS)], rows(result["runs"])),
            "",
        ]
    )


@command
def main(argv: list[str] | None = None) -> int:
    args = Parser(__doc__).parse_arms(argv, ARMS, FULL.steps, "routers")
    size = QUICK if args.quick else FULL
    size = replace(size, steps=args.steps or size.steps)
    torch.set_num_threads(1)
    begin, before = time.perf_counter(), load_averages()
    folder = args.runs or ROOT / "runs" / f"routers-{'quick-' if args.quick else ''}{size.steps}"
    folder.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in range(args.seeds):
        for name in args.arms:
            runs.append(record := run(name, size, seed, folder))
            print(
                f"{name:<14} seed {seed}  held-out loss {record['loss']:.4f}  busiest expert {record['load']:.2f}  "
                f"{record['seconds']:4.0f} s",
                flush=True,
            )
    result: dict[str, Any] = {
        "facts": facts(),
        "command": " ".join(["python benchmarks/routers.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": asdict(size) | {"seeds": args.seeds},
        "runs": runs,
        **spent(begin, before),
    }
    text = markdown(result)
    print(text, "written: ", *write(result, text, args.out, "routers" + ("-quick" if args.quick else "")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
