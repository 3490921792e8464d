"""Checks that an interrupted run ends in the same bits as an uninterrupted one, on every kind of mesh."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from equimoe.launch.options import to_yaml
from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import files, saver, store
from equimoe.moe.train.config import CheckpointConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from tests.faults.table import report
from tests.faults.test_reshard import MESHES, config_of, trainer_of
from tests.helpers import small
from tests.helpers.checkpoints import load_all
from tests.helpers.command import Ended, launch
from tests.helpers.fork import run_ranks

KINDS = ["one process", "dp 2", "ep 2", "dp 4, ep 2, etp 2", "tp 2, ep 2", "pp 2", "fsdp 4, ep 2", "cp 2, ep 2"]


def digest(state: dict[str, torch.Tensor]) -> dict[str, str]:
    whole = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in state.items()}
    return {name: hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest() for name, value in whole.items()}


@pytest.mark.faults
@pytest.mark.parametrize("mesh", KINDS)
def test_10_steps_and_a_resume_and_10_steps_equal_20(tmp_path: Path, mesh: str) -> None:
    """Compare parameters, moments, expert bias, carried load and random numbers; all experts are in the checkpoint."""
    texts = tmp_path / "texts"
    corpus = load_corpus(config_of(texts, mesh).data, load_tokenizer("bytes"))

    def script(rank: int, world: int) -> tuple[bool, bool, dict[str, str]]:
        straight, first, second = (trainer_of(texts, mesh, corpus) for _ in range(3))
        norms = [float(straight.train_step()) for _ in range(20)]
        random = torch.get_rng_state()
        for _ in range(10):
            first.train_step()
        path = first.save(tmp_path / mesh)
        second.resume(path, checkpoint.read_manifest(path))
        equal_norms = [float(second.train_step()) for _ in range(10)] == norms[10:]
        equal = digest(straight.state()) == digest(second.state()) and torch.equal(random, torch.get_rng_state())
        biases = {name: value for name, value in digest(second.state()).items() if name.endswith("bias_E")}
        return equal, equal_norms, biases

    found = run_ranks(script, MESHES[mesh][0], timeout=100)
    assert all(equal and norms for equal, norms, _ in found)
    biases: dict[str, str] = {}
    for _, _, of_rank in found:
        assert of_rank and all(biases.setdefault(name, value) == value for name, value in of_rank.items())
    saved = load_all(tmp_path / mesh / "step-00000010")
    for layer in (0, 1):
        experts = saved[f"model.blocks.{layer}.mlp.experts.gate_up_proj"]
        assert len({expert.numpy().tobytes() for expert in experts}) == 4
    # in one layer, an even number of steps may happen to cancel
    assert any(saved[f"model.blocks.{layer}.mlp.router.bias_E"].any() for layer in (0, 1))
    report("18", "4 of 4 experts distinct in every layer", mesh=mesh)
    report("19", "bit-identical", mesh=mesh)
    report("39", "equal on all ranks, and after a resume", mesh=mesh)


# ---- a rank is killed within a save


def _shard() -> Any:
    return mock.patch("equimoe.moe.checkpoint.writer.write_tensors", _killing(files.write_tensors))


def _manifest() -> Any:
    return mock.patch("equimoe.moe.checkpoint.store.encode", _killing(store.encode))


def _rename() -> Any:
    return mock.patch.object(Path, "rename", _killing(Path.rename))


def _retention() -> Any:
    return mock.patch("equimoe.moe.checkpoint.saver.Retention.apply", _killing(saver.Retention.apply))


def _killing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Kill this process in the third call, within a save of the third step."""
    calls = []

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


PHASES = {"shard": _shard, "manifest": _manifest, "rename": _rename, "retention": _retention}
CASES = [("shard", 1), ("shard", 0), ("manifest", 0), ("rename", 0), ("retention", 0)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("phase", "killed"),
    CASES,
)
def test_a_kill_within_a_save_loses_no_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, killed: int
) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    config = small.on(small.write_texts(tmp_path / "texts"), steps=4, checkpoint=CheckpointConfig(1, keep_last=2))
    (tmp_path / "small.yaml").write_text(to_yaml(config))

    @contextmanager
    def kill() -> Iterator[None]:
        if os.environ["RANK"] == str(killed):
            with PHASES[phase]():
                yield
        else:
            yield

    def run(folder: str, *options: str, **within: Any) -> Ended:
        base = ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / folder)]
        return launch([*base, *options], 2, cwd=tmp_path, **within)

    ended = run("killed", within=kill)
    assert ended.codes[killed] == -signal.SIGKILL and ended.codes[1 - killed] not in (0, -signal.SIGKILL), ended
    root = tmp_path / "killed" / "checkpoints"
    before = "step-00000003" if phase == "retention" else "step-00000002"
    assert checkpoint.newest(root).name == before and load_all(root / before)
    again = run("killed", "--resume")
    assert again.codes == [0, 0] and again.errors == [], again
    assert not list(root.glob("*.tmp")) and len(list(root.iterdir())) == 2
    assert run("straight").codes == [0, 0]
    ends = [load_all(tmp_path / folder / "checkpoints" / "step-00000004") for folder in ("killed", "straight")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    report("4", "the checkpoint before is used, and the run ends in the same bits")
