"""Converts folders of transformers to checkpoints and back, bit for bit, and refuses damaged and hostile ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equimoe.launch import checkpoint as checkpoint_command
from equimoe.launch import env
from equimoe.launch.convert import main
from equimoe.moe.checkpoint import contents
from equimoe.moe.config import RouterConfig
from equimoe.moe.interop.architecture import architecture
from tests.helpers import hf_folders
from tests.helpers.hf_folders import CONFIGS, assert_same, config, read, tensors, write
from tests.helpers.small import CONFIG

ROOT = Path(__file__).resolve().parents[2]


def converted(model: Path, tmp_path: Path, *how: str, files: int = 1) -> Path:
    """Import a model, verify the checkpoint, and export it again."""
    main(["import", str(model), "--out", str(tmp_path / "ours"), "--files", str(files)])
    checkpoint_command.main(["verify", str(tmp_path / "ours")])
    main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), *how])
    return tmp_path / "back"


@pytest.mark.parametrize("layout", ["v4", "v5"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_there_and_back(kind: str, layout: Any, tmp_path: Path) -> None:
    values, dtype = config(kind, dtype="bfloat16"), torch.bfloat16
    weights = tensors(values, layout, dtype)
    model = write(tmp_path / "model", values, weights, files=3)
    back = converted(model, tmp_path, "--file-bytes", "8000", files=2)
    assert_same(read(back), weights)
    assert json.loads((back / "config.json").read_text()) == values
    assert (back / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert len(list(back.glob("*.safetensors"))) > 1
    index = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == weights.keys()


def test_to_the_other_layout_and_dtype(tmp_path: Path) -> None:
    for kind in CONFIGS:
        values, place = config(kind), tmp_path / kind
        model = write(place / "model", values, tensors(values, "v4"))
        back = converted(model, place, "--layout", "v5", "--dtype", "bfloat16")
        assert_same(read(back), tensors(values, "v5", torch.bfloat16))
        assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_values_are_where_the_decoder_wants_them(tmp_path: Path) -> None:
    """Heads of queries, keys and values are next to each other, and rotated neighbours become halves."""
    values = config("mixtral")
    weights = tensors(values)
    main(["import", str(write(tmp_path / "model", values, weights)), "--out", str(tmp_path / "ours")])
    ours, prefix = read(tmp_path / "ours" / "step-00000000"), "model.layers.1.self_attn."
    q, k, v = (weights[f"{prefix}{name}_proj.weight"].view(2, -1, 4, 16) for name in "qkv")
    assert torch.equal(ours["model.blocks.1.attention.qkv_proj.weight"].view(2, 4, 4, 16), torch.cat((q, k, v), 1))

    values = config("deepseek_v3")
    weights = tensors(values)
    main(["import", str(write(tmp_path / "deep", values, weights)), "--out", str(tmp_path / "deep_ours")])
    ours = read(tmp_path / "deep_ours" / "step-00000000")
    found = ours["model.blocks.0.attention.q_up_proj.weight"].view(4, 10, 6)
    wanted = weights["model.layers.0.self_attn.q_b_proj.weight"].view(4, 10, 6)
    assert torch.equal(found, wanted[:, [0, 1, 2, 3, 4, 6, 8, 5, 7, 9]])


def test_names_that_are_not_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotary frequencies of old files, a tied head, and layers for multi-token prediction."""
    values = config("deepseek_v3", num_nextn_predict_layers=1)
    weights = tensors(values)
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
        "model.layers.2.eh_proj.weight": torch.ones(2, 2),
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
    }
    back = converted(write(tmp_path / "model", values, weights | more), tmp_path)
    assert_same(read(back), weights | {"lm_head.weight": more["lm_head.weight"]})
    assert "note: left out 1 tensors of layers for multi-token prediction" in capsys.readouterr().out
    assert json.loads((back / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_without_the_small_files_a_configuration_is_written(tmp_path: Path) -> None:
    for kind in CONFIGS:
        values, place = config(kind), tmp_path / kind
        weights = tensors(values)
        main(["import", str(write(place / "model", values, weights)), "--out", str(place / "ours")])
        (place / "ours" / "transformers").rename(place / "elsewhere")
        main(["export", str(place / "ours"), "--out", str(place / "back")])
        assert_same(read(place / "back"), weights)
        again = converted(place / "back", place / "again")
        assert_same(read(again), weights)


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    """In the cache of Hugging Face, a model's folder has links to files in a folder ``blobs``."""
    values, cache = config("olmoe"), tmp_path / "models--a--b"
    weights = tensors(values)
    store, model = write(cache / "blobs", values, weights), cache / "snapshots" / "1234"
    model.mkdir(parents=True)
    for file in store.iterdir():
        (model / file.name).symlink_to(Path("../../blobs") / file.name)
    assert_same(read(converted(model, tmp_path)), weights)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json", "tokenizer.json"])
def test_links_to_elsewhere_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A hostile model could otherwise bring a private file of this machine into what is exported and published."""
    values = config("olmoe")
    model = write(tmp_path / "model", values, tensors(values))
    (model / "tokenizer.json").write_text("{}")
    (model / name).rename(tmp_path / "private")
    (model / name).symlink_to(tmp_path / "private")
    with pytest.raises(SystemExit) as stopped:
        main(["import", str(model), "--out", str(tmp_path / "ours")])
    assert stopped.value.code == env.CHECKPOINT
    error = capsys.readouterr().err
    assert f"{name}: refused: is a link to a file outside of its folder" in error and error.count(name) == 1
    assert not (tmp_path / "ours").exists()


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    values = config("mixtral")
    main(["import", str(write(tmp_path / "model", values, tensors(values))), "--out", str(tmp_path / "ours")])
    for module, how in (("checkpoint.tools", "import model"), ("interop.convert", "export ours")):
        command, source = how.split()
        with monkeypatch.context() as patch:
            patch.setattr(f"equimoe.moe.{module}.write_blocks", full)
            with pytest.raises(SystemExit) as stopped:
                main([command, str(tmp_path / source), "--out", str(tmp_path / "new")])
        assert stopped.value.code == env.CANNOT_WRITE and "No space left on device" in capsys.readouterr().err
        assert not list(tmp_path.glob("new*"))


def test_a_checkpoint_that_the_run_deletes_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is training deletes old checkpoints; an export that is too slow says so in one line."""

    def deleted(path: Path, manifest: dict[str, Any]) -> Any:
        found = contents(path, manifest)
        for file in path.glob("*.safetensors"):
            file.unlink()
        return found

    values = config("mixtral")
    main(["import", str(write(tmp_path / "model", values, tensors(values))), "--out", str(tmp_path / "ours")])
    monkeypatch.setattr("equimoe.moe.interop.convert.contents", deleted)
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    error = capsys.readouterr().err
    assert stopped.value.code == env.CHECKPOINT and error.count("\n") == 1
    assert "if a run has deleted it meanwhile, try again" in error and "step-00000000/rank" in error
    assert not list(tmp_path.glob("back*"))


def rewritten(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        weights = read(folder)
        change(weights)
        (folder / "model.safetensors").unlink()
        hf_folders.save_file(weights, folder / "model.safetensors")

    return damage


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def indexed(places: Any) -> Callable[[Path], None]:
    def write_index(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        known = dict.fromkeys(read(folder), "a.safetensors")
        text = places(known) if callable(places) else places
        (folder / "model.safetensors.index.json").write_text(text if isinstance(text, str) else json.dumps(text))

    return write_index


def folder_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def damaged_shard(folder: Path) -> None:
    weights = read(folder)
    (folder / "model.safetensors").unlink()
    write(folder / "new", config("mixtral"), weights, files=2)
    for file in (folder / "new").iterdir():
        file.rename(folder / file.name)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")


NORM = "model.norm.weight"
DAMAGED = "model/model.safetensors: refused: is damaged or incomplete ("
FAULTS: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "truncated": (cut, env.CHECKPOINT, DAMAGED),
    "header beyond the file": (huge_header, env.CHECKPOINT, DAMAGED),
    "not a file": (lambda f: (f / "model.safetensors").write_text("weights"), env.CHECKPOINT, DAMAGED),
    "empty": (lambda f: (f / "model.safetensors").write_text(""), env.CHECKPOINT, DAMAGED),
    "a folder": (folder_instead, env.CHECKPOINT, "model.safetensors: refused: "),
    "damaged shard": (damaged_shard, env.CHECKPOINT, "model-00002-of-00002.safetensors: refused: is damaged or "),
    "link to itself": (
        lambda f: (f / "tokenizer.json").symlink_to("tokenizer.json"),
        env.CHECKPOINT,
        "tokenizer.json: refused: is a link to itself; copy the file",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        env.CHECKPOINT,
        "holds neither model.safetensors nor ",
    ),
    "missing tensor": (rewritten(lambda w: w.pop(NORM)), env.CHECKPOINT, f"refused: {NORM} is missing"),
    "unknown tensor": (
        rewritten(lambda w: w.update(extra=torch.ones(2))),
        env.CHECKPOINT,
        "refused: 'extra' is not a tensor of this model",
    ),
    "wrong shape": (
        rewritten(lambda w: w.update({NORM: torch.ones(17)})),
        env.CHECKPOINT,
        f"refused: {NORM} has shape [17] instead of (16,)",
    ),
    "integers": (
        rewritten(lambda w: w.update({NORM: torch.ones(16, dtype=torch.int32)})),
        env.CHECKPOINT,
        f"model.safetensors: refused: {NORM} is I32; use one of F32, F16, BF16",
    ),
    "not finite": (
        rewritten(lambda w: w[NORM].fill_(float("nan"))),
        env.CHECKPOINT,
        f"model.safetensors: refused: {NORM} is not finite",
    ),
    "index outside": (
        indexed(lambda known: {"weight_map": known | {NORM: "../model/a.safetensors"}}),
        env.CHECKPOINT,
        f"refused: '{NORM}' is in '../model/a.safetensors', which is no file of the folder",
    ),
    "index with a number": (
        indexed(lambda known: {"weight_map": known | {NORM: 3}}),
        env.CHECKPOINT,
        f"refused: '{NORM}' is in 3, which is no file of the folder",
    ),
    "missing shard": (
        indexed(lambda known: {"weight_map": known | {NORM: "b.safetensors"}}),
        env.CHECKPOINT,
        "b.safetensors: missing, but the index names it",
    ),
    "index of another file": (
        indexed(lambda known: {"weight_map": {name: file for name, file in known.items() if name != NORM}}),
        env.CHECKPOINT,
        f"a.safetensors: refused: '{NORM}': the index does not say that it is here",
    ),
    "index of more": (
        indexed(lambda known: {"weight_map": known | {"more": "a.safetensors"}}),
        env.CHECKPOINT,
        "a.safetensors: refused: 'more' is missing, unlike the index says",
    ),
    "index without a map": (indexed({"metadata": {}}), env.CHECKPOINT, "index.json: refused: has no weight_map"),
    "index twice": (indexed('{"weight_map": {"a": "b", "a": "c"}}'), env.CHECKPOINT, "refused: duplicate keys"),
    "deep index": (indexed("[" * 100000), env.CHECKPOINT, "index.json: refused: "),
    "no configuration": (lambda f: (f / "config.json").unlink(), env.CHECKPOINT, "config.json: refused: missing, or "),
    "no json": (lambda f: (f / "config.json").write_text("{"), env.CHECKPOINT, "config.json: refused: "),
    "unknown architecture": (
        lambda f: (f / "config.json").write_text('{"model_type": "gemma"}'),
        env.CONFIG,
        "config.json: model_type='gemma': is an unknown architecture; use one of ",
    ),
    "unknown activation": (
        lambda f: (f / "config.json").write_text(json.dumps(config("mixtral", hidden_act="relu"))),
        env.CONFIG,
        "config.json: hidden_act='relu': is an unknown activation; use one of ",
    ),
    "unknown router": (
        lambda f: (f / "config.json").write_text(json.dumps(config("deepseek_v3", scoring_func="tanh"))),
        env.CONFIG,
        "config.json: scoring_func='tanh': is an unknown router; this family has sigmoid",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_named_in_one_line(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, code, message = FAULTS[fault]
    values = config("mixtral")
    damage(write(tmp_path / "model", values, tensors(values)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["import", "model", "--out", "ours"])
    error = capsys.readouterr().err
    assert stopped.value.code == code, error
    assert error.startswith("error: model") and error.count("\n") == 1 and message in error
    assert str(tmp_path) not in error, "the file is named as it was given"
    assert "SafetensorError" not in error and ("is damaged" not in error or error.endswith("; download it again\n"))
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        (["import", "nowhere", "--out", "x"], env.CHECKPOINT, "nowhere: is not a folder"),
        (["import", "ours", "--out", "x"], env.CHECKPOINT, "ours: holds checkpoints of this package, not a transfor"),
        (["import", "ours/step-00000000", "--out", "x"], env.CHECKPOINT, "to make one of them, use export; to train"),
        (["import", "run", "--out", "x"], env.CHECKPOINT, "run: holds checkpoints of this package"),
        (["import", "empty", "--out", "x"], env.CHECKPOINT, "; give the folder of a transformers model"),
        (["import", "model", "--out", "ours"], env.CONFIG, "--out=ours: already contains "),
        (["import", "model", "--out", "x", "--files", "0"], env.CONFIG, "--files=0: must be at least 1"),
        (["import", "model", "--out", "x", "--files", "99"], env.CONFIG, "--files=99: the tensors of model can be "),
        (["export", "ours", "--out", "model"], env.CONFIG, "--out=model: exists already; choose another folder"),
        (["export", "model", "--out", "x"], env.CHECKPOINT, "model: is a transformers model already; to make a chec"),
        (["export", "empty", "--out", "x"], env.CHECKPOINT, "empty: no checkpoint; give the folder of a checkpoint or"),
        (["export", "ours", "--out", "x", "--file-bytes", "0"], env.CONFIG, "--file-bytes=0: must be at least 1"),
        (["export", "ours", "--out", "x", "--layout", "v6"], env.CONFIG, "--layout"),
        (["export", "ours", "--out", "file/x"], env.CANNOT_WRITE, "file/x: cannot be written or read ("),
    ],
)
def test_wrong_options(
    how: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = config("mixtral")
    write(Path("model"), values, tensors(values))
    Path("file").write_text("")
    main(["import", "model", "--out", "ours"])
    Path("empty").mkdir()
    Path("run").mkdir()
    Path("run/checkpoints").symlink_to("../ours")
    with pytest.raises(SystemExit) as stopped:
        main(how)
    error = capsys.readouterr().err
    assert stopped.value.code == code, error
    assert message in error and error.count("\n") == 1
    assert not list(Path().glob("x*"))


def test_small_files_of_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = config("mixtral")
    main(["import", str(write(tmp_path / "model", values, tensors(values))), "--out", str(tmp_path / "ours")])
    side = tmp_path / "ours" / "transformers"
    for file, content, message in (
        ("config.json", json.dumps(config("mixtral", rms_norm_eps=0.5)), "describes another model than the checkpoint"),
        ("weights.json", '{"layout": "v9"}', "weights.json: refused: "),
        ("weights.json", "[" * 100000, "weights.json: refused: "),
    ):
        before = (side / file).read_text()
        (side / file).write_text(content)
        with pytest.raises(SystemExit):
            main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "back").exists()
        (side / file).write_text(before)


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from equimoe.launch.convert import main
from equimoe.moe.checkpoint import contents
from equimoe.moe.config import RouterConfig
from equimoe.moe.interop.architecture import architecture

def anonymous():  # memory that is not the cache of a file
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "RssAnon" in line)

def measured(*argv):
    most, before, done = [0], anonymous(), threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], anonymous() - before)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    main(list(argv))
    done.set()
    thread.join()
    print("peak", most[0] * 1024)

torch.ones(4).to(torch.bfloat16).isfinite().all()  # what the first operation loads
measured(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_than_two_tensors_are_in_memory(tmp_path: Path) -> None:
    """The model has 100 MB, and its largest tensors 26 MB each."""
    values = config("mixtral", vocab_size=25000, hidden_size=256, intermediate_size=1024, num_local_experts=8)
    values |= {"num_attention_heads": 8}
    weights = tensors(values, "v5")
    write(tmp_path / "model", values, weights)
    largest = sorted(t.nbytes for t in weights.values())[-2:]
    assert sum(t.nbytes for t in weights.values()) > 1.9 * sum(largest)
    for argv in (["import", "model", "--out", "ours"], ["export", "ours", "--out", "back"]):
        done = subprocess.run(  # each in a process of its own, whose memory nothing has used before
            [sys.executable, "-c", MEASURE, *argv],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.rpartition("peak ")[2])
        assert 2**20 < peak < 1.2 * sum(largest), (argv, peak)
    assert_same(read(tmp_path / "back"), weights)


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"select": "top_p"}, "moe.router.select='top_p'"),
        ({"select": "each_group"}, "moe.router.select='each_group'"),
        ({"select": "even"}, "moe.router.select='even'"),
        ({"gate": "cosine"}, "moe.router.gate='cosine'"),
    ],
)
def test_a_router_that_transformers_lacks_is_refused(router: dict[str, Any], message: str) -> None:
    sections = asdict(replace(CONFIG, moe=replace(CONFIG.moe, router=RouterConfig(**router))))
    sections["model"]["vocab_size"] = 32
    with pytest.raises(ValueError, match=f"{message}: no model of transformers has such a router, .*--resume"):
        architecture(sections, False)


def test_a_head_that_transformers_lacks_is_refused() -> None:
    sections = asdict(replace(CONFIG, model=replace(CONFIG.model, norm_head=True, vocab_size=32)))
    with pytest.raises(ValueError, match="model.norm_head=True: no model of transformers has such a head"):
        architecture(sections, False)
