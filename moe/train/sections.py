"""The sections of a training run's configuration that no other part of the library declares."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config import check_literals, require
from ..observe.profile import steps_of
from ..observe.trackers import tracker_names


@dataclass(frozen=True)
class ModelConfig:
    """The decoder language model around the MoE layers, which section ``moe`` describes."""

    #: number of decoder blocks
    num_layers: int = 4
    #: attention heads of a block
    num_heads: int = 4
    #: width of the dense feed-forwards
    intermediate_size: int = 512
    #: use an MoE layer in every n-th block, starting with the n-th; 1: in all blocks, 0: in none
    moe_every: int = 1
    #: use dense feed-forwards in the first n blocks, regardless of ``moe_every``
    dense_layers: int = 0
    #: vocabulary size of embedding and head; None: that of the tokenizer
    vocab_size: int | None = None
    #: epsilon of all RMSNorms
    norm_eps: float = 1e-5
    #: use the embedding's weight for the head as well; not with pipeline parallelism
    tie_embeddings: bool = False
    #: divide each row of the head's weight by its length (NormHead of Ling, arXiv 2503.05139)
    norm_head: bool = False
    #: recompute activations in the backward pass; section ``recompute`` says which
    recompute: bool = False

    def __post_init__(self) -> None:
        check_literals(self, "model.")
        for name in ("num_layers", "num_heads", "intermediate_size"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "must be at least 1")
        require(self.num_layers <= 10_000, "model.num_layers", self.num_layers, "must be at most 10000")
        require(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "must be positive; 1e-5 and 1e-6 are usual")
        require(self.moe_every >= 0, "model.moe_every", self.moe_every, "must not be negative; 1: all blocks, 0: none")
        require(
            0 <= self.dense_layers <= self.num_layers,
            "model.dense_layers",
            self.dense_layers,
            f"must be between 0 and model.num_layers={self.num_layers}",
        )


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is split into sequences."""

    #: text, .jsonl (also .gz, .zst), .parquet, Hugging Face datasets on disk, Megatron's .bin and .idx, flat token
    #: files, or a folder of such files; or what ``python -m equimoe.launch.tokenize`` has written; None: the text that
    #: comes with Python
    path: str | None = None
    #: "bytes", or the path of a Hugging Face tokenizer.json
    tokenizer: str = "bytes"
    #: the token that ends a document, such as "</s>"; None: the one that the tokenizer's files name
    end_of_document: str | None = None
    #: folder for the tokens of long text, which runs can share; None: ``tokens`` in the run folder
    cache: str | None = None
    #: tokens per sequence
    seq_len: int = 256
    #: sequences per optimizer step, over all ranks
    global_batch: int = 16
    #: sequences per forward pass on one rank
    micro_batch: int = 8
    #: share of each domain's tokens that is held out for evaluation and never trained on
    heldout_fraction: float = 0.02
    #: what determines a document's domain: its top-level folder, its file type, or a field of its record;
    #: "auto": the field if it exists, else the folder, else the file type
    domain_by: Literal["auto", "folder", "kind", "field"] = "auto"
    #: field of a record that holds the text
    text_field: str = "text"
    #: field of a record that holds the domain
    domain_field: str = "domain"
    #: bytes to read of each domain of the built-in text; None: all. Text from ``path`` is always read completely
    builtin_bytes_per_domain: int | None = None
    #: whether positions attend to earlier documents of their sequence: "joined" lets them, "separate" keeps attention
    #: within each document
    documents: Literal["joined", "separate"] = "joined"
    #: integer type of the ids in a flat token file that does not say it itself
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    #: shares of the domains in what is trained on, as in ``web=0.7,code=0.3``; None: in proportion to their sizes
    mixture: str | None = None
    #: processes of each rank that read the next steps' sequences from files; 0: the rank reads them itself
    workers: int = 1

    def __post_init__(self) -> None:
        check_literals(self, "data.")
        for name in ("seq_len", "global_batch", "micro_batch"):
            require(getattr(self, name) >= 1, f"data.{name}", getattr(self, name), "must be at least 1")
        require(
            self.path is None or self.path.strip() != "",
            "data.path",
            self.path,
            "is empty; give a file or folder, or leave it out for the text that comes with Python",
        )
        for name, remedy in (
            ("tokenizer", "is empty; use 'bytes' or a path to a tokenizer.json"),
            ("text_field", "is empty; name the field that holds the text"),
            ("domain_field", "is empty; name the field that holds the domain"),
            ("end_of_document", "is empty; give a token of the tokenizer, or leave it out"),
            ("cache", "is empty; give a folder, or leave it out"),
            ("mixture", "is empty; give a share to each domain, as in web=0.7,code=0.3, or leave it out"),
        ):
            value = getattr(self, name)
            require(value is None or value.strip() != "", f"data.{name}", value, remedy)
        require(0 <= self.workers <= 64, "data.workers", self.workers, "must lie in 0..64; 1 is usual")
        self.shares()
        require(
            self.builtin_bytes_per_domain is None or self.builtin_bytes_per_domain >= 1,
            "data.builtin_bytes_per_domain",
            self.builtin_bytes_per_domain,
            "must be at least 1; leave it out for no limit",
        )
        require(
            0 < self.heldout_fraction < 1,
            "data.heldout_fraction",
            self.heldout_fraction,
            "must be greater than 0 and less than 1; 0.02 is usual",
        )

    def shares(self) -> dict[str, float] | None:
        """Return the shares of ``mixture``, which add up to 1, in the order of the domains' names; None without one."""
        if self.mixture is None:
            return None
        found: dict[str, float] = {}
        for entry in self.mixture.split(","):
            name, _, number = (part.strip() for part in entry.rpartition("="))
            try:
                share = float(number)
            except ValueError:
                share = -1.0
            ok = name != "" and name not in found and 0 < share < math.inf
            remedy = f"{entry.strip()!r} is wrong; name each domain once, with a positive share, as in web=0.7,code=0.3"
            require(ok, "data.mixture", self.mixture, remedy)
            found[name] = share
        return {name: found[name] / sum(found.values()) for name in sorted(found)}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning-rate schedule."""

    #: adamw; lamb: AdamW with steps in proportion to the size of each weight and each expert, for large batches (arXiv
    #: 1904.00962); muon: orthogonal steps for the matrices between hidden states, each expert by itself, and AdamW for
    #: embedding, head, routers and vectors (arXiv 2502.16982). engine "torch" has all of them, the others AdamW
    name: Literal["adamw", "lamb", "muon"] = "adamw"
    #: peak learning rate
    lr: float = 3e-3
    #: decay of AdamW's mean of gradients, per step
    beta1: float = 0.9
    #: decay of AdamW's mean of squared gradients, per step
    beta2: float = 0.95
    #: added to the root of AdamW's mean of squared gradients
    eps: float = 1e-8
    #: decay of the mean of gradients of the matrices that it updates, per step
    momentum: float = 0.95
    #: share of a weight that a step takes away, times the learning rate
    weight_decay: float = 0.1
    #: learning rate after warm-up: cosine decay, warmup-stable-decay ("wsd"), "constant", or "power": min(lr, sequences
    #: of a step * power_amplitude / tokens so far ^ power_exponent), with a decay at the end as in "wsd" (arXiv
    #: 2408.13359)
    schedule: Literal["cosine", "wsd", "constant", "power"] = "cosine"
    #: steps of linear warm-up
    warmup_steps: int = 20
    #: share of the steps, at the end of the run, in which the learning rate decays
    decay_fraction: float = 0.2
    #: a of the paper, which holds for its own scaling of weights (muP)
    power_amplitude: float = 4.6
    #: -b of the paper
    power_exponent: float = 0.51
    #: final learning rate as a fraction of ``lr``
    min_lr_ratio: float = 0.1
    #: clip gradients to this norm; 0 switches clipping off
    grad_clip: float = 1.0
    #: weights that are not trained, by parts of their names, separated by commas: ``router`` freezes all routers, which
    #: X-MoE (arXiv 2204.09179) advises for fine-tuning; none: all are trained
    frozen: str | None = None

    def __post_init__(self) -> None:
        check_literals(self, "optim.")
        require(self.lr > 0, "optim.lr", self.lr, "must be positive")
        for name in ("beta1", "beta2", "momentum"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "must lie in [0, 1)")
        for name in ("eps", "weight_decay"):
            require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "must not be negative")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "must not be negative")
        require(self.power_amplitude > 0, "optim.power_amplitude", self.power_amplitude, "must be positive")
        require(self.power_exponent >= 0, "optim.power_exponent", self.power_exponent, "must not be negative")
        require(0 < self.decay_fraction <= 1, "optim.decay_fraction", self.decay_fraction, "must lie in (0, 1]")
        require(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", self.min_lr_ratio, "must lie in [0, 1]")
        require(self.grad_clip >= 0, "optim.grad_clip", self.grad_clip, "must not be negative; 0 switches it off")
        given = self.frozen is None or all(part.strip() for part in self.frozen.split(","))
        what = "is empty" if not (self.frozen or "").strip() else "has an empty part"
        require(given, "optim.frozen", self.frozen, f"{what}; give parts of names, as in router,embedding")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; raise ``ValueError`` for a key that is given twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed, if ``engine`` is "deepspeed"."""

    #: 0: every rank holds everything; 1: shard the optimizer's state over the ranks that hold a weight; 2: shard the
    #: gradients too; 3: shard the weights too
    zero_stage: int = 1
    #: a DeepSpeed configuration (JSON) for what has no option here; values that contradict this run are refused
    config: str | None = None

    def __post_init__(self) -> None:
        require(self.zero_stage in (0, 1, 2, 3), "deepspeed.zero_stage", self.zero_stage, "use 0, 1, 2 or 3")
        require(
            self.config is None or self.config.strip() != "",
            "deepspeed.config",
            self.config,
            "is empty; give a JSON file, or leave it out",
        )

    def settings(self) -> dict[str, Any]:
        """Return the content of ``config``. Raises ValueError if it cannot be read."""
        if self.config is None:
            return {}
        try:
            with Path(self.config).expanduser().open() as file:
                found = json.loads(file.read(1 << 20), object_pairs_hook=_once)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"deepspeed.config={self.config}: cannot be read ({error}); give a JSON file") from None
        require(isinstance(found, dict), "deepspeed.config", self.config, "must hold a JSON object")
        return found


@dataclass(frozen=True)
class MegatronConfig:
    """Megatron-Core, if ``engine`` is "megatron"."""

    #: shard the optimizer's state over the ranks that hold a weight
    distributed_optimizer: bool = True

    def __post_init__(self) -> None:
        check_literals(self, "megatron.")


@dataclass(frozen=True)
class RoutingConfig:
    """Routing replay: record which experts every token is sent to, or train with recorded decisions."""

    #: folder for the decisions of every step; none: they are not recorded
    record: str | None = None
    #: folder with the decisions to train with, recorded on the same sequences and as many ranks; none: routers decide
    replay: str | None = None

    def __post_init__(self) -> None:
        for name in ("record", "replay"):
            folder = getattr(self, name)
            require(folder is None or folder.strip() != "", f"routing.{name}", folder, "is empty; give a folder")
            require("\0" not in (folder or ""), f"routing.{name}", folder, "cannot name a folder; choose another")


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and how many are kept."""

    #: save a checkpoint every n steps, and at the end; 0: only at the end
    every: int = 100
    #: keep the newest n complete checkpoints and delete older ones
    keep_last: int = 2

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every", self.every, "must not be negative; 0 saves only the last step")
        require(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(frozen=True)
class HealthConfig:
    """What to do about steps whose numbers are wrong, and how to find numbers that are silently wrong."""

    #: if a loss or gradient norm is not finite: end the run; skip the update and go on; or skip it, and read the batch
    #: once more later. All ranks do the same. A skipped step does not count as a step
    nonfinite: Literal["stop", "skip", "revisit"] = "stop"
    #: the same for a loss that is far above the last 128 losses; "ignore": do nothing
    spike: Literal["ignore", "stop", "skip", "revisit"] = "ignore"
    #: standard deviations above the mean of these losses that make a spike
    spike_sigmas: float = 6.0
    #: end the run if more than n of 100 steps in a row had to be skipped
    max_skipped: int = 10
    #: every n steps, and before every checkpoint, compare the copies of each weight on different ranks; 0: never
    replicas_every: int = 100
    #: compute every n-th step twice before the update, and end the run if the bits of loss or gradient differ, as after
    #: a hardware fault; 0: never. Needs kernels that are deterministic
    replay_every: int = 0

    def __post_init__(self) -> None:
        check_literals(self, "health.")
        require(self.spike_sigmas > 0, "health.spike_sigmas", self.spike_sigmas, "must be positive; 6 is usual")
        for name in ("max_skipped", "replicas_every", "replay_every"):
            require(getattr(self, name) >= 0, f"health.{name}", getattr(self, name), "must not be negative")


@dataclass(frozen=True)
class LogConfig:
    """How often the run is measured, and what it records."""

    #: record metrics and print progress every n steps
    every: int = 10
    #: evaluate on held-out text every n steps, and at the end; 0: only at the end
    eval_every: int = 100
    #: evaluate at most this many sequences per domain
    eval_sequences: int = 16
    #: trackers that show the metrics, separated by commas: tensorboard, wandb, mlflow; none: no tracker
    trackers: str | None = "tensorboard"
    #: FIRST:END: profile the steps from FIRST to END - 1 on rank 0, and write traces to the run folder; none: no steps
    profile: str | None = None

    def __post_init__(self) -> None:
        check_literals(self, "log.")
        require(self.every >= 1, "log.every", self.every, "must be at least 1")
        require(self.eval_every >= 0, "log.eval_every", self.eval_every, "must not be negative; 0: only at the end")
        require(self.eval_sequences >= 1, "log.eval_sequences", self.eval_sequences, "must be at least 1")
        for name in ("trackers", "profile"):
            text = getattr(self, name)
            require(text is None or text.strip() != "", f"log.{name}", text, "is empty; give a value, or none")
        tracker_names(self.trackers)
        if self.profile is not None:
            steps_of(self.profile)
