"""Converts transformers' folders to checkpoints of this package and back, block by block."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError, contents
from ..checkpoint.files import new_folder, remove, write_blocks, write_durably
from ..checkpoint.manifest import parse_manifest, reason
from ..checkpoint.store import opener
from ..checkpoint.tensors import DTYPE_OF_NAME, Saved
from ..checkpoint.tools import INDEX, WEIGHTS, Reader, Source, bytes_of, find, held, rewrite
from ..checkpoint.writer import FILE_BYTES
from .architecture import Architecture, architecture
from .families import FAMILIES, family_of
from .hf import (
    COMPANIONS,
    CONFIG,
    RECORD,
    SINGLE,
    Weights,
    companions,
    config_of,
    is_folder,
    keep_companions,
    neighbours,
    open_folder,
)
from .names import Layout, Part, Shape, empty, names, theirs

#: key of a checkpoint's position that describes the model of an imported checkpoint; a run has "config"
ARCHITECTURE = "architecture"
#: the folders that hold weights, in errors
SOURCES = "a run, a checkpoint or a transformers model"
#: dtypes in which weights can be written
DTYPES = ("float32", "bfloat16", "float16")
#: fields of ``config.json`` that a model keeps when it is grown
_GENERAL = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")
#: the part of a name that marks a tensor that is fp32 unless the imported model has another dtype
_BIAS = "e_score_correction_bias"


def model_of(path: Path) -> Architecture:
    """Return the architecture of the model in a transformers folder, a checkpoint or a run, without reading weights.

    It need not be one that transformers knows.
    """
    if is_folder(path):
        return config_of(path)[1]
    problem = None
    for found in reversed(find(path, SOURCES)):
        try:
            manifest = parse_manifest(found)
            return _architecture(found, manifest, contents(found, manifest), own=True)
        except CheckpointError as error:  # of a run, an older one may be valid
            problem = problem or error
    assert problem is not None, "there is a checkpoint"
    raise problem


def weights_of(path: Path, manifest: dict[str, Any] | None = None, own: bool = False) -> Weights:
    """Describe the weights in a transformers folder, or in the checkpoint in folder ``path`` with its ``manifest``.

    Raises CheckpointError for a model that transformers does not know, unless it may be our ``own``.
    """
    if manifest is None:
        return open_folder(path)
    saved = contents(path, manifest)
    tensors = {name: entry for name, entry in saved.items() if name.startswith(WEIGHTS)}
    return Weights(path, _architecture(path, manifest, saved, own), tensors, opener(manifest), {})


def _architecture(path: Path, manifest: dict[str, Any], saved: dict[str, Saved], own: bool = False) -> Architecture:
    position = manifest["position"]
    try:
        sections = position[ARCHITECTURE] if ARCHITECTURE in position else position["config"]
        vocabulary = saved[f"{WEIGHTS}embedding.weight"].shape[0]
        sections = sections | {"model": sections["model"] | {"vocab_size": vocabulary}}
        return architecture(sections, any(name.endswith("router.bias_E") for name in saved), own)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path}: the configuration of its model cannot be read ({reason(error)})") from None


def import_folder(folder: Path, out: Path, files: int | None = None) -> tuple[Path, Weights]:
    """Write the weights of a transformers folder as a checkpoint of step 0 in folder ``out``; return its path.

    Weights become fp32. ``out`` also gets the model's small files, for a later export. ``files``: by default of 1 GiB.
    """
    source = open_folder(folder)
    wanted = {name: replace(entry, dtype=torch.float32) for name, entry in source.tensors.items()}
    with source.reader() as reader:
        final = write_first(reader, wanted, source.architecture, out, files, str(folder), companions(source))
    return final, source


def write_first(
    values: Source,
    wanted: dict[str, Saved],
    model: Architecture,
    out: Path,
    files: int | None,
    what: str,
    small: dict[str, bytes],
) -> Path:
    """Write weights as a checkpoint of step 0 in folder ``out``; return its path.

    ``out`` also gets the ``small`` files of a transformers model, if there are any. See :func:`rewrite` and
    :func:`import_folder`.
    """
    _check_new(out)
    if files is None:
        most = max(len(wanted), *(entry.shape[0] for entry in wanted.values()))
        files = min(most, math.ceil(sum(map(bytes_of, wanted.values())) / FILE_BYTES))
    position = {"world": 1, "parallel": {}, ARCHITECTURE: model.sections()}
    new = not out.exists()
    final = rewrite(values, wanted, out, 0, position, files, what)
    if not small:
        return final
    try:
        keep_companions(small, out / COMPANIONS)
    except BaseException:
        remove(out if new else final)
        raise
    return final


def _check_new(out: Path) -> None:
    """Raise ValueError if a model that is already in ``out`` would hide the new checkpoint, or the other way round."""
    if is_folder(out):
        raise ValueError(f"--out={out}: holds a transformers model; choose another folder")
    if (out / COMPANIONS).exists():
        raise ValueError(f"--out={out}: already contains {COMPANIONS}; choose another folder")
    if there := held(out):
        raise ValueError(f"--out={out}: already contains {there[-1].name}; choose another folder")


def companions_of(path: Path) -> Path | None:
    """Return the folder with the small files of the model of a checkpoint or a run; None if there is none."""
    places = (path / COMPANIONS, path.parent / COMPANIONS, path.parent.parent / COMPANIONS)
    return next((place for place in places if is_folder(place) or (place / RECORD).exists()), None)


def small_files(source: Weights) -> dict[str, bytes]:
    """Return the small files of the transformers model that weights come from; empty if they come from none."""
    if is_folder(source.path):
        return companions(source)
    side = companions_of(source.path)
    return {} if side is None else companions(side)


def small_files_of_new(source: Weights, model: Architecture) -> dict[str, bytes]:
    """Return the small files of a model that has been made of ``source``.

    Its ``config.json`` is left out if no model of transformers computes the same.
    """
    small = small_files(source)
    if not small:
        return {}
    record = _record(source.path, small.get(RECORD)) | {"layout": "v4"}
    found = small | {RECORD: json.dumps(record, indent=1).encode()}
    try:
        before = dict(json.loads(found.pop(CONFIG, b"{}")))
        _, values = family_of(model)
    except (ValueError, TypeError, RecursionError):
        return found
    values |= {name: before[name] for name in _GENERAL if name in before}
    return found | {CONFIG: json.dumps(values, indent=2).encode()}


def export_checkpoint(
    path: Path, manifest: dict[str, Any], out: Path, layout: Layout | None, dtype: str | None, file_bytes: int
) -> tuple[str, list[Path]]:
    """Write the weights of a checkpoint as a new folder that transformers loads. Return its family and its files.

    ``layout`` and ``dtype`` are by default those of the model that the weights come from, or else "v4" and fp32.
    """
    if out.exists():
        raise ValueError(f"--out={out}: exists already; choose another folder")
    saved = contents(path, manifest)
    wanted, side = _architecture(path, manifest, saved), companions_of(path)
    small = {} if side is None else companions(side)
    record = _record(side, small.pop(RECORD, None))
    kind, config = _config(wanted, side, manifest["position"])
    layout = layout or record.get("layout", "v4")
    ours = names(FAMILIES[kind], wanted, layout)
    for name, tensor in ours.items():
        if WEIGHTS + name not in saved or saved[WEIGHTS + name].shape != tensor.shape:
            raise CheckpointError(f"{path}: {name} of shape {tensor.shape} is missing")
    tensors = theirs(ours)
    tensors |= {name: (shape, []) for name, shape in empty(FAMILIES[kind], wanted).items()}
    if wanted.tie_embeddings and record.get("head"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    usual, others = dtype or record.get("dtype", "float32"), {} if dtype else record.get("others", {})
    exact = "float32" if dtype or not record else usual
    dtypes = {name: DTYPE_OF_NAME[others.get(name, exact if _BIAS in name else usual)] for name in tensors}
    small[CONFIG] = json.dumps(config | _dtype_of(config, usual), indent=2).encode()
    with new_folder(out) as partial:
        for name, content in small.items():
            write_durably(partial / name, [content])
        with Reader(path, saved, opener(manifest)) as reader:
            _write(partial, tensors, dtypes, _blocks_of(reader, tensors, dtypes), file_bytes)
    return kind, sorted(out.iterdir())


def _record(side: Path | None, content: bytes | None) -> dict[str, Any]:
    """Return what is known of the tensors of the model that the weights come from."""
    if content is None:
        return {}
    try:
        found = json.loads(content)
        dtypes = [found["dtype"], *found["others"].values()]
        if found["layout"] not in ("v4", "v5") or not all(name in DTYPES for name in dtypes):
            raise ValueError("layout or dtype")
        return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{side}/{RECORD}: refused: {reason(error)}") from None


def _config(wanted: Architecture, side: Path | None, position: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the family, and the content of ``config.json``."""
    if side is None or not is_folder(side):
        kind, values = family_of(wanted)
        length = position["config"]["data"]["seq_len"] if "config" in position else None
        return kind, values if length is None else values | {"max_position_embeddings": length}
    kind, found, values = config_of(side)
    if found != wanted:
        raise ValueError(f"{side / CONFIG}: describes another model than the checkpoint; remove {side}")
    if "num_nextn_predict_layers" in values:
        values["num_nextn_predict_layers"] = 0
    return kind, {name: value for name, value in values.items() if name not in ("auto_map", "_name_or_path")}


def _dtype_of(config: dict[str, Any], dtype: str) -> dict[str, str]:
    return {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}


def _blocks_of(
    reader: Reader, tensors: dict[str, tuple[Shape, list[tuple[str, Part]]]], dtypes: dict[str, torch.dtype]
) -> Callable[[str], Iterator[Tensor]]:
    """Return a function that yields the values of a tensor of transformers, whose name it gets."""

    def blocks(name: str) -> Iterator[Tensor]:
        shape, parts = tensors[name]
        if not parts:
            yield torch.zeros(shape, dtype=dtypes[name])
        for ours, part in parts:
            if part.interleaved:
                rows = reader.box(WEIGHTS + ours, part.offsets, part.sizes)
                yield rows[neighbours(part.sizes[0])].to(dtypes[name])
                continue
            for block in reader.blocks(WEIGHTS + ours, part.offsets, part.sizes):
                yield block.to(dtypes[name])

    return blocks


def _write(
    folder: Path,
    tensors: dict[str, tuple[Shape, list[tuple[str, Part]]]],
    dtypes: dict[str, torch.dtype],
    blocks: Callable[[str], Iterator[Tensor]],
    file_bytes: int,
) -> None:
    """Write files of at most ``file_bytes`` each, and an index if there are several."""
    groups: list[dict[str, tuple[torch.dtype, Shape]]] = [{}]
    size = total = 0
    for name, (shape, _) in tensors.items():
        nbytes = math.prod(shape) * dtypes[name].itemsize
        total += nbytes
        if groups[-1] and size + nbytes > file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = (dtypes[name], shape)
        size += nbytes
    places: dict[str, str] = {}
    for number, entries in enumerate(groups, 1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_blocks(folder / file, entries, blocks)
        places |= dict.fromkeys(entries, file)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_durably(folder / INDEX, [json.dumps(index, indent=1).encode()])
