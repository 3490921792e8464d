"""Loads a model for inference: from a run, a checkpoint or a folder of transformers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..moe import BalanceConfig, checkpoint
from ..moe.checkpoint import tools
from ..moe.collectives import LOCAL, Axis
from ..moe.interop.convert import SOURCES, companions_of, weights_of
from ..moe.interop.hf import Weights, is_folder
from ..moe.model import Attention, Decoder
from ..moe.parallel import Mesh, ParallelConfig, build_mesh, parallelize
from ..moe.parallel.tied import allocate
from ..moe.train.data import HuggingFaceTokenizer, Tokenizer, load_tokenizer, special_token
from . import env, joining
from .failing import Failure
from .memory import is_out_of_memory
from .usage import a_path

#: sequence length of a model whose folder does not say on what it was trained
SEQ_LEN = 4096
#: seconds in which all ranks must join, and after which a collective fails
JOIN_S, COLLECTIVE_S = 180.0, 600.0
#: files of a transformers model that say after which tokens a text ends
GENERATION, CONFIG = "generation_config.json", "config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """Weights, and what is known about the model that they belong to."""

    weights: Weights
    #: where they are, and of which step
    where: str
    #: section ``data`` of the run's configuration; empty if no run has trained it here
    data: dict[str, Any]
    #: path of the tokenizer, or "bytes"; None if unknown
    tokenizer: str | None
    #: folder with the small files of a transformers model, if the weights come from one
    side: Path | None = None

    @property
    def seq_len(self) -> int:
        """The sequence length of the run."""
        return int(self.data.get("seq_len", SEQ_LEN))


def find(path: Path) -> Source:
    """Find the weights that a folder holds. Raises ValueError, or CheckpointError, if it holds none."""
    if not path.is_dir():
        raise ValueError(f"--run-dir={path}: is not a folder; give that of {SOURCES}")
    if is_folder(path):
        file = path / "tokenizer.json"
        return Source(weights_of(path), str(path), {}, str(file) if file.is_file() else None, path)
    folder, manifest = tools.newest_valid(path, SOURCES)
    data = manifest["position"].get("config", {}).get("data", {})
    side = companions_of(folder)
    kept, tokenizer = None if side is None else side / "tokenizer.json", data.get("tokenizer")
    if kept is not None and kept.is_file() and (tokenizer is None or not Path(str(tokenizer)).exists()):
        tokenizer = str(kept)
    return Source(weights_of(folder, manifest), f"{folder}, step {manifest['step']}", data, tokenizer, side)


def end_of(source: Source, tokenizer: Tokenizer) -> int | None:
    """Return the id that ends a document for attention, if the model was trained on separate documents."""
    return tokenizer.end_of_document if source.data.get("documents") == "separate" else None


def tokenizer_of(source: Source, given: str | None, end_of_document: str | None = None) -> Tokenizer:
    """Load the tokenizer of a model. Raises ValueError if it is unknown or does not fit the vocabulary."""
    name, vocabulary = given or source.tokenizer, source.weights.architecture.vocab_size
    if name is None:
        raise ValueError(f"{source.where}: has no tokenizer.json; say which one it uses with --tokenizer")
    try:
        found = load_tokenizer(name, end_of_document or source.data.get("end_of_document"))
    except ValueError as error:
        text = str(error).replace("data.tokenizer=", "--tokenizer=")
        if "data.end_of_document" in text:
            raise ValueError(text.replace("data.end_of_document", "--end-of-document")) from None
        raise ValueError(text if given else f"{text}; say where it is with --tokenizer") from None
    if found.vocab_size > vocabulary:
        size = f"has {found.vocab_size} tokens, but the model knows {vocabulary}"
        raise ValueError(f"--tokenizer={name}: {size}; give the one that it was trained with")
    return found


@dataclass(frozen=True)
class Marks:
    """The special tokens of texts: of a run, those between the documents of its training."""

    #: id before a text without a context
    prefix: int
    #: ids after which a text ends
    stops: frozenset[int]
    #: returns the ids of a text to continue
    prompt: Callable[[str], list[int]]


def marks(source: Source, tokenizer: Tokenizer) -> Marks:
    """Return the special tokens: those of the training, or what transformers uses for a model that it has trained."""
    end = tokenizer.end_of_document
    stops = {end} | {i for name in (GENERATION, CONFIG) for i in _ends(source.side, name)}

    def document(text: str) -> list[int]:
        return [end, *map(int, tokenizer.encode(text))]

    if source.data or source.side is None or not isinstance(tokenizer, HuggingFaceTokenizer):
        return Marks(end, frozenset(stops), document)
    begin = tokenizer.id_of(special_token(source.side / "tokenizer_config.json", "bos_token"))
    prefix = end if begin is None else begin
    return Marks(prefix, frozenset(stops), lambda text: tokenizer.encode_prompt(text) or [prefix])


def _ends(side: Path | None, name: str) -> list[int]:
    """Return ``eos_token_id`` of a file of a transformers model."""
    try:
        found = json.loads((side / name).read_text(encoding="utf-8"))["eos_token_id"] if side is not None else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [i for i in (found if isinstance(found, list) else [found]) if type(i) is int]


def build(source: Source, mesh: Mesh | None, device: torch.device, seq_len: int, dtype: torch.dtype) -> Decoder:
    """Build this rank's part of the model for sequences of up to ``seq_len``, and load its weights.

    Every rank must call this. Experts have no capacity, so that no text depends on the others of its batch.
    """
    a = source.weights.architecture
    balance = BalanceConfig(bias_update_rate=0.001 if a.expert_bias else 0.0)
    with torch.device("meta"):
        model = Decoder(
            vocab_size=a.vocab_size,
            seq_len=seq_len,
            num_layers=a.num_layers,
            num_heads=a.num_heads,
            intermediate_size=a.intermediate_size or 1,
            moe=replace(a.moe, balance=balance, capacity=None),
            moe_every=a.moe_every,
            dense_layers=a.dense_layers,
            attention=a.attention,
            norm_eps=a.norm_eps,
            tie_embeddings=a.tie_embeddings,
        ).to(dtype)
    model = model if mesh is None else parallelize(model, mesh, reduced=True)
    allocate(model, device)
    for attention in (module for module in model.modules() if isinstance(module, Attention)):
        attention.fill_tables()
    state = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("router.bias_E")}
    named = {f"model.{name}": value.detach() for name, value in state.items()}
    checkpoint.load_weights(source.weights.path, named, source.weights.tensors, source.weights.opened)
    return model.requires_grad_(False).eval()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options with which a command finds and places its model."""
    what = f"folder of {SOURCES}; of a run, its newest valid checkpoint is used"
    parser.add_argument("--run-dir", type=a_path, required=True, metavar="DIR", help=what)
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or 'bytes'; default: the model's own")
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="token that ends a document; default: the model's own"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and activations")
    parser.add_argument("--processes", type=int, metavar="N", help="ranks to start on this machine; default 1")
    parser.add_argument(
        "--ep", type=int, default=0, metavar="N", help="ranks over which experts are split; default all"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="ranks that split all else; default 1")


@contextmanager
def this_rank() -> Iterator[env.Process]:
    """Within the block, this process's place is known, and errors end it with one line instead of a traceback."""
    process = env.Process()
    try:
        process = env.this_process()
        torch.set_num_threads(env.threads(process))
        yield process
    except Exception as error:
        known = classify(error)
        if known is None:
            raise
        if process.world > 1:  # this rank has met nobody yet, and the others may have no error
            with joining.joined(process, joining.introduce(process, {}, known), JOIN_S, COLLECTIVE_S):
                pass
        env.stop(process, *known)


def classify(error: Exception) -> tuple[int, str] | None:
    """Return the exit code for an error, and what to say about it; None if it needs its traceback."""
    if isinstance(error, checkpoint.CheckpointError):
        return env.CHECKPOINT, str(error)
    if isinstance(error, ValueError):
        return env.code_of(error), str(error)
    if is_out_of_memory(error):
        why = "the model, or the cache of such long texts, does not fit into this machine's memory"
        said = str(error).splitlines()[0] if str(error) else "out of memory"
        remedy = "lower --batch or the length of the texts, or split the model over ranks with --ep and --tp"
        return env.MEMORY, f"{why} ({said}); {remedy}"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # with that, nobody reads the output
        return env.DATA, f"{error.filename}: cannot be read or written ({error.strerror})"
    return None


@contextmanager
def ranks(
    process: env.Process, arguments: argparse.Namespace, num_experts: int, module: str, argv: list[str]
) -> Iterator[Mesh | None]:
    """Start the ranks of a command, or join those that torchrun has started. Within the block, their mesh exists.

    It is None for a single rank. Raises ValueError if the degrees do not fit the number of ranks.
    """
    asked, started = arguments.processes, env.started()
    if asked is not None and (asked < 1 or (started and asked != process.local_world)):
        why = f"torchrun has already started {process.local_world}; leave it out" if started else "must be at least 1"
        raise ValueError(f"--processes={asked}: {why}")
    world = process.world if started else asked or 1
    given = {"ep": arguments.ep} if arguments.ep else {}
    try:
        degrees = ParallelConfig(**given, tp=arguments.tp, sequence_parallel=False).resolve(world, num_experts)
    except ValueError as error:
        raise ValueError(str(error).replace("parallel.", "--")) from None
    if not started and world > 1:
        env.start(world, module, argv)
    if world == 1:
        yield None
        return
    facts = {name: str(value) for name, value in vars(arguments).items()}
    own = joining.introduce(process, facts | joining.versions())
    with joining.joined(process, own, JOIN_S, COLLECTIVE_S) as meeting:
        failure = Failure(process, meeting, classify)
        try:
            with failure.listening():
                yield build_mesh(degrees, process.device.type)
        except BrokenPipeError:
            failure.quietly(env.UNREAD)
            raise
        except Exception as problem:
            failure.error(problem)


def readers(mesh: Mesh | None) -> Axis:
    """Return the ranks that read different texts."""
    return LOCAL if mesh is None else mesh["dp"]
