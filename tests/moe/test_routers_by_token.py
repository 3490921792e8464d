"""Checks routers that read the id or the task of a token.  T tokens, V token ids, D hidden, E experts, N tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.moe import BalanceConfig, MoE, MoEConfig, RouterConfig, Step
from equimoe.moe.engines import Batch, build_engine
from equimoe.moe.model import Decoder
from equimoe.moe.routing.by_token import HashRouter, balanced_table
from equimoe.moe.serve import Sampling, generate
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import oracle, small
from tests.helpers.router_rows import NO_LOSS, ROWS, layer_of

V, T, D, E = 101, 23, 8, 6


def layer(k: int = 1, **settings: Any) -> MoE:
    torch.manual_seed(0)
    router = RouterConfig(gate="hash", vocabulary=V, **settings)
    return MoE(MoEConfig(D, 4, E, k, router, NO_LOSS, init_std=0.4)).double()


def decoder(router: RouterConfig, **moe: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "seq_len": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    return Decoder(**sizes, moe=MoEConfig(16, 8, 4, 2, router, init_std=0.4, **moe)).double()


@pytest.mark.parametrize("ids", [1, E - 1, 600, 1003])
@pytest.mark.parametrize("k", [1, 3, E])
def test_every_expert_has_equally_many_ids(ids: int, k: int) -> None:
    """In every column of the table; an id's experts differ, and there is no pattern in the ids."""
    table_VK = balanced_table(ids, E, k, torch.device("cpu"))
    for column_V in table_VK.T:
        counts_E = torch.bincount(column_V, minlength=E)
        assert counts_E.max() - counts_E.min() <= 1
    assert all(len(set(row)) == k for row in table_VK.tolist())
    if ids > 100:
        first_V = table_VK[:, 0]
        pairs_EE = torch.bincount(first_V[:-1] * E + first_V[1:], minlength=E * E)  # of neighbouring ids
        mean = ids / E**2
        assert (pairs_EE.double() - mean).square().mean().sqrt() < 2 * mean**0.5


def test_the_same_token_has_the_same_expert_always() -> None:
    """In other layers, runs, steps and places, and whatever its hidden state is; there are no parameters."""
    one, other = layer(3), layer(3)
    assert not list(one.router.parameters()) and not [name for name in one.state_dict() if "router" in name]
    codes_T = torch.randint(V, (T,))
    first = one.router(torch.randn(T, D), None, 1, None, codes_T).ids_TK
    again = other.eval().router(torch.randn(T, D).flip(0), None, 1, None, codes_T.flip(0)).ids_TK
    assert torch.equal(first, again.flip(0))
    with torch.device("meta"):
        empty = layer(3)
    empty.to_empty(device="cpu").reset_parameters()
    assert torch.equal(empty.router.weight, one.router.weight)


@pytest.mark.parametrize(("k", "normalize", "scale"), [(1, True, 1.0), (3, True, 2.0), (E, False, 1.0)])
@pytest.mark.parametrize("masked", [False, True])
def test_hash_outputs_and_gradients(k: int, normalize: bool, scale: float, masked: bool) -> None:
    """The output is the sum of the experts in the table's row of a token's id; in fp64."""
    of = layer(k, normalize_weights=normalize, weight_scale=scale)
    x_TD, codes_T = torch.randn(T, D, dtype=torch.float64), torch.randint(V, (T,))
    mask_T = torch.arange(T) % 4 != 1
    up_EFD, down_EDF = (p.detach().clone().requires_grad_() for p in of.parameters())
    want_x, rows = x_TD.clone().requires_grad_(), []
    for t, code in enumerate(codes_T.tolist()):
        y_D = torch.zeros(D, dtype=torch.float64)
        for e in of.router.weight[code].tolist():
            gate, up = (up_EFD[e] @ want_x[t]).chunk(2)
            y_D = y_D + down_EDF[e] @ (F.silu(gate) * up) * scale / (k if normalize else 1)
        rows.append(y_D if mask_T[t] or not masked else y_D * 0)
    want_y = torch.stack(rows)
    (want_y**2).sum().backward()
    got_x = x_TD.clone().requires_grad_()
    y = of(got_x, mask_T if masked else None, codes_T)
    (y**2).sum().backward()
    pairs: list[tuple[Tensor, Tensor]] = [(y, want_y), (got_x.grad, want_x.grad)]
    pairs += [(p.grad, w.grad) for p, w in zip(of.parameters(), (up_EFD, down_EDF), strict=True)]
    assert max(oracle.relative_error(got, want) for got, want in pairs) < 1e-12
    valid_T = mask_T if masked else torch.ones_like(mask_T)
    load_E = torch.bincount(of.router.weight[codes_T[valid_T]].flatten(), minlength=E)
    assert torch.equal(of.stats.counts, load_E) and int(of.stats.tokens) == int(valid_T.sum())


def test_a_decoder_gives_its_routers_the_ids() -> None:
    """Also in generation, and to a stage that gets hidden states only if it is told the ids."""
    model = decoder(RouterConfig(gate="hash"), balance=NO_LOSS)
    ids_BS = torch.randint(32, (3, 8))
    seen: list[Tensor] = []
    for of in model.moe_layers():
        assert isinstance(of.router, HashRouter) and of.router.weight.shape == (32, 2)
        of.router.register_forward_hook(lambda _, given, routing: seen.append(routing.ids_TK))
    logits = model(ids_BS)
    assert all(torch.equal(found, model.moe_layers()[0].router.weight[ids_BS.flatten()]) for found in seen)
    x_BSD, model.embedding = model.embedding(ids_BS), None
    torch.testing.assert_close(model(x_BSD, codes=ids_BS), logits)
    with pytest.raises(ValueError, match="codes=None: router.gate='hash' routes by token ids"):
        model(x_BSD)
    whole = decoder(RouterConfig(gate="hash"), balance=NO_LOSS).eval()
    text = [3, 5]
    with torch.no_grad():
        for _ in range(4):
            text.append(int(whole(torch.tensor([text]))[0, -1].argmax()))
    assert generate(whole, [[3, 5]], Sampling(max_tokens=4, temperature=0))[0] == text[2:]


def test_a_task_changes_the_routing() -> None:
    """The same hidden state with another task goes to other experts, and an unknown one has the mean embedding."""
    router = layer_of(ROWS["task"], 3).router.double().eval()
    x_TD = torch.randn(1, router.weight.shape[1], dtype=torch.float64).expand(5, -1)
    with torch.no_grad():
        router.task_weight.mul_(20)
    routing = router(x_TD, None, 1, None, torch.tensor([0, 1, 2, 3, -1]))
    assert len({tuple(row) for row in routing.ids_TK.tolist()}) > 2
    with torch.no_grad():
        router.task_embedding[1] = router.task_embedding[[0, 2, 3]].mean(0)
    between = router(x_TD, None, 1, None, torch.tensor([1, -1, -1, -1, -1]))
    torch.testing.assert_close(between.weights_TK[0], between.weights_TK[1])
    torch.testing.assert_close(router(x_TD).weights_TK, between.weights_TK)


def test_a_task_that_does_not_occur_gets_no_gradient() -> None:
    of = layer_of(ROWS["task"], 3, balance=BalanceConfig(coefficient=0.0))
    of(torch.randn(6, of.config.hidden_size), None, torch.tensor([0, 0, 2, 2, 2, 0])).square().sum().backward()
    grad_NR = of.router.task_embedding.grad
    assert not grad_NR[1].any() and not grad_NR[3].any() and bool(grad_NR[[0, 2]].any(1).all())


def test_the_balance_loss_is_that_of_all_tasks_together() -> None:
    """One micro-batch per task, each with an expert of its own: the load of the step is even."""
    of = layer_of(ROWS["task"], 1, balance=BalanceConfig(coefficient=1.0, estimator="exact", micro_batches=2))
    values = []
    for scope in ("micro", "global"):
        with torch.no_grad():
            of.router.weight.zero_()
            of.router.task_embedding.zero_()
            of.router.task_weight.zero_()
            of.router.task_embedding[:2, :2] = torch.eye(2) * 9
            of.router.task_weight[:2, :2] = torch.eye(2)
        step = Step.of(of)
        for ahead in (True, False):
            for m in (0, 1):
                with step.micro_batch(m, ahead=ahead), torch.set_grad_enabled(not ahead):
                    y = of(torch.randn(8, of.config.hidden_size), None, torch.full((8,), m))
                if not ahead:
                    (y * 0).sum().backward()
        values.append(of.stats.losses[scope])
        step.end()
    assert values[0] > 1.9 * values[1]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="router.vocabulary=None: router.gate='hash' needs the number of token ids"):
        MoE(MoEConfig(D, 4, E, 1, RouterConfig(gate="hash"), NO_LOSS))
    with pytest.raises(ValueError, match="balance.coefficient=0.01: router.gate='hash' has nothing to train"):
        MoEConfig(D, 4, E, 1, RouterConfig(gate="hash"))
    with pytest.raises(ValueError, match="router.vocabulary=31: the decoder has 32 token ids; leave it out"):
        decoder(RouterConfig(gate="hash", vocabulary=31), balance=NO_LOSS)
    of = layer()
    for wrong in (torch.zeros(T - 1, dtype=torch.int64), torch.zeros(T)):
        with pytest.raises(ValueError, match=r"codes=torch.* must be torch.int64 \(23,\), a number per token"):
            of(torch.randn(T, D).double(), None, wrong)
    engine = build_engine(decoder(RouterConfig(gate="task", tasks=3)), None, lambda p: torch.optim.SGD(p.values()))
    ids = torch.randint(32, (2, 8))
    with pytest.raises(ValueError, match="codes=None: router.gate='task' needs each token's task"):
        engine.step([Batch(ids, ids)], 0.1)
    with pytest.raises(
        ValueError, match=r"batch.tasks: torch.int64 of shape \(2, 8\); give torch.int64 of shape \(2,\)"
    ):
        engine.step([Batch(ids, ids, tasks=ids)], 0.1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "wrong", "allowed"), [("hash", (-1, V, -V), (0, V - 1)), ("task", (-2, 4), (-1, 3))])
def test_codes_out_of_range_are_refused(
    name: str, wrong: tuple[int, ...], allowed: tuple[int, ...], training: bool
) -> None:
    """Indexing would wrap negative ones around."""
    of = layer(2) if name == "hash" else layer_of(ROWS["task"], 2).double()
    of.train(training)
    field, number = ("router.vocabulary", V) if name == "hash" else ("router.tasks", 4)
    x_TD, mask_T = torch.randn(3, of.config.hidden_size, dtype=torch.float64), torch.tensor([True, True, False])
    for code in allowed:
        assert bool(of(x_TD, mask_T, torch.tensor([1, 0, code]))[:2].isfinite().all())
    for code in wrong:
        message = (
            f"codes={code}: out of range for {field}={number}; give .* from {allowed[0]} to {number - 1}, also where"
        )
        for place in range(3):
            codes_T = torch.ones(3, dtype=torch.int64)
            codes_T[place] = code
            with pytest.raises(ValueError, match=message):
                of(x_TD, mask_T, codes_T)
            with pytest.raises(ValueError, match=message):
                of.router.probabilities(x_TD, codes_T)


def test_the_lookup_itself_refuses_codes_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is what happens on a GPU, where nobody reads the codes."""
    monkeypatch.setattr("equimoe.moe.routing.by_token.check_codes", lambda *_: None)
    for of, wrong in ((layer(2), (-1, V)), (layer_of(ROWS["task"], 2).double(), (-2, 4, -4))):
        for code in wrong:
            with pytest.raises(IndexError, match="index out of range"):
                of(torch.randn(2, of.config.hidden_size, dtype=torch.float64), None, torch.tensor([1, code]))


def test_the_task_of_a_sequence_is_its_domain(tmp_path: Path) -> None:
    """A run trains the embedding of every domain, and evaluates each with its own."""
    router = RouterConfig(gate="task", tasks=3)
    config = small.on(small.write_texts(tmp_path / "texts"), router=router)
    corpus = load_corpus(config.data, load_tokenizer("bytes"))
    trainer = Trainer(config, corpus, None, torch.device("cpu"))
    before = [of.router.task_embedding.detach().clone() for of in trainer.model.moe_layers()]
    for _ in range(4):
        trainer.train_step()
    for of, first_NR in zip(trainer.model.moe_layers(), before, strict=True):
        assert bool((of.router.task_embedding != first_NR).any(1).all())
    seen: set[int] = set()
    for of in trainer.model.moe_layers():
        of.router.register_forward_hook(lambda _, given, routing: seen.update(given[4].tolist()))
    assert len(trainer.evaluate()["domains"]) == 3 and seen == {0, 1, 2}
    few = small.changed(config, router=RouterConfig(gate="task", tasks=2))
    with pytest.raises(ValueError, match="moe.router.tasks=2: the data has 3 domains"):
        Trainer(few, corpus, None, torch.device("cpu"))
