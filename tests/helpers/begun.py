"""Runs that start from weights on a mesh, and leave them as they are."""

from __future__ import annotations

from pathlib import Path

import torch

from equimoe.launch import initial
from equimoe.launch.options import parse
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer

#: a run of two steps that changes no bit of a weight
STILL = ["--steps", "2", "--optim.lr", "1e-30", "--log.every", "1", "--log.eval_sequences", "1", "--data.seq_len", "16"]
STILL += ["--data.global_batch", "8", "--data.micro_batch", "2", "--log.trackers", "none"]
MESHES: dict[str, tuple[int, list[str]]] = {
    "alone": (1, []),
    "ep": (2, ["--parallel.ep", "2"]),
    "tp": (2, ["--parallel.tp", "2"]),
    "fsdp, bfloat16": (2, ["--parallel.data_parallel", "fsdp", "--parallel.ep", "2", "--dtype", "bfloat16"]),
    "pp": (2, ["--parallel.pp", "2"]),
}


def begun(rank: int, world: int, options: list[str], source: Path, run_dir: Path) -> float:
    """Start a run from weights, train a step, save a checkpoint, and return the step's loss."""
    run = parse(["--init.from", str(source), *STILL, *options]).config
    mesh = build_mesh(run.parallel) if world > 1 else None
    corpus = load_corpus(run.data, load_tokenizer(run.data.tokenizer))
    trainer = Trainer(run, corpus, mesh, torch.device("cpu"))
    initial.begin(trainer, source)
    norm = trainer.train_step()
    trainer.save(run_dir / "checkpoints")
    return float(trainer.record(norm)["loss"])
