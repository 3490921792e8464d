"""Checks the processes that read sequences ahead: what they read, when they end, and what happens if one is lost."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from equimoe.moe.train.config import DataConfig, HealthConfig
from equimoe.moe.train.data import Ahead, Batches, DataError, load_corpus, load_tokenizer
from equimoe.moe.train.data.ahead import STEPS
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small
from tests.helpers.slow import slow_but
from tests.moe.test_data_store import write

BYTES = load_tokenizer("bytes")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A corpus in a store, with a loss mask, cut documents and flat files."""
    monkeypatch.setattr("equimoe.moe.train.data.sources.SHORT", -1)
    config = DataConfig(path=str(write(tmp_path / "data")), seq_len=7, heldout_fraction=0.01)
    return load_corpus(config, BYTES, tmp_path / "cache")


def batches_of(corpus, **changes) -> Batches:
    return Batches(corpus.train, 7, 12, 3, corpus.train_masks, **changes)


def numbers(step: int) -> range:
    return range(12 * step, 12 * step + 12)


def same(a, b) -> bool:
    return all(x.equal(y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def children() -> list[int]:
    """Return the processes of this one that read, without those that have ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            reads = b"reading.py" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if reads and state != "Z" and int(parent) == os.getpid():
            found.append(int(folder.name))
    return sorted(found)


def ended(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shares", [None, {"a": 0.3, "c": 0.7}])
def test_what_is_read_ahead_is_what_is_read_at_once(stored, workers, shares, monkeypatch):
    plain, ahead = batches_of(stored, shares=shares), batches_of(stored, shares=shares)
    reader = Ahead(ahead, workers)
    assert len(children()) == workers
    direct = []
    monkeypatch.setattr(ahead, "read_streams", lambda *given: direct.append(1) or plain.read_streams(*given))
    for step in range(40):
        assert same(plain.read(numbers(step), 0, 1, 3, 4), ahead.read(numbers(step), 0, 1, 3, 4))
        reader.expect([numbers(later) for later in range(step + 1, step + 1 + STEPS)])
    assert len(direct) == 1  # the first step
    assert any((labels == -100).any() for step in range(40) for _, labels, _ in plain.read(numbers(step), 0, 1, 1, 12))
    reader.close()
    assert not children()
    assert same(plain.read(numbers(41), 0, 1, 3, 4), ahead.read(numbers(41), 0, 1, 3, 4))


def test_a_step_that_was_not_expected_is_read_right_too(stored):
    """As after a step that was skipped: its sequences come again later, and others move."""
    plain, ahead = batches_of(stored), batches_of(stored)
    reader = Ahead(ahead, 2)
    draw = np.random.default_rng(0)
    for step in range(60):
        asked = [int(n) for n in draw.integers(0, 300, 12)] if step % 3 == 0 else numbers(step)
        assert same(plain.read(asked, 0, 1, 1, 12), ahead.read(asked, 0, 1, 1, 12))
        reader.expect([numbers(later) for later in range(step + 1, step + 1 + STEPS)])
    assert len(reader._asked) <= STEPS + 2 and len(reader._known) == STEPS
    reader.close()


def test_text_in_memory_needs_no_processes(tmp_path):
    corpus = load_corpus(DataConfig(path=str(write(tmp_path)), seq_len=7), BYTES)
    batches = batches_of(corpus)
    reader = Ahead(batches, 2)
    assert not children() and batches.fetch == batches.read_streams
    reader.expect([numbers(1)])
    reader.close()


def test_a_process_that_is_killed_is_done_without(stored):
    plain, ahead = batches_of(stored), batches_of(stored)
    reader = Ahead(ahead, 2)
    for step in range(20):
        assert same(plain.read(numbers(step), 0, 1, 3, 4), ahead.read(numbers(step), 0, 1, 3, 4))
        reader.expect([numbers(later) for later in range(step + 1, step + 1 + STEPS)])
        if step == 4:
            os.kill(children()[0], signal.SIGKILL)
        if step == 9:
            os.kill(children()[-1], signal.SIGKILL)
    reader.close()


def test_signals_of_the_terminal_leave_the_processes_to_the_run(stored):
    reader = Ahead(batches_of(stored), 1)
    (child,) = children()
    reader.expect([numbers(0)])
    time.sleep(0.5)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child, number)
    time.sleep(0.2)
    assert children() == [child]
    reader.close()


def test_the_processes_end_with_their_reader(stored):
    reader = Ahead(batches_of(stored), 2)
    assert len(children()) == 2
    del reader
    gc.collect()
    assert not children()


PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import Ahead, Batches, load_corpus, load_tokenizer, sources
sources.SHORT = -1
corpus = load_corpus(DataConfig(path=sys.argv[1], seq_len=7), load_tokenizer("bytes"), Path(sys.argv[2]))
reader = Ahead(Batches(corpus.train, 7, 12, 3, corpus.train_masks), 2)
reader.expect([range(12)])
print(*(worker.process.pid for worker in reader._workers), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", slow_but([signal.SIGKILL], [signal.SIGKILL, signal.SIGTERM]))
def test_the_processes_end_with_the_run_however_it_ends(tmp_path, number):
    command = [sys.executable, "-c", PROGRAM, str(write(tmp_path / "data")), str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as parent:
        found = list(map(int, parent.stdout.readline().split()))
        assert len(found) == 2
        parent.send_signal(number)
    assert all(map(ended, found))


def test_a_file_that_shrinks_is_the_same_error(tmp_path):
    ids = np.random.default_rng(0).integers(0, 256, 20_000)
    ids.astype("<u2").tofile(tmp_path / "x.bin")
    corpus = load_corpus(DataConfig(path=str(tmp_path / "x.bin"), seq_len=7), BYTES)
    batches = Batches(corpus.train, 7, 12, 3)
    reader = Ahead(batches, 1)
    os.truncate(tmp_path / "x.bin", 5000)
    reader.expect([numbers(0)])
    with pytest.raises(DataError, match="has shrunk from 40000 to 5000 bytes since the run started; restore the file"):
        batches.read(numbers(0), 0, 1, 1, 12)
    reader.close()


def test_a_resumed_run_and_a_skipped_step_read_the_same_samples(tmp_path, monkeypatch):
    """Losses of a run that is interrupted, and of one that postpones a batch, with and without reading ahead."""
    monkeypatch.setattr("equimoe.moe.train.data.sources.SHORT", -1)
    config = small.on(small.write_texts(tmp_path / "texts"), steps=12)
    config = replace(config, health=HealthConfig(nonfinite="revisit"))

    def trainer(workers: int) -> Trainer:
        own = replace(config, data=replace(config.data, workers=workers, mixture="domain0=0.5,domain2=0.5"))
        return Trainer(own, load_corpus(own.data, BYTES, tmp_path / "cache"), None, torch.device("cpu"))

    def samples(of: Trainer, steps: int, spoilt: int) -> list[list[int]]:
        """Train, with a loss that is not finite in the attempt ``spoilt``; return all inputs, by attempt."""
        seen, real = [], of.engine.step

        def step(batches, lr, accept=None):
            seen.append(torch.cat([batch.inputs.flatten() for batch in batches]).tolist())
            if len(seen) == spoilt:
                batches = [replace(batch) for batch in batches]
                with torch.no_grad():
                    weight = next(of.model.parameters())
                    kept = weight.clone()
                    weight.fill_(float("nan"))
                result = real(batches, lr, accept)
                with torch.no_grad():
                    weight.copy_(kept)
                return result
            return real(batches, lr, accept)

        of.engine.step = step
        for _ in range(steps):
            of.train_step(observed=False)
        of.engine.step = real
        return seen

    plain, ahead = samples(trainer(0), 12, 3), samples(trainer(2), 12, 3)
    assert plain == ahead and len(plain) == 13
    first = trainer(1)
    begun = samples(first, 5, 3)
    path = first.save(tmp_path / "checkpoints")
    from equimoe.moe import checkpoint

    second = trainer(2)
    second.resume(path, checkpoint.read_manifest(path))
    assert begun + samples(second, 7, 0) == plain
    for each in (first, second):
        each.ahead.close()
