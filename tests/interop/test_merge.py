"""Models that are merged: weighted sums of chosen tensors, the same in any number of files, block by block."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.launch import env, initial
from equimoe.launch.convert import main as convert
from equimoe.launch.upcycle import main
from equimoe.moe.checkpoint import tools
from equimoe.moe.checkpoint.tools import Reader
from equimoe.moe.interop.convert import write_first
from tests.helpers import hf_folders
from tests.helpers.begun import MESHES, begun
from tests.helpers.fork import run_ranks
from tests.helpers.grown import Held, dense, tensors, write
from tests.helpers.hf_folders import assert_same
from tests.helpers.slow import slow_but
from tests.helpers.small import write_texts

GATE_UP = "model.blocks.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three MoE models, whose files are split differently."""
    folder, model = tmp_path_factory.mktemp("models"), dense(num_experts=4)
    return [write(folder / str(i), seed=i, model=model, files=files) for i, files in enumerate((1, 3, 5))]


def merged(sources: list[Path], out: Path, *options: str, method: str = "assemble") -> dict[str, Tensor]:
    main([*map(str, sources), "--out", str(out), "--method", method, *options])
    return tensors(out)


def is_router(name: str) -> bool:
    return "router" in name


def is_expert(name: str) -> bool:
    return ".experts." in name


def both(base: dict[str, Tensor], donor: dict[str, Tensor], chosen: Any) -> dict[str, Tensor]:
    return {name: donor[name] if chosen(name) else value for name, value in base.items()}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--weights", "1", "0", "--tensors", "all", "--routers"], lambda name: False),
        (["--weights", "0", "1"], is_expert),
        (["--weights", "0", "1", "--routers"], lambda name: is_expert(name) or is_router(name)),
        (["--weights", "0", "1", "--tensors", "all"], lambda name: not is_router(name)),
        (["--weights", "0", "1", "--tensors", "all", "--routers"], lambda name: True),
        (["--weights", "0", "1", "--threshold", "0"], is_expert),
        (["--weights", "0.5", "0.5", "--tensors", "all", "--routers", "--threshold", "1e9"], lambda name: False),
    ],
)
def test_base_and_donor_are_copied_bit_for_bit(
    options: list[str], chosen: Any, models: list[Path], tmp_path: Path
) -> None:
    base, donor = tensors(models[0]), tensors(models[1])
    assert_same(merged(models[:2], tmp_path / "out", *options), both(base, donor, chosen))


def test_weighted_sums(models: list[Path], tmp_path: Path) -> None:
    parts, weights = [tensors(model) for model in models], (0.5, 0.2, 0.3)
    found = merged(models, tmp_path / "sum", "--weights", *map(str, weights))
    average = merged(models, tmp_path / "average", method="average")
    for name in parts[0]:
        stacked = torch.stack([part[name].double() for part in parts])
        wanted = torch.einsum("m...,m->...", stacked, torch.tensor(weights, dtype=torch.float64))
        assert torch.equal(found[name], wanted.float() if is_expert(name) else parts[0][name])
        torch.testing.assert_close(average[name], stacked.mean(0).float(), atol=1e-6, rtol=1e-6)


def test_the_threshold_is_the_root_mean_square_difference_of_a_matrix(models: list[Path], tmp_path: Path) -> None:
    """The up projection of one expert differs much, and the gate projection next to it little."""
    base = tensors(models[0])
    donor = {name: value.clone() for name, value in base.items()}
    up, gate = (2, slice(12, 24)), (2, slice(0, 12))
    donor[GATE_UP][up] += torch.tensor([0.3, -0.5]).repeat(12, 8)  # root mean square sqrt(0.17) = 0.412
    donor[GATE_UP][gate] += 0.1
    donor[GATE_UP][3] += 0.2
    found = initial.weights(models[0])
    write_first(Held(donor), found.tensors, found.architecture, tmp_path / "donor", 2, "a test", {})
    for threshold, places in ((0.15, (up, 3)), (0.41, (up,)), (0.42, ())):
        wanted = {name: value.clone() for name, value in base.items()}
        for place in places:
            wanted[GATE_UP][place] = donor[GATE_UP][place]
        options = ["--weights", "0", "1", "--threshold", str(threshold)]
        assert_same(merged([models[0], tmp_path / "donor"], tmp_path / f"{threshold}", *options), wanted)


def test_one_model_that_differs_is_enough(models: list[Path], tmp_path: Path) -> None:
    options = ["--weights", "0.5", "0.25", "0.25", "--threshold"]
    merge = [models[0], models[0], models[1]]
    everything = merged(merge, tmp_path / "everything", *options[:-1])
    assert_same(merged(merge, tmp_path / "low", *options, "0.05"), everything)
    assert_same(merged(merge, tmp_path / "high", *options, "9"), tensors(models[0]))


@pytest.mark.parametrize("threshold", [[], ["--threshold", "0.28"]])
def test_any_number_of_files_has_the_same_values(threshold: list[str], models: list[Path], tmp_path: Path) -> None:
    options = ["--weights", "0.5", "0.2", "0.3", *threshold]
    one = merged(models, tmp_path / "one", *options)
    for number, model in enumerate(models):
        tools.reshard(*tools.newest_valid(model), tmp_path / str(number), 4 - number)
    sharded = [tmp_path / str(number) for number in range(3)]
    assert_same(merged(sharded, tmp_path / "many", *options, "--files", "4"), one)


@pytest.mark.parametrize("mesh", slow_but(["pp", "fsdp, bfloat16"], ["ep", "tp", "pp", "fsdp, bfloat16"]))
def test_checkpoints_of_any_mesh_are_merged_alike(mesh: str, models: list[Path], tmp_path: Path) -> None:
    """A step on the mesh changes no bit; then the result is that of checkpoints of one process."""
    world, options = MESHES[mesh]
    options = [*options, "--data.path", str(write_texts(tmp_path / "texts"))]
    runs = [tmp_path / f"run{number}" for number in range(2)]
    for model, run_dir in zip(models, runs, strict=False):
        run_ranks(begun, world, options, model, run_dir)
    assert len(list(runs[0].glob("checkpoints/*/*.safetensors"))) >= 2  # it is in parts
    for number, how in enumerate(
        (["--weights", "0.3", "0.7"], ["--tensors", "all", "--routers", "--threshold", "0.28"])
    ):
        one = merged(models[:2], tmp_path / f"one{number}", *how)
        assert_same(merged(runs, tmp_path / f"many{number}", *how, "--files", "2"), one)


@pytest.mark.parametrize("threshold", [[], ["--threshold", "0.28"]])
def test_only_a_block_is_in_memory(
    threshold: list[str], models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest, box = 0, Reader.box

    def watched(reader: Reader, *place: Any) -> Tensor:
        nonlocal largest
        found = box(reader, *place)
        largest = max(largest, found.nbytes)
        return found

    monkeypatch.setattr(Reader, "box", watched)
    monkeypatch.setattr(tools, "BLOCK_BYTES", 1600)
    main([*map(str, models), "--out", str(tmp_path / "out"), "--method", "assemble", *threshold])
    assert largest <= max(1600, 24 * 16 * 4)  # or one expert's gate and up projection


def test_models_of_transformers_are_merged_and_written_again(tmp_path: Path) -> None:
    """In their dtype and with their small files. Tensors that are not merged have the same bits."""
    values = hf_folders.config("qwen3_moe", dtype="bfloat16")
    first = hf_folders.tensors(values, "v4", torch.bfloat16)
    second = {name: -value for name, value in first.items()}
    for name, weights in (("first", first), ("second", second)):
        hf_folders.write(tmp_path / name, values, weights)
    options = ["--out", str(tmp_path / "ours"), "--method", "assemble", "--weights", "0", "1"]
    main([str(tmp_path / "first"), str(tmp_path / "second"), *options])
    convert(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    assert_same(hf_folders.read(tmp_path / "back"), both(first, second, is_expert))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == values


WRONG = {
    "--weights=0.5 0.6: must sum to 1": ["--weights", "0.5", "0.6"],
    "--weights=nan 1: must sum to 1": ["--weights", "nan", "1"],
    "--weights=1: must be one per model, 2": ["--weights", "1"],
    "--threshold=-1.0: must not be negative": ["--threshold", "-1"],
    "--seed: has no effect with --method=assemble": ["--seed", "1"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(
    message: str, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        merged(models[:2], tmp_path / "out", *WRONG[message])
    error = capsys.readouterr().err
    assert stopped.value.code == env.CONFIG and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_model_is_hidden_by_the_result(
    models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that holds a model or a run would mean either that or the result."""
    values = hf_folders.config("qwen3_moe")
    folder = hf_folders.write(tmp_path / "theirs", values, hf_folders.tensors(values))
    tools.reshard(*tools.newest_valid(models[0]), tmp_path / "run" / "checkpoints", 1)
    for out, message in (
        (folder, "holds a transformers model; choose another folder"),
        (tmp_path / "run", "already contains step-00000000; choose another folder"),
        (tmp_path / "run" / "checkpoints", "already contains step-00000000; choose another folder"),
    ):
        before = sorted(out.iterdir())
        with pytest.raises(SystemExit):
            merged(models[:2], out)
        error = capsys.readouterr().err
        assert f"--out={out}: {message}" in error and len(error.splitlines()) == 1
        assert sorted(out.iterdir()) == before


def test_dense_models_have_no_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [write(tmp_path / str(seed), seed) for seed in range(2)]
    with pytest.raises(SystemExit):
        merged(sources, tmp_path / "out")
    assert "has no MoE layers; use --tensors all" in capsys.readouterr().err
    merged(sources, tmp_path / "out", "--tensors", "all")
