"""Compares the bigram model with slow and obvious counting."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from equimoe.moe.train.data import Corpus, bigram, bigram_loss, heldout_batches


def chain(generator, length, vocab_size):
    """Return a stream in which the previous token predicts the next one well."""
    follow = np.random.default_rng(7).dirichlet(np.full(vocab_size, 0.1), vocab_size)
    ids = [0]
    for _ in range(length - 1):
        ids.append(int(generator.choice(vocab_size, p=follow[ids[-1]])))
    return np.array(ids, np.uint16)


def make(vocab_size=12, lengths=((300, 40), (160, 23), (50, 1))):
    generator = np.random.default_rng(0)
    names = tuple("abc")
    train = {n: chain(generator, size, vocab_size) for n, (size, _) in zip(names, lengths, strict=True)}
    heldout = {n: chain(generator, size, vocab_size) for n, (_, size) in zip(names, lengths, strict=True)}
    return Corpus(names, train, heldout, "", vocab_size)


def probability(pairs, vocab_size, a, b, discount, strength, continuation):
    """Return P(b|a) from a list of training pairs."""
    count, total = Counter(pairs), sum(first == a for first, _ in pairs)
    followers = len({second for first, second in set(pairs) if first == a})
    weight = Counter(second for _, second in (set(pairs) if continuation else pairs))
    single = (weight[b] + 0.5) / (sum(weight.values()) + 0.5 * vocab_size)
    if not total:
        return single
    return (max(count[a, b] - discount, 0) + (strength + discount * followers) * single) / (total + strength)


def neighbours(ids):
    return list(zip(ids.tolist()[:-1], ids.tolist()[1:], strict=True))


def slow(corpus, tested):
    """Return the mean loss per domain of ``tested`` pairs, with the variant that is best on the training tail."""
    vocab_size, head, tail = corpus.vocab_size, [], []
    for domain, stream in corpus.train.items():
        trained = corpus.train_masks.get(domain, np.ones(len(stream)))[1:]
        pairs = list(zip(neighbours(stream), trained, strict=True))
        held = int(len(stream) * 0.05)
        head += [pair for pair, kept in pairs[: len(pairs) - held] if kept]
        tail += [pair for pair, kept in pairs[len(pairs) - held :] if kept]
    variants = [(d, s, k) for d in bigram.DISCOUNTS for s in bigram.STRENGTHS for k in bigram.CONTINUATION]
    best = min(variants, key=lambda v: sum(-math.log(probability(head, vocab_size, *ab, *v)) for ab in tail))
    nats = {d: [-math.log(probability(head + tail, vocab_size, *ab, *best)) for ab in p] for d, p in tested.items()}
    everything = sum(nats.values(), [])
    return {**{d: sum(n) / len(n) for d, n in nats.items()}, "all": sum(everything) / len(everything)}


@pytest.mark.parametrize("dense", [4096, 1])
@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_equals_slow_counting(monkeypatch, dense, chunk):
    monkeypatch.setattr(bigram, "DENSE_UP_TO", dense)
    monkeypatch.setattr(bigram, "CHUNK", chunk)
    corpus = make()
    expected = slow(corpus, {d: neighbours(s) for d, s in corpus.heldout.items() if len(s) > 1})
    assert bigram_loss(corpus, 12) == pytest.approx(expected, rel=1e-12)


def test_evaluates_the_labels_of_heldout_batches():
    corpus = make()
    tested = {}
    for domain, inputs, labels, mask in heldout_batches(corpus, 5, 3, 2):
        tested.setdefault(domain, []).extend(zip(inputs[mask].tolist(), labels[mask].tolist(), strict=True))
    assert {d: len(p) for d, p in tested.items()} == {"a": 15, "b": 15}
    assert bigram_loss(corpus, 12, 5, 3) == pytest.approx(slow(corpus, tested), rel=1e-12)


@pytest.mark.parametrize("chunk", [1 << 24, 7])
def test_labels_that_are_not_trained_on_are_left_out(monkeypatch, chunk):
    """Of a domain with a mask, the model is fitted to, and judged by, pairs whose second id is trained on."""
    monkeypatch.setattr(bigram, "CHUNK", chunk)
    corpus, draw = make(), np.random.default_rng(5)
    masks = [{"b": draw.integers(0, 2, len(of["b"])).astype(np.uint8)} for of in (corpus.train, corpus.heldout)]
    masked = replace(corpus, train_masks=masks[0], heldout_masks=masks[1])
    tested = {"a": neighbours(corpus.heldout["a"])}
    pairs = zip(neighbours(corpus.heldout["b"]), masks[1]["b"][1:], strict=True)
    tested["b"] = [pair for pair, trained in pairs if trained]
    found = bigram_loss(masked, 12)
    assert 0 < len(tested["b"]) < len(corpus.heldout["b"]) - 1
    assert found == pytest.approx(slow(masked, tested), rel=1e-12)
    assert found["b"] != pytest.approx(bigram_loss(corpus, 12)["b"], rel=1e-6)
    assert "b" not in bigram_loss(replace(masked, heldout_masks={"b": masks[1]["b"] * 0}), 12)


@pytest.mark.parametrize("vocab_size", [12, 5000])
def test_probabilities_of_all_next_tokens_sum_to_one(vocab_size):
    corpus = make(12)
    model = bigram._Bigram(bigram._count([(stream, None) for stream in corpus.train.values()], vocab_size), vocab_size)
    for first in (0, 3, vocab_size - 1):
        keys = first * vocab_size + np.arange(vocab_size)
        for variant in ((0.5, 0.0, True), (0.95, 10.0, False), (0.05, 1000.0, True)):
            assert np.exp(-model.nats(keys, model.find(keys), *variant)).sum() == pytest.approx(1)


def test_is_a_strong_baseline_where_only_the_previous_token_counts():
    vocab_size, generator = 12, np.random.default_rng(1)
    corpus = Corpus(
        ("a",), {"a": chain(generator, 20000, vocab_size)}, {"a": chain(generator, 4000, vocab_size)}, "", 12
    )
    truth = np.random.default_rng(7).dirichlet(np.full(vocab_size, 0.1), vocab_size)
    pairs = neighbours(corpus.heldout["a"])
    entropy = -sum(math.log(truth[a, b]) for a, b in pairs) / len(pairs)
    assert entropy < bigram_loss(corpus, vocab_size)["all"] < entropy + 0.02


def test_degenerate_corpora():
    empty = np.empty(0, np.uint16)
    assert bigram_loss(Corpus(("a",), {"a": empty}, {"a": empty}, "", 4), 4) == {}
    untrained = Corpus(("a",), {"a": empty}, {"a": np.arange(4, dtype=np.uint16)}, "", 4)
    assert bigram_loss(untrained, 4)["all"] == pytest.approx(math.log(4))
    with pytest.raises(ValueError, match=r"^vocab_size=3: must be at least 4, the size of"):
        bigram_loss(untrained, 3)


def test_only_the_beginning_of_a_very_long_text_is_fitted(monkeypatch):
    monkeypatch.setattr(bigram, "MOST", 1000)
    ids = np.concatenate([np.tile([1, 2], 400), np.tile([1, 3], 2000)]).astype(np.uint16)
    long = Corpus(("a", "b"), {"a": ids, "b": ids}, {"a": ids[:100], "b": ids[-100:]}, "", 4)
    found = bigram_loss(long, 4, 4)
    assert found["a"] < 0.1 and found["b"] > 1.0
