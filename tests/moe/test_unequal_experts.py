"""Checks experts of unequal width (HMoE) against their definition in fp64.  T tokens, D hidden, E experts, K top-k."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from equimoe.moe import BalanceConfig, MoE, MoEConfig, Owners, Placement, RouterConfig, Step, checkpoint, recompute
from equimoe.moe.collectives import Axis
from equimoe.moe.parallel import build_mesh
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import oracle, small
from tests.helpers.checkpoints import load_all
from tests.helpers.fork import run_ranks

WIDTHS, D, ALPHA = (9, 3, 15, 6, 12), 10, 0.3
E, UNIT = len(WIDTHS), 3
FIRST = [0, *accumulate(width // UNIT for width in WIDTHS)]


def config(k: int, **changes: Any) -> MoEConfig:
    router = changes.pop("router", RouterConfig(normalize_weights=k > 1))
    return MoEConfig(
        D,
        9,
        E,
        k,
        router=router,
        balance=BalanceConfig(coefficient=ALPHA, estimator="exact"),
        widths=",".join(map(str, WIDTHS)),
        init_std=0.5,
        **changes,
    )


def layer_of(k: int, **changes: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(config(k, **changes)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(n, 7, D, generator=generator, dtype=torch.float64) for n in (3, 1)]
    return [(x, torch.arange(x[..., 0].numel()).view(x.shape[:-1]) % 4 != 1) for x in parts]


def mixed(y: Tensor) -> Tensor:
    return (y * torch.linspace(1, 99, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum()


def matrices(gate_up: Tensor, down: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return an expert's gate and up [F, D] and down [D, F], with its own width F, from the stacked weights."""
    rows = range(FIRST[e], FIRST[e + 1])
    gate, up = (torch.cat([gate_up[r].chunk(2)[half] for r in rows]) for half in (0, 1))
    return gate, up, torch.cat([down[r] for r in rows], 1)


def defined(layer: MoE, parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return outputs, loss and gradients of a step, token by token, with experts of full width."""
    k = layer.config.top_k
    weights = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    gate_up, down = weights["experts.gate_up_proj"], weights["experts.down_proj"]
    inputs = [x.clone().requires_grad_() for x, _ in parts]
    outputs, probs, chosen = [], [], []
    for x, (_, mask) in zip(inputs, parts, strict=True):
        rows = []
        for x_D, valid in zip(x.flatten(0, 1), mask.flatten().tolist(), strict=True):
            p = (weights["router.weight"] @ x_D).softmax(0)
            values, y_D = p.tolist(), x_D * 0
            ids = sorted(range(E), key=lambda e: (-values[e], e))[:k]  # noqa: B023
            total = sum(p[e] for e in ids) if layer.config.router.normalize_weights else 1.0
            if valid:
                for e in ids:
                    gate, up, out = matrices(gate_up, down, e)
                    assert gate.shape == (WIDTHS[e], D)
                    z = gate @ x_D
                    y_D = y_D + p[e] / total * (out @ (z * torch.sigmoid(z) * (up @ x_D)))
                probs.append(p)
                chosen += ids
            rows.append(y_D)
        outputs.append(torch.stack(rows).view(x.shape))
    # N sum M P, with M the fraction of choices times the width, relative to the mean width
    share_E = torch.bincount(torch.tensor(chosen), minlength=E).double() / len(chosen)
    relative_E = torch.tensor(WIDTHS, dtype=torch.float64) * E / sum(WIDTHS)
    penalty = E * (share_E * relative_E * torch.stack(probs).mean(0)).sum()
    (sum(mixed(y) for y in outputs) + ALPHA * penalty).backward()
    found = {n: p.grad for n, p in weights.items()} | {f"x{i}": x.grad for i, x in enumerate(inputs)}
    return found | {f"y{i}": y.detach() for i, y in enumerate(outputs)}


def trained(layer: MoE, parts: list[tuple[Tensor, Tensor]], again: bool = False) -> dict[str, Tensor]:
    layer.zero_grad()
    step, found = Step.of(layer), {}
    inputs = [x.clone().requires_grad_() for x, _ in parts]
    for i, (x, (_, mask)) in enumerate(zip(inputs, parts, strict=True)):
        with step.micro_batch(i):
            found[f"y{i}"] = recompute(layer, x, mask) if again else layer(x, mask)
    sum(mixed(y) for y in found.values()).backward()
    step.end()
    return found | {f"x{i}": x.grad for i, x in enumerate(inputs)} | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("how", ["plain", "recomputed", "experts recomputed", "reference backend"])
@pytest.mark.parametrize("k", [1, 3, E])
def test_outputs_and_gradients_are_as_defined(k: int, how: str) -> None:
    """Two micro-batches with masked tokens, whose penalty counts the load of both."""
    backend = "reference" if how == "reference backend" else "torch"
    layer, parts = layer_of(k, backend=backend, recompute_experts=how == "experts recomputed"), batches()
    want, got = defined(layer, parts), trained(layer, parts, again=how == "recomputed")
    assert got.keys() == want.keys()
    assert max(oracle.relative_error(got[name], want[name]) for name in got) < 1e-11


def test_the_penalty_pushes_logits_down_in_proportion_to_width() -> None:
    """For a token with equal probabilities and an even load; and its value is 1.0, whatever the unit of widths."""
    layer = layer_of(E)
    torch.nn.init.zeros_(layer.router.weight)
    x = torch.eye(D, dtype=torch.float64)[:1]
    (layer(x) * 0).sum().backward()
    pushed_E = layer.router.weight.grad[:, 0]
    widths_E = torch.tensor(WIDTHS, dtype=torch.float64)
    want_E = ALPHA * (widths_E / widths_E.mean() - 1) / E
    assert oracle.relative_error(pushed_E, want_E) < 1e-12 and layer.stats.losses["global"] == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_operations_are_the_sum_of_widths(backend: str) -> None:
    """Of the chosen experts, forward and backward; nothing is padded to the widest."""
    layer, x = layer_of(2, backend=backend), torch.randn(33, D, dtype=torch.float64, requires_grad=True)
    ids_TK = layer.router(x).ids_TK
    widths = sum(WIDTHS[e] for row in ids_TK.tolist() for e in row)
    plan = layer.dispatcher.send(x, layer.router(x))
    with FlopCounterMode(display=False) as forward:
        y = layer.dispatcher.finish(plan, layer.experts)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    router = 2 * 33 * D * E  # its gradient to the hidden states
    assert forward.get_total_flops() == 2 * 3 * D * widths
    assert backward.get_total_flops() == 2 * 2 * 3 * D * widths + 2 * router
    assert widths < 33 * 2 * max(WIDTHS)


def test_no_tokens_and_unchosen_experts() -> None:
    for tokens in (0, 1):
        layer = layer_of(1)
        y = layer(torch.randn(tokens, D, dtype=torch.float64, requires_grad=True))
        y.sum().backward()
        used = [bool(layer.experts.down_proj.grad[FIRST[e] : FIRST[e + 1]].any()) for e in range(E)]
        assert y.shape == (tokens, D) and sum(used) == tokens


def test_ranks_get_equal_widths() -> None:
    owners = Owners.even((12, 4, 4, 4, 8, 16, 6, 10), 4)
    assert owners.rank_of_E == (0, 0, 1, 1, 1, 2, 3, 3) and owners.slots == 3
    assert config(1).rows_of([1, 3]) == [3, 9, 10]
    for widths, ranks in (((1, 2, 4), 2), ((3, 1, 3, 1), 3)):
        with pytest.raises(ValueError, match=rf"^moe.widths=.*: cannot be cut into parallel.ep={ranks} runs"):
            Owners.even(widths, ranks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": "9,3"}, "widths='9,3': must be 5 whole numbers"),
        ({"widths": "9,3,15,6,-12"}, "widths='9,3,15,6,-12': must be 5 whole numbers"),
        ({"widths": ""}, "widths='': is empty"),
        ({"widths": [9, 3, 15, 6, 12]}, "widths=[9, 3, 15, 6, 12]: must be 5 whole numbers"),
        ({"intermediate_size": 8}, "intermediate_size=8: must be the mean of widths, 9"),
        ({"balance": BalanceConfig("communication")}, "balance.scope='communication': balances ranks"),
        ({"balance": BalanceConfig(bias_update_rate=0.1)}, "balance.bias_update_rate=0.1: evens out choices"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        replace(config(2), **changes)


def test_a_placement_needs_owners() -> None:
    with pytest.raises(ValueError, match="^placement.owners=None: experts of unequal width need owners"):
        layer_of(2).place(Placement(ep=Axis("ep", size=3)))


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_mesh(tmp_path: Path) -> None:
    """From two expert-parallel ranks onto one process and back, in the same bits; losses stay equal."""
    texts = small.write_texts(tmp_path / "texts")
    config = small.on(texts, widths="16,8,12,12", backend="torch")
    config = replace(config, optim=replace(config.optim, lr=1e-3))
    corpus = load_corpus(config.data, load_tokenizer("bytes"))

    def script(rank: int, world: int, onto: str, start: str | None) -> list[float]:
        parallel = replace(config.parallel, ep=world)
        mesh = build_mesh(parallel) if world > 1 else None
        micro_batch = replace(config.data, micro_batch=config.data.global_batch // world)
        trainer = Trainer(replace(config, parallel=parallel, data=micro_batch), corpus, mesh, torch.device("cpu"))
        if start is not None:
            trainer.resume(Path(start), checkpoint.read_manifest(Path(start)))
            trainer.save(tmp_path / f"{onto} at once")
        losses = [trainer.record(trainer.train_step())["loss"] for _ in range(2)]
        trainer.save(tmp_path / onto)
        return losses

    run_ranks(script, 2, "first", None)
    first, second = tmp_path / "first" / "step-00000002", tmp_path / "second" / "step-00000004"
    on_one = run_ranks(script, 1, "second", str(first))[0]
    assert run_ranks(script, 2, "other", str(first))[0] == pytest.approx(on_one, rel=1e-6)
    run_ranks(script, 2, "third", str(second))
    for saved, resumed in ((first, "second at once"), (second, "third at once")):
        before, after = load_all(saved), load_all(tmp_path / resumed / saved.name)
        assert before["model.blocks.0.mlp.experts.gate_up_proj"].shape == (12, 2 * 4, 16)
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
