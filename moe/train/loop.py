"""A training run from its first step to its report.  N domains, L MoE layers, E experts."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..balance import loss_value
from ..collectives import LOCAL, sum_over, world_axis
from ..engines import build_engine
from ..model import Decoder, numbered_moe_layers
from ..parallel import Mesh
from ..types import load_summary
from . import checkpoint
from .config import ModelConfig, TrainConfig
from .data import Batches, Corpus
from .evaluate import evaluate
from .metrics import MetricsWriter, Progress
from .optim import build_optimizer, learning_rate
from .step import Losses, mixed_precision, train_step


def build_model(config: TrainConfig, vocab_size: int, micro_batches: int) -> Decoder:
    """The whole model of a configuration, the same on every rank: the seed alone decides its weights."""
    torch.manual_seed(config.seed)
    return Decoder(
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        num_layers=config.model.num_layers,
        num_heads=config.model.num_heads,
        intermediate_size=config.model.intermediate_size,
        moe=config.moe(micro_batches),
        moe_every=config.model.moe_every,
        dense_layers=config.model.dense_layers,
        attention=config.attention,
        recompute_blocks=config.model.recompute,
        recompute_how=config.recompute,
    )


class Trainer:
    """Model, optimizer and data of a run on this rank."""

    def __init__(self, config: TrainConfig, corpus: Corpus, mesh: Mesh | None, device: torch.device) -> None:
        self.config, self.corpus, self.device, self.mesh = config, corpus, device, mesh
        self.axis = world_axis()
        #: the ranks that read different sequences
        self.data = LOCAL if mesh is None else mesh["dp"]
        self.micro_batches = config.micro_batches(self.data.size)
        model = build_model(config, config.model.vocab_size or corpus.vocab_size, self.micro_batches)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.active_parameters = self.parameters - sum(
            w.numel() * (config.model.num_experts - config.model.top_k) // config.model.num_experts
            for layer in model.moe_layers()
            for w in layer.experts.parameters()
        )
        #: the decoder's layers that are MoE
        self.moe_numbers = list(numbered_moe_layers([model]))
        self.engine = build_engine(
            model.to(device),
            mesh,
            micro_batches=self.micro_batches,
            shape=(config.data.micro_batch, config.data.seq_len),
            device=device,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" else None,
            precision=partial(mixed_precision, config, device),
        )
        #: those of them that are on this rank
        self.layers = numbered_moe_layers(cast(list[Decoder], self.engine.parts))
        self.optimizer = build_optimizer(self.engine.named_parameters().values(), config.optim)
        self.batches = Batches(corpus.train, config.data.seq_len, config.data.global_batch, config.seed)
        self.losses = Losses(len(corpus.domains), device)
        self.step = 0
        torch.manual_seed(config.seed + 1 + self.axis.rank)

    @property
    def model(self) -> Decoder:
        """The decoder; under pipeline parallelism this rank's first stage."""
        return cast(Decoder, self.engine.model)

    def train_step(self) -> Tensor:
        """Do the next optimizer step; returns the gradient's norm."""
        rate = learning_rate(self.config.optim, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self.batches.sample(
            self.step, self.data.rank, self.data.size, self.micro_batches, self.config.data.micro_batch
        )
        norm = train_step(self.engine, self.optimizer, batches, self.config, self.losses)
        self.step += 1
        return norm

    def evaluate(self) -> dict[str, Any]:
        """An ``eval`` record: see :mod:`equimoe.moe.train.metrics`."""
        return {"kind": "eval", "step": self.step} | evaluate(self)

    def record(self, norm: Tensor) -> dict[str, Any]:
        """A ``train`` record of the steps since the last one. Every rank calls it; one small all-reduce."""
        experts = self.config.model.num_experts
        table = torch.zeros(len(self.moe_numbers), 2 * experts + 3, dtype=torch.float64, device=self.device)
        for row, number in zip(table, self.moe_numbers, strict=True):
            if number not in self.layers:
                continue
            layer = self.layers[number]
            totals = layer.balancer.window.last
            assert totals is not None
            row[:experts], row[experts:-3] = totals.local_counts_E, totals.local_prob_sums_E
            row[-3:] = torch.stack((totals.local_tokens, layer.stats.dropped_choices, layer.stats.counts.sum()))
        joined = sum_over(torch.cat((self.losses.sums_N2.flatten(), table.flatten())), self.axis).get().cpu()
        sums_N2 = joined[: self.losses.sums_N2.numel()].view(-1, 2)
        rows = [_layer_record(row, self.config.model) for row in joined[sums_N2.numel() :].view(table.shape)]
        self.losses = Losses(len(self.corpus.domains), self.device)
        nats, tokens = sums_N2.sum(0).tolist()
        return {
            "kind": "train",
            "step": self.step,
            "loss": nats / max(tokens, 1.0),
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "balance": float(np.mean([row["balance"] for row in rows])) if rows else 1.0,
            "max_over_mean": max((row["max_over_mean"] for row in rows), default=1.0),
            "tokens": self.step * self.config.data.global_batch * self.config.data.seq_len,
            "domain_loss": {d: n / t for d, (n, t) in zip(self.corpus.domains, sums_N2.tolist(), strict=True) if t},
            "layers": rows,
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors that a resume needs, those of load balancing among them."""
        generators = {f"cpu.{self.axis.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators[f"cuda.{self.axis.rank}"] = torch.cuda.get_rng_state(self.device)
        state = checkpoint.training_state(self.engine.named_parameters(), self.optimizer, generators)
        for number, layer in self.layers.items():
            balance = layer.balancer.state(self.config.model.num_experts, self.device)
            state |= {f"balance.{number}.{name}": value for name, value in balance.items()}
        biases = [(n, b) for part in self.engine.parts for n, b in part.named_buffers() if n.endswith("router.bias_E")]
        return state | {f"model.{name}": bias_E for name, bias_E in biases}

    def save(self, root: Path) -> Path:
        """Write a checkpoint of the present step. Every rank calls it."""
        degrees = {} if self.mesh is None else asdict(self.mesh.degrees)
        position = {"world": self.axis.size, "parallel": degrees, "data": self.corpus.fingerprint}
        return checkpoint.save(root, self.step, self.state(), position, self.config.checkpoint.keep_last)

    def resume(self, path: Path, manifest: dict[str, Any]) -> None:
        """Go on exactly where the checkpoint was written. Every rank calls it."""
        position = manifest["position"]
        if position.get("data") != self.corpus.fingerprint:
            raise checkpoint.CheckpointError(
                f"{path}: was trained on other data; give the same data.path, tokenizer and sizes, or a new run folder"
            )
        state = self.state()
        checkpoint.load(path, state, manifest)
        torch.set_rng_state(state[f"generator.cpu.{self.axis.rank}"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[f"generator.cuda.{self.axis.rank}"], self.device)
        self.step = int(manifest["step"])

    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """A ``run`` record."""
        return {
            "kind": "run",
            "config": config,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "world_size": self.axis.size,
            "device": self.device.type,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
        }


def _layer_record(row: Tensor, model: ModelConfig) -> dict[str, Any]:
    """Counts, probability sums, tokens, and dropped and wanted choices of a layer, as the metrics want them."""
    counts_E, prob_sums_E = row[: model.num_experts].long(), row[model.num_experts : -3]
    tokens, dropped, wanted = row[-3:]
    return {
        "counts": counts_E.tolist(),
        "balance": float(loss_value(counts_E, tokens, prob_sums_E, tokens, model.top_k)),
        **load_summary(counts_E),
        "dropped": float(dropped / wanted.clamp_min(1)),
    }


def run(trainer: Trainer, run_dir: Path, metrics: MetricsWriter | None, progress: Progress | None) -> dict[str, Any]:
    """Train to the configured last step, with evaluations and checkpoints on the way; returns the last evaluation.

    ``metrics`` and ``progress`` are rank 0's; the others pass None.
    """
    config, start = trainer.config, time.perf_counter()
    since, tokens_per_step = (trainer.step, start), config.data.global_batch * config.data.seq_len
    last_eval: dict[str, Any] = {}

    def publish(record: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(record)
        if progress is not None:
            progress.show(record)

    while trainer.step < config.steps:
        norm = trainer.train_step()
        step, last = trainer.step, trainer.step == config.steps
        if progress is not None:
            progress.advance(step)
        if step % config.log.every == 0 or last:
            record, now = trainer.record(norm), time.perf_counter()
            record["tokens_per_s"] = (step - since[0]) * tokens_per_step / (now - since[1])
            record["elapsed_s"] = now - start
            publish(record)
            since = (step, time.perf_counter())
        busy = time.perf_counter()
        if last or (config.log.eval_every and step % config.log.eval_every == 0):
            last_eval = trainer.evaluate()
            publish(last_eval)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            trainer.save(run_dir / "checkpoints")
        since = (since[0], since[1] + time.perf_counter() - busy)  # training's own speed
    return last_eval
