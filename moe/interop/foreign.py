"""Reads the MoE layers in checkpoints of DeepSpeed and Megatron-Core, layer by layer. Needs neither library.

E experts, F expert width, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.files import new_folder, write_tensors
from ..checkpoint.manifest import METADATA, read_plain, reason, short
from ..checkpoint.pickles import Name
from ..checkpoint.tensors import Chunk, Saved
from ..checkpoint.tools import Reader
from ..checkpoint.torch_files import BROKEN, METADATA_NAMES, TENSOR_NAMES, Archive, described, opened
from .hf import linked

#: usual names of an expert's gate, up and down projection
EXPERT = ("gate_proj", "up_proj", "down_proj")
#: files of a run's folder that name the newest checkpoint, and the folder of that checkpoint
_NEWEST = {"latest": "{}", "latest_checkpointed_iteration.txt": "iter_{:0>7}"}
_MAX_PICKLE_BYTES, _MAX_NAME_BYTES = 256 << 20, 4096
#: the sizes of each weight; in a layer, a letter is the same size everywhere. U is F, or 2 F with a gate
_SIZES = {
    "router.weight": "ED",
    "experts.gate_up_proj": "EUD",
    "experts.down_proj": "EDF",
    "router.bias_E": "E",
    "shared.mlp.gate_proj.weight": "SD",
    "shared.mlp.up_proj.weight": "SD",
    "shared.mlp.down_proj.weight": "DS",
    "shared.gate.weight": "1D",
}

_FILE = re.compile(r"(?:layer_\d+_)?expert_\d+_mp_rank_(\d+)_model_states\.pt", re.ASCII)
_REST = "mp_rank_00_model_states.pt"
_OF_EXPERT = re.compile(r"(.+)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d{1,9})\.(.+)", re.ASCII)
_DEEPSPEED_NAMES = TENSOR_NAMES | {Name("torch", "Size")}

_PLANNER = "torch.distributed.checkpoint.planner"
_MEGATRON_NAMES = METADATA_NAMES | {
    Name("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
    *(Name(_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
}
_OF_LAYER = re.compile(r"((?:.+\.)?layers)(?:\.(\d+))?\.mlp\.((?:router|experts|shared_experts)\..+)", re.ASCII)
_OPTIMIZER = re.compile(r"(?:.+\.)?optimizer\.")


def moe_layers(folder: Path, expert: Sequence[str] = EXPERT) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name of each MoE layer of a checkpoint, and its weights, named as in the layer's ``state_dict``.

    ``folder`` is that of a checkpoint, or that in which a run saves them: of DeepSpeed with its own
    ``deepspeed.moe.layer.MoE``, or of Megatron-Core in the format "torch_dist". ``expert`` names the linear layers of
    DeepSpeed's experts: gate, up and down projection, or the two layers of experts that are not gated. The files
    contain pickles, which are interpreted as data and never executed. Raises CheckpointError for all but tensors.
    """
    if len(expert) not in (2, 3):
        raise ValueError(f"--expert={' '.join(expert)}: give the names of three linear layers, or of two if not gated")
    place = _newest(folder)
    if (place / METADATA).is_file():
        yield from _megatron(place)
    elif files := sorted(file for file in place.iterdir() if _FILE.fullmatch(file.name)):
        yield from _deepspeed(place, files, expert)
    else:
        raise CheckpointError(
            f"{place}: holds neither {METADATA}, as checkpoints of Megatron-Core do, nor files "
            "layer_0_expert_0_mp_rank_00_model_states.pt and so on, as those of DeepSpeed's MoE layers"
        )


def write_layers(folder: Path, out: Path, expert: Sequence[str] = EXPERT) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Write a safetensors file for each layer of :func:`moe_layers` to the new folder ``out``; yield them."""
    with new_folder(out) as partial:
        for name, weights in moe_layers(folder, expert):
            if not re.fullmatch(r"\w[\w.]*", name):
                raise CheckpointError(f"{folder}: refused: {short(name)} is no name of a layer")
            write_tensors(partial / f"{name}.safetensors", weights)
            yield out / f"{name}.safetensors", weights


def _newest(folder: Path) -> Path:
    for name, where in _NEWEST.items():
        if (folder / name).exists():
            with _refused(folder / name) as target:
                found = read_plain(target, _MAX_NAME_BYTES).decode(errors="replace").strip()
            place = folder / (where.format(found) if found != "release" else found)
            if not re.fullmatch(r"\w[\w.-]*", found) or not place.is_dir():
                raise CheckpointError(f"{folder / name}: names {short(found)}, which is no folder next to it")
            return place
    return folder


# ---- DeepSpeed


def _deepspeed(folder: Path, files: list[Path], expert: Sequence[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if any(_FILE.fullmatch(file.name)[1] != "00" for file in files):  # type: ignore[index]
        raise CheckpointError(f"{folder}: was saved with tensor parallelism; save it without")
    layers: dict[str, dict[int, dict[str, tuple[Path, Any]]]] = {}
    for file in files:
        for name, record in _content(file).items():
            if not (match := _OF_EXPERT.fullmatch(name)):
                raise CheckpointError(f"{file}: refused: {short(name)} is no weight of an expert")
            of_layer = layers.setdefault(match[1], {})
            of_layer.setdefault(int(match[2]), {})[match[3]] = (file, record)
    rest = _content(folder / _REST).get("module")
    if not isinstance(rest, dict):
        raise CheckpointError(f"{folder / _REST}: refused: holds no weights; save with ZeRO 0, 1 or 2")
    for layer, experts in layers.items():
        gate = f"{layer}.deepspeed_moe.gate.wg.weight"
        if other := [name for name in rest if str(name).startswith(f"{layer}.") and name != gate]:
            raise CheckpointError(
                f"{folder / _REST}: refused: {short(other[0])} belongs to a layer with use_residual, which this "
                "package's layer does not have"
            )
        if gate not in rest or sorted(experts) != list(range(len(experts))):
            raise CheckpointError(f"{folder}: refused: the router or an expert of {short(layer)} is missing")
        router = _tensor(folder / _REST, rest[gate])
        yield layer, _checked(folder, layer, {"router.weight": router} | _stacked(folder, layer, experts, expert))


def _stacked(
    folder: Path, layer: str, experts: dict[int, dict[str, tuple[Path, Any]]], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the experts of a layer in two tensors."""
    wanted = {f"{name}.weight" for name in names}
    for number in range(len(experts)):
        if experts[number].keys() != wanted:
            has, needs = ", ".join(map(short, experts[number])), ", ".join(sorted(wanted))
            raise CheckpointError(
                f"{folder}: refused: expert {number} of {short(layer)} has {has} instead of {needs}; "
                "name its linear layers with --expert; they can have no biases"
            )
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    left = sum(file.stat().st_size for file in {file for expert in experts.values() for file, _ in expert.values()})
    for number in range(len(experts)):
        for name in names:
            found[name].append(_tensor(*experts[number][f"{name}.weight"]))
            if (left := left - found[name][-1].nbytes) < 0:
                raise CheckpointError(f"{folder}: refused: {short(layer)} is larger than its files")
    try:
        *first, down = (torch.stack(found[name]) for name in names)
        return {"experts.gate_up_proj": torch.cat(first, dim=1), "experts.down_proj": down}
    except RuntimeError:
        raise CheckpointError(f"{folder}: refused: the experts of {short(layer)} have different shapes") from None


def _content(file: Path) -> dict[Any, Any]:
    """Return the content of a file of ``torch.save``, with a record instead of each tensor."""
    with _refused(file) as target, target.open("rb") as stream, Archive(stream, _MAX_PICKLE_BYTES) as archive:
        found = archive.interpret(_DEEPSPEED_NAMES)
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ValueError("holds no tensors by name")
        return found


def _tensor(file: Path, record: Any) -> Tensor:
    with _refused(file) as target, target.open("rb") as stream, Archive(stream, _MAX_PICKLE_BYTES) as archive:
        return archive.tensor(record).contiguous()


@contextmanager
def _refused(file: Path) -> Iterator[Path]:
    """Yield the file that ``file`` is or links to. What is wrong with it becomes a CheckpointError that names it."""
    target = linked(file)
    try:
        if target.exists() and not target.is_file():
            raise ValueError("is no regular file")
        yield target
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing; save with ZeRO 0, 1 or 2") from None
    except CheckpointError:
        raise
    except (*BROKEN, RecursionError) as error:
        raise CheckpointError(f"{file}: refused: {reason(error)}") from None


# ---- Megatron-Core


def _megatron(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    file = folder / METADATA
    sizes = {part.name: linked(part).stat().st_size for part in folder.glob("*.distcp") if part.is_file()}
    with _refused(file) as target:
        saved = described(read_plain(target, _MAX_PICKLE_BYTES), _MEGATRON_NAMES, sizes, _is_weight)
    layers: dict[tuple[str, str | None], dict[str, str]] = {}
    for key in saved:
        match = _OF_LAYER.fullmatch(key)
        assert match is not None, "such names are wanted"
        layers.setdefault((match[1], match[2]), {})[match[3]] = key
    layers = {place: leaves for place, leaves in layers.items() if "router.weight" in leaves}
    if not layers:
        raise CheckpointError(f"{file}: describes no MoE layer of Megatron-Core")
    with Reader(folder, saved, _opened) as reader:
        for (prefix, number), leaves in layers.items():
            if number is not None:
                yield _named(prefix, number), _layer(folder, _Weights(reader, leaves, ()), _named(prefix, number))
                continue
            for block in range(saved[leaves["router.weight"]].shape[0]):
                yield _named(prefix, block), _layer(folder, _Weights(reader, leaves, (block,)), _named(prefix, block))


@contextmanager
def _opened(file: Path) -> Iterator[Callable[[Chunk, tuple[slice, ...]], Tensor]]:
    """See :data:`equimoe.moe.checkpoint.tensors.Opened`."""
    with opened(linked(file)) as read:
        yield read


def _is_weight(key: str) -> bool:
    return "._extra_state" not in key and bool(_OF_LAYER.fullmatch(key)) and not _OPTIMIZER.match(key)


def _named(prefix: str, number: str | int) -> str:
    return f"{prefix}.{number}.mlp"


class _Weights:
    """The weights of a layer, by the ends of their names. All layers are in one tensor, or each has its own."""

    def __init__(self, reader: Reader, leaves: dict[str, str], block: tuple[int, ...]) -> None:
        self.reader, self.left, self.block = reader, dict(leaves), block

    def take(self, leaf: str) -> Tensor | None:
        """Read a tensor, and forget it; None if there is none. The gate and up projection may be two."""
        if f"{leaf}_w" in self.left:
            halves = [self.take(f"{leaf}_{half}") for half in "wv"]
            return None if halves[1] is None else torch.cat([half for half in halves if half is not None])
        if (key := self.left.pop(leaf, None)) is None:
            return None
        saved: Saved = self.reader.saved[key]
        if any(block >= size for block, size in zip(self.block, saved.shape, strict=False)):
            raise ValueError(f"{short(key)} is of fewer layers than the router")
        rest = saved.shape[len(self.block) :]
        return self.reader.box(key, (*self.block, *(0 for _ in rest)), (*(1 for _ in self.block), *rest)).view(rest)

    def take_experts(self, leaf: str, number: int) -> Tensor | None:
        """Read a tensor of all experts; each may have its own."""
        if (found := self.take(f"experts.experts.{leaf}")) is not None:
            return found
        parts = [self.take(f"experts.experts.{expert}.{leaf}") for expert in range(number)]
        return torch.stack(parts) if all(part is not None for part in parts) else None  # type: ignore[arg-type]


def _layer(folder: Path, weights: _Weights, layer: str) -> dict[str, Tensor]:
    with _refused(folder / METADATA):
        found = _taken(weights)
    if weights.left:
        other = short(min(weights.left.values()))
        raise CheckpointError(f"{folder}: refused: {other} is no weight that this package's layer has")
    return _checked(folder, layer, found)


def _taken(weights: _Weights) -> dict[str, Tensor]:
    found = {"router.weight": weights.take("router.weight"), "router.bias_E": weights.take("router.expert_bias")}
    router = found["router.weight"]
    number = 0 if router is None else router.shape[0]
    found["experts.gate_up_proj"] = weights.take_experts("linear_fc1.weight", number)
    found["experts.down_proj"] = weights.take_experts("linear_fc2.weight", number)
    shared = weights.take("shared_experts.linear_fc1.weight")
    if shared is not None:
        gate, up = shared.chunk(2)
        found |= {"shared.mlp.gate_proj.weight": gate, "shared.mlp.up_proj.weight": up}
        found["shared.mlp.down_proj.weight"] = weights.take("shared_experts.linear_fc2.weight")
        found["shared.gate.weight"] = weights.take("shared_experts.gate_weight")
    return {name: value for name, value in found.items() if value is not None}


def _checked(folder: Path, layer: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, if none is missing, and shapes and dtypes are those of a layer."""
    routed, shared = ("router.weight", "experts.gate_up_proj", "experts.down_proj"), "shared.mlp.down_proj.weight"
    if any(name not in found for name in routed):
        raise CheckpointError(f"{folder}: refused: the router or the experts of {short(layer)} are missing")
    if any(name.startswith("shared") for name in found) and shared not in found:
        raise CheckpointError(f"{folder}: refused: a projection of the shared experts of {short(layer)} is missing")
    sizes = {"1": 1}
    fits = True
    for name, value in found.items():
        fits &= value.dim() == len(_SIZES[name])
        fits &= all(sizes.setdefault(k, n) == n for k, n in zip(_SIZES[name], value.shape, strict=False))
    if not fits or sizes["U"] not in (sizes["F"], 2 * sizes["F"]):
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in found.items())
        raise CheckpointError(f"{folder}: refused: the weights of {short(layer)} have the shapes {shapes}")
    if other := [name for name, value in found.items() if not value.is_floating_point()]:
        raise CheckpointError(f"{folder}: refused: {other[0]} of {short(layer)} is {found[other[0]].dtype}")
    return found
