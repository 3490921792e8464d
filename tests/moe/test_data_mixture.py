"""Checks mixtures: exact shares, epochs of each domain, and an order that needs no history."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equimoe.launch.options import parse
from equimoe.moe.train.config import DataConfig
from equimoe.moe.train.data import Batches
from equimoe.moe.train.data.order import Feistel, Mixture, Shuffles
from equimoe.moe.train.data.packing import IGNORED
from tests.moe.test_data_packing import rows, streams


def read(order: Mixture, first: int, count: int) -> list[tuple[int, int]]:
    return [order.place(number) for number in range(first, first + count)]


def test_shares_are_exact_in_every_block() -> None:
    order = Mixture({"code": 500, "math": 900, "web": 400}, {"code": 0.3, "web": 0.7}, seed=3)
    for block in range(50):
        assert Counter(d for d, _ in read(order, 10 * block, 10)) == {0: 3, 2: 7}
    # the order within the blocks differs
    assert len({tuple(d for d, _ in read(order, 10 * block, 10)) for block in range(50)}) > 20


@example([1.0, 1e-6], 0)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=5), st.integers(0, 2**40))
def test_any_shares_are_met(weights: list[float], seed: int) -> None:
    total = sum(weights)
    names = [f"d{i}" for i in range(len(weights))]
    shares = {name: weight / total for name, weight in zip(names, weights, strict=True)}
    order = Mixture(dict.fromkeys(names, 7), shares, seed)
    block = int(order._bounds[-1])
    assert block <= 10_000 + len(names)
    found = Counter(d for d, _ in read(order, 3 * block, block))
    for i, name in enumerate(names):
        assert found[i] >= 1 and abs(found[i] / block - shares[name]) <= 1e-4 * (len(names) + 1)


def test_each_domain_has_its_own_epochs() -> None:
    """Of two domains with 5 and 40 sequences, the small one is read eight times as the large one is read once."""
    order = Mixture({"a": 5, "b": 40}, {"a": 0.5, "b": 0.5}, seed=1)
    found = read(order, 0, 80)
    of = {d: [place for domain, place in found if domain == d] for d in (0, 1)}
    assert sorted(of[1]) == list(range(40))
    epochs = [of[0][i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 4
    told = order.epochs(["a", "b"], 80)
    assert (told["a"].epochs, told["a"].most, told["b"].epochs, told["b"].most) == (8.0, 8, 1.0, 1)


def test_the_order_needs_no_history_and_does_not_depend_on_the_mesh() -> None:
    def make(seed: int) -> Batches:
        return Batches(streams(200, 90, 400), 4, 12, seed, shares={"d0": 0.25, "d2": 0.75})

    forward = [rows(make(5), step, 1, 1) for step in range(40)]
    one = make(5)
    assert [rows(one, step, 1, 1) for step in reversed(range(40))] == forward[::-1]
    assert [rows(one, step, 3, 2) for step in range(40)] == forward
    assert rows(make(6), 0, 1, 1) != forward[0]
    assert {row[0] for step in forward for row in step} == {0, 2}
    # a batch of another size goes on where this one was
    other = Batches(streams(200, 90, 400), 4, 8, 5, shares={"d0": 0.25, "d2": 0.75})
    assert sum(forward[:2], []) == sum((rows(other, step, 1, 1) for step in range(3)), [])


def test_without_a_mixture_the_order_is_numpys_permutation() -> None:
    """As it was before there were mixtures."""
    batches = Batches(streams(83, 40), 4, 7, 3)
    for step in (0, 3, 9):
        for i, (domain, *ids) in enumerate(rows(batches, step, 1, 1)):
            epoch, place = divmod(step * 7 + i, 29)
            found = np.random.Generator(np.random.PCG64([3, epoch])).permutation(29)[place]
            assert (domain, ids[0]) == ((0, found * 4) if found < 20 else (1, 83 + (found - 20) * 4))


def test_a_small_domain_may_have_less_than_a_batch() -> None:
    batches = Batches(streams(9, 100), 4, 16, 0, shares={"d0": 0.5, "d1": 0.5})
    assert Counter(row[0] for row in rows(batches, 0, 1, 1)) == {0: 8, 1: 8}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40))
def test_the_permutation_that_is_computed_is_one(size: int, seed: int) -> None:
    order = Feistel(size, np.random.default_rng(seed))
    assert sorted(order[i] for i in range(size)) == list(range(size))


def test_long_orders_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.moe.train.data.order.IN_MEMORY", 10)
    shuffles = Shuffles(1000, (0,))
    epochs = [[shuffles[epoch * 1000 + i] for i in range(1000)] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1000)) and epochs[0] != epochs[1]
    # neighbours are as far apart as chance has it: a third of the size
    assert 250 < np.abs(np.diff(epochs[0])).mean() < 420


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("web=0.7,code=0.3", {"code": 0.3, "web": 0.7}),
        (" web = 7 , code=3 ", {"code": 0.3, "web": 0.7}),
        ("a=b=1", {"a=b": 1.0}),
        ("web=1e-3,x y=1", {"web": 1e-3 / 1.001, "x y": 1 / 1.001}),
    ],
)
def test_mixtures_are_parsed(text: str, shares: dict[str, float]) -> None:
    found = DataConfig(mixture=text).shares()
    assert list(found) == sorted(shares) and found == pytest.approx(shares)
    assert parse(["--data.mixture", text]).config.data.shares() == found


@pytest.mark.parametrize(
    "text", ["web", "web=", "web=x", "web=0", "web=-1", "web=nan", "web=inf", "=1", "web=1,web=2", "web=1,,", "web=1,"]
)
def test_wrong_mixtures_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.mixture='.*' is wrong; name each domain once, with a positive share"):
        DataConfig(mixture=text)


def test_domains_that_are_not_there_or_too_short_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^data\.mixture='x=1': there is no domain 'x'; name some of d0, d1$"):
        Batches(streams(100, 2), 4, 8, 0, shares={"x": 1.0})
    with pytest.raises(ValueError, match=r"^data\.mixture='d1=1': domain 'd1' is too short for one sequence$"):
        Batches(streams(100, 2), 4, 8, 0, shares={"d1": 1.0})


def test_a_resumed_run_may_not_change_its_mixture() -> None:
    from dataclasses import asdict

    from equimoe.moe.train.config import TrainConfig
    from equimoe.moe.train.contract import check_resumed

    before = TrainConfig()
    after = replace(before, data=replace(before.data, mixture="python=1", workers=3, cache="x"))
    with pytest.raises(ValueError, match=r"data\.mixture from None to 'python=1'; undo this, or add --allow-change"):
        check_resumed(asdict(before), after, ())


def test_labels_that_are_not_trained_on_are_ignored() -> None:
    data = streams(41, 21)
    mask = (np.arange(41) % 3 == 0).astype(np.uint8)
    plain, masked = Batches(data, 4, 15, 0), Batches(data, 4, 15, 0, {"d0": mask})
    for (inputs, labels, domain), (inputs2, labels2, domain2) in zip(
        plain.sample(0, 0, 1, 3, 5), masked.sample(0, 0, 1, 3, 5), strict=True
    ):
        assert inputs.equal(inputs2) and domain.equal(domain2)
        kept = labels2 != IGNORED
        assert labels[kept].equal(labels2[kept])
        assert kept[domain == 1].all() and kept[domain == 0].equal(labels[domain == 0] % 3 == 0)
