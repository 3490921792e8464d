"""Reads the folder of a transformers model: ``config.json``, and safetensors files with or without an index.

Nothing in it is trusted: every file is checked, and nothing outside of the folder is named by it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.files import write_durably
from ..checkpoint.manifest import read_json, read_plain, reason, short
from ..checkpoint.reader import listed, opened
from ..checkpoint.tensors import DTYPES, Chunk, Opened, Saved
from ..checkpoint.tools import INDEX, WEIGHTS, Reader
from .architecture import Architecture
from .families import FAMILIES, read_config
from .names import Layout, Part, Shape, empty, names, theirs

CONFIG, SINGLE = "config.json", "model.safetensors"
#: folder next to checkpoints, for the small files of a transformers model, which an export needs
COMPANIONS = "transformers"
#: file in it: the layout, dtypes and some names of the model's tensors
RECORD = "weights.json"
_MAX_JSON = 64 << 20
#: files that are kept: configurations, and what tokenizers of transformers consist of
_KEPT = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken)"
    r"\.json|chat_template\.jinja|vocab\.txt|merges\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|LICENSE(\.\w+)?"
)
_FILE = re.compile(r"[A-Za-z0-9][\w.-]*\.safetensors", re.ASCII)
#: tensors that some files hold, and that no model needs: rotary frequencies
_NEEDLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", re.ASCII)
_LAYER = re.compile(r"model\.layers\.(\d+)\.", re.ASCII)
_FLOATS = {name: dtype for dtype, name in DTYPES.items() if dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Weights:
    """The weights in a folder, as tensors of this package's decoder."""

    path: Path
    architecture: Architecture
    #: by their names in checkpoints
    tensors: dict[str, Saved]
    opened: Opened
    #: content of the file ``RECORD``; empty if the folder is a checkpoint
    record: dict[str, Any]
    #: what the reader should know, in sentences
    notes: tuple[str, ...] = ()

    def reader(self) -> Reader:
        """Return a reader of the tensors."""
        return Reader(self.path, self.tensors, self.opened)


@dataclass(frozen=True)
class PartChunk(Chunk):
    """A part of a tensor of the decoder in a file of transformers."""

    part: Part


def is_folder(path: Path) -> bool:
    """Return whether ``path`` looks like the folder of a transformers model."""
    return (path / CONFIG).exists()


def config_of(folder: Path) -> tuple[str, Architecture, dict[str, Any]]:
    """Return the family and architecture of the model in a folder, and its ``config.json``."""
    if not is_folder(folder):
        why = "missing, or a broken link; give the folder of a transformers model"
        raise CheckpointError(f"{folder / CONFIG}: refused: {why}")
    values = _json(folder / CONFIG)
    return (*read_config(values, str(folder / CONFIG)), values)


def open_folder(folder: Path) -> Weights:
    """Describe the weights of a transformers model, after checking the headers of all its files."""
    kind, wanted, _ = config_of(folder)
    files = _files(folder)
    found: dict[str, tuple[str, str, Shape]] = {}
    for file, expected in files.items():
        for name, (dtype, shape) in listed(linked(folder / file), folder / file, "download it again").items():
            if name in found or (expected is not None and name not in expected):
                raise CheckpointError(
                    f"{folder / file}: refused: {short(name)}: the index does not say that it is here"
                )
            found[name] = (file, dtype, tuple(shape))
        if lacking := sorted((expected or set()) - found.keys()):
            raise CheckpointError(f"{folder / file}: refused: {short(lacking[0])} is missing, unlike the index says")
    layout: Layout = "v5" if any(name.endswith(".experts.gate_up_proj") for name in found) else "v4"
    ours = names(FAMILIES[kind], wanted, layout)
    for name in empty(FAMILIES[kind], wanted):
        found.pop(name, None)
    left_out = _compare(folder, found, {name: shape for name, (shape, _) in theirs(ours).items()}, wanted)
    tensors = {}
    for name, tensor in ours.items():
        chunks = tuple(
            PartChunk(part.offsets, part.sizes, found[part.name][0], part.name, part) for part in tensor.parts
        )
        tensors[WEIGHTS + name] = Saved(_FLOATS[found[chunks[0].part.name][1]], tensor.shape, chunks)
        tensors[WEIGHTS + name].check()
    note = f"left out {len(left_out)} tensors of layers for multi-token prediction, which this decoder does not have"
    return Weights(folder, wanted, tensors, _opened, _record(layout, found), (note,) if left_out else ())


def _record(layout: Layout, found: dict[str, tuple[str, str, Shape]]) -> dict[str, Any]:
    """Return what an export needs to write the same tensors again."""
    dtypes = {name: str(_FLOATS[dtype]).removeprefix("torch.") for name, (_, dtype, _) in found.items()}
    kinds = list(dtypes.values())
    usual = max(sorted(set(kinds)), key=kinds.count)
    others = {name: dtype for name, dtype in dtypes.items() if dtype != usual}
    return {"layout": layout, "dtype": usual, "others": others, "head": "lm_head.weight" in found}


def _files(folder: Path) -> dict[str, set[str] | None]:
    """Return the files with weights, and the names of the tensors that the index says are in each."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}; save the model with safetensors")
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: refused: has no weight_map")
    found: dict[str, set[str]] = {}
    for name, file in places.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(
                f"{index}: refused: {short(name)} is in {short(file)}, which is no file of the folder"
            )
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: missing, but the index names it; download it again")
        found.setdefault(file, set()).add(name)
    return dict(found)


def _compare(
    folder: Path, found: dict[str, tuple[str, str, Shape]], wanted: dict[str, Shape], model: Architecture
) -> list[str]:
    """Check that the files hold the ``wanted`` tensors; remove from ``found`` what is not needed, and return its names.

    Raises CheckpointError for a tensor that is missing, unknown, of another shape, or not of floating-point numbers.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{folder}: refused: {name} is missing")
        if found[name][2] != shape:
            raise CheckpointError(f"{folder}: refused: {name} has shape {short(found[name][2])} instead of {shape}")
    left_out = []
    for name in sorted(found.keys() - wanted.keys()):
        layer = _LAYER.match(name)
        if _NEEDLESS.fullmatch(name):
            del found[name]
        elif model.expert_bias and layer and int(layer[1]) >= model.num_layers:
            left_out.append(name)
            del found[name]
        elif not (name == "lm_head.weight" and model.tie_embeddings):
            raise CheckpointError(f"{folder}: refused: {short(name)} is not a tensor of this model")
    for name, (file, dtype, _) in found.items():
        if dtype not in _FLOATS:
            raise CheckpointError(f"{folder / file}: refused: {name} is {dtype}; use one of {', '.join(_FLOATS)}")
    return left_out


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[Chunk, tuple[slice, ...]], Tensor]]:
    """See :data:`equimoe.moe.checkpoint.tensors.Opened`."""
    with opened(linked(file)) as read_rows:

        def read(chunk: Chunk, box: tuple[slice, ...]) -> Tensor:
            assert isinstance(chunk, PartChunk)
            part = chunk.part
            rows, *rest = box[1:] if part.one_expert else box
            within = rows
            if part.interleaved:
                within = slice(0, part.sizes[0])
            value = read_rows(chunk, (slice(part.row + within.start, part.row + within.stop), *rest))
            if part.interleaved:
                value = value[halves(part.sizes[0])[rows]]
            if not value.isfinite().all():
                raise CheckpointError(f"{file}: refused: {part.name} is not finite")
            return value[None] if part.one_expert else value

        yield read


def halves(rows: int) -> Tensor:
    """Return the order in which neighbours (0, 1), (2, 3), ... become two halves."""
    return torch.arange(rows).view(-1, 2).T.flatten()


def neighbours(rows: int) -> Tensor:
    """Return the order that undoes :func:`halves`."""
    return torch.arange(rows).view(2, -1).T.flatten()


def keep_companions(small: dict[str, bytes], into: Path) -> None:
    """Write the small files of a model to the new folder ``into``, for a later export."""
    into.mkdir(parents=True)
    for name, content in small.items():
        write_durably(into / name, [content])


def companions(source: Weights | Path) -> dict[str, bytes]:
    """Return the contents of the small files of a model, or of those in a folder, by name."""
    folder = source if isinstance(source, Path) else source.path
    found = {}
    for file in sorted(folder.iterdir()):
        if _KEPT.fullmatch(file.name) or (file.name == RECORD and folder.name == COMPANIONS):
            target = linked(file)
            try:
                found[file.name] = read_plain(target, _MAX_JSON)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{file}: cannot be read ({reason(error)})") from None
    if isinstance(source, Weights):
        found[RECORD] = json.dumps(source.record, indent=1).encode()
    return found


def linked(file: Path) -> Path:
    """Return the file that ``file`` is, or is a link to, as in the download cache of Hugging Face.

    Raises CheckpointError for a link to elsewhere, which would bring another file of this machine into an export.
    """
    try:
        folder, target = file.parent.resolve(), file.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{file}: refused: is a link to itself; copy the file") from None
    if target.parent not in (folder, folder.parent.parent / "blobs"):
        raise CheckpointError(f"{file}: refused: is a link to a file outside of its folder; copy the file")
    return target


def _json(file: Path) -> dict[str, Any]:
    target = linked(file)
    try:
        found = read_json(target, _MAX_JSON)
        if not isinstance(found, dict):
            raise ValueError("must be an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: refused: {reason(error)}") from None
    return found
