"""A soak: a run that is hit by many random faults ends in the same bits as one that is not."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from equimoe.launch.options import to_yaml
from equimoe.moe import checkpoint
from equimoe.moe.observe.metrics import read_records
from equimoe.moe.train.config import CheckpointConfig, LogConfig
from tests.faults import inject
from tests.faults.table import report
from tests.helpers import small
from tests.helpers.checkpoints import load_all
from tests.helpers.command import Ended, launch

WORLD, EVERY = 2, 5
#: what hits a running attempt; the phases of a save are in inject.SAVES
RUNNING = ("kill", "raise", "nan", "term", "flip")


def attempt(base: list[str], fault: inject.Fault | None, folder: Path) -> Ended:
    """Run the command on forked ranks until it ends, with a fault in one of them."""

    @contextmanager
    def within() -> Iterator[None]:
        if fault is not None:
            rank = int(os.environ.get("RANK", 0))
            inject.install(inject.Injector([fault], rank, folder))
        yield

    return launch(base, WORLD, timeout=120, within=within)


def random_fault(rng: random.Random, steps: int, start: int) -> inject.Fault:
    """Choose a fault of the next few steps."""
    step, rank = start + rng.randint(1, 2 * EVERY), rng.randrange(WORLD)
    if rng.random() < 0.3:
        save, phase = (start // EVERY + 1) * EVERY, rng.choice(inject.SAVES)
        return inject.Fault("kill", rank if phase == "save:shard" else 0, save, phase)  # rank 0 does the rest
    kind = rng.choice(RUNNING)
    phase = "optim" if kind == "flip" else rng.choice(("forward", "dispatch", "backward"))
    # the highest bit of the exponent: a gradient that is silently wrong on one replica only
    name = "attention.out_proj" if kind == "flip" else ""
    return inject.Fault(kind, rank, min(step, steps), phase, name=name)


def damage(rng: random.Random, root: Path) -> str:
    """Damage the newest checkpoint if an older one is left; return what was done."""
    if len(checkpoint.complete(root)) < 2:
        return ""
    files = sorted(checkpoint.complete(root)[-1].iterdir())
    file = rng.choice(files)
    kind = rng.choice(("truncated", "flipped", "removed"))
    data = bytearray(file.read_bytes())
    if kind == "truncated":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    else:
        file.unlink()
    return f"{kind} {file.suffix}"


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_many_random_faults_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("equimoe.launch.page.PLOTS", ())
    faults, rng = int(os.environ.get("EQUIMOE_SOAK_FAULTS", "200")), random.Random(0)
    steps = 4 * faults
    config = small.on(
        small.write_texts(tmp_path / "texts"),
        2,
        steps=steps,
        checkpoint=CheckpointConfig(every=EVERY, keep_last=3),
        log=LogConfig(every=1, eval_every=0, eval_sequences=1, trackers=None),
    )
    (tmp_path / "small.yaml").write_text(to_yaml(config))

    def base(run: str) -> list[str]:
        return ["--config", str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / run)]

    assert launch(base("straight"), WORLD, timeout=600).codes == [0] * WORLD
    root = tmp_path / "hit" / "checkpoints"
    ends, kinds, done, taken = Counter[str](), Counter[str](), 0, 0
    resumed_from = 0
    for number in range(10 * faults):
        fault = random_fault(rng, steps, resumed_from) if done < faults else None
        ended = attempt([*base("hit"), *(["--resume"] if number else [])], fault, tmp_path / f"hit.{number}")
        if ended.codes == [0] * WORLD:
            break
        assert fault is not None, ended
        done += 1
        kinds[f"{fault.kind} in {fault.phase}"] += 1
        ends[str(sorted(set(ended.codes)))] += 1
        if rng.random() < 0.2 and done < faults and (what := damage(rng, root)):
            done += 1
            kinds[what] += 1
        records = [r["step"] for r in read_records(tmp_path / "hit" / "metrics.jsonl") if r["kind"] == "train"]
        taken += max(records, default=0) - resumed_from
        whole = [path for path in checkpoint.complete(root) if _is_whole(path)]
        resumed_from = int(whole[-1].name[5:]) if whole else 0
    assert done >= faults and checkpoint.newest(root).name == f"step-{steps:08d}", (done, kinds, ends)
    last = [load_all(checkpoint.newest(tmp_path / run / "checkpoints")) for run in ("straight", "hit")]
    assert last[0].keys() == last[1].keys()
    mismatches = [name for name in last[0] if not torch.equal(last[0][name], last[1][name])]
    logs = [read_records(tmp_path / run / "metrics.jsonl") for run in ("straight", "hit")]
    curves = [{r["step"]: r["loss"] for r in log if r["kind"] == "train"} for log in logs]
    assert not mismatches and curves[0] == curves[1], (mismatches, kinds, ends)
    taken += steps - resumed_from
    report("50", "ends in the same bits", faults=done, mismatches=0, goodput=f"{steps / taken:.0%}", kinds=len(kinds))
    print(dict(kinds), dict(ends))


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.read_manifest(path)
    except checkpoint.CheckpointError:
        return False
    return True
