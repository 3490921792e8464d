"""Checks that every mistake is reported in one line, with one exit code on all ranks, in seconds, with no partial
files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equimoe.launch import env
from equimoe.launch.options import to_yaml
from equimoe.moe.observe.metrics import read_records
from tests.helpers import small
from tests.helpers.command import Ended, launch


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Return a function that runs the small run with more options. Reports have no figures, which saves seconds."""
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(small.write_texts(tmp_path / "texts"), steps=2)))

    def command(*options: str, world: int = 2) -> Ended:
        base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
        return launch([*base, *options], world, cwd=tmp_path)

    return command


def refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.codes == [code] * len(ended.codes), ended
    assert len(ended.errors) == 1, ended.errors
    assert all(word in ended.errors[0] for word in words), ended.errors[0]
    assert ended.seconds < 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--moe.num_expert", "8"], ["--moe.num_expert", "did you mean --moe.num_experts?"]),
        (["--moe.top_k", "1"], ["moe.router.normalize_weights=True", "set it to False"]),
        (["--parallel.ep", "3", "--moe.num_experts", "6"], ["parallel.ep=3", "number of processes, which is 2"]),
        (["--parallel.tp", "2", "--parallel.cp", "2"], ["parallel.cp=2 * parallel.tp=2", "processes, which is 2"]),
        (["--parallel.pp", "2", "--parallel.schedule", "zbv"], ["model.num_layers=2", "4 stages"]),
        (["--seed", "99999999999999999999"], ["seed=99999999999999999999", "must lie in 0..2**63 - 1"]),
        (["--moe.hidden_size", "99999999999996"], ["moe.hidden_size=99999999999996", "not fit into", "dryrun"]),
        (["--parallel.tp", "2", "--model.vocab_size", ""], ["--model.vocab_size=: must be a whole number or none"]),
        (["--parallel.cp", "2", "--data.seq_len", "30"], ["seq_len=30", "parallel.cp"]),
        (["--data.global_batch", "6"], ["data.global_batch=6", "data.micro_batch * data-parallel ranks = 2 * 2"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
        (["--run-dir", ""], ["--run-dir=: is empty"]),
        (["--processes", "3"], ["--processes=3: torchrun has already started 2 processes on this machine"]),
    ],
)
def test_configuration(run: Callable[..., Ended], tmp_path: Path, options: list[str], words: list[str]) -> None:
    """tests/moe/test_options.py has more mistakes of this kind, without a run."""
    refused(run(*options), env.CONFIG, *words)
    assert not (tmp_path / "run").exists()


def _tokens(folder: Path) -> str:
    np.full(5000, 60000, dtype=np.uint16).tofile(folder / "bad.bin")
    return str(folder / "bad.bin")


def _jsonl(folder: Path) -> str:
    (folder / "bad.jsonl").write_text(json.dumps({"text": "fine " * 100}) + "\n{not json\n")
    return str(folder / "bad.jsonl")


def _empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: str(folder / "absent"), ["data.path", "absent"]),
        (_empty, ["data.path", "empty"]),
        (_tokens, ["bad.bin", "60000", "257"]),
        (_jsonl, ["bad.jsonl", "2"]),
    ],
    ids=["absent", "empty", "token-beyond-vocabulary", "not-json"],
)
def test_data(run: Callable[..., Ended], tmp_path: Path, make: Callable[[Path], str], words: list[str]) -> None:
    refused(run("--data.path", make(tmp_path)), env.DATA, *words)
    assert not (tmp_path / "run").exists()


def test_vocabulary_smaller_than_the_tokenizers(run: Callable[..., Ended]) -> None:
    refused(run("--model.vocab_size", "100"), env.DATA, "model.vocab_size=100", "257")


def test_ranks_that_read_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that differs between two machines must be found before the first step, on every rank."""
    from equimoe.launch import tokens

    real = tokens.load

    def per_rank(data: Any, *rest: Any) -> object:
        import os
        from dataclasses import replace

        return real(replace(data, path=str(tmp_path / f"texts{os.environ['RANK']}")), *rest)

    for rank in range(2):
        small.write_texts(tmp_path / f"texts{rank}")
    (tmp_path / "texts1" / "domain0" / "0.txt").write_text("other words " * 60)
    monkeypatch.setattr(tokens, "load", per_rank)
    (tmp_path / "small.yaml").write_text(to_yaml(small.on(tmp_path / "texts0", steps=2)))
    ended = launch(["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")], 2)
    refused(ended, env.DISAGREEMENT, "data: rank 0 has ", ", rank 1 has ", "give all ranks the same")


def test_one_rank_that_fails_ends_all(
    tmp_path: Path, run: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from equimoe.launch import tokens

    real = tokens.load_corpus

    def unreadable(*given: Any) -> object:
        if os.environ["RANK"] == "1":
            raise OSError(5, "Input/output error", "texts/domain0/0.txt")
        return real(*given)

    monkeypatch.setattr(tokens, "load_corpus", unreadable)
    refused(run(), env.DATA, "rank 1: ", "Input/output error", "texts/domain0/0.txt")


@pytest.mark.faults
def test_run_folder_of_another_run_then_resume(run: Callable[..., Ended], tmp_path: Path) -> None:
    assert run().codes == [0, 0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    refused(run(), env.CHECKPOINT, "run_dir=", "already holds a run", "--resume")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    finished = run("--resume")
    assert finished.codes == [0, 0] and finished.errors == [] and finished.out[1] == ""
    assert finished.out[0].endswith("is finished, as step-00000002 has reached --steps=2; raise it to train on\n")
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert {path.name for path in before if before[path] != after[path]} <= {"exit_code", "run"}  # it was ours
    assert (tmp_path / "run" / "exit_code").read_text().strip() == "0"
    assert run("--resume", "--steps", "4").codes == [0, 0]


def test_a_run_that_torchrun_has_restarted_goes_on(
    run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("--checkpoint.every", "1").codes == [0, 0]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = run("--steps", "4")
    assert again.codes == [0, 0], again
    steps = [record["step"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_missing_and_damaged_checkpoint(run: Callable[..., Ended], tmp_path: Path) -> None:
    refused(run("--resume"), env.CHECKPOINT, "no complete checkpoint")
    assert not (tmp_path / "run").exists()
    assert run().codes == [0, 0]
    shard = tmp_path / "run" / "checkpoints" / "step-00000002" / "rank00001-000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(
        run("--resume", "--steps", "4"),
        env.CHECKPOINT,
        "rank00001-000.safetensors",
        "sha256 differs",
        "delete this checkpoint",
    )


def test_checkpoint_of_another_model(run: Callable[..., Ended]) -> None:
    assert run().codes == [0, 0]
    change = ("--resume", "--steps", "4", "--moe.intermediate_size", "8")
    refused(run(*change), env.CONFIG, "moe.intermediate_size from 12 to 8", "--allow-change moe.intermediate_size")
    other = run(*change, "--allow-change", "moe.intermediate_size")
    refused(other, env.CHECKPOINT, "experts.down_proj: this run wants", "resume with the config")


def test_run_folder_that_cannot_be_made(run: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    refused(run(), env.CANNOT_WRITE, "run_dir=", "run is not a folder; choose another --run-dir")


def test_links_in_a_run_folder_are_not_written_through(run: Callable[..., Ended], tmp_path: Path) -> None:
    """A run folder that somebody else has made may hold links to anything."""
    assert run("--steps", "1", world=1).codes == [0]
    folder, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("precious")
    for name in ("config.yaml", "report.html"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    assert run("--resume", world=1).codes == [0]
    assert victim.read_text() == "precious" and not (folder / "config.yaml").is_symlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "metrics.jsonl").symlink_to(victim)
    refused(run("--resume", "--steps", "3", world=1), env.CANNOT_WRITE, "metrics.jsonl: is a link")
    assert victim.read_text() == "precious"


def test_gradient_that_is_not_finite(run: Callable[..., Ended], tmp_path: Path) -> None:
    ended = run("--optim.lr", "1e30", "--optim.warmup_steps", "0", "--steps", "9")
    refused(ended, env.NON_FINITE, "step ", "grad_norm=", "lower optim.lr")


def test_dry_run_and_print_config_write_nothing(run: Callable[..., Ended], tmp_path: Path) -> None:
    dry = run("--dry-run")
    assert dry.codes == [0, 0] and "parameters" in dry.out[0] and dry.out[1] == ""
    shown = run("--print-config", "--steps", "77", world=1)
    assert shown.codes == [0] and "steps: 77" in shown.out[0]
    assert not (tmp_path / "run").exists()
