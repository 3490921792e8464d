"""MoE layers in checkpoints of DeepSpeed and Megatron-Core: read as data, by the names of this package's layer.

The files here are like theirs; ``tests/engines/test_foreign.py`` reads those that the libraries write.
"""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor

from equimoe.launch import env
from equimoe.launch.convert import main as convert
from equimoe.moe import MoE, MoEConfig
from equimoe.moe.checkpoint import CheckpointError
from equimoe.moe.interop.foreign import EXPERT, moe_layers
from tests.helpers.checkpoints import nothing_happens

E, D, F = 3, 6, 4
PREFIX = "net.moe.deepspeed_moe."


def weights(layer: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(layer)
    shapes = {"router": (E, D), "gate_proj": (E, F, D), "up_proj": (E, F, D), "down_proj": (E, D, F)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write(folder: Path, names: tuple[str, ...] = EXPERT, layers: int = 1) -> Path:
    """Write files like those of DeepSpeed; return ``folder``."""
    (folder / "one").mkdir(parents=True)
    (folder / "latest").write_text("one")
    module = OrderedDict({"net.first.weight": torch.ones(2)})
    module._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    for layer in range(layers):
        prefix, found = PREFIX.replace("net", f"net{layer or ''}"), weights(layer)
        module[f"{prefix}gate.wg.weight"] = found["router"]
        for e in range(E):
            own = {f"{prefix}experts.deepspeed_experts.{e}.{name}.weight": found[name][e].clone() for name in names}
            torch.save(own, folder / "one" / f"layer_{layer}_expert_{e}_mp_rank_00_model_states.pt")
    rest = {"module": module, "optimizer": None, "dp_world_size": 2, "ds_config": {"zero": {"stage": 1}, "lr": 0.1}}
    torch.save(rest | {"param_shapes": [{"w": torch.Size([2])}]}, folder / "one" / "mp_rank_00_model_states.pt")
    return folder


def test_layers_of_deepspeed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are written one by one, and this package's layer loads them."""
    folder = write(tmp_path / "run", layers=2)
    convert(["layers", str(folder), "--out", str(tmp_path / "out")])
    assert "net.moe.safetensors: 3 experts of width 4" in capsys.readouterr().out
    for layer, name in enumerate(("net.moe", "net1.moe")):
        found, wanted = load_file(tmp_path / "out" / f"{name}.safetensors"), weights(layer)
        MoE(MoEConfig(D, F, E, 2)).load_state_dict(found)
        assert torch.equal(found["router.weight"], wanted["router"])
        assert torch.equal(found["experts.gate_up_proj"], torch.cat([wanted["gate_proj"], wanted["up_proj"]], 1))
        assert torch.equal(found["experts.down_proj"], wanted["down_proj"])


def test_experts_without_a_gate(tmp_path: Path) -> None:
    names = ("up_proj", "down_proj")
    ((_, found),) = moe_layers(write(tmp_path / "run", names) / "one", names)
    MoE(MoEConfig(D, F, E, 2, gated=False)).load_state_dict(found)
    assert torch.equal(found["experts.gate_up_proj"], weights()["up_proj"])


class Planted:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch planted",)


def linked(file: Path) -> None:
    outside = file.parents[2] / "outside"
    file.rename(outside / file.name)
    file.symlink_to(outside / file.name)


def replaced(value: Tensor) -> Callable[[Path], None]:
    """Give all matrices of a DeepSpeed checkpoint the same value."""

    def damage(folder: Path) -> None:
        for e in range(E):
            name = f"layer_0_expert_{e}_mp_rank_00_model_states.pt"
            changed(name, lambda c: c.update(dict.fromkeys(c, value)))(folder)
        changed(REST, lambda c: c["module"].update({f"{PREFIX}gate.wg.weight": value}))(folder)

    return damage


def repeated(folder: Path) -> None:
    """Let many experts refer to the same numbers of one file."""
    value = torch.zeros(100, 100)
    shared = {f"{PREFIX}experts.deepspeed_experts.{e}.{n}.weight": value for e in range(90) for n in EXPERT}
    torch.save(shared, folder / EXPERT_1)
    for e in (0, 2):
        (folder / EXPERT_1.replace("expert_1", f"expert_{e}")).unlink()


def changed(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = torch.load(folder / file, weights_only=False)
        change(content)
        torch.save(content, folder / file)

    return damage


EXPERT_1, REST = "layer_0_expert_1_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"
OF_EXPERT = f"{PREFIX}experts.deepspeed_experts.1."
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a command": (changed(EXPERT_1, lambda c: c.update(x=Planted())), "the pickle names posix.system, which such"),
    "a command in the rest": (changed(REST, lambda c: c.update(args=Planted())), "the pickle names posix.system"),
    "an old pickle": (lambda f: (f / EXPERT_1).write_bytes(pickle.dumps({})), "not a zip file"),
    "truncated": (lambda f: (f / EXPERT_1).write_bytes((f / EXPERT_1).read_bytes()[:-50]), f"{EXPERT_1}: refused: "),
    "a missing expert": (lambda f: (f / EXPERT_1).unlink(), "the router or an expert of 'net.moe' is missing"),
    "no rest": (lambda f: (f / REST).unlink(), f"{REST}: is missing; save with ZeRO 0, 1 or 2"),
    "no router": (changed(REST, lambda c: c["module"].pop(f"{PREFIX}gate.wg.weight")), "the router or an expert of"),
    "no weights": (changed(REST, lambda c: c.update(module=None)), "holds no weights; save with ZeRO 0, 1 or 2"),
    "a residual": (changed(REST, lambda c: c["module"].update({"net.moe.mlp.w": torch.ones(1)})), "use_residual"),
    "a bias": (changed(EXPERT_1, lambda c: c.update({f"{OF_EXPERT}up_proj.bias": torch.ones(F)})), "no biases"),
    "another tensor": (changed(EXPERT_1, lambda c: c.update(other=torch.ones(1))), "'other' is no weight of an expert"),
    "a number": (changed(EXPERT_1, lambda c: c.update({f"{OF_EXPERT}up_proj.weight": 5})), "found a int instead of a"),
    "another shape": (
        changed(EXPERT_1, lambda c: c.update({f"{OF_EXPERT}up_proj.weight": torch.ones(F + 1, D)})),
        "the experts of 'net.moe' have different shapes",
    ),
    "one number, repeated": (replaced(torch.zeros(1).expand(9, 9)), "the tensor is larger than its storage"),
    "experts that share numbers": (repeated, "'net.moe' is larger than its files"),
    "one dimension": (replaced(torch.zeros(4)), "the weights of 'net.moe' have the shapes router.weight [4], "),
    "five dimensions": (replaced(torch.zeros(1, 1, 1, 1, 1)), "the weights of 'net.moe' have the shapes router.weight"),
    "whole numbers": (replaced(torch.ones(E, E, dtype=torch.int64)), "router.weight of 'net.moe' is torch.int64"),
    "a long number": (
        changed(EXPERT_1, lambda c: c.update({f"{PREFIX}experts.deepspeed_experts.{'9' * 5000}.w": torch.ones(1)})),
        "is no weight of an expert",
    ),
    "a pipe": (
        lambda f: ((f / EXPERT_1).unlink(), os.mkfifo(f / EXPERT_1)),
        f"{EXPERT_1}: refused: is no regular file",
    ),
    "a link": (lambda f: linked(f / EXPERT_1), f"{EXPERT_1}: refused: is a link to a file outside of its folder"),
    "a long name": (
        lambda f: (f.parent / "latest").write_bytes(b"x" * 5000),
        "latest: refused: larger than 4096 bytes",
    ),
    "another router": (
        changed(REST, lambda c: c["module"].update({f"{PREFIX}gate.wg.weight": torch.ones(E + 1, D)})),
        "have the shapes router.weight [4, 6], experts.gate_up_proj [3, 8, 6], experts.down_proj [3, 6, 4]",
    ),
    "tensor parallelism": (
        lambda f: (f / EXPERT_1).rename(f / EXPERT_1.replace("rank_00", "rank_01")),
        "was saved with tensor parallelism",
    ),
    "a name elsewhere": (lambda f: (f.parent / "latest").write_text("../run/one"), "latest: names '../run/one', which"),
    "a folder above": (lambda f: (f.parent / "latest").write_text(".."), "latest: names '..', which is no folder"),
    "nothing": (lambda f: [file.unlink() for file in f.iterdir()], "holds neither .metadata, as checkpoints of"),
    "no metadata": (lambda f: (f / ".metadata").write_bytes(pickle.dumps(Planted())), "the pickle names posix.system"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_in_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = FAULTS[fault]
    folder = write(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    damage(folder / "one")
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["outside", "run"]


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which the folder ``run`` is refused."""
    with pytest.raises(SystemExit) as stopped:
        convert(["layers", "run", "--out", "out"])
    error = capsys.readouterr().err
    assert stopped.value.code == env.CHECKPOINT, error
    assert error.startswith("error: run") and error.count("\n") == 1, error
    return error


def declared(*shape: int) -> Callable[[Path], None]:
    """Describe the router as a tensor of another shape."""

    def damage(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        entry = metadata.state_dict_metadata["layers.0.mlp.router.weight"]
        entry.size = entry.chunks[0].sizes = torch.Size(shape)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


UP, DOWN = "layers.0.mlp.shared_experts.linear_fc1.weight", "layers.0.mlp.shared_experts.linear_fc2.weight"
LAYER = {
    "layers.0.mlp.router.weight": torch.ones(E, D),
    "layers.0.mlp.experts.experts.linear_fc1.weight": torch.ones(E, 2 * F, D),
    "layers.0.mlp.experts.experts.linear_fc2.weight": torch.ones(E, D, F),
}
#: all layers in one tensor, of which only the router has two
STACKED = {name.replace(".0.", "."): torch.stack([v] * (2 if "router" in name else 1)) for name, v in LAYER.items()}
FAULTS_OF_MEGATRON: dict[str, tuple[dict[str, Tensor], Callable[[Path], object], str]] = {
    "shared experts without a gate": (LAYER | {UP: torch.ones(4, D), DOWN: torch.ones(D, 4)}, str, "have the shapes"),
    "half of the shared experts": (LAYER | {UP: torch.ones(4, D)}, str, "a projection of the shared experts of 'layer"),
    "a number": (LAYER | {UP: torch.tensor(1.0)}, str, ".metadata: refused: RuntimeError chunk expects at least"),
    "a router of one number": (LAYER | {"layers.0.mlp.router.weight": torch.tensor(1.0)}, str, "refused: IndexError"),
    "another bias": (LAYER | {"layers.0.mlp.router.expert_bias": torch.ones(9)}, str, "router.bias_E [9]"),
    "experts of fewer layers": (STACKED, str, "linear_fc1.weight' is of fewer layers than the router"),
    "a huge router": (
        LAYER,
        declared(10**9, 10**9),
        "router.weight': the shape [1000000000, 1000000000] is larger than",
    ),
    "a link": (LAYER, lambda f: linked(f / "__0_0.distcp"), "__0_0.distcp: refused: is a link to a file outside of"),
}


@pytest.mark.parametrize("fault", FAULTS_OF_MEGATRON)
def test_damage_of_megatrons_layers_is_named_in_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, damage, message = FAULTS_OF_MEGATRON[fault]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside").mkdir()
    dcp.save(layer, checkpoint_id="run/one", no_dist=True)
    damage(tmp_path / "run" / "one")
    Path("run/latest").write_text("one")
    assert message in refusal(capsys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["outside", "run"]


def test_reading_runs_and_writes_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    list(moe_layers(folder))
    with nothing_happens(tmp_path):
        list(moe_layers(folder))
    changed(EXPERT_1, lambda c: c.update(x=Planted()))(folder / "one")
    with nothing_happens(tmp_path), pytest.raises(CheckpointError):
        list(moe_layers(folder))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (["layers", "run", "--out", "run"], "--out=run: exists already; choose another folder"),
        (
            ["layers", "run", "--out", "x", "--expert", "w1"],
            "--expert=w1: give the names of three linear layers, or of",
        ),
        (["layers", "none", "--out", "x"], "none: is not a folder"),
    ],
)
def test_wrong_options(
    how: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        convert(how)
    assert message in capsys.readouterr().err and not (tmp_path / "x").exists()
