"""Checks the command that verifies, shows and rewrites checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equimoe.launch import checkpoint as command
from equimoe.launch import env
from equimoe.launch.usage import Parser
from equimoe.moe import checkpoint
from tests.helpers.checkpoints import load_all
from tests.helpers.fork import run_ranks


def state() -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.arange(35.0).view(7, 5),
        "model.half": torch.arange(4).bfloat16(),
        "model.empty": torch.zeros(0, 3),
        "optimizer.w.exp_avg": torch.ones(7, 5),
        "optimizer.w.step": torch.tensor(3.0),
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    root = tmp_path / "run" / "checkpoints"
    position = {"world": 2, "parallel": {"ep": 2}, "config": {"seed": 0, "optim": {"lr": 0.1}}}
    for step in (1, 2):
        run_ranks(lambda rank, world, step: checkpoint.save(root, step, state(), position, 9) and None, 2, step)
    return tmp_path / "run"


def call(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    code = 0
    try:
        command.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "checkpoints"
    code, out, err = call(capsys, "verify", run_dir)
    assert code == 0 and err == "" and len(out.splitlines()) == 2
    assert out.startswith(f"{root}/step-00000001: valid, step 1, 5 tensors in 3 files, ")
    flip(root / "step-00000001" / "rank00001-000.safetensors")
    for folder, valid in ((run_dir, 1), (root, 1), (root / "step-00000001", 0)):
        code, out, err = call(capsys, "verify", folder)
        assert code == env.CHECKPOINT and len(out.splitlines()) == valid
        assert err.startswith(f"error: {root}/step-00000001/rank00001-000.safetensors: sha256 differs")
        assert len(err.splitlines()) == 1
    assert call(capsys, "verify", root / "step-00000002")[0] == 0


def test_show(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "show", run_dir)
    assert code == 0 and err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].endswith("step-00000002: step 2")
    assert 'parallel: {"ep": 2}' in lines and "optim.lr: 0.1" in lines
    assert "model.w float32 7 x 5 140 1" in lines and "optimizer.w.step float32 scalar 4 1" in lines
    assert lines[-1] == "5 tensors, 292 bytes"


@pytest.mark.parametrize("files", [1, 2, 3, 6, 7])
def test_reshard(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int) -> None:
    code, out, err = call(capsys, "reshard", run_dir, "--out", tmp_path / "out", "--files", files)
    final = tmp_path / "out" / "step-00000002"
    written = sorted(path.name for path in final.glob("*.safetensors"))
    assert code == 0 and err == "" and len(written) <= files
    assert out.startswith(f"wrote {final}: step 2, {len(written)} file")
    loaded, expected = load_all(final), state()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[n], v) and loaded[n].dtype == v.dtype for n, v in expected.items())
    position = checkpoint.read_manifest(run_dir / "checkpoints" / "step-00000002")["position"]
    assert checkpoint.read_manifest(final)["position"] == position

    def resume(rank: int, world: int) -> bool:
        own = {name: torch.zeros_like(value) for name, value in expected.items()}
        checkpoint.load(final, own, checkpoint.read_manifest(final))
        return all(torch.equal(own[name], expected[name]) for name in own)

    assert run_ranks(resume, 2) == [True, True]
    code, out, err = call(capsys, "reshard", run_dir, "--out", tmp_path / "out")
    assert code == env.CONFIG and "already contains step-00000002" in err and out == ""


@pytest.mark.parametrize("files", [8, 10**8, 10**30])
def test_more_files_than_parts_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: int
) -> None:
    code, out, err = call(capsys, "reshard", run_dir, "--out", tmp_path / "new" / "out", "--files", files)
    assert code == env.CONFIG and out == "" and len(err.splitlines()) == 1
    assert f"--files={files}: the tensors of " in err and err.endswith("can be split into at most 7 files\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["reshard", "export"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    there: bool,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equimoe.moe.checkpoint.tools.write_blocks", full)
    (tmp_path / "out").mkdir() if there and name == "reshard" else None
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call(capsys, name, run_dir, "--out", tmp_path / "out")
    assert code == env.CANNOT_WRITE and out == "" and "No space left on device" in err and len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "verify|show|reshard|export"),
        (["explode", "x"], "explode"),
        (["show"], "DIR"),
        (["reshard", "x"], "--out"),
        (["verify", "x", "--deep\nly"], "--deep\\nly"),
    ],
)
def test_wrong_usage_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == env.CONFIG and out == "" and len(err.splitlines()) == 1
    assert err.startswith("error: ") and words in err and err.endswith("; see --help\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--files", "many"], "--files=many: must be a whole number"),
        (["--ratio", "1,5"], "--ratio=1,5: must be a number"),
        (["--method", "best"], "--method=best: use one of drop, fine"),
        (["--files"], "--files: give a value, as in --files VALUE"),
        (["--weights"], "--weights: give a value, as in --weights VALUE"),
        (["--nothing", "\x1b[2J"], "unrecognized arguments: --nothing \\x1b[2J; see --help"),
    ],
)
def test_wrong_values_of_options_name_option_value_and_remedy(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    parser = Parser()
    parser.add_argument("--files", type=int)
    parser.add_argument("--ratio", type=float)
    parser.add_argument("--method", choices=("drop", "fine"))
    parser.add_argument("--weights", type=float, nargs="+")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(arguments)
    assert ended.value.code == env.CONFIG and capsys.readouterr().err == f"error: {line}\n"


def test_help_says_where_files_go(capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("reshard", "OUT/step-00000100"), ("export", "must not exist")):
        code, out, err = call(capsys, name, "--help")
        assert code == 0 and err == "" and words in " ".join(out.split())


def test_verify_says_that_an_entry_is_no_folder(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000009").write_text("a file")
    code, out, err = call(capsys, "verify", run_dir)
    assert code == env.CHECKPOINT and len(out.splitlines()) == 2
    assert err == f"error: {run_dir}/checkpoints/step-00000009: is not a folder, and so not a checkpoint; delete it\n"


@pytest.mark.parametrize("file_bytes", [1, 100, 10**9])
def test_export(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file_bytes: int) -> None:
    code, out, err = call(capsys, "export", run_dir, "--out", tmp_path / "out", "--file-bytes", file_bytes)
    assert code == 0 and err == "" and out.startswith(f"wrote {tmp_path}/out: weights of step 2, ")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 148, "step": 2}
    found = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        loaded = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in loaded)
        found |= loaded
    expected = {name.removeprefix("model."): value for name, value in state().items() if name.startswith("model.")}
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in expected.items())
    assert len(set(index["weight_map"].values())) == {1: 3, 100: 2, 10**9: 1}[file_bytes]


def test_an_export_touches_nothing_beside_its_folder(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("precious")
    before = set(tmp_path.iterdir())
    assert call(capsys, "export", run_dir, "--out", tmp_path / "out")[0] == 0
    assert set(tmp_path.iterdir()) == before | {tmp_path / "out"}
    assert (tmp_path / "out.tmp" / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["show", "reshard", "export"])
def test_the_newest_valid_checkpoint_of_a_run_is_used(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    flip(run_dir / "checkpoints" / "step-00000002" / "tensors.json")
    options = [] if name == "show" else ["--out", tmp_path / "out"]
    code, out, _ = call(capsys, name, run_dir, *options)
    assert code == 0 and "step 1" in out
    code, out, err = call(capsys, name, run_dir / "checkpoints" / "step-00000002", *options)
    assert code == env.CHECKPOINT and "tensors.json: sha256 differs" in err and len(err.splitlines()) == 1


def test_mistakes_are_one_line(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for arguments, code, words in (
        (["verify", tmp_path / "nowhere"], env.CHECKPOINT, "no checkpoint; give the folder"),
        (["reshard", run_dir, "--out", tmp_path / "out", "--files", 0], env.CONFIG, "--files=0: must be at least 1"),
        (["export", run_dir, "--out", tmp_path / "o", "--file-bytes", 0], env.CONFIG, "--file-bytes=0: must be"),
        (["export", run_dir, "--out", run_dir], env.CONFIG, "exists already; choose another folder"),
        (["reshard", run_dir, "--out", tmp_path / "file" / "x"], env.CANNOT_WRITE, "cannot be written or read (Not a"),
    ):
        found, out, err = call(capsys, *arguments)
        assert found == code and out == "" and words in err and len(err.splitlines()) == 1, err


def test_a_failed_export_or_reshard_leaves_nothing(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("equimoe.moe.checkpoint.tools.write_blocks", full)
    for name in ("reshard", "export"):
        code, _, err = call(capsys, name, run_dir, "--out", tmp_path / "out" / name)
        assert code == env.CANNOT_WRITE and "No space left on device" in err
        assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(("step", "model"))]
