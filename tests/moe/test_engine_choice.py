"""The choice of an engine: the core imports none of the foreign ones, and says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equimoe.moe.train.data import load_corpus, load_tokenizer
from equimoe.moe.train.loop import Trainer
from tests.helpers import small


def test_without_its_package_an_engine_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("equimoe.moe.engines.deepspeed")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = small.on(small.write_texts(tmp_path), engine="deepspeed")
    corpus = load_corpus(config.data, load_tokenizer(config.data.tokenizer))
    with pytest.raises(ValueError, match=r"engine='deepspeed'.*pip install 'equimoe\[deepspeed\]'"):
        Trainer(config, corpus, None, torch.device("cpu"))


def test_the_core_imports_no_foreign_engine() -> None:
    code = "import sys; import equimoe.launch.train, equimoe.moe.engines; "
    code += "sys.exit(str(sorted({'deepspeed', 'megatron'} & sys.modules.keys())) if "
    code += "{'deepspeed', 'megatron'} & sys.modules.keys() else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
