"""Checks generation with a key/value cache against generation without one, and the sampling of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equimoe.moe import BalanceConfig, MoEConfig
from equimoe.moe.config import AttentionConfig, RotaryScaling
from equimoe.moe.model import Decoder
from equimoe.moe.model.documents import document_numbers, document_starts
from equimoe.moe.model.past import Past
from equimoe.moe.parallel import ParallelConfig, build_mesh, parallelize
from equimoe.moe.serve import Sampling, Window, generate, score, windows
from equimoe.moe.serve.sample import choose
from tests.helpers.fork import run_ranks
from tests.helpers.slow import slow_but

LATENT = {"kind": "latent", "kv_lora_rank": 8, "qk_nope_width": 8, "qk_rope_width": 4, "v_width": 6}
ATTENTION = {
    "multi-head": AttentionConfig(),
    "grouped": AttentionConfig(num_kv_heads=2, qk_norm=True),
    "biases": AttentionConfig(num_kv_heads=2, bias="all"),
    "joint norms": AttentionConfig(num_kv_heads=2, qk_norm=True, qk_norm_over="all_heads"),
    "window": AttentionConfig(num_kv_heads=2, window=5, window_from=1),
    "latent": AttentionConfig(**LATENT, q_lora_rank=8),
    "latent without a latent of queries": AttentionConfig(**LATENT, q_lora_rank=0),
    "latent, scaled": AttentionConfig(**LATENT, q_lora_rank=8, scaling=RotaryScaling("yarn", 4.0, 10)),
}
PROMPTS = [[1, 2, 3], [7, 8, 9, 10, 11, 12, 13, 3, 4], [5], [6, 6, 1]]


def decoder(attention: str = "grouped", seq_len: int = 30) -> Decoder:
    torch.manual_seed(1)
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=24,
        num_experts=4,
        top_k=2,
        init_std=0.3,
        balance=BalanceConfig(bias_update_rate=0.001),
    )
    sizes = {"vocab_size": 50, "num_layers": 3, "num_heads": 4, "intermediate_size": 20, "dense_layers": 1}
    return Decoder(**sizes, seq_len=seq_len, attention=ATTENTION[attention], moe=moe)


@torch.no_grad()
def without_cache(model: Decoder, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("attention", ATTENTION)
def test_the_cache_changes_no_token(attention: str) -> None:
    """Prompts of different lengths are continued together; the model reads each of its tokens once."""
    model = decoder(attention).eval()
    found = generate(model, PROMPTS, Sampling(20, temperature=0), batch=3)
    assert found == {n: without_cache(model, prompt, 20) for n, prompt in enumerate(PROMPTS)}
    assert all(block.attention.past is None for block in model.blocks.values())


@pytest.mark.parametrize(
    ("attention", "degrees"),
    slow_but(
        [("grouped", {"ep": 2}), ("latent", {"tp": 2, "ep": 2})],
        [
            ("grouped", {"ep": 2}),
            ("latent", {"tp": 2, "ep": 2}),
            ("grouped", {"tp": 2, "ep": 1}),
            ("latent", {"ep": 2}),
        ],
    ),
    ids=str,
)
def test_ranks_that_split_the_model_generate_the_same(degrees: dict, attention: str) -> None:
    """Without tensor parallelism the ranks share the prompts; one of them has fewer, or none."""
    model = decoder(attention)
    want = [generate(model, prompts, Sampling(8, temperature=0.7, seed=3)) for prompts in (PROMPTS[:3], PROMPTS[:1])]

    def body(rank: int, world: int) -> list[dict[int, list[int]]]:
        mesh = build_mesh(ParallelConfig(**degrees, sequence_parallel=False))
        part = parallelize(decoder(attention), mesh, reduced=True)
        sampling = Sampling(8, temperature=0.7, seed=3)
        return [generate(part, p, sampling, dp=mesh["dp"], batch=1) for p in (PROMPTS[:3], PROMPTS[:1])]

    results = run_ranks(body, 2)
    for number, whole in enumerate(want):
        assert {n: text for of_rank in results for n, text in of_rank[number].items()} == whole
    assert degrees["ep"] == 1 or "tp" in degrees or set(results[1][0]) == {1}


def test_a_text_does_not_depend_on_the_others_of_its_batch() -> None:
    model = decoder()
    sampling = Sampling(10, temperature=1.5, top_p=0.9, seed=7)
    together = generate(model, PROMPTS, sampling)
    assert together == generate(model, PROMPTS, sampling, batch=1)
    assert together != generate(model, PROMPTS, Sampling(10, temperature=1.5, top_p=0.9, seed=8))
    assert len({tuple(t) for t in generate(model, [[1]] * 4, sampling).values()}) > 1, "each prompt has its own draws"


def test_a_text_ends_after_the_stop_token() -> None:
    model = decoder()
    plain = generate(model, PROMPTS, Sampling(20, temperature=0))
    stop = plain[1][5]
    seen: list[tuple[int, int]] = []
    found = generate(
        model, PROMPTS, Sampling(20, temperature=0), stop={stop}, on_token=lambda n, t: seen.append((n, t))
    )
    for number, text in plain.items():
        end = text.index(stop) + 1 if stop in text else 20
        assert found[number] == text[:end] == [token for n, token in seen if n == number]


@torch.no_grad()
@pytest.mark.parametrize("attention", slow_but(["window"], ["grouped", "window", "latent, scaled"]))
def test_tokens_after_the_end_of_a_document_do_not_see_it(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training on separate documents: in prompts, and if a document ends in the new text."""
    attend = Past.attend

    def watched(past: Past, *args: Any, **how: Any) -> torch.Tensor:
        starts_BS = past.now.starts_BS
        assert starts_BS is None or (starts_BS <= past.now.positions_BS).all(), "a position does not see itself"
        return attend(past, *args, **how)

    monkeypatch.setattr(Past, "attend", watched)
    model, end = decoder(attention).eval(), 25
    prompts = [[end, 1, 2, 3], [7, 8, end, 9, 10], [5], [end, end], [6, 6, 1, 40, 2, end]]
    seen, want = 0, {}
    for number, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(20):
            text = torch.tensor([ids])
            ids.append(int(model(text, None, document_starts(document_numbers(text, end)))[0, -1].argmax()))
        want[number] = ids[len(prompt) :]
        seen += want[number].count(end)
    found = generate(model, prompts, Sampling(20, temperature=0), end=end, batch=3)
    assert found == want != generate(model, prompts, Sampling(20, temperature=0), batch=3)
    stopped = generate(model, prompts, Sampling(20, temperature=0), stop={end}, end=end, batch=3)
    assert stopped == {n: text[: text.index(end) + 1] if end in text else text for n, text in want.items()}
    assert seen, "no document ends within a text; choose another end"


def test_generation_leaves_the_model_as_it_was() -> None:
    model = decoder().train()
    generate(model, [[1]], Sampling(2))
    assert model.training and all(block.attention.past is None for block in model.blocks.values())
    with pytest.raises(ZeroDivisionError):
        generate(model, [[1]], Sampling(2), on_token=lambda *_: 1 // 0)
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "tokens", "message"),
    [
        ([[1], []], 4, "prompt 1: is empty"),
        ([[50]], 4, "prompt 0: has ids outside of the model's 50 tokens"),
        ([[-1]], 4, "prompt 0: has ids outside of the model's 50 tokens"),
        ([[1, 2]], 29, "prompt 0: has 2 tokens, and with max_tokens=29 more than the 30 positions"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(decoder(), prompts, Sampling(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_wrong_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# ---- sampling


def drawn(logits: list[float], sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = [choose(torch.tensor(logits), sampling, generator) for _ in range(draws)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits)) / draws


def test_frequencies_follow_the_probabilities() -> None:
    logits = [0.0, 2.0, 1.0, -1.0]
    for temperature in (1.0, 0.5, 3.0):
        want = (torch.tensor(logits) / temperature).softmax(0)
        torch.testing.assert_close(drawn(logits, Sampling(temperature=temperature)), want, rtol=0, atol=0.03)


def test_top_p_keeps_the_smallest_set_that_is_likely_enough() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    for top_p, kept in ((0.4, [1]), (0.6, [1, 2]), (0.74, [1, 2]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        found = drawn(logits, Sampling(top_p=top_p))
        assert found.nonzero().flatten().tolist() == kept
        want = torch.tensor(logits).exp()[kept]
        torch.testing.assert_close(found[kept], want / want.sum(), rtol=0, atol=0.03)


def test_extreme_logits_and_temperatures() -> None:
    for sampling in (Sampling(temperature=1e-300), Sampling(temperature=0)):
        assert drawn([1e30, -1e30, 3e38, float("-inf")], sampling, 5)[2] == 1
    with pytest.raises(ValueError, match="logits are not finite"):
        drawn([float("nan"), 1.0], Sampling(temperature=0), 1)


# ---- scores


def test_windows_score_every_token_but_the_first_once() -> None:
    text = list(range(23))
    parts = list(windows(4, text, 5))
    assert [t for w in parts for t in w.ids[1:]] == text[1:] and all(len(w.ids) <= 6 and w.text == 4 for w in parts)
    assert list(windows(0, [1], 5)) == []


def test_tokens_without_a_label_are_read_but_not_scored() -> None:
    model, text = decoder().eval(), [1, 2, 3, 4, 5, 6, 7, 8]
    scored = [True, False, False, True, True, False, True]
    parts = list(windows(0, text, 5, scored))
    assert [w.scored for w in parts] == [scored[:5], scored[5:]]
    whole = {n: losses for n, losses, _ in score(model, list(windows(0, text, 5)))}
    found = {n: (losses, best) for n, losses, best in score(model, parts)}
    assert torch.equal(found[0][0], whole[0][[0, 3, 4]]) and torch.equal(found[1][0], whole[1][[1]])
    assert [len(best) for _, (_, best) in sorted(found.items())] == [3, 1]


def test_scores_of_separate_documents_are_those_of_each_alone() -> None:
    model, end = decoder().eval(), 0
    whole = Window(0, [end, 4, 5, 6, end, 7, 8, 9])
    ((_, found, _),) = score(model, [whole], end=end)
    alone = [[end, 4], [4, 5, 6, end, 7], [7, 8, 9]]  # the end belongs to the document that it ends
    want = {n: losses for n, losses, _ in score(model, [Window(n, ids) for n, ids in enumerate(alone)])}
    torch.testing.assert_close(found, torch.cat([want[n] for n in range(3)]), rtol=1e-5, atol=1e-5)
    ((_, joined, _),) = score(model, [whole])
    assert not torch.allclose(found, joined, atol=1e-3)


def test_scores_are_those_of_a_plain_forward() -> None:
    model = decoder().eval()
    texts = [[1, 2, 3], [4] * 12, [5, 6], list(range(20))]
    several = [Window(n, text, read_only=n % 2) for n, text in enumerate(texts)]
    found = {n: (losses, best) for n, losses, best in score(model, several, batch=3)}
    for n, text in enumerate(texts):
        logits = model(torch.tensor([text[:-1]]))[0].double()
        labels = torch.tensor(text[1:])
        want = -logits.log_softmax(-1).gather(1, labels[:, None])[:, 0].detach()
        torch.testing.assert_close(found[n][0], want[n % 2 :], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[n][1], (logits.argmax(-1) == labels)[n % 2 :])

    def body(rank: int, world: int) -> dict[int, torch.Tensor]:
        mesh = build_mesh(ParallelConfig(ep=2))
        part = parallelize(decoder().eval(), mesh, reduced=True)
        return {n: losses for n, losses, _ in score(part, several, batch=3, dp=mesh["dp"])}

    shared = {n: losses for of_rank in run_ranks(body, 2) for n, losses in of_rank.items()}
    torch.testing.assert_close(shared, {n: losses for n, (losses, _) in found.items()}, rtol=1e-5, atol=1e-5)
