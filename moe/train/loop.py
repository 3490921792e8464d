"""The training loop: steps, evaluations, records and checkpoints.

B sequences, S tokens per sequence, N domains, L MoE layers.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import checkpoint
from ..collectives import LOCAL, sum_over, world_axis
from ..engines import Batch, Engine, build_engine
from ..health import Heartbeat, Pulse
from ..model import Decoder, numbered_moe_layers
from ..observe import Columns, expert_fraction, layer_record, observe, step_record, training_score, watch_routers
from ..observe.metrics import MetricsWriter, Progress
from ..parallel import Mesh
from .config import TrainConfig
from .data import Batches, Corpus
from .evaluate import evaluate
from .optim import build_optimizer, learning_rate


class NonFiniteError(RuntimeError):
    """Raised if a gradient is not finite. The step was not applied."""


class Stopped(Exception):  # noqa: N818  (nothing is wrong)
    """Raised after a checkpoint was saved because a rank got a signal."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


class DomainLosses:
    """Accumulates this rank's training loss by domain between two records."""

    def __init__(self, domains: int, device: torch.device) -> None:
        #: fp64 [N, 2]: sum of the loss in nats, and tokens
        self.sums_N2 = torch.zeros(domains, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses_BS: Tensor, domain_B: Tensor) -> None:
        """Add the losses per token [B, S] of one micro-batch; ``domain_B`` is the domain of each sequence."""
        tokens_B = torch.full_like(domain_B, losses_BS.shape[1], dtype=torch.float64)
        rows_B2 = torch.stack((losses_BS.double().sum(1), tokens_B), dim=1)
        self.sums_N2.index_add_(0, domain_B, rows_B2)


def mixed_precision(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Return an autocast context that computes in bf16 if ``config.dtype`` is bfloat16, and else does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")


def build_model(config: TrainConfig, vocab_size: int) -> Decoder:
    """Build the complete model of ``config``. Its weights depend only on the seed, so all ranks build the same."""
    torch.manual_seed(config.seed)
    return Decoder(
        vocab_size=vocab_size,
        seq_len=config.data.seq_len,
        num_layers=config.model.num_layers,
        num_heads=config.model.num_heads,
        intermediate_size=config.model.intermediate_size,
        moe=config.moe,
        moe_every=config.model.moe_every,
        dense_layers=config.model.dense_layers,
        attention=config.attention,
        recompute_blocks=config.model.recompute,
        recompute_how=config.recompute,
    )


def _built(config: TrainConfig, vocab_size: int) -> Decoder:
    """Run :func:`build_model`; if there is not enough memory, raise a ValueError that says so in one line."""
    try:
        return build_model(config, vocab_size)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0] or "out of memory"
        if not isinstance(error, MemoryError) and "alloc" not in reason and "overflow" not in reason.lower():
            raise
        raise ValueError(
            f"model.num_layers={config.model.num_layers}, moe.hidden_size={config.moe.hidden_size}: the model does "
            f"not fit into this machine's memory ({reason}); python -m equimoe.launch.dryrun shows what it needs"
        ) from None


def _engine(config: TrainConfig, model: Decoder, mesh: Mesh | None, device: torch.device, micro_batches: int) -> Engine:
    def optimizer(trainable: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(trainable.values(), config.optim)

    shared: dict[str, Any] = {
        "max_norm": config.optim.grad_clip,
        "device": device,
        "precision": partial(mixed_precision, config, device),
    }
    if config.engine == "torch":
        dtype = torch.bfloat16 if config.dtype == "bfloat16" else None
        shape = (config.data.micro_batch, config.data.seq_len)
        return build_engine(model, mesh, optimizer, shape=shape, dtype=dtype, micro_batches=micro_batches, **shared)
    with _named_extra(config.engine):
        if config.engine == "megatron":
            from ..engines.megatron import build_megatron_engine
        else:
            from ..engines.deepspeed import build_deepspeed_engine
    if config.engine == "megatron":
        sharded = config.megatron.distributed_optimizer
        return build_megatron_engine(model, mesh, optimizer, distributed_optimizer=sharded, **shared)
    settings = config.deepspeed.settings()
    stage, micro_batch = config.deepspeed.zero_stage, config.data.micro_batch
    return build_deepspeed_engine(
        model,
        mesh,
        optimizer,
        zero_stage=stage,
        settings=settings,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        **shared,
    )


@contextmanager
def _named_extra(engine: str) -> Iterator[None]:
    """Turn an ImportError into a ValueError that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"engine={engine!r}: cannot be imported ({error}); install it with pip install 'equimoe[{engine}]'"
        ) from None


class Trainer:
    """Trains, evaluates, saves and resumes the model of this rank."""

    def __init__(self, config: TrainConfig, corpus: Corpus, mesh: Mesh | None, device: torch.device) -> None:
        self.config, self.corpus, self.device, self.mesh = config, corpus, device, mesh
        self.axis = world_axis()
        #: mesh axis whose ranks read different sequences
        self.data = LOCAL if mesh is None else mesh["dp"]
        self.micro_batches = config.micro_batches(self.data.size)
        model = _built(config, config.model.vocab_size or corpus.vocab_size)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.active_parameters = self.parameters - sum(
            w.numel() * (config.moe.num_experts - config.moe.top_k) // config.moe.num_experts
            for layer in model.moe_layers()
            for w in layer.experts.parameters()
        )
        self.expert_fraction = expert_fraction(model)
        #: block numbers of all MoE layers of the model
        self.moe_numbers = list(numbered_moe_layers([model]))
        self.engine = _engine(config, model.to(device), mesh, device, self.micro_batches)
        #: this rank's MoE layers, keyed by block number
        self.layers = numbered_moe_layers(cast(list[Decoder], self.engine.parts))
        self.batches = Batches(corpus.train, config.data.seq_len, config.data.global_batch, config.seed)
        self.losses = DomainLosses(len(corpus.domains), device)
        self.columns = Columns.of(config.moe, self.axis.size)
        #: for each layer, fp64 [2]: summed probability of the chosen experts, and tokens; None if not observed
        self.scores: list[Tensor | None] = [None] * len(self.layers)
        self.step = 0
        torch.manual_seed(config.seed + 1 + self.axis.rank)

    @property
    def model(self) -> Decoder:
        """The decoder, or this rank's first stage of it under pipeline parallelism."""
        return cast(Decoder, self.engine.parts[0])

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return learning_rate(self.config.optim, self.step - 1, self.config.steps)

    def train_step(self, observed: bool = True) -> Tensor:
        """Run the next optimizer step and return the gradient norm.

        ``observed`` also collects the router's scores for :meth:`record`, at the cost of one more product with the
        router's weight. Raises NonFiniteError on every rank if the norm is not finite; the weights are then unchanged.
        """
        config = self.config
        sampled = self.batches.sample(
            self.step, self.data.rank, self.data.size, self.micro_batches, config.data.micro_batch
        )
        batches = [Batch(inputs_BS, labels_BS) for inputs_BS, labels_BS, _ in sampled]
        self.scores = [None] * len(self.layers)
        with self._observed_scores() if observed else nullcontext():
            result = self.engine.step(batches, learning_rate(config.optim, self.step, config.steps))
        if self.mesh is None or self.mesh["tp"].rank == 0:  # all ranks of a tensor-parallel group have the same losses
            for losses_BS, (_, _, domain_B) in zip(result.losses, sampled, strict=False):  # empty before the last stage
                self.losses.add(losses_BS, domain_B.to(self.device))
        if not result.applied:
            raise NonFiniteError(
                f"grad_norm={float(result.norm)}: is not finite; lower optim.lr, or resume from an earlier checkpoint"
            )
        self.step += 1
        return result.norm

    @contextmanager
    def _observed_scores(self) -> Iterator[None]:
        with watch_routers(self.layers.values(), training_score) as seen:
            yield
        found = [[score for score in of_layer if score is not None] for of_layer in seen]
        self.scores = [torch.stack(of_layer).sum(0) if of_layer else None for of_layer in found]

    def evaluate(self) -> dict[str, Any]:
        """Evaluate and return an ``eval`` record, see :mod:`equimoe.moe.observe.metrics`. Every rank must call it."""
        found = evaluate(self.engine, self.layers, self.moe_numbers, self.corpus, self.config, self.mesh, self.device)
        return {"kind": "eval", "step": self.step} | found

    def record(self, norm: Tensor) -> dict[str, Any]:
        """Return a ``train`` record of the steps since the last record.

        Every rank must call it. It costs one small all-reduce, and smaller ones among ranks that share sequences or
        experts.
        """
        table = torch.zeros(len(self.moe_numbers), self.columns.width, dtype=torch.float64, device=self.device)
        places = [self.moe_numbers.index(number) for number in self.layers]
        observe(table, places, self.layers.values(), self.columns, self.mesh, self.axis.rank, self.scores)
        joined = sum_over(torch.cat((self.losses.sums_N2.flatten(), table.flatten())), self.axis).get().cpu()
        sums_N2 = joined[: self.losses.sums_N2.numel()].view(-1, 2)
        rows = [layer_record(row, self.columns) for row in joined[sums_N2.numel() :].view(table.shape)]
        self.losses = DomainLosses(len(self.corpus.domains), self.device)
        loss, tokens = sums_N2.sum(0).tolist()
        return {
            "kind": "train",
            "step": self.step,
            "loss": loss / max(tokens, 1.0),
            "grad_norm": float(norm),
            "lr": self.rate,
            "tokens": self.step * self.config.data.global_batch * self.config.data.seq_len,
            "domain_loss": {d: n / t for d, (n, t) in zip(self.corpus.domains, sums_N2.tolist(), strict=True) if t},
            **step_record(rows, self.expert_fraction),
            "layers": rows,
        }

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that a resume needs, including the state of load balancing and of random generators."""
        state = self.engine.state()
        for number, layer in self.layers.items():
            balance = layer.balancer.state(self.device)
            state |= {f"balance.{number}.{name}": value for name, value in balance.items()}
        state[f"generator.cpu.{self.axis.rank}"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state[f"generator.cuda.{self.axis.rank}"] = torch.cuda.get_rng_state(self.device)
        return state

    def save(self, root: Path) -> Path:
        """Save a checkpoint of the current step and return its path. Every rank must call it."""
        degrees = {} if self.mesh is None else asdict(self.mesh.degrees)
        position = {"world": self.axis.size, "parallel": degrees, "data": self.corpus.fingerprint}
        return checkpoint.save(root, self.step, self.state(), position, self.config.checkpoint.keep_last)

    def resume(self, path: Path, manifest: dict[str, Any]) -> None:
        """Restore the state of a checkpoint, so that training continues exactly. Every rank must call it.

        Raises CheckpointError if the checkpoint was trained on other data.
        """
        position = manifest["position"]
        if position.get("data") != self.corpus.fingerprint:
            raise checkpoint.CheckpointError(
                f"{path}: was trained on other data; use the same data.path, tokenizer and sizes, or a new --run-dir"
            )
        self.engine.expect(checkpoint.contents(path, manifest))
        state = self.state()
        checkpoint.load(path, state, manifest)
        self.engine.restore(state)
        for number, layer in self.layers.items():
            own = f"balance.{number}."
            layer.balancer.restore({name[len(own) :]: t for name, t in state.items() if name.startswith(own)})
        try:
            torch.set_rng_state(state[f"generator.cpu.{self.axis.rank}"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state[f"generator.cuda.{self.axis.rank}"], self.device)
        except RuntimeError as error:
            raise checkpoint.CheckpointError(f"{path}: a random generator's state is refused: {error}") from None
        self.step = int(manifest["step"])

    def describe(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return a ``run`` record that contains ``config``."""
        return {
            "kind": "run",
            "config": config,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
            "world_size": self.axis.size,
            "device": self.device.type,
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
        }


def run(
    trainer: Trainer,
    run_dir: Path,
    metrics: MetricsWriter | None,
    progress: Progress | None,
    heartbeat: Heartbeat | None = None,
    signal: Callable[[], int] = lambda: 0,
) -> dict[str, Any]:
    """Train to the last configured step, evaluating and saving checkpoints, and return the last ``eval`` record.

    Rank 0 passes ``metrics`` and ``progress``; other ranks pass None. ``signal`` returns the signal that asked this
    rank to stop, or 0. If any rank got one, all save after the same step, and raise Stopped.
    """
    config, start = trainer.config, time.perf_counter()
    since, tokens_per_step = (trainer.step, start), config.data.global_batch * config.data.seq_len
    last_eval: dict[str, Any] = {}
    pulse = Pulse(trainer.axis, heartbeat)

    def publish(record: dict[str, Any]) -> None:
        if metrics is not None:
            metrics.write(record)
        if progress is not None:
            progress.show(record)

    while trainer.step < config.steps:
        step, last = trainer.step + 1, trainer.step + 1 == config.steps
        logged = last or step % config.log.every == 0
        pulse.begin(step)
        norm = trainer.train_step(observed=logged)
        stop = pulse.end(signal(), logged)
        if progress is not None:
            progress.advance(step)
        if logged:
            record, now = trainer.record(norm) | pulse.record(), time.perf_counter()
            record["tokens_per_s"] = (step - since[0]) * tokens_per_step / (now - since[1])
            record["elapsed_s"] = now - start
            publish(record)
            if progress is not None and (note := pulse.note()):
                progress.say(note)
            since = (step, time.perf_counter())
        busy = time.perf_counter()
        if last or (config.log.eval_every and step % config.log.eval_every == 0):
            pulse.enter("evaluate")
            last_eval = trainer.evaluate()
            publish(last_eval)
        if last or stop or (config.checkpoint.every and step % config.checkpoint.every == 0):
            pulse.enter("save")
            trainer.save(run_dir / "checkpoints")
        if stop and not last:
            raise Stopped(stop)
        since = (since[0], since[1] + time.perf_counter() - busy)  # tokens_per_s excludes this time
    return last_eval
