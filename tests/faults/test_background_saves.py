"""Checks saves that go on in the background: what they hold, and how ranks wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from equimoe.launch.failing import FAILED
from equimoe.moe import checkpoint
from equimoe.moe.checkpoint import SaveError
from equimoe.moe.train.config import CheckpointConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.faults.conftest import Run, command
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.checkpoints import load_all, small_state
from tests.helpers.fork import run_ranks

FILES = "equimoe.moe.checkpoint.files"


def slow_disk(gate: threading.Event) -> Callable[..., Any]:
    """Return a function that opens files once ``gate`` is set."""

    def opened(*args: Any, **kwargs: Any) -> Any:
        gate.wait(20)
        return open(*args, **kwargs)

    return opened


def test_the_values_saved_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer goes on before a byte is written."""

    def script(rank: int, world: int) -> tuple[bool, bool]:
        gate = threading.Event()
        monkeypatch.setattr(f"{FILES}.open", slow_disk(gate), raising=False)
        config = small.on(tmp_path / "texts", ep=2)
        corpus = load_corpus(config.data, load_tokenizer("bytes"))
        trainer = Trainer(config, corpus, small_mesh(config), torch.device("cpu"))
        trainer.train_step()
        before = {name: _whole(value).clone() for name, value in trainer.state().items()}
        path = trainer.start_saving(tmp_path / "run")
        trainer.train_step()
        trainer.saver.check()
        unfinished = not path.exists()
        gate.set()
        trainer.saver.wait()
        saved = load_all(path)
        after = {name: _whole(value) for name, value in trainer.state().items()}
        assert not torch.equal(saved["model.head.weight"], after["model.head.weight"])
        return unfinished, saved.keys() == before.keys() and all(torch.equal(saved[n], before[n]) for n in before)

    small.write_texts(tmp_path / "texts")
    assert run_ranks(script, 2) == [(True, True)] * 2
    report("43", "the file holds the values of the step")


def small_mesh(config: Any) -> Any:
    from equimoe.moe.parallel import build_mesh

    return build_mesh(config.parallel)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


def test_saves_wait_for_each_other_and_reuse_their_buffers(tmp_path: Path) -> None:
    def script(rank: int, world: int) -> list[str]:
        saver, values = checkpoint.Saver(keep_last=9), small_state()
        for step in range(1, 6):
            for value in values.values():
                value.fill_(step)
            saver.start(tmp_path, step, values, {"step": step})
        values["model.new"] = torch.ones(3)  # a new plan
        saver.start(tmp_path, 6, values, {})
        saver.close()
        for step in range(1, 6):
            saved = load_all(tmp_path / f"step-{step:08d}")
            assert all(torch.equal(value, torch.full((50, 3), float(step))) for value in saved.values()), step
        return sorted(load_all(tmp_path / "step-00000006"))

    assert run_ranks(script, 2) == [[*small_state(), "model.new"][4:] + list(small_state())] * 2


def test_ranks_share_the_work_of_replicated_tensors(tmp_path: Path) -> None:
    def script(rank: int, world: int) -> int:
        saver = checkpoint.Saver(keep_last=1)
        saver.start(tmp_path, 1, small_state(), {})
        saver.wait()
        assert saver._stager is not None
        return len(saver._stager._buffers)

    assert run_ranks(script, 2) == [2, 2]


def test_a_failed_save_is_reported_on_all_ranks_in_the_same_step(tmp_path: Path) -> None:
    """The ranks notice at different times that the save has failed."""

    def script(rank: int, world: int) -> int:
        gate = threading.Event()
        saver = checkpoint.Saver(keep_last=1)
        with mock.patch(f"{FILES}.open", side_effect=OSError(28, "No space left on device"), create=True):
            saver.start(tmp_path, 1, small_state(), {})
            assert saver._flight is not None
            saver._flight[0].exception(20)
        late = saver._flight[0].done if rank == 0 else gate.is_set
        for step in range(9):
            if step == 4:
                gate.set()
            try:
                with mock.patch.object(saver._flight[0], "done", late):
                    saver.check()
            except SaveError:
                return step
        return -1

    assert run_ranks(script, 2) == [4, 4]


def test_settling_waits_no_longer_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(f"{FILES}.open", slow_disk(gate), raising=False)
    saver = checkpoint.Saver(keep_last=1)
    path = saver.start(tmp_path, 1, small_state(), {})
    saver.settle(0.05)
    assert not path.exists()
    gate.set()
    saver.settle(20)
    assert load_all(path)


# ---- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs five steps on two ranks, with a save in every step."""
    return partial(command(tmp_path, monkeypatch, steps=5, checkpoint=CheckpointConfig(1, keep_last=2)), world=2)


@pytest.mark.faults
def test_the_end_of_a_run_and_an_exception_wait_for_the_save_in_flight(tmp_path: Path, run: Run) -> None:
    @contextmanager
    def slow(stops: bool = False) -> Iterator[None]:
        def opened(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.3)
            return open(*args, **kwargs)

        real = Trainer.train_step

        def step(trainer: Trainer, observed: bool = True) -> torch.Tensor:
            if stops and trainer.step == 2:
                raise ArithmeticError("planted")
            return real(trainer, observed)

        with mock.patch(f"{FILES}.open", opened, create=True), mock.patch.object(Trainer, "train_step", step):
            yield

    assert run(within=lambda: slow(True)).codes == [FAILED] * 2
    assert [path.name[-1] for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["1", "2"]
    assert run("--resume", within=slow).codes == [0, 0]
    assert [path.name[-1] for path in checkpoint.complete(tmp_path / "run" / "checkpoints")] == ["4", "5"]
