"""The trainer of a rank: it takes steps, evaluates, saves and resumes.

B sequences, S tokens per sequence, N domains, L MoE layers.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .. import checkpoint
from ..collectives import LOCAL, sum_over, world_axis
from ..config import require
from ..engines import Accept, Batch, StepResult
from ..health import Replicas
from ..model import Decoder, numbered_moe_layers
from ..observe import (
    Columns,
    expert_fraction,
    layer_record,
    memory_in_use,
    observe,
    peak_flops,
    speed_record,
    step_flops,
    step_record,
    training_score,
    watch_routers,
)
from ..parallel import IGNORED, Mesh
from ..transfer import Reading, to_device
from .build import build_model, documents_of, engine_of, one_line_for_memory
from .config import TrainConfig
from .contract import DATA
from .data import READ_AHEAD, Ahead, Batches, Corpus, Cursor
from .decisions import Decisions, RoutingFiles, recorded_routing
from .evaluate import evaluate
from .judge import Judge, NonFiniteError
from .optim import learning_rate
from .replay import DisagreementError, replayed

#: optimizer steps after which a postponed batch is read again, unless the run ends before
REVISIT_AFTER = 20


class DomainLosses:
    """Accumulates this rank's training loss by domain between two records."""

    def __init__(self, domains: int, device: torch.device) -> None:
        #: fp64 [N, 2]: sum of the loss in nats, and labels
        self.sums_N2 = torch.zeros(domains, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, losses_BS: Tensor, labelled_B: Tensor, domain_B: Tensor) -> None:
        """Add the losses per position [B, S] of one micro-batch.

        ``labelled_B`` is the number of labels of each sequence that this rank counts; ``domain_B`` its domain.
        """
        rows_B2 = torch.stack((losses_BS.double().sum(1), labelled_B.double()), dim=1)
        self.sums_N2.index_add_(0, domain_B, rows_B2)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Set the random generators of a step. They depend on nothing else, so a run can resume on any mesh."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7], "little"))


class Trainer:
    """Trains, evaluates, saves and resumes the model of this rank."""

    def __init__(self, config: TrainConfig, corpus: Corpus, mesh: Mesh | None, device: torch.device) -> None:
        self.config, self.corpus, self.device, self.mesh = config, corpus, device, mesh
        self.axis = world_axis()
        tasks, domains = config.moe.router.tasks, len(corpus.domains)
        remedy = f"the data has {domains} domains, whose numbers are the tasks; set it to at least {domains}"
        require(tasks is None or tasks >= domains, "moe.router.tasks", tasks, remedy)
        #: mesh axis whose ranks read different sequences
        self.data = LOCAL if mesh is None else mesh["dp"]
        self.micro_batches = config.micro_batches(self.data.size)
        # torch's engine builds only the part of the model that this rank holds
        with one_line_for_memory(config), torch.device("meta" if config.engine == "torch" else device):
            model = build_model(config, config.model.vocab_size or corpus.vocab_size)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.active_parameters = self.parameters - sum(
            int(w.numel() * (config.moe.num_experts - config.moe.mlps_per_token) / config.moe.num_experts)
            for layer in model.moe_layers()
            for w in layer.experts.parameters()
        )
        self.expert_fraction, self.flops_per_token = expert_fraction(model), step_flops(model)
        self.peak_flops = peak_flops(device)
        #: block numbers of all MoE layers of the model
        self.moe_numbers = list(numbered_moe_layers([model]))
        with one_line_for_memory(config):
            self.engine = engine_of(config, model, mesh, device, self.micro_batches)
        #: this rank's MoE layers, keyed by block number
        self.layers = numbered_moe_layers(cast(list[Decoder], self.engine.parts))
        size = config.data.seq_len, config.data.global_batch
        self.batches = Batches(corpus.train, *size, config.seed, corpus.train_masks, config.data.shares())
        #: reads the next steps' sequences while this one is computed
        self.ahead = Ahead(self.batches, config.data.workers)
        self.losses = DomainLosses(len(corpus.domains), device)
        self.columns = Columns.of(config.moe, self.axis.size)
        #: for each layer, fp64 [2]: summed probability of the chosen experts, and tokens; None if not observed
        self.scores: list[Tensor | None] = [None] * len(self.layers)
        self.step = 0
        #: position in the data, and the tokens of all steps taken
        self.cursor, self.tokens = Cursor(), 0
        #: whether this rank's losses count: all ranks of a tensor-parallel group have the same ones
        self.counts = mesh is None or mesh["tp"].rank == 0
        self.judge = Judge(config.health, self.axis, self.counts)
        #: a record of each step that was skipped since the loop last took them
        self.skipped: list[dict[str, Any]] = []
        self._replicas: Replicas | None = None
        #: seconds of training before this process, and when it started to train
        self._earlier_s, self.started = 0.0, time.perf_counter()
        self.saver = checkpoint.Saver(config.checkpoint.keep_last)
        self.records, self.replays = (self._routing_files(name) for name in ("record", "replay"))

    def _routing_files(self, name: str) -> RoutingFiles | None:
        folder = getattr(self.config.routing, name)
        if folder is None:
            return None
        tokens, stage = (self.axis, 0) if self.mesh is None else (self.mesh["stage"], self.mesh["pp"].rank)
        files = RoutingFiles(folder, f"routing.{name}", tokens, stage)
        if name == "replay":
            files.check()
        return files

    @property
    def model(self) -> Decoder:
        """The decoder, or this rank's first stage of it under pipeline parallelism."""
        return cast(Decoder, self.engine.parts[0])

    @property
    def elapsed_s(self) -> float:
        """Seconds of training since step 0, without the time between an interrupted run and its resume."""
        return self._earlier_s + time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """The learning rate of the last step."""
        return self._rate_of(self.step - 1, self.tokens)

    def _rate_of(self, step: int, tokens: int) -> float:
        return learning_rate(self.config.optim, step, self.config.steps, self.config.data.global_batch, tokens)

    def train_step(self, observed: bool = True) -> Tensor:
        """Run the next optimizer step and return the gradient norm.

        ``observed`` also collects the router's scores for :meth:`record`, at the cost of one more product with the
        router's weight. A step that may not update the weights is skipped, and the next batch takes its place, as far
        as section ``health`` allows; else raises NonFiniteError on every rank, and the weights are unchanged.
        """
        while True:
            numbers = self.cursor.batch(self.step, self.config.data.global_batch)
            result = self._attempt(numbers, observed)
            if result.applied:
                self.cursor.advance(numbers)
                self.step += 1
                self.tokens += len(numbers) * self.config.data.seq_len
                return result.norm
            self._skip(numbers)

    def _attempt(self, numbers: list[int], observed: bool) -> StepResult:
        """Run a step on these sequences."""
        config = self.config
        seed_step(config.seed, self.step, self.axis.rank)
        sampled = self.batches.read(
            numbers, self.data.rank, self.data.size, self.micro_batches, config.data.micro_batch
        )
        later = self.cursor.later(self.step, numbers, min(READ_AHEAD, config.steps - self.step - 1))
        self.ahead.expect([self.batches.share_of(each, self.data.rank, self.data.size) for each in later])
        batches = [
            Batch(inputs_BS, labels_BS, documents=documents_of(inputs_BS, config, self.corpus), tasks=domain_B)
            for inputs_BS, labels_BS, domain_B in sampled
        ]
        rate = self._rate_of(self.step, self.tokens + len(numbers) * config.data.seq_len)
        accept: Accept = self.judge
        if config.health.replay_every and (self.step + 1) % config.health.replay_every == 0:
            accept = replayed(self.engine, batches, rate, self.axis, self.judge)
        for layer in self.layers.values():
            layer.router.begin_step(self.step)
        self.scores = [None] * len(self.layers)
        with self._observed_scores() if observed else nullcontext(), self._routing(numbers):
            result = self.engine.step(batches, rate, accept)
        if self.counts and result.applied:
            first = self.mesh is None or self.mesh["cp"].rank == 0  # one of the ranks that share a sequence
            for losses_BS, (_, labels_BS, domain_B) in zip(result.losses, sampled, strict=False):  # of the last stage
                labelled_B = (labels_BS != IGNORED).sum(1) * first
                self.losses.add(losses_BS, *to_device(torch.stack((labelled_B, domain_B)), self.device))
        return result

    def _skip(self, numbers: list[int]) -> None:
        """Go on without the refused step of these sequences, or raise NonFiniteError."""
        why = self.judge.stop(self.step)
        if why is not None:
            raise NonFiniteError(why)
        fault, postpone_to = self.judge.fault, None
        assert fault is not None
        if self.judge.revisits:
            postpone_to = self.cursor.place(self.step, numbers, self.step + REVISIT_AFTER, self.config.steps)
        again = self.cursor.advance(numbers, postpone_to)
        if postpone_to == self.config.steps:
            again = 0  # unless the run is continued beyond its end
        self.skipped.append(
            {
                "kind": "skip",
                "step": self.step,
                "reason": fault.what,
                "loss": fault.loss,
                "grad_norm": fault.norm,
                "sequences": len(numbers),
                "postponed": again,
            }
        )

    def check_replicas(self) -> None:
        """Raise DisagreementError, on every rank, if ranks hold different copies of a weight or of its moments."""
        held = self.engine.weights() | self.engine.moments()
        if self._replicas is None:
            self._replicas = Replicas(held, self.axis)
        found = self._replicas.difference(held)
        if found is not None:
            raise DisagreementError(f"{found}; a bit flipped, or only some ranks changed it: resume from a checkpoint")

    @contextmanager
    def _routing(self, numbers: list[int]) -> Iterator[None]:
        """Context of a step on these sequences, which replays or records its routing if section ``routing`` says so."""
        found: Decisions = {}
        with ExitStack() as stack:
            if self.replays is not None:
                stack.enter_context(self.replays.replayed(self.layers, self.step, numbers))
            if self.records is not None:
                found = stack.enter_context(recorded_routing(self.layers))
            yield
        if self.records is not None:
            self.records.write(self.step, numbers, found)

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
        experts. The host waits once, for all layers and the norm together.
        """
        table = torch.zeros(len(self.moe_numbers), self.columns.width, dtype=torch.float64, device=self.device)
        places = [self.moe_numbers.index(number) for number in self.layers]
        observe(table, places, self.layers.values(), self.columns, self.mesh, self.axis.rank, self.scores)
        joined = sum_over(torch.cat((self.losses.sums_N2.flatten(), table.flatten())), self.axis).get()
        read = Reading(torch.cat((joined, norm.to(joined).reshape(1)))).get()
        sums_N2, table, norm = read.split([self.losses.sums_N2.numel(), table.numel(), 1])
        sums_N2 = sums_N2.view(-1, 2)
        rows = [layer_record(row, self.columns) for row in table.view(-1, self.columns.width)]
        self.losses = DomainLosses(len(self.corpus.domains), self.device)
        loss, tokens = sums_N2.sum(0).tolist()
        return {
            "kind": "train",
            "step": self.step,
            "loss": loss / tokens if tokens else None,
            "grad_norm": float(norm),
            "lr": self.rate,
            "tokens": self.tokens,
            "skipped": self.judge.skips,
            "postponed": self.cursor.waiting,
            "domain_loss": {d: n / t for d, (n, t) in zip(self.corpus.domains, sums_N2.tolist(), strict=True) if t},
            **step_record(rows, self.expert_fraction),
            "layers": rows,
        }

    def state(self) -> checkpoint.State:
        """Return all tensors that a resume needs, including the state of load balancing.

        Random generators are not among them: :func:`seed_step` sets them in every step.
        """
        state = dict(self.engine.state())
        for number, layer in self.layers.items():
            balance = layer.balancer.state(self.device)
            state |= {f"balance.{number}.{name}": value for name, value in balance.items()}
        return state

    def start_saving(self, root: Path) -> Path:
        """Begin to save a checkpoint of the current step, and return its path. Every rank must call it.

        Training may go on at once; ``saver`` tells how the save ends.
        """
        return self.saver.start(root, self.step, self.state(), self.position())

    def save(self, root: Path) -> Path:
        """Save a checkpoint of the current step, and return its path when it is complete. Every rank must call it."""
        path = self.start_saving(root)
        self.saver.wait()
        return path

    def position(self) -> dict[str, Any]:
        """Return, as JSON, what a resume needs besides tensors. Every rank must call it."""
        losses_PN2 = self.losses.sums_N2.new_zeros(self.axis.size, *self.losses.sums_N2.shape)
        losses_PN2[self.axis.rank] = self.losses.sums_N2
        of_rank = enumerate(sum_over(losses_PN2, self.axis).get().tolist())
        return {
            "world": self.axis.size,
            "parallel": {} if self.mesh is None else asdict(self.mesh.degrees),
            "data": self.corpus.fingerprint,
            "config": asdict(self.config),
            "cursor": self.cursor.state(),
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
            "health": self.judge.state(),
            # of the steps since the last record; ranks stay apart, because a sum in another order has other bits
            "losses": {str(rank): rows for rank, rows in of_rank if any(map(any, rows))},
        }

    def resume(self, path: Path, manifest: dict[str, Any], other_data: bool = False) -> None:
        """Restore the state of a checkpoint, so that training continues exactly. Every rank must call it.

        Raises CheckpointError if the checkpoint was trained on other data, unless ``other_data`` allows it.
        """
        position = manifest["position"]
        imported = "architecture" in position  # it has not been trained on anything yet
        if position.get("data") != self.corpus.fingerprint and not other_data and not imported:
            raise checkpoint.CheckpointError(
                f"{path}: was trained on other data; use the same data.path, tokenizer and sizes, a new --run-dir, or "
                f"add --allow-change {DATA}"
            )
        try:
            self._restore_position(int(manifest["step"]), position)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError) as error:
            raise checkpoint.CheckpointError(f"{path}: its position cannot be read ({error!r})") from None
        self.engine.expect(checkpoint.contents(path, manifest))
        state = self.state()
        checkpoint.load(path, state, manifest)
        self.engine.restore(state)
        for number, layer in self.layers.items():
            own = f"balance.{number}."
            tensors = checkpoint.tensors_of({n: value for n, value in state.items() if n.startswith(own)})
            layer.balancer.restore({name.removeprefix(own): tensor for name, tensor in tensors.items()})

    def begin(self, path: Path, tensors: dict[str, checkpoint.Saved], opened: checkpoint.Opened) -> None:
        """Start from the weights ``tensors`` in folder ``path``, which ``opened`` opens. Every rank must call it."""
        state = self.engine.state()
        weights = {name: value for name, value in state.items() if name.startswith("model.")}
        checkpoint.load_weights(path, weights, tensors, opened)
        self.engine.restore(state)

    def _restore_position(self, step: int, position: dict[str, Any]) -> None:
        self.step = step
        sequences = step * self.config.data.global_batch
        self.cursor = Cursor.restored(position["cursor"]) if "cursor" in position else Cursor(sequences)
        self.tokens = int(position.get("tokens", sequences * self.config.data.seq_len))
        self._earlier_s = float(position.get("elapsed_s", 0.0))
        if "health" in position:
            self.judge.restore(position["health"])
        self.losses = DomainLosses(len(self.corpus.domains), self.device)
        for rank, rows in position.get("losses", {}).items():
            if int(rank) % self.axis.size == self.axis.rank and len(rows) == len(self.corpus.domains):
                self.losses.sums_N2 += torch.tensor(rows, dtype=torch.float64, device=self.device)

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
            "flops_per_token": self.flops_per_token,
            "device_name": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
            "peak_flops": self.peak_flops,
        }

    def speed(self, tokens_per_s: float) -> dict[str, float]:
        """Return the fields of a ``train`` record about speed and memory. Every rank must call it.

        ``tokens_per_s`` is the speed of all ranks together.
        """
        memory_P = torch.zeros(self.axis.size, dtype=torch.int64)  # on the host, so that no GPU is waited for
        memory_P[self.axis.rank] = memory_in_use(self.device)
        most = int(sum_over(memory_P, self.axis).get().max())
        found = speed_record(tokens_per_s, self.axis.size, self.flops_per_token, self.peak_flops)
        return found | {"memory_bytes": most}
