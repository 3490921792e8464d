"""Computes the memory of a rank in closed form, from the configuration and the parallel degrees alone.

Weights, gradients and optimizer state are exact. Activations are what a GPU's fused kernels save for the backward pass,
with balanced routing. Buffers of collectives and temporary tensors are not included, except for those of the loss;
:mod:`equimoe.moe.plan.dry_run` measures all.

D hidden, N heads, M key/value heads, H head width, F expert width, V vocabulary, T tokens of a micro-batch in this
rank's attention, t tokens that it holds between split layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import ceil, prod

from ...kernels.matmul_tiles import MANY_ROWS
from ..config import require
from ..config.routing import UP_TO_K
from ..parallel.degrees import ParallelConfig
from ..parallel.mesh import EXPERT_GRID, sizes
from ..parallel.stages import FREES_LOGITS, stage_ids
from ..train.config import TrainConfig


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on one rank, by kind."""

    #: fp32 master weights; under FSDP, this rank's shards
    parameters: int
    #: gradients of these parameters
    gradients: int
    #: unsharded gradients, which FSDP accumulates until the last micro-batch of a step
    whole_gradients: int
    #: AdamW's two moments, and one step counter per weight tensor
    optimizer_state: int
    #: weights that FSDP has gathered: all of a pipeline's rank; else those outside of blocks, and those of one block
    gathered_weights: int
    #: activations of all micro-batches that are in flight at the same time
    activations: int
    #: gradients of the log-softmax and of the logits in fp32, which the backward of the loss needs at the same time
    loss: int

    @property
    def total(self) -> int:
        """The sum of all kinds, which are rarely at their largest all at once."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Weight:
    """This rank's part of a weight under tensor and expert parallelism. FSDP shards its rows."""

    rows: int
    width: int
    expert: bool = False


@dataclass(frozen=True)
class RankPart:
    """A rank's position in the mesh, and its part of the model."""

    degrees: ParallelConfig
    rank: int
    blocks: tuple[int, ...]
    stages: tuple[int, ...]
    num_stages: int

    @property
    def first(self) -> bool:
        return 0 in self.stages

    @property
    def last(self) -> bool:
        return self.num_stages - 1 in self.stages

    def shard(self, expert: bool) -> tuple[int, int]:
        """Return the number of ranks over which FSDP shards a weight, and this rank's index among them."""
        d = self.degrees
        if d.data_parallel != "fsdp":
            return 1, 0
        if expert:
            lengths = sizes(d)
            after = prod(lengths[name] for name in EXPERT_GRID[EXPERT_GRID.index("edp_shard") + 1 :])
            return lengths["edp_shard"], self.rank // after % lengths["edp_shard"]
        over = d.dp_shard * d.cp
        return over, self.rank // d.tp % over


def memory(config: TrainConfig, world: int, rank: int, vocab_size: int | None = None) -> Memory:
    """Return the memory of ``rank`` of ``world``. Raises ValueError if the degrees do not fit or lack a formula."""
    part = _part_of(config, world, rank)
    vocabulary = config.model.vocab_size or vocab_size
    require(vocabulary is not None, "model.vocab_size", vocabulary, "give the tokenizer's vocabulary size")
    assert vocabulary is not None
    require(
        config.dtype == "float32" or part.degrees.data_parallel == "fsdp",
        "parallel.data_parallel",
        part.degrees.data_parallel,
        "autocast keeps 16-bit casts of the weights, which have no formula; use equimoe.launch.dryrun",
    )
    require(
        config.optim.name != "muon",
        "optim.name",
        config.optim.name,
        "has one moment for some weights and two for others, which has no formula; use equimoe.launch.dryrun",
    )
    window = config.attention.window
    require(
        window is None or window >= config.data.seq_len,
        "attention.window",
        window,
        "has no formula; use equimoe.launch.dryrun",
    )
    micro_batches = config.micro_batches(part.degrees.dp)
    weights = list(weights_of(config, part, vocabulary))
    padded = own = 0
    for weight in weights:
        over, number = part.shard(weight.expert)
        if weight.expert and weight.rows % over:  # sharded within each expert, evenly
            padded, own = padded + weight.rows * weight.width // over, own + weight.rows * weight.width // over
            continue
        rows = ceil(weight.rows / over)
        padded += rows * weight.width
        own += min(max(weight.rows - number * rows, 0), rows) * weight.width
    # under TP the embedding's gradient covers the whole vocabulary on each rank, until its reduction over replicas
    tp = part.degrees.tp
    unsplit = 4 * (vocabulary - ceil(vocabulary / tp)) * config.moe.hidden_size if part.first else 0
    sharded = part.degrees.data_parallel == "fsdp"
    accumulates = sharded and micro_batches > 1
    activations = _Activations(config, part, vocabulary)
    # gradients received from the next stage: the current one, and the previous one, which schedules free late
    arriving = 0 if part.last else 2 * activations.hidden
    return Memory(
        parameters=4 * padded,
        gradients=4 * padded + (0 if sharded or part.degrees.dp * part.degrees.cp > 1 else unsplit),
        whole_gradients=4 * sum(w.rows * w.width for w in weights) + unsplit if accumulates else 0,
        optimizer_state=8 * own + 4 * len(weights),
        gathered_weights=_gathered(config, part, vocabulary) * activations.c if sharded else 0,
        activations=_in_flight(config, part, micro_batches) * activations.of_stage() + arriving,
        loss=8 * activations.logits if part.last else 0,
    )


def _gathered(config: TrainConfig, part: RankPart, vocabulary: int) -> int:
    """Return how many of this rank's weights are gathered at the same time under FSDP."""

    def count(blocks: tuple[int, ...], stages: tuple[int, ...] = ()) -> int:
        some = replace(part, blocks=blocks, stages=stages)
        weights = weights_of(config, some, vocabulary)
        return sum(w.rows * w.width for w in weights if not (w.expert and part.degrees.experts == "fssdp"))

    if part.num_stages > 1:
        return count(part.blocks, part.stages)
    return count((), part.stages) + max(count((block,)) for block in part.blocks)


def _part_of(config: TrainConfig, world: int, rank: int) -> RankPart:
    require(0 <= rank < world, "rank", rank, f"must be from 0 to {world - 1}")
    degrees = config.degrees(world)
    if degrees.pp == 1:
        return RankPart(degrees, rank, tuple(range(config.model.num_layers)), (0,), 1)
    each = degrees.stages_of_rank
    stages = stage_ids(degrees.schedule, degrees.pp, rank // (world // degrees.pp), each)
    number = degrees.pp * each
    size, more = divmod(config.model.num_layers, number)
    starts = [s * size + min(s, more) for s in range(number + 1)]
    blocks = tuple(block for s in stages for block in range(starts[s], starts[s + 1]))
    return RankPart(degrees, rank, blocks, tuple(stages), number)


def _is_moe(config: TrainConfig, block: int) -> bool:
    model = config.model
    return block >= model.dense_layers and model.moe_every > 0 and (block + 1) % model.moe_every == 0


def _in_flight(config: TrainConfig, part: RankPart, micro_batches: int) -> int:
    """Return the largest number of micro-batches that are in flight, waiting for their backward pass."""
    if part.num_stages == 1:
        return 1
    schedule = part.degrees.schedule
    known = {"gpipe": micro_batches, "1f1b": min(micro_batches, part.num_stages - part.stages[0])}
    require(
        schedule in known,
        "parallel.schedule",
        schedule,
        f"has no formula; use {' or '.join(known)}, or equimoe.launch.dryrun",
    )
    return known[schedule]


# ---- weights


def weights_of(config: TrainConfig, part: RankPart, vocabulary: int) -> Iterator[Weight]:
    hidden, tp = config.moe.hidden_size, part.degrees.tp
    if part.first:
        yield Weight(ceil(vocabulary / tp), hidden)
    for block in part.blocks:
        yield from (Weight(hidden, 1), Weight(hidden, 1))
        yield from _attention_weights(config, tp)
        if _is_moe(config, block):
            yield from _moe_weights(config, part.degrees)
        else:
            width = config.model.intermediate_size // tp
            yield from (Weight(width, hidden), Weight(width, hidden), Weight(hidden, width))
    if part.last:
        yield Weight(hidden, 1)
        if not config.model.tie_embeddings:
            yield Weight(ceil(vocabulary / tp), hidden)


def _attention_weights(config: TrainConfig, tp: int) -> Iterator[Weight]:
    hidden, heads, a = config.moe.hidden_size, config.model.num_heads, config.attention
    if a.kind == "grouped":
        width, kv_heads = a.head_width or hidden // heads, a.num_kv_heads or heads
        yield Weight((heads + 2 * kv_heads) * width // tp, hidden)
        yield from [Weight((heads + 2 * kv_heads) * width // tp, 1)] * (a.bias != "none")
        yield Weight(hidden, heads * width // tp)
        yield from [Weight(hidden, 1)] * (a.bias == "all")
        if a.qk_norm:
            joint = a.qk_norm_over == "all_heads"
            yield from (Weight(count * width if joint else width, 1) for count in (heads, kv_heads))
        return
    if a.q_lora_rank:
        yield from (Weight(a.q_lora_rank, hidden), Weight(a.q_lora_rank, 1))
        yield from [Weight(a.q_lora_rank, 1)] * (a.bias != "none")
    yield Weight(heads * (a.qk_nope_width + a.qk_rope_width) // tp, a.q_lora_rank or hidden)
    yield from (Weight(a.kv_lora_rank + a.qk_rope_width, hidden), Weight(a.kv_lora_rank, 1))
    yield from [Weight(a.kv_lora_rank + a.qk_rope_width, 1)] * (a.bias != "none")
    yield Weight(heads * (a.qk_nope_width + a.v_width) // tp, a.kv_lora_rank)
    yield Weight(hidden, heads * a.v_width // tp)
    yield from [Weight(hidden, 1)] * (a.bias == "all")


def _moe_weights(config: TrainConfig, degrees: ParallelConfig) -> Iterator[Weight]:
    moe = config.moe
    rows = moe.num_experts if moe.chunks is None else sum(moe.chunks)
    hidden, width, experts = moe.hidden_size, moe.row_width // degrees.etp, -(-rows // degrees.ep)
    projected = moe.router.projected(moe.all_experts)
    number, free = moe.all_experts, moe.zero_computation
    yield from {
        "linear": [Weight(number, hidden)],
        "noisy": [Weight(number, hidden)] * 2,
        "hash": [],
        "slots": [Weight(moe.num_experts * moe.router.slots, hidden)],
        "task": [
            Weight(number, hidden),
            Weight(number, moe.router.task_width),
            Weight(moe.router.tasks or 1, moe.router.task_width),
        ],
        "cosine": [Weight(projected, hidden), Weight(number, projected), Weight(1, 1)],
        "residual": [Weight(number, hidden), Weight(number, number)],
    }[moe.router.gate]
    if free is not None and free.constant:
        yield from (Weight(free.constant, 2 * hidden), Weight(free.constant, hidden))
    yield Weight(experts, (1 + moe.gated) * width * hidden, expert=True)
    yield Weight(experts, width * hidden, expert=True)
    if shared := moe.shared_intermediate_size:
        yield from (Weight(shared, hidden), Weight(shared, hidden), Weight(hidden, shared))
        yield from [Weight(1, hidden)] * moe.shared_gate


# ---- activations


class _Activations:
    """Computes the bytes that the forward pass of one micro-batch saves for its backward pass."""

    def __init__(self, config: TrainConfig, part: RankPart, vocabulary: int) -> None:
        d = part.degrees
        self.config, self.part = config, part
        self.heads, self.tp = config.model.num_heads // d.tp, d.tp
        #: bytes per value in the computation's dtype
        self.c = 2 if config.dtype == "bfloat16" else 4
        self.T = config.data.micro_batch * config.data.seq_len // d.cp
        self.splits = d.tp > 1 and d.sequence_parallel
        self.t = self.T // d.tp if self.splits else self.T
        #: bytes of the hidden states between two blocks
        self.hidden = self.c * config.moe.hidden_size * self.t
        #: number of logits
        self.logits = ceil(vocabulary / d.tp) * self.T

    def of_stage(self) -> int:
        """Bytes that all blocks of this rank save, with their inputs, and those of the head."""
        inputs, part = len(self.part.blocks), self.part
        total = sum(self.of_block(block) for block in part.blocks)
        if part.num_stages > 1:  # a stage keeps its output until the backward pass
            inputs += len(part.stages) - part.last
        return total + inputs * self.hidden + part.last * self._head()

    def of_block(self, block: int) -> int:
        """Bytes that a block saves besides its input: attention, feed-forward, norms and the states between them."""
        again, is_moe = self._again(block), _is_moe(self.config, block)
        if again == "block":
            return self._kept() * is_moe
        attention = self._grouped() if self.config.attention.kind == "grouped" else self._latent()
        feed_forward = self._moe() if is_moe else self._dense()
        halves = {
            "": attention + feed_forward + 8 * self.t,
            "attention": feed_forward + 4 * self.t,
            "feed_forward": attention + 4 * self.t + self._kept() * is_moe,
        }
        return self.hidden + halves[again]

    def _again(self, block: int) -> str:
        """The part of a block that is recomputed, or "" for none."""
        how = self.config.recompute
        here = self.config.model.recompute and (how.layers is None or block < how.layers)
        return how.part if here else ""

    def _kept(self) -> int:
        """Bytes that a recomputed MoE layer keeps: its routing decisions, and exchanged rows under keep_exchanges."""
        rows = self.config.moe.top_k * self._moe_tokens()
        exchanged = self._received() + self.c * self.config.moe.hidden_size
        kept = self.config.recompute.keep_exchanges and self.part.degrees.ep > 1
        return (8 + exchanged * kept) * rows

    def _to_split(self, width: int, layers: int = 1) -> int:
        """Bytes of the input of layers split by tensor parallelism; one per layer under sequence parallelism."""
        return self.c * width * self.T * (layers if self.splits else 1)

    def _grouped(self) -> int:
        a, model = self.config.attention, self.config.model
        width, n = a.head_width or self.config.moe.hidden_size // model.num_heads, self.heads
        m = (a.num_kv_heads or model.num_heads) // self.tp
        # the qkv projection; rotated q and k; the output
        heads = self.c * width * ((n + 2 * m) + n + m + n)
        rows = 4 * n + 4 * (n + m) * a.qk_norm  # attention's logsumexp; norms
        if a.qk_norm and a.qk_norm_over == "all_heads":  # copies of q and k with their heads side by side
            rows += 8 - 4 * (n + m) + self.c * width * (n + m)
        return self._to_split(self.config.moe.hidden_size) + (heads + rows + self._tables(width)) * self.T

    def _latent(self) -> int:
        a, n, c = self.config.attention, self.heads, self.c
        qk = a.qk_nope_width + a.qk_rope_width
        outputs = 2 if qk == a.v_width or self.part.degrees.cp > 1 else 1
        heads = c * n * (a.qk_nope_width + a.v_width + 2 * qk + outputs * a.v_width) + 4 * n
        latents = c * (a.q_lora_rank + a.kv_lora_rank + a.qk_rope_width) + 8
        to_split = self._to_split(a.kv_lora_rank) + self._to_split(a.q_lora_rank)
        if not a.q_lora_rank and self.splits:
            to_split += self._to_split(self.config.moe.hidden_size)
        return self.hidden + latents * self.t + to_split + (heads + self._tables(a.qk_rope_width)) * self.T

    def _tables(self, width: int) -> int:
        """Bytes of sines and cosines per token, cast to bf16 for queries and for keys."""
        return 2 * self.c * width if self.c == 2 else 0

    def _dense(self) -> int:
        inside = 4 * self.c * (self.config.model.intermediate_size // self.tp) * self.T
        return self._to_split(self.config.moe.hidden_size, layers=2) + inside

    def _received(self) -> int:
        """Bytes of a row that a rank receives together with its gate weight."""
        return ceil((self.c * self.config.moe.hidden_size + 4) / 16) * 16

    def _moe_tokens(self) -> int:
        return ceil(self.T / self.tp)  # tensor-parallel ranks hold the same tokens and divide them

    def _moe(self) -> int:
        moe, degrees, t, c = self.config.moe, self.part.degrees, self._moe_tokens(), self.c
        hidden, number, rows, mixed = moe.hidden_size, moe.all_experts, round(moe.mlps_per_token * t), 0
        # the router's op keeps the hidden states as they are; for few tokens, and in slots, their fp32 copy is kept
        in_fp32 = t < MANY_ROWS or moe.router.gate == "slots"
        router = 0 if moe.router.gate == "hash" else ((4 if in_fp32 else c) * hidden + 4 * number) * t
        if moe.router.gate == "slots":  # shares of tokens in slots and back; the slots, and their results
            slots = moe.num_experts * moe.router.slots
            rows = slots * self.config.data.micro_batch
            router, mixed = (4 * hidden + 20 * slots + 16) * t, 2 * c * hidden * rows
        # the factor of each value; random numbers and their sizes, or cosines and probabilities; the projection twice
        router += 4 * hidden * t if moe.router.jitter else 0
        router += 8 * number * t if moe.router.gate in ("noisy", "cosine") else 0
        router += 8 * (moe.router.projected(number) + 1) * t if moe.router.gate == "cosine" else 0
        # outside of the fused op, scores and their logarithms; for the entropy, also before they are normalised
        width = moe.router.width(number, moe.top_k)
        router += 8 * (number + 2 * width) * t if moe.router.select in UP_TO_K else 0
        router += 12 * number * t if moe.router.entropy_loss else 0
        copied = (in_fp32 and c < 4) or moe.router.jitter or moe.router.gate == "hash"
        x = c * hidden * t if copied else 0  # in addition to what the router keeps
        shared = 0
        if moe.shared_intermediate_size:
            gate = c * (hidden + 1) * t if moe.shared_gate else 0
            shared = 4 * c * moe.shared_intermediate_size * t + gate
        # rows received under ep; without ep, only etp ranks gather tokens
        arriving = rows if degrees.ep > 1 else t if degrees.etp > 1 else 0
        sources = self._received() * arriving * degrees.etp
        up = (1 + moe.gated) * moe.intermediate_size // degrees.etp
        places = 72 * rows  # ids, gate weights and row positions
        if degrees.ep == 1:  # the host does not know how many of a token's places stay empty
            places += 25 * (width - moe.top_k) * t
            rows += (width - moe.top_k) * t
        experts = sources + mixed + (0 if moe.recompute_experts else c * up * rows * degrees.etp)
        return router + experts + places + shared + (x if shared or degrees.ep * degrees.etp == 1 else 0)

    def _head(self) -> int:
        """Bytes of the final norm, and of the logits' log-softmax in fp32; most pipelines keep the logits too."""
        kept = 4 if self.part.num_stages == 1 or FREES_LOGITS else self.c + 4
        return 4 * self.t + self._to_split(self.config.moe.hidden_size) + kept * self.logits
