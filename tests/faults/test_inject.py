"""Checks the fault injector: every phase is reached, in order, and a fault fires as often as it is told to."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from equimoe.launch import env
from tests.faults import inject
from tests.helpers import small
from tests.helpers.fork import run_ranks


def small_run(folder: Path, faults: str, steps: int = 2, seen: list[str] | None = None) -> None:
    """Run in a forked process, because the injector changes the library."""
    from equimoe.launch.options import to_yaml
    from equimoe.moe.train.config import CheckpointConfig

    texts = small.write_texts(folder / "texts") if not (folder / "texts").exists() else folder / "texts"
    config = small.on(texts, steps=steps, checkpoint=CheckpointConfig(every=1, keep_last=9))
    (folder / "small.yaml").write_text(to_yaml(config))
    os.environ["MOE_FAULT"] = faults
    for name in env.PLACE:  # a process of its own
        os.environ.pop(name, None)
    inject.sys.argv = ["inject", "--config", str(folder / "small.yaml"), "--run-dir", str(folder / "run")]
    if seen is not None:
        real = inject.Injector.reach

        def reach(self: inject.Injector, phase: str, step: int | None = None, tensor: object = None) -> None:
            seen.append(f"{self.step if step is None else step} {phase}")
            real(self, phase, step, tensor)  # type: ignore

        inject.Injector.reach = reach  # type: ignore
    inject.main()


def test_every_phase_is_reached_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())

    def body(rank: int, world: int) -> list[str]:
        seen: list[str] = []
        small_run(tmp_path, "", seen=seen)
        return seen

    (seen,) = run_ranks(body, 1)
    last = [entry[2:] for entry in seen if entry.startswith("2 ")]
    order = list(dict.fromkeys(last))
    assert order == [phase for phase in inject.PHASES if phase not in ("start", "setup", "move")]
    assert seen[:2] == ["0 start", "0 setup"]


def test_a_fault_fires_once_in_a_run_folder(tmp_path: Path) -> None:
    fault = inject.Fault.parse("raise@rank=1,step=5,phase=dispatch")
    assert fault == inject.Fault("raise", 1, 5, "dispatch")
    for _ in range(2):  # a second attempt of the same run
        injector = inject.Injector([fault], 1, tmp_path / "run.faults")
        injector.step = 5
        injector.reach("forward")
        if not _:
            with pytest.raises(ValueError, match="injected on rank 1 in phase dispatch"):
                injector.reach("dispatch")
        injector.reach("dispatch")
    inject.Injector([fault], 0, tmp_path / "other.faults").reach("dispatch", 5)


def test_a_fault_waits_for_a_checkpoint(tmp_path: Path) -> None:
    begun = tmp_path / "run" / "checkpoints" / "step-00000004.tmp"
    begun.mkdir(parents=True)
    injector = inject.Injector([inject.Fault.parse("nan@step=5,saved=4")], 0, tmp_path / "run.faults")
    x = torch.ones(4)
    waits = threading.Thread(target=injector.reach, args=("optim", 5, x))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive() and not x.isnan().any()
    begun.rename(begun.with_suffix(""))
    waits.join(10.0)
    assert not waits.is_alive() and x.isnan().all()


def test_values_are_changed(tmp_path: Path) -> None:
    x = torch.ones(4)
    inject.Injector([inject.Fault.parse("flip@bit=31")], 0, tmp_path / "a").reach("forward", 1, x)
    assert x.tolist() == [-1, 1, 1, 1]
    inject.Injector([inject.Fault.parse("nan@step=1")], 0, tmp_path / "b").reach("forward", 1, x)
    assert x.isnan().all()


@pytest.mark.parametrize("text", ["hit@rank=1", "kill@phase=lunch", "kill@whom=me"])
def test_unknown_faults_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no such kind or phase"):
        inject.Fault.parse(text)


def test_a_signal_reaches_the_rank(tmp_path: Path) -> None:
    pid = os.fork()
    if not pid:
        inject.Injector([inject.Fault.parse("kill@step=1")], 0, tmp_path / "faults").reach("data", 1)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
