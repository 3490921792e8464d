"""Checks the policies of a run's health in one process: spikes, skipped and postponed batches, replays, changes."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from equimoe.launch.options import fields_of
from equimoe.moe import BalanceConfig, CapacityConfig, checkpoint
from equimoe.moe.health import LossWindow
from equimoe.moe.observe.metrics import MetricsWriter, read_records
from equimoe.moe.observe.progress import Progress
from equimoe.moe.train.config import HealthConfig, OptimConfig, TrainConfig
from equimoe.moe.train.contract import MAY_CHANGE, check_resumed, differences
from equimoe.moe.train.data import Cursor, load_corpus, load_tokenizer
from equimoe.moe.train.judge import NonFiniteError
from equimoe.moe.train.loop import run
from equimoe.moe.train.optim import learning_rate, rise_on_resume
from equimoe.moe.train.replay import DisagreementError
from equimoe.moe.train.trainer import Trainer
from tests.faults.table import report
from tests.helpers import small

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_texts(tmp_path_factory.mktemp("texts"))


def config_of(texts: Path, steps: int = 6, **health: Any) -> TrainConfig:
    balance = BalanceConfig(coefficient=0.05, estimator="carry", bias_update_rate=0.1)
    return replace(small.on(texts, steps=steps, balance=balance), health=HealthConfig(**health))


def trainer_of(config: TrainConfig) -> Trainer:
    return Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, CPU)


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in trainer.state().items()}
    return {name: value for name, value in state.items() if not name.startswith("generator.")}


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


class Spoiler:
    """Multiplies the logits of chosen attempts by a factor, and remembers the sequences of every attempt."""

    def __init__(self, trainer: Trainer, attempts: set[int], factor: float) -> None:
        self.read: list[list[int]] = []
        self.states: list[dict[str, Tensor]] = []
        attempt = trainer._attempt

        def watched(numbers: list[int], observed: bool) -> Any:
            self.states.append(snapshot(trainer))
            self.read.append(list(numbers))
            return attempt(numbers, observed)

        trainer._attempt = watched  # type: ignore[method-assign]
        trainer.model.head.register_forward_hook(
            lambda module, args, out: out * factor if len(self.read) - 1 in attempts else out
        )


# ---- what a step does


@pytest.mark.parametrize("kind", ["nonfinite", "spike"])
@pytest.mark.parametrize("policy", ["skip", "revisit"])
def test_skipped_step_leaves_nothing_and_is_revisited_once(texts: Path, kind: str, policy: str) -> None:
    trainer = trainer_of(config_of(texts, **{kind: policy}))
    trainer.judge.window = LossWindow([5.3, 5.7] * 20)
    spoiler = Spoiler(trainer, {2}, float("nan") if kind == "nonfinite" else 1e3)
    size = trainer.config.data.global_batch
    norms = [trainer.train_step() for _ in range(trainer.config.steps)]
    assert trainer.step == len(norms) == 6 and len(spoiler.read) == 7 and trainer.judge.skips == 1
    equal(spoiler.states[2], spoiler.states[3])  # weights, moments, biases and the load that is carried over
    seen = Counter(number for numbers in spoiler.read for number in numbers)
    spoiled = set(range(2 * size, 3 * size))
    again = spoiled if policy == "revisit" else set()
    assert seen == Counter({number: 2 if number in again else 1 for number in range((7 - bool(again)) * size)})
    (record,) = trainer.skipped
    assert (record["kind"], record["step"], record["postponed"]) == ("skip", 2, len(again))
    assert trainer.tokens == 6 * size * trainer.config.data.seq_len


def test_batch_is_revisited_only_once_and_then_left_out(texts: Path) -> None:
    trainer = trainer_of(config_of(texts, steps=4, nonfinite="revisit"))
    spoiler = Spoiler(trainer, {1, 4}, float("nan"))  # the second attempt, and that of the same batch in the last step
    for _ in range(4):
        trainer.train_step()
    assert spoiler.read[4] == spoiler.read[1] and len(spoiler.read) == 6
    assert [r["postponed"] for r in trainer.skipped] == [trainer.config.data.global_batch, 0]
    assert trainer.cursor.postponed == []
    report("55", "its sequences are read once more, and then left out")


def test_batches_postponed_near_the_end_are_all_read_again(texts: Path) -> None:
    trainer = trainer_of(config_of(texts, nonfinite="revisit"))
    spoiler = Spoiler(trainer, {2, 3, 5}, float("nan"))  # two in the place of step 2, and one in the place of step 3
    for _ in range(6):
        trainer.train_step()
    size = trainer.config.data.global_batch
    assert [r["postponed"] for r in trainer.skipped] == [size] * 3 and trainer.cursor.waiting == 0
    batches = [numbers[0] // size for numbers in spoiler.read]
    assert sorted(batches[-3:]) == [2, 3, 5] and batches[:-3] == [0, 1, 2, 3, 4, 5]
    assert trainer.cursor.first == 6 * size


def test_the_end_of_a_run_tells_of_sequences_that_were_not_read_again(texts: Path, tmp_path: Path) -> None:
    """As if the run had been resumed with fewer steps."""
    trainer, out = trainer_of(config_of(texts, steps=2, nonfinite="revisit")), io.StringIO()
    trainer.cursor = Cursor.restored({"first": 8, "postponed": [[22, 0, 8]]})
    with MetricsWriter(tmp_path) as metrics, Progress(2, stream=out) as progress:
        run(trainer, tmp_path, metrics, progress)
    assert out.getvalue().splitlines()[-1].startswith("note: 8 postponed sequences were not read again, because the")
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["postponed"] for record in records if record["kind"] == "train"] == [8, 8]


def test_too_many_skips_end_the_run(texts: Path) -> None:
    trainer = trainer_of(config_of(texts, nonfinite="skip", max_skipped=2))
    Spoiler(trainer, set(range(1, 9)), float("inf"))
    trainer.train_step()
    before = snapshot(trainer)
    with pytest.raises(
        NonFiniteError, match=r"is not finite; health\.max_skipped=2 steps have been skipped within 100"
    ):
        trainer.train_step()
    equal(before, snapshot(trainer))
    assert trainer.step == 1


def test_spike_ends_the_run_if_asked(texts: Path) -> None:
    trainer = trainer_of(config_of(texts, spike="stop"))
    trainer.judge.window = LossWindow([5.3, 5.7] * 20)
    Spoiler(trainer, {0}, 1e3)
    with pytest.raises(NonFiniteError, match=r"^loss=[\d.]+: is far above the losses of the last steps; lower"):
        trainer.train_step()


def test_window_knows_spikes_and_never_holds_one() -> None:
    window = LossWindow()
    for i in range(31):
        window.add(2.0 + 0.1 * (i % 2))
    assert not window.is_spike(100.0, 6.0)  # too few losses to judge by
    window.add(2.0)
    assert window.is_spike(2.5, 6.0) and not window.is_spike(2.2, 6.0) and not window.is_spike(0.0, 6.0)
    window.add(float("nan"))
    assert window.is_spike(2.5, 6.0) and len(window.losses) == 32
    for _ in range(200):
        window.add(1.0)
    assert len(window.losses) == 128 and window.is_spike(1.01, 6.0) and not window.is_spike(1.005, 6.0)


def test_judge_survives_a_resume(texts: Path, tmp_path: Path) -> None:
    """A run that is resumed between a skipped step and its second visit goes on as if it had not been interrupted."""
    config = config_of(texts, nonfinite="revisit")
    straight, first = trainer_of(config), trainer_of(config)
    for trainer in (straight, first):
        Spoiler(trainer, {1}, float("nan"))
        for _ in range(3):
            trainer.train_step()
    path = first.save(tmp_path)
    resumed = trainer_of(config)
    resumed.resume(path, checkpoint.read_manifest(path))
    assert resumed.cursor.state() == straight.cursor.state() and resumed.cursor.postponed
    assert resumed.judge.state() == straight.judge.state()
    for trainer in (straight, resumed):
        last = [trainer.record(trainer.train_step()) for _ in range(3)]
        assert not trainer.cursor.postponed and trainer.judge.skips == 1
        trainer.last = last  # type: ignore[attr-defined]
    equal(snapshot(straight), snapshot(resumed))
    assert straight.last == resumed.last  # type: ignore[attr-defined]


def test_first_record_after_a_resume_covers_the_whole_interval(texts: Path, tmp_path: Path) -> None:
    config = config_of(texts)
    straight, first = trainer_of(config), trainer_of(config)
    for trainer in (straight, first):
        trainer.train_step()
        trainer.train_step()
    path = first.save(tmp_path)
    resumed = trainer_of(config)
    resumed.resume(path, checkpoint.read_manifest(path))
    assert straight.record(straight.train_step()) == resumed.record(resumed.train_step())
    assert resumed.elapsed_s > first._earlier_s


# ---- the position in the data


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    refused=st.sets(st.integers(0, 39)),
    reads=st.integers(0, 5),
)
def test_each_sequence_trains_once_whatever_the_batch(sizes: list[int], refused: set[int], reads: int) -> None:
    """Batches of changing size, some postponed, and a resume after each: no sequence is lost or trained twice."""
    cursor, trained, failed = Cursor(), Counter[int](), Counter[int]()
    for step, size in enumerate([*sizes, *[7] * 60]):
        batch = cursor.batch(step, size)
        assert len(batch) == len(set(batch)) == size and batch == cursor.batch(step, size)
        again = step in refused and step < len(sizes)
        (failed if again else trained).update(batch)
        cursor.advance(batch, step + reads if again else None)
        cursor = Cursor.restored(cursor.state())
    assert not cursor.postponed
    assert max(trained.values()) == 1 and max(failed.values(), default=0) <= 2
    assert set(range(cursor.first)) == set(trained) | {number for number, times in failed.items() if times == 2}


@given(
    end=st.integers(1, 30), size=st.integers(1, 3), preferred=st.integers(0, 25), refused=st.sets(st.integers(0, 60))
)
def test_postponed_batches_are_read_again_before_the_end(
    end: int, size: int, preferred: int, refused: set[int]
) -> None:
    """Whatever attempts fail: every sequence is read once, or twice if the first attempt failed."""
    cursor, read, failed = Cursor(), Counter[int](), set[int]()
    step = attempt = 0
    while step < end:
        batch = cursor.batch(step, size)
        read.update(batch)
        if attempt in refused:
            new = [number for number in batch if number >= cursor.first]
            failed.update(new)
            place = cursor.place(step, batch, step + preferred, end)
            assert place <= step + preferred or not new
            cursor.advance(batch, place)
        else:
            cursor.advance(batch)
            step += 1
        attempt += 1
    assert cursor.waiting == 0
    assert read == Counter({number: 2 if number in failed else 1 for number in range(cursor.first)})


def test_what_cannot_be_read_before_the_end_is_kept_for_a_continued_run() -> None:
    cursor = Cursor.restored({"first": 8, "postponed": [[9, 0, 8]]})
    batch = list(range(8, 12))  # the run was resumed with half the batch and fewer steps
    assert cursor.place(3, batch, 23, end=4) == 3  # what is due only after the end takes no step
    assert cursor.place(3, batch, 23, end=11) == 8
    cursor.postponed = [(0, 0, 8)]
    assert cursor.place(3, batch, 23, end=4) == 4
    cursor.advance(batch, 4)
    assert cursor.waiting == 12


def test_another_global_batch_goes_on_where_the_last_one_stopped(texts: Path, tmp_path: Path) -> None:
    config = config_of(texts)
    first = trainer_of(config)
    for _ in range(3):
        first.train_step()
    path = first.save(tmp_path)
    size = config.data.global_batch
    other = replace(config, data=replace(config.data, global_batch=2 * size))
    resumed = trainer_of(other)
    resumed.resume(path, checkpoint.read_manifest(path))
    spoiler = Spoiler(resumed, set(), 1.0)
    resumed.train_step()
    assert spoiler.read == [list(range(3 * size, 5 * size))]
    assert resumed.tokens == 5 * size * config.data.seq_len
    report("20", "another global batch continues at the next sequence")


# ---- replays


def test_replay_changes_no_bit_and_finds_another_result(texts: Path) -> None:
    config = config_of(texts)
    plain, twice = trainer_of(config), trainer_of(replace(config, health=HealthConfig(replay_every=2)))
    for trainer in (plain, twice):
        for _ in range(4):
            trainer.train_step()
    equal(snapshot(plain), snapshot(twice))

    calls = [0]

    def flip(module: Any, args: Any, out: Tensor) -> Tensor:
        """Flip a bit of one activation of the second computation."""
        calls[0] += 1
        if calls[0] <= twice.micro_batches:
            return out
        changed = out.clone()
        changed.view(torch.int32).view(-1)[0] ^= 1 << 12
        return changed

    twice.train_step()
    before = snapshot(twice)
    twice.model.blocks["0"].attention.register_forward_hook(flip)
    with pytest.raises(DisagreementError, match=r"computing the step twice gave different losses on ranks \[0\]"):
        twice.train_step()
    equal(before, snapshot(twice))


# ---- what may change


def test_changes_of_meaning_are_refused_until_allowed(texts: Path) -> None:
    config = config_of(texts)
    saved = asdict(config)
    other = replace(config, seed=7, moe=replace(config.moe, top_k=3, activation="gelu"), steps=9)
    with pytest.raises(ValueError) as refused:
        check_resumed(saved, other, ())
    message = str(refused.value)
    assert "seed from 0 to 7" in message and "moe.top_k from 2 to 3" in message and "steps" not in message.split(";")[0]
    assert message.endswith("add --allow-change seed --allow-change moe.top_k --allow-change moe.activation")
    found = check_resumed(saved, other, ("seed", "moe"))
    assert found == differences(saved, other) and found["steps"] == (config.steps, 9)


def test_optional_sections_that_appear_or_vanish_are_changes(texts: Path) -> None:
    without = config_of(texts)
    capped = replace(without, moe=replace(without.moe, capacity=CapacityConfig()))
    for one, two in ((without, capped), (capped, without)):
        with pytest.raises(ValueError, match=r"moe\.capacity"):
            check_resumed(asdict(one), two, ())
        assert check_resumed(asdict(one), two, ("moe.capacity",))
    assert differences(asdict(capped), capped) == {}


def test_every_name_that_may_change_exists() -> None:
    names = fields_of()
    for known in MAY_CHANGE:
        assert any(name == known or name.startswith(f"{known}.") for name in names), known


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_longer_schedule_says_that_it_raises_the_rate(schedule: Any) -> None:
    optim = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=5)
    longer = replace(TrainConfig(steps=200), optim=optim)
    last, now = rise_on_resume(optim, 100, longer, 100) or (0.0, 0.0)
    assert (last, now) == (learning_rate(optim, 99, 100), learning_rate(optim, 100, 200)) and now > 5 * last
    assert rise_on_resume(optim, 100, replace(longer, steps=100), 50) is None
    for steps in (2, 100):  # in the warm-up
        assert rise_on_resume(optim, steps, longer, 2) is None
    constant = replace(longer, optim=replace(optim, schedule="constant", lr=last))
    assert rise_on_resume(optim, 100, constant, 100) is None
    assert {learning_rate(constant.optim, step, 200) for step in range(100, 200)} == {last}


@pytest.mark.parametrize(
    "position",
    [
        {"cursor": {"first": "x", "postponed": []}},
        {"cursor": 3},
        {"cursor": {"first": 0, "postponed": [[1]]}},
        {"cursor": {"first": -1, "postponed": []}},
        {"cursor": {"first": 1 << 60, "postponed": []}},
        {"cursor": {"first": 8, "postponed": [[0, 4, 5]]}},
        {"cursor": {"first": 1 << 40, "postponed": [[0, 0, 1 << 40]]}},
        {"health": {"losses": ["a"]}},
        {"losses": {"0": [["x", 1]] * 3}},
        {"losses": [1]},
        {"tokens": None},
        {"elapsed_s": "later"},
    ],
)
def test_position_that_cannot_be_read_is_one_line(texts: Path, position: dict[str, Any]) -> None:
    trainer = trainer_of(config_of(texts))
    manifest = {"step": 1, "position": {"data": trainer.corpus.fingerprint} | position}
    with pytest.raises(checkpoint.CheckpointError, match="its position cannot be read") as refused:
        trainer.resume(Path("x"), manifest)
    assert "\n" not in str(refused.value)
