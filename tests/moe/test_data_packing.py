"""Checks which sequences form a step, and which are evaluated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equimoe.moe.train.data import Batches, Corpus, heldout_batches


def streams(*lengths):
    """Return streams in which every token is different, so that a token identifies its position."""
    ends = np.cumsum((0, *lengths))
    return {f"d{i}": np.arange(ends[i], ends[i + 1]).astype(np.uint32) for i in range(len(lengths))}


def corpus(*heldout_lengths):
    heldout = streams(*heldout_lengths)
    return Corpus(tuple(heldout), {d: np.arange(5, dtype=np.uint16) for d in heldout}, heldout, "", 1 << 20)


def rows(batches, step, data_parallel, micro_batches):
    """Return the step's sequences as [rank][micro-batch][sequence], lists of tokens."""
    micro_batch = batches.global_batch // (data_parallel * micro_batches)
    out = []
    for rank in range(data_parallel):
        parts = batches.sample(step, rank, data_parallel, micro_batches, micro_batch)
        assert len(parts) == micro_batches
        for inputs, labels, domain in parts:
            assert inputs.shape == labels.shape == (micro_batch, batches.seq_len) and domain.shape == (micro_batch,)
            assert inputs.dtype == labels.dtype == domain.dtype == torch.int64
            assert torch.equal(inputs[:, 1:], labels[:, :-1])
            out += [
                (d, *i, row[-1]) for d, i, row in zip(domain.tolist(), inputs.tolist(), labels.tolist(), strict=True)
            ]
    return out


def test_every_split_of_a_step_holds_the_same_sequences():
    batches = Batches(streams(83, 40, 61), seq_len=4, global_batch=12, seed=3)
    for step in (0, 1, 3, 4, 100):
        whole = rows(batches, step, 1, 1)
        for data_parallel in (1, 2, 3, 4, 6, 12):
            for micro_batches in (1, 2, 3):
                if 12 % (data_parallel * micro_batches) == 0:
                    assert rows(batches, step, data_parallel, micro_batches) == whole


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 9),
    st.integers(0, 2**40),
)
def test_every_sequence_once_per_epoch_across_the_edges(lengths, seq_len, global_batch, seed):
    data = streams(*lengths)
    expected = sorted(
        (d, *stream[s : s + seq_len + 1].tolist())
        for d, stream in enumerate(data.values())
        for s in range(0, len(stream) - seq_len, seq_len)
    )
    if len(expected) < global_batch:
        with pytest.raises(ValueError, match=r"^data\.global_batch="):
            Batches(data, seq_len, global_batch, seed)
        return
    batches = Batches(data, seq_len, global_batch, seed)
    assert batches.sequences == len(expected)
    steps = -(-3 * len(expected) // global_batch)
    seen = [row for step in range(steps) for row in rows(batches, step, 1, 1)]
    for epoch in range(3):
        assert sorted(seen[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected


def test_every_token_is_a_label_once_per_epoch():
    data = streams(41, 81)
    batches = Batches(data, seq_len=4, global_batch=6, seed=0)
    assert batches.sequences == 30
    labels = Counter(t for step in range(5) for row in rows(batches, step, 1, 1) for t in row[2:])
    assert labels == Counter([*range(1, 41), *range(42, 122)])


def test_a_step_needs_no_history_and_epochs_and_seeds_differ():
    data = streams(400)
    batches = Batches(data, 4, 8, seed=1)
    forward = [rows(batches, step, 1, 1) for step in range(40)]
    again = Batches(data, 4, 8, seed=1)
    assert [rows(again, step, 1, 1) for step in reversed(range(40))] == forward[::-1]
    one, two = sum(forward, [])[:99], sum(forward, [])[99:198]
    assert sorted(one) == sorted(two) and one != two
    assert rows(Batches(data, 4, 8, seed=2), 0, 1, 1) != forward[0]


def test_sample_errors():
    batches = Batches(streams(100), 4, 8, 0)
    with pytest.raises(
        ValueError, match=r"^data\.global_batch=8: data_parallel=2 \* micro_batches=2 \* micro_batch=4 is 16; make"
    ):
        batches.sample(0, 0, 2, 2, 4)
    with pytest.raises(ValueError, match=r"^rank=2: must lie in \[0, 2\)"):
        batches.sample(0, 2, 2, 1, 4)
    with pytest.raises(ValueError, match=r"^step=-1: "):
        batches.sample(-1, 0, 2, 1, 4)
    message = r"^data\.global_batch=8: the training text has fewer sequences of data\.seq_len=4, 4 from 22 tokens"
    with pytest.raises(ValueError, match=message):
        Batches(streams(20, 2), 4, 8, 0)


def labels_of(batches):
    """Return the evaluated ``(input, label)`` pairs of each domain, in order."""
    found = {}
    for domain, inputs, labels, mask in batches:
        assert inputs.shape == labels.shape == mask.shape and mask.dtype == torch.bool
        assert not inputs[~mask].any() and not labels[~mask].any()
        found.setdefault(domain, []).extend(zip(inputs[mask].tolist(), labels[mask].tolist(), strict=True))
    return found


def test_held_out_text_is_evaluated_once_whole():
    data = corpus(23, 3, 1, 0, 9)
    found = labels_of(heldout_batches(data, 4, None, 2))
    assert found == {
        domain: list(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
        for domain, stream in data.heldout.items()
        if len(stream) > 1
    }


def test_labels_that_are_not_trained_on_are_ignored():
    """A mask says for each id of a stream whether it is trained on as a label; inputs stay whole."""
    train = streams(83, 40)
    masks = {"d1": (np.arange(40) % 3 != 0).astype(np.uint8)}
    plain, masked = Batches(train, 4, 4, seed=3), Batches(train, 4, 4, seed=3, masks=masks)
    ignored = 0
    for step in range(8):
        for (x, y, domain), (inputs, labels, _) in zip(
            plain.sample(step, 0, 1, 2, 2), masked.sample(step, 0, 1, 2, 2), strict=True
        ):
            left_out = (domain[:, None] == 1) & ((y - 83) % 3 == 0)
            assert torch.equal(x, inputs) and torch.equal(labels, y.masked_fill(left_out, -100))
            ignored += int(left_out.sum())
    assert ignored
    data = replace(corpus(23, 9), heldout_masks={"d1": np.array([1, 0, 0, 1, 1, 0, 1, 0, 1], np.uint8)})
    found = labels_of(heldout_batches(data, 4, None, 2))
    assert found["d0"] == [(i, i + 1) for i in range(22)]
    assert [label for _, label in found["d1"]] == [-100, -100, 26, 27, -100, 29, -100, 31]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("limit", [1, 3, None])
def test_ranks_share_the_evaluation_evenly(world, limit):
    data = corpus(50, 3, 1, 21)
    parts = [list(heldout_batches(data, 4, limit, 2, rank, world)) for rank in range(world)]
    for part in parts:
        assert [(d, i.shape) for d, i, _, _ in part] == [(d, i.shape) for d, i, _, _ in parts[0]]
        assert all(i.shape == (2, 4) for _, i, _, _ in part)
    together = labels_of(batch for part in parts for batch in part)
    alone = labels_of(heldout_batches(data, 4, limit, 2))
    assert {d: sorted(v) for d, v in together.items()} == {d: sorted(v) for d, v in alone.items()}


def test_a_limit_spreads_over_the_held_out_text():
    found = labels_of(heldout_batches(corpus(401), 4, 5, 2))["d0"]
    assert [pair[0] for pair in found[::4]] == [0, 80, 160, 240, 320]
    assert len(found) == 20
    with pytest.raises(ValueError, match=r"^rank=1: "):
        next(heldout_batches(corpus(9), 4, 5, 2, rank=1, world=1))
