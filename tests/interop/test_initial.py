"""A run starts from weights that exist: its model is theirs, and every rank gets its part of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.launch import env, generate, initial
from equimoe.launch.convert import main as convert
from equimoe.launch.options import parse
from equimoe.launch.train import _facts as facts_of
from equimoe.moe.checkpoint import reader
from equimoe.moe.interop import hf
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers.begun import MESHES, STILL, begun
from tests.helpers.command import launch, one_line
from tests.helpers.fork import run_ranks
from tests.helpers.hf_folders import assert_same, config, read, tensors, write
from tests.helpers.slow import slow_but
from tests.helpers.small import write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("texts")))


def model(folder: Path, kind: str = "mixtral", **settings: Any) -> Path:
    values = config(kind) | {"vocab_size": 260, "tie_word_embeddings": False} | settings
    return write(folder, values, tensors(values))


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize(
    ("mesh", "kind"),
    slow_but(
        [("alone", "qwen2_moe"), ("ep", "mixtral"), ("tp", "deepseek_v3"), ("pp", "deepseek_v3")],
        [
            ("alone", "qwen2_moe"),
            ("ep", "mixtral"),
            ("ep", "deepseek_v3"),
            ("tp", "deepseek_v3"),
            ("tp", "qwen2_moe"),
            ("fsdp, bfloat16", "deepseek_v3"),
            ("fsdp, bfloat16", "olmoe"),
            ("pp", "deepseek_v3"),
        ],
    ),
)
def test_a_run_on_any_mesh_has_the_weights(mesh: str, kind: str, tmp_path: Path, texts: str) -> None:
    """After a step that changes no bit, the run's checkpoint is exported to the same tensors.

    Qwen2-MoE has biases, and here its head is tied to the embedding, which a pipeline would tear apart.
    """
    source = model(tmp_path / "model", kind, tie_word_embeddings=kind == "qwen2_moe")
    run_dir = tmp_path / "run"
    world, options = MESHES[mesh]
    still = ["--data.path", texts]
    still += ["--moe.balance.bias_update_rate", "1e-30"] if kind == "deepseek_v3" else []
    found = run_ranks(begun, world, [*still, *options], source, run_dir)
    initial.keep(source, run_dir)
    convert(["export", str(run_dir), "--out", str(tmp_path / "back")])
    assert_same(read(tmp_path / "back"), read(source))
    again = run_ranks(begun, 1, still, run_dir, tmp_path / "again")  # from that run, in one process
    assert again == pytest.approx(found[:1], rel=3e-2 if "bfloat16" in mesh else 1e-5)


#: a model of ours; its router's settings and its sizes are options
SMALL = ["--moe.hidden_size", "16", "--moe.intermediate_size", "8", "--moe.num_experts", "4", "--moe.top_k", "2"]
SMALL += ["--model.num_layers", "2", "--model.num_heads", "2"]


def own_run(run_dir: Path, texts: str, *options: str) -> Path:
    """Start a small run of ours from nothing and leave a checkpoint."""
    config = parse([*SMALL, *STILL, "--data.path", texts, *options]).config
    trainer = Trainer(config, load_corpus(config.data, load_tokenizer("bytes")), None, torch.device("cpu"))
    trainer.save(run_dir / "checkpoints")
    return run_dir


@pytest.mark.parametrize(
    ("router", "changes"),
    slow_but(
        [(["gate", "cosine"], ["select", "top_p"]), (["gate", "linear"], ["gate", "residual"])],
        [
            (["gate", "cosine"], ["select", "top_p"]),
            (["gate", "noisy"], ["select", "top_k"]),
            (["select", "top_p"], ["select", "top_k"]),
            (["gate", "linear"], ["gate", "residual"]),
            (["gate", "linear"], ["gate", "noisy"]),
            (["gate", "linear"], ["gate", "task"]),
        ],
    ),
)
def test_a_run_starts_from_one_with_a_router_of_ours(
    router: list[str], changes: list[str], tmp_path: Path, texts: str
) -> None:
    """It has its weights, and its router unless that is chosen anew; what a new router adds begins as in a new run."""
    tasks = ["--moe.router.tasks", "3"] if "task" in changes else []
    source = own_run(tmp_path / "own", texts, f"--moe.router.{router[0]}", router[1])
    found = parse(["--init.from", str(source)]).config.moe.router
    assert getattr(found, router[0]) == router[1]
    argv = ["--data.path", texts, f"--moe.router.{changes[0]}", changes[1], *tasks]
    run_ranks(begun, 1, argv, source, tmp_path / "next")
    before, after = (weights_in(folder) for folder in (source, tmp_path / "next"))
    assert set(before) <= set(after)
    assert all(".router." in name for name in set(after) - set(before))
    # one step with a vanishing learning rate moves weights that are zero, such as those of the noise
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-12) for name in before)


def weights_in(run_dir: Path) -> dict[str, torch.Tensor]:
    found = initial.weights(run_dir)
    with found.reader() as reader:
        return {name: reader.box(name, (0,) * len(saved.shape), saved.shape) for name, saved in found.tensors.items()}


def test_a_router_with_other_weights_is_refused(tmp_path: Path, texts: str) -> None:
    source = own_run(tmp_path / "own", texts)
    for name, value in (("gate", "'cosine'"), ("gate", "'hash'")):
        with pytest.raises(
            ValueError, match=f"moe.router.{name}={value}: the model of --init.from=.* has 'linear'; lea"
        ):
            parse(["--init.from", str(source), f"--moe.router.{name}", value.strip("'")])
    other = own_run(tmp_path / "other", texts, "--moe.router.gate", "noisy")
    with pytest.raises(ValueError, match="moe.router.gate='linear': the model of --init.from=.* has 'noisy'; leave"):
        parse(["--init.from", str(other), "--moe.router.gate", "linear"])


@pytest.mark.slow
def test_a_rank_reads_only_its_part(tmp_path: Path, texts: str) -> None:
    """Under expert parallelism, a rank reads the tensors of its own experts only."""
    seen: list[str] = []
    opened = reader.opened

    def watched(file: Path) -> Any:
        return _Watched(opened(file), seen)

    def within() -> Any:
        return _Patched(watched, tmp_path / "names", seen)

    argv = ["--init.from", str(model(tmp_path / "model")), "--run-dir", str(tmp_path / "run"), "--parallel.ep", "2"]
    ended = launch([*argv, *STILL, "--data.path", texts, "--steps", "1"], 2, within=within)
    assert ended.codes == [0, 0], ended.err
    assert {file.name for file in (tmp_path / "run" / "transformers").iterdir()} == {
        *("config.json", "generation_config.json", "weights.json")
    }
    for rank in range(2):
        names = set((tmp_path / f"names{rank}").read_text().split())
        experts = {int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name}
        assert experts == {2 * rank, 2 * rank + 1}


class _Watched:
    """Notes which tensors are read from a file."""

    def __init__(self, opened: Any, seen: list[str]) -> None:
        self.opened, self.seen = opened, seen

    def __enter__(self) -> Any:
        read_chunk = self.opened.__enter__()

        def noted(chunk: Any, box: Any) -> Any:
            self.seen.append(chunk.place)
            return read_chunk(chunk, box)

        return noted

    def __exit__(self, *error: object) -> Any:
        return self.opened.__exit__(*error)


class _Patched:
    """Puts a watched reader in its place on a forked rank, and writes what it has seen."""

    def __init__(self, watched: Any, file: Path, seen: list[str]) -> None:
        self.watched, self.file, self.seen = watched, file, seen

    def __enter__(self) -> None:
        hf.opened = self.watched  # type: ignore[attr-defined]

    def __exit__(self, *error: object) -> None:
        rank = env.this_process().rank
        self.file.with_name(f"{self.file.name}{rank}").write_text("\n".join(self.seen))


def test_a_resumed_run_needs_the_weights_no_more(tmp_path: Path, texts: str) -> None:
    """Neither the folder nor its tokenizer, of which the run has a copy; also if its newest checkpoint is damaged."""
    tokenizers = pytest.importorskip("tokenizers")
    source, run_dir = model(tmp_path / "model"), tmp_path / "run"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "alpha": 1, "</s>": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.save(str(source / "tokenizer.json"))
    argv = ["--init.from", str(source), "--run-dir", str(run_dir), *STILL, "--data.path", texts]
    argv += ["--checkpoint.every", "1"]
    assert (ended := launch(argv)).codes == [0], ended.err
    source.rename(tmp_path / "elsewhere")
    (run_dir / "checkpoints" / "step-00000002" / "manifest.json").write_text("{")
    ended = launch([*argv, "--resume", "--steps", "3"])
    assert ended.codes == [0], ended.err
    assert "resumed with data.tokenizer changed" in ended.out[0] + ended.err[0] and len(losses(run_dir)) == 3
    one_line(launch([*argv[:3], str(tmp_path / "new"), *argv[4:]]), env.CONFIG, "model: is not a folder")
    tokens = ["--prompt", "alpha", "--max-tokens", "2"]
    assert (ended := launch(["--run-dir", str(run_dir), *tokens], main=generate.main)).codes == [0], ended.err


@pytest.mark.slow
def test_an_imported_checkpoint_is_resumed(tmp_path: Path, texts: str) -> None:
    source, run_dir = model(tmp_path / "model"), tmp_path / "run"
    convert(["import", str(source), "--out", str(run_dir / "checkpoints")])
    still = [*STILL, "--data.path", texts]
    argv = ["--init.from", str(run_dir / "checkpoints"), "--run-dir", str(run_dir), "--resume", *still]
    assert (ended := launch(argv)).codes == [0], ended.err
    other = ["--init.from", str(source), "--run-dir", str(tmp_path / "other"), *still]
    assert launch(other).codes == [0]
    assert losses(run_dir) == losses(tmp_path / "other") and len(losses(run_dir)) == 2
    assert (ended := launch([*argv, "--steps", "3"])).codes == [0], ended.err  # and its own checkpoint is found
    assert len(losses(run_dir)) == 3


def test_the_configuration_is_that_of_the_weights(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "deepseek_v3", num_hidden_layers=3)
    (folder / "tokenizer.json").write_text("{}")
    found = parse(["--recipe", "mixtral", "--init.from", str(folder), "--optim.lr", "0.5", "--moe.top_k", "2"]).config
    assert (found.model.num_layers, found.model.dense_layers, found.model.vocab_size) == (3, 1, 260)
    assert found.attention.kind == "latent" and found.moe.router.score == "sigmoid" and found.model.norm_eps == 1e-6
    assert found.moe.balance.bias_update_rate == 0.001 and found.optim.lr == 0.5
    assert found.data.tokenizer == str(folder / "tokenizer.json")
    plain = parse(["--recipe", "mixtral"]).config
    assert asdict(found)["data"] | {"tokenizer": "bytes"} == asdict(plain)["data"]
    own = parse(["--init.from", str(folder), "--data.tokenizer", "x.json", "--moe.balance.bias_update_rate", "0.5"])
    assert own.config.data.tokenizer == "x.json" and own.config.moe.balance.bias_update_rate == 0.5
    assert parse([]).init is None and own.init == folder
    assert facts_of(own)["init.from"] != facts_of(parse([]))["init.from"]  # all ranks must have the same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--moe.top_k", "1"], "moe.top_k=1: the model of --init.from=model has 2; leave it out"),
        (
            ["--moe.router.score", "softmax"],
            "moe.router.score='softmax': the model of --init.from=model has 'sigmoid'; ",
        ),
        (
            ["--attention.scaling.factor", "2"],
            "attention.scaling={'factor': 2.0}: the model of --init.from=model has None",
        ),
        (["--model.vocab_size", "300"], "model.vocab_size=300: the model of --init.from=model has 260; leave it out"),
        (["--config", "own.yaml"], "model.num_layers=9: the model of --init.from=model has 2; leave it out"),
        (["--moe.balance.bias_update_rate", "0"], "moe.balance.bias_update_rate=0: the routers of --init.from=model "),
        (["--init.from", "nowhere"], "--init.from=nowhere: is not a folder; give that of a run, a checkpoint or "),
        (
            ["--init.from", "empty"],
            "empty: no checkpoint; give the folder of a run, a checkpoint or a transformers model",
        ),
        (["--init.from", ""], "--init.from=: is empty; give a value, or leave the option out"),
    ],
)
def test_what_is_refused(options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model(Path("model"), "deepseek_v3")
    Path("empty").mkdir()
    Path("own.yaml").write_text("model: {num_layers: 9}")
    with pytest.raises(ValueError) as error:
        parse(["--init.from", "model", *options])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_dense_model_gets_experts_by_another_command(tmp_path: Path) -> None:
    folder = model(tmp_path / "model", "llama")
    for option in (["--model.moe_every", "1"], ["--moe.num_experts", "4"]):
        with pytest.raises(ValueError, match="is dense; give it experts with equimoe.launch.upcycle"):
            parse(["--init.from", str(folder), *option])


def test_weights_that_are_damaged_end_the_run(tmp_path: Path, texts: str) -> None:
    folder = model(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    argv = ["--init.from", str(folder), "--run-dir", str(tmp_path / "run"), *STILL, "--data.path", texts]
    one_line(launch([*argv, "--parallel.ep", "2"], 2), env.CHECKPOINT, "model.safetensors: refused: ")
    assert not (tmp_path / "run").exists()
