"""The choice of an engine: the core imports none of the foreign ones, and says what to install."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from equimoe.moe.train.config import DeepSpeedConfig, MegatronConfig, TrainConfig
from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.trainer import Trainer
from tests.helpers import small


@pytest.fixture(params=["deepspeed", "megatron"])
def missing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that cannot be imported."""
    package: str = request.param
    for name in list(sys.modules):
        if name.startswith(f"equimoe.moe.engines.{package}"):
            monkeypatch.delitem(sys.modules, name)
        if name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    return package


def test_without_its_package_an_engine_names_the_extra(tmp_path: Path, missing: str) -> None:
    config = small.on(small.write_texts(tmp_path), engine=missing)
    corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
    with pytest.raises(ValueError, match=rf"engine='{missing}'.*pip install 'equimoe\[{missing}\]'") as raised:
        Trainer(config, corpus, None, torch.device("cpu"))
    assert "\n" not in str(raised.value)


def test_without_its_package_an_import_names_the_extra(missing: str) -> None:
    with pytest.raises(ImportError, match=rf"{missing}.*pip install 'equimoe\[{missing}\]'") as raised:
        importlib.import_module(f"equimoe.moe.engines.{missing}")
    assert "\n" not in str(raised.value) and raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deepspeed": DeepSpeedConfig(config="zero.json")}, "deepspeed.config=zero.json: .* set engine='deepspeed'"),
        ({"deepspeed": DeepSpeedConfig(zero_stage=2), "engine": "megatron"}, "deepspeed.zero_stage=2: has no effect"),
        (
            {"megatron": MegatronConfig(False), "engine": "deepspeed"},
            "distributed_optimizer=False: .*megatron",
        ),
    ],
)
def test_options_of_another_engine_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


FOREIGN = {"deepspeed", "megatron", "transformers", "matplotlib", "torch.distributed.pipelining", "torch._dynamo"}
OF_RANKS = {"torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint"}


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [("equimoe.launch.train, equimoe.launch.generate", FOREIGN), ("equimoe.moe", FOREIGN | OF_RANKS | {"triton"})],
)
def test_the_core_imports_no_foreign_engine_and_nothing_slow_that_few_runs_need(
    modules: str, unwanted: set[str]
) -> None:
    code = f"import sys; import {modules}; "
    code += f"sys.exit(str(sorted({unwanted} & sys.modules.keys())) if {unwanted} & sys.modules.keys() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
