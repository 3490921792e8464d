"""Dense models that are grown into MoE models: same outputs, channels that are drawn again, any number of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from equimoe.launch import env, initial, loaded
from equimoe.launch.options import parse
from equimoe.launch.upcycle import main
from equimoe.moe.interop import computed
from equimoe.moe.interop.convert import write_first
from equimoe.moe.interop.upcycle import Recipe, Upcycled
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers.grown import HIDDEN, LENGTH, VOCABULARY, WIDTH, Held, dense, logits, tensors, write
from tests.helpers.hf_folders import assert_same
from tests.helpers.small import write_texts

LAYER = "model.blocks.1.mlp."


def run(source: Path | list[Path], out: Path, method: str, *options: str) -> Path:
    sources = source if isinstance(source, list) else [source]
    main([*map(str, sources), "--out", str(out), "--method", method, *options])
    return out


def experts(found: dict[str, Tensor], layer: str = LAYER) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate and up [E, F, D], and down [E, D, F]."""
    gate, up = found[f"{layer}experts.gate_up_proj"].chunk(2, dim=1)
    return gate, up, found[f"{layer}experts.down_proj"]


def feed_forward(found: dict[str, Tensor], layer: str = LAYER) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(found[f"{layer}{kind}_proj.weight"] for kind in ("gate", "up", "down"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparse", ["--experts", "4"]),
        ("sparse", ["--experts", "6", "--top-k", "3", "--moe-every", "2"]),
        ("sparse", ["--experts", "4", "--dense-layers", "1"]),
        ("drop", ["--ratio", "0"]),
        ("fine", ["--experts", "16", "--top-k", "8", "--granularity", "8"]),
        ("fine", ["--experts", "8", "--top-k", "2"]),
    ],
)
def test_outputs_are_those_of_the_dense_model(method: str, options: list[str], tmp_path: Path) -> None:
    source = write(tmp_path / "dense")
    found, wanted = logits(run(source, tmp_path / "moe", method, *options)), logits(source)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("method", "granularity"), [("sparse", 1), ("fine", 4)])
def test_gradients_are_those_of_the_dense_model(method: str, granularity: int, tmp_path: Path) -> None:
    """By the chain rule: a weight's gradient is the sum of its copies' gradients, times their factors."""
    options = ["--granularity", "4", "--top-k", "8", "--experts", "16"] if granularity > 1 else ["--experts", "4"]
    source = write(tmp_path / "dense")
    wanted, found = gradients(source), gradients(run(source, tmp_path / "moe", method, *options))
    factors = {"gate": 1.0, "up": granularity**0.5, "down": granularity**0.5}
    for layer in ("blocks.0.mlp.", "blocks.1.mlp."):
        for kind, copies in zip(("gate", "up", "down"), experts(found, layer), strict=True):
            parts = copies.unflatten(0, (-1, granularity)).sum(0) * factors[kind]
            whole = torch.cat(list(parts), dim=1 if kind == "down" else 0)
            torch.testing.assert_close(whole, wanted[f"{layer}{kind}_proj.weight"], atol=1e-8, rtol=1e-5)
        of_copies = found[f"{layer}router.weight"].unflatten(0, (-1, granularity)).sum(1)
        assert float(of_copies.abs().max()) < 1e-8  # gate weights sum to 1 over equal copies
    for name in wanted.keys() & found.keys():
        torch.testing.assert_close(found[name], wanted[name], atol=1e-8, rtol=1e-5, msg=name)


def gradients(folder: Path) -> dict[str, Tensor]:
    """Return the gradients of a checkpoint's model for some tokens, by name."""
    model = loaded.build(loaded.find(folder), None, torch.device("cpu"), LENGTH, torch.float64).requires_grad_()
    ids = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


#: activation, matrices that are scaled, normalised gate weights
EXACT = [
    (F.silu, "linear", True),
    (F.silu, "linear", False),
    (lambda x: F.relu(x).square(), "linear", True),
    (F.relu, "all", True),
    (F.relu, "all", False),
]


@pytest.mark.parametrize(("activation", "scaled", "normalize"), EXACT)
def test_the_scale_makes_up_for_gate_weights(activation: Any, scaled: Any, normalize: bool, tmp_path: Path) -> None:
    """G=8 experts per copy, 16 of 32 experts per token, by an independent computation with small logits."""
    found = dense(64)
    recipe = Recipe(32, 16, granularity=8, scaled=scaled, normalize_weights=normalize)
    source = write(tmp_path / "dense", model=found)
    held = initial.weights(source)
    gate, up, down = feed_forward(tensors(source))
    x = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(0))
    wanted = (activation(x @ gate.T) * (x @ up.T)) @ down.T
    with held.reader() as reader:
        values = Upcycled([reader], recipe, recipe.grown(found))
        router, gate_up, down_E = (
            values.box(LAYER + name, (0,) * len(values.wanted[LAYER + name].shape), values.wanted[LAYER + name].shape)
            for name in ("router.weight", "experts.gate_up_proj", "experts.down_proj")
        )
    scores = (0.01 * x @ router.T).softmax(-1)
    weights, ids = scores.topk(16)
    assert {tuple(sorted(row.tolist())) for row in ids.unflatten(1, (2, 8)).flatten(0, 1) // 8} <= {
        (copy,) * 8 for copy in range(4)
    }  # whole copies
    weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
    both = torch.einsum("td,efd->tef", x, gate_up)
    gates, ups = both.chunk(2, dim=-1)
    outputs = torch.einsum("tef,edf->ted", activation(gates) * ups, down_E)
    got = (outputs.gather(1, ids[..., None].expand(-1, -1, HIDDEN)) * weights[..., None]).sum(1)
    error = float((got - wanted).norm() / wanted.norm())
    assert error < (1e-5 if normalize else 0.02)  # unnormalised weights are only about K / E
    unscaled = got / recipe.scale()
    assert float((unscaled - wanted).norm() / wanted.norm()) > 0.5


def test_experts_of_a_copy_have_equal_rows_of_the_router(tmp_path: Path) -> None:
    options = ["--experts", "32", "--top-k", "4", "--granularity", "4"]
    router = tensors(run(write(tmp_path / "dense"), tmp_path / "moe", "fine", *options))[f"{LAYER}router.weight"]
    groups = router.unflatten(0, (8, 4))
    assert torch.equal(groups, groups[:, :1].expand_as(groups)) and len(groups[:, 0].unique(dim=0)) == 8
    assert float(groups[:, 0].std()) == pytest.approx(0.02, rel=0.3) and abs(float(groups.mean())) < 0.006


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A dense model of width 200, and 6 experts of it with half of the channels drawn again."""
    folder = tmp_path_factory.mktemp("dropped")
    source = write(folder / "dense", model=dense(200))
    return tensors(source), tensors(run(source, folder / "moe", "drop", "--experts", "6", "--ratio", "0.5"))


def kept(dense_model: dict[str, Tensor], moe: dict[str, Tensor]) -> list[Tensor]:
    """Return, for gate, up and down, which channels of which experts are unchanged, [E, F]."""
    found = []
    for kind, ours, whole in zip(("gate", "up", "down"), experts(moe), feed_forward(dense_model), strict=True):
        found.append((ours == whole).all(1 if kind == "down" else 2))
    return found


def test_the_same_channels_are_drawn_again_in_all_matrices(dropped: Any) -> None:
    gate, up, down = kept(*dropped)
    assert torch.equal(gate, up) and torch.equal(gate, down)
    assert gate.sum(1).tolist() == [100] * 6  # half of the channels are intact in all three, in every expert
    assert len(gate.unique(dim=0)) == 6
    both = torch.stack([(gate[a] & gate[b]).float().mean() for a in range(6) for b in range(a)])
    assert float(both.mean()) == pytest.approx(0.25, abs=0.04)  # two experts share (1 - r)^2 of the channels


def test_new_values_have_the_mean_and_deviation_of_those_they_replace(tmp_path: Path) -> None:
    """The dense model's matrices differ in mean and deviation, and so do channels that are drawn again."""
    source = write(tmp_path / "dense", model=dense(200))
    found = initial.weights(source)
    shift = {"gate": (0.3, 1.0), "up": (-0.2, 2.0), "down": (0.1, 0.5)}
    values = tensors(source)
    for kind, (mean, scale) in shift.items():
        values[f"{LAYER}{kind}_proj.weight"].mul_(scale).add_(mean)
    write_first(Held(values), found.tensors, found.architecture, tmp_path / "other", None, "a test", {})
    moe = tensors(run(tmp_path / "other", tmp_path / "moe", "drop", "--experts", "4", "--ratio", "0.5"))
    intact = kept(values, moe)[0]
    for kind, ours, whole in zip(("gate", "up", "down"), experts(moe), feed_forward(values), strict=True):
        for expert in range(4):
            new = (ours[expert].T if kind == "down" else ours[expert])[~intact[expert]]
            old = (whole.T if kind == "down" else whole)[~intact[expert]]
            count = new.numel()
            assert abs(float(new.mean() - old.mean())) < 4 * float(old.std()) / count**0.5
            assert float(new.std()) == pytest.approx(float(old.std()), rel=4 / (2 * count) ** 0.5)


def test_ratio_one_draws_everything_again(tmp_path: Path) -> None:
    source = write(tmp_path / "dense")
    moe = run(source, tmp_path / "moe", "drop", "--experts", "2", "--ratio", "1")
    assert not any(bool(channels.any()) for channels in kept(tensors(source), tensors(moe)))


@pytest.mark.parametrize("ratio", ["0.5", "1"])
def test_any_number_of_files_and_any_box_has_the_same_values(ratio: str, tmp_path: Path) -> None:
    source, options = write(tmp_path / "dense", files=3), ["--granularity", "2", "--experts", "8", "--ratio", ratio]
    one = tensors(run(source, tmp_path / "one", "drop", *options))
    assert_same(tensors(run(source, tmp_path / "many", "drop", *options, "--files", "7")), one)
    other = tensors(run(source, tmp_path / "other", "drop", *options, "--seed", "1"))
    assert not torch.equal(other[f"{LAYER}router.weight"], one[f"{LAYER}router.weight"])
    recipe = Recipe(8, 2, granularity=2, ratio=float(ratio))
    found = initial.weights(source)
    boxes = {"router.weight": ((3, 5), (2, 7)), "experts.gate_up_proj": ((1, 5, 3), (3, 14, 9))}
    boxes["experts.down_proj"] = ((2, 3, 4), (5, 6, 7))
    with found.reader() as reader:
        for name, (offsets, sizes) in boxes.items():
            values = Upcycled([reader], recipe, recipe.grown(found.architecture))
            part = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert torch.equal(values.box(LAYER + name, offsets, sizes), one[LAYER + name][part])


def test_random_rows_are_the_same_in_any_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computed, "_BLOCK", 50)  # 7 rows
    whole = computed.normal(0, "a", 0, 40, 7)
    for first, last in ((0, 1), (6, 7), (6, 9), (13, 30), (39, 40)):
        assert torch.equal(computed.normal(0, "a", first, last, 7), whole[first:last])
    assert len(whole.unique()) == 280 and abs(float(whole.std()) - 1) < 0.2


def test_domain_models_become_experts(tmp_path: Path) -> None:
    sources = [write(tmp_path / f"domain{i}", seed=i) for i in range(3)]
    models, moe = [tensors(source) for source in sources], tensors(run(sources, tmp_path / "moe", "join"))
    for layer in (LAYER, "model.blocks.0.mlp."):
        for ours, *theirs in zip(experts(moe, layer), *(feed_forward(m, layer) for m in models), strict=True):
            assert torch.equal(ours, torch.stack(theirs))
    for name in models[0].keys() & moe.keys():
        mean = torch.stack([model[name].double() for model in models]).mean(0).float()
        torch.testing.assert_close(moe[name], mean, atol=1e-6, rtol=0)
    twice = experts(tensors(run(sources, tmp_path / "twice", "join", "--experts", "6")))[0]
    assert torch.equal(twice[0], twice[1]) and torch.equal(twice[4], feed_forward(models[2])[0])


def test_a_run_starts_from_the_grown_model(tmp_path: Path) -> None:
    """It has the dense model's loss, and begins with a new optimizer."""
    source = write(tmp_path / "dense")
    moe = run(source, tmp_path / "moe", "sparse", "--experts", "4")
    assert all(name.startswith("model.") for name in tensors(moe))
    options = ["--data.path", str(write_texts(tmp_path / "texts")), "--data.seq_len", "16", "--data.global_batch", "8"]
    losses = []
    for start in (source, moe):
        config = parse(["--init.from", str(start), *options, "--moe.balance.coefficient", "0"]).config
        corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
        trainer = Trainer(config, corpus, None, torch.device("cpu"))
        initial.begin(trainer, start)
        losses.append([trainer.record(trainer.train_step())["loss"] for _ in range(3)])
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5) and losses[0][2] != losses[1][2]


@pytest.mark.parametrize(("ratio", "count", "share"), [(0.29, 100, 29), (0.5, 37, 18), (0.999, 100, 99), (1.0, 7, 7)])
def test_a_share_of_the_channels_is_rounded_down(ratio: float, count: int, share: int) -> None:
    assert computed.share_of(ratio, count) == share


WRONG = {
    "--experts=0: must be at least 1": ["sparse", "--experts", "0"],
    "--experts=8: must be a multiple of --granularity=3": ["fine", "--granularity", "3", "--experts", "8"],
    "--granularity=5: must divide the width of the feed-forwards, 24": ["fine", "--granularity", "5"],
    "--top-k=3: must be a multiple of --granularity=2": ["fine", "--top-k", "3"],
    "--top-k=9: must be at most --experts=8": ["sparse", "--top-k", "9"],
    "--top-k=1: normalised gate weights would all be 1": ["sparse", "--top-k", "1"],
    "--ratio=1.5: must be between 0 and 1": ["drop", "--ratio", "1.5"],
    "--ratio: has no effect with --method=sparse": ["sparse", "--ratio", "0.5"],
    "--dense-layers=2: with --moe-every=1, none of the 2 blocks becomes MoE": ["sparse", "--dense-layers", "2"],
    "--moe-every=0: must be at least 1": ["sparse", "--moe-every", "0"],
    "--method=join: give at least two models": ["join"],
    "--files=0: must be at least 1": ["sparse", "--files", "0"],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "dense")
    with pytest.raises(SystemExit) as stopped:
        run(source, tmp_path / "moe", *WRONG[message])
    error = capsys.readouterr().err
    assert stopped.value.code == env.CONFIG and message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "moe").exists()


def test_models_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, moe = write(tmp_path / "first"), write(tmp_path / "moe", model=dense(num_experts=4))
    for sources, method, message in (
        ([moe], "sparse", "has MoE layers already; give a model whose feed-forwards are all dense"),
        ([first, write(tmp_path / "wide", model=dense(WIDTH + 1))], "join", f"has intermediate_size={WIDTH + 1}, but"),
        ([first, first], "sparse", "--method=sparse: give one model"),
        ([tmp_path / "none"], "sparse", "none: is not a folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(sources, tmp_path / "out", method)
        error = capsys.readouterr().err
        assert stopped.value.code == env.CONFIG and message in error and len(error.splitlines()) == 1
