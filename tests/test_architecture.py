"""Holds the direction of imports and the bans, by reading the source: nothing of the package is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("moe", "kernels", "launch")

BASE = (
    "moe.collectives",
    "moe.placement",
    "moe.regions",
    "moe.transfer",
    "moe.types",
    "moe.config",
    "moe.version",
    "kernels",
)
STAGES = ("moe.routing", "moe.balance", "moe.dispatch", "moe.experts")
LAYER = ("moe.layer", "moe.replication", *STAGES, *BASE)
MODEL = ("moe.model", *LAYER)
PARALLEL = ("moe.parallel", *MODEL)
TRAIN = ("moe.train", "moe.engines", "moe.checkpoint", "moe.health", "moe.observe", *PARALLEL)

#: part -> the parts that it may import (besides itself); what is not listed may not exist
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "kernels": (),
    **dict.fromkeys([part for part in BASE if part != "kernels"], BASE),
    **dict.fromkeys(STAGES, BASE),
    **dict.fromkeys(("moe.layer", "moe.replication"), LAYER),
    "moe": LAYER,  # moe/__init__.py
    "moe.model": LAYER,
    "moe.interop": ("moe.checkpoint", *LAYER),
    "moe.parallel": MODEL,
    "moe.checkpoint": BASE,
    "moe.health": PARALLEL,
    "moe.observe": PARALLEL,
    "moe.engines": TRAIN,
    "moe.train": TRAIN,
    "moe.plan": TRAIN,
    "moe.serve": MODEL,
    "launch": ("moe", "moe.interop", "moe.plan", "moe.serve", *TRAIN),
}

#: top-level package or module -> the files and folders of the package that may use it
ONLY_IN: dict[str, tuple[str, ...]] = {
    "torch.distributed": (
        "moe/collectives/",
        "moe/parallel/",
        "moe/engines/",
        "moe/health/",
        "moe/checkpoint/",
        "moe/plan/",
        "launch/env.py",
        "launch/joining.py",
        "launch/failing.py",
    ),
    "safetensors": ("moe/checkpoint/",),
    "deepspeed": ("moe/engines/deepspeed/",),
    "megatron": ("moe/engines/megatron/",),
    "transformers": (),
    "lm_eval": ("launch/harness.py",),
    # the readers of torch's files: zipfile and pickletools parse, and run nothing
    "pickletools": ("moe/checkpoint/pickles.py",),
    "zipfile": ("moe/checkpoint/torch_files.py",),
    **dict.fromkeys(("pickle", "_pickle", "cloudpickle", "copyreg", "dill", "joblib", "marshal", "shelve"), ()),
}

#: torch's own storages of distributed checkpoints
PICKLING_STORAGES = ("FileSystemReader", "FileSystemWriter", "FsspecReader", "FsspecWriter")

#: no copy to the host here: it waits for the device
SYNC_FREE = (
    "moe/layer.py",
    "moe/replication.py",
    "moe/routing/",
    "moe/balance/",
    "moe/experts/",
    "moe/dispatch/",
    "moe/collectives/",
)
SYNCS = ("item", "tolist", "cpu")
#: the dropless exchange has to tell the host its split sizes; weights are filled once, before training
SYNCS_ALLOWED = {
    ("moe/collectives/no_gradient.py", "tolist"): 2,
    ("moe/collectives/initial.py", "tolist"): 1,
    ("moe/routing/assign.py", "cpu"): 1,  # BASE's auction runs on the host
}


def within(name: str, parts: tuple[str, ...], dot: str = ".") -> bool:
    return any(name == part or name.startswith(part.rstrip(dot) + dot) for part in parts)


class Source:
    """One file of the package, and what it imports as dotted names below ``equimoe``."""

    def __init__(self, root: Path, path: Path) -> None:
        self.file = path.relative_to(root).as_posix()
        self.tree = ast.parse(path.read_text(), self.file)
        names = list(path.relative_to(root).with_suffix("").parts)
        self.package = names[:-1]  # both of a module and of an __init__.py
        self.module = ".".join(self.package if names[-1] == "__init__" else names)
        self.root = root

    def part(self) -> str:
        """The most specific entry of MAY_IMPORT that holds this module."""
        return part_of(self.module)

    def imports(self) -> Iterator[tuple[int, str, str]]:
        """(line, kind, dotted name): kind "own" below equimoe, "bare" or "absolute" for the wrong spelling, "other"."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield node.lineno, self.kind(alias.name), alias.name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                for alias in node.names:
                    yield node.lineno, self.kind(node.module or ""), f"{node.module}.{alias.name}"
            elif isinstance(node, ast.ImportFrom):
                yield from self.relative(node)

    @staticmethod
    def kind(name: str) -> str:
        top = name.split(".")[0]
        return "bare" if top in FOLDERS else "absolute" if top == "equimoe" else "other"

    def relative(self, node: ast.ImportFrom) -> Iterator[tuple[int, str, str]]:
        above = ["equimoe", *self.package]
        if node.level > len(above):
            yield node.lineno, "beyond", "." * node.level + (node.module or "")
            return
        base = above[: len(above) - node.level + 1] + (node.module.split(".") if node.module else [])
        for alias in node.names:
            inside = base[1:]
            if self.is_module([*inside, alias.name]):
                inside = [*inside, alias.name]
            yield node.lineno, "own", ".".join(inside)

    def is_module(self, names: list[str]) -> bool:
        path = self.root.joinpath(*names)
        return path.with_suffix(".py").is_file() or path.is_dir()


def part_of(module: str) -> str:
    """The longest listed part that ``module`` lies in; an unlisted submodule of moe is its own part."""
    names = module.split(".")
    listed = [".".join(names[:i]) for i in range(len(names), 0, -1) if ".".join(names[:i]) in MAY_IMPORT]
    if not listed or (listed[0] == "moe" and module != "moe"):
        return ".".join(names[:2])
    return listed[0]


def import_violations(source: Source) -> Iterator[tuple[int, str]]:
    part = source.part()
    if part not in MAY_IMPORT:
        yield 1, f"{part} has no place in the direction of imports"
        return
    for line, kind, name in source.imports():
        if kind == "bare":
            yield line, f"bare import of {name}; write it relatively"
        elif kind == "absolute":
            yield line, f"absolute import of {name}; write it relatively"
        elif kind == "beyond":
            yield line, f"relative import {name} leaves the package"
        elif kind == "own":
            target = part_of(name)
            if target != part and not within(target, MAY_IMPORT[part]):
                yield line, f"{part} must not import {name}"
        else:
            for module, places in ONLY_IN.items():
                if within(name, (module,)) and not allowed(source.file, places):
                    yield line, f"{module} is for {', '.join(places) or 'nobody'}"
            if within(name, ("triton",)) and not is_triton_file(source.file):
                yield line, "triton is for kernels/*/triton_ops.py"
            if name in ("torch.load", "torch.save"):
                yield line, f"{name} runs code from files"
            if name.split(".")[-1] in PICKLING_STORAGES:
                yield line, f"{name} unpickles"


def is_triton_file(file: str) -> bool:
    in_op = file.startswith("kernels/") and file.count("/") == 2 and file.endswith("/triton_ops.py")
    return in_op or file == "kernels/_interpreter.py"


def allowed(file: str, places: tuple[str, ...]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def use_violations(source: Source) -> Iterator[tuple[int, str]]:
    """Bans on what is called or looked up, however it was imported."""
    syncs: dict[str, int] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text == "torch.distributed" and not allowed(source.file, ONLY_IN["torch.distributed"]):
                yield node.lineno, "torch.distributed by attribute"
            if text in ("torch.load", "torch.save", "torch.serialization.load", "os.system", "os.popen"):
                yield node.lineno, f"{text} is banned"
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            yield node.lineno, f"{node.func.id}() is banned"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in ("shell", "allow_pickle") and not off:
                yield node.lineno, f"{keyword.arg}= is banned"
            if keyword.arg in ("trust_remote_code", "weights_only"):
                yield node.lineno, f"{keyword.arg}= is banned"
        if isinstance(node.func, ast.Attribute) and node.func.attr in SYNCS and allowed(source.file, SYNC_FREE):
            name = node.func.attr
            syncs[name] = syncs.get(name, 0) + 1
            if syncs[name] > SYNCS_ALLOWED.get((source.file, name), 0):
                yield node.lineno, f".{name}() waits for the device"


def sources(root: Path) -> list[Source]:
    return [Source(root, path) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def violations(root: Path) -> list[str]:
    return [
        f"{source.file}:{line}: {text}"
        for source in sources(root)
        for check in (import_violations, use_violations)
        for line, text in check(source)
    ]


def test_the_house_keeps_its_rules() -> None:
    assert len(sources(ROOT)) > 20
    assert violations(ROOT) == []


def test_no_test_or_benchmark_imports_a_folder_by_its_bare_name() -> None:
    found = []
    for folder in ("tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            source = Source(ROOT, path)
            found += [f"{source.file}:{line}: {name}" for line, kind, name in source.imports() if kind == "bare"]
    assert found == []


GOOD = {
    "kernels/__init__.py": "",
    "kernels/topk/__init__.py": "from .triton_ops import topk",
    "kernels/topk/triton_ops.py": "import triton.language as tl",
    "moe/__init__.py": "from .layer import MoE",
    "moe/types.py": "from ..kernels import topk",
    "moe/collectives/no_gradient.py": "import torch.distributed as dist",
    "moe/routing/__init__.py": "from .router import Router",
    "moe/routing/router.py": "from ..types import Routing\nfrom ...kernels.topk import topk",
    "moe/balance/__init__.py": "",
    "moe/dispatch/__init__.py": "",
    "moe/dispatch/all_to_all.py": "",
    "moe/layer.py": "from . import routing\nfrom .balance import Balancer\nmodel.eval()",
    "moe/interop/__init__.py": "from ..layer import MoE",
    "moe/parallel/__init__.py": "from torch.distributed.device_mesh import DeviceMesh\nfrom ..layer import MoE",
    "moe/engines/__init__.py": "from ..parallel import parallelize",
    "moe/train/__init__.py": "from ..engines import build_engine",
    "moe/checkpoint/__init__.py": "import torch.distributed as dist\nfrom safetensors import safe_open",
    "moe/checkpoint/pickles.py": "import pickletools",
    "moe/checkpoint/torch_files.py": "import zipfile",
    "launch/__init__.py": "",
    "launch/train.py": "from ..moe import checkpoint, interop\nfrom . import env",
    "launch/env.py": "import torch.distributed as dist",
}


def plant(root: Path, changed: dict[str, str]) -> list[str]:
    for file, text in {**GOOD, **changed}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    return violations(root)


def test_the_checker_accepts_a_good_tree(tmp_path: Path) -> None:
    assert plant(tmp_path, {}) == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("kernels/topk/__init__.py", "from ...moe.types import Routing", "kernels must not import moe.types"),
        ("kernels/topk/__init__.py", "from ... import launch", "kernels must not import launch"),
        ("moe/routing/router.py", "from ..balance import x", "moe.routing must not import moe.balance"),
        ("moe/balance/__init__.py", "from .. import routing", "moe.balance must not import moe.routing"),
        ("moe/balance/__init__.py", "from .. import MoE", "moe.balance must not import moe"),
        (
            "moe/dispatch/__init__.py",
            "def f():\n    from ..routing.router import R",
            "must not import moe.routing.router",
        ),
        ("moe/types.py", "from .routing import Router", "moe.types must not import moe.routing"),
        ("moe/layer.py", "from .parallel import parallelize", "moe.layer must not import moe.parallel"),
        ("moe/layer.py", "from .train.config import x", "moe.layer must not import moe.train"),
        ("moe/__init__.py", "from .engines import build_engine", "moe must not import moe.engines"),
        ("moe/parallel/__init__.py", "from ..train import x", "moe.parallel must not import moe.train"),
        ("moe/train/__init__.py", "from ...launch import env", "moe.train must not import launch"),
        ("moe/parallel/__init__.py", "from ..interop import swap", "moe.parallel must not import moe.interop"),
        ("moe/novelty.py", "", "moe.novelty has no place"),
        ("launch/train.py", "from .... import moe", "leaves the package"),
        ("launch/train.py", "import moe.layer", "bare import of moe.layer"),
        ("launch/train.py", "from kernels import topk", "bare import of kernels.topk"),
        ("launch/train.py", "from equimoe.moe import MoE", "absolute import of equimoe.moe.MoE"),
        ("launch/train.py", "import torch.distributed as dist", "torch.distributed is for"),
        ("moe/layer.py", "from torch import distributed", "torch.distributed is for"),
        ("moe/layer.py", "import torch\ntorch.distributed.get_rank()", "torch.distributed by attribute"),
        ("moe/layer.py", "import triton", "triton is for"),
        ("kernels/topk/__init__.py", "from triton import jit", "triton is for"),
        ("launch/train.py", "import torch\ntorch.load('x')", "torch.load is banned"),
        ("launch/train.py", "from torch import save", "torch.save runs code"),
        ("launch/train.py", "import pickle", "pickle is for"),
        ("moe/checkpoint/pickles.py", "import pickle", "pickle is for nobody"),
        ("moe/checkpoint/pickles.py", "def f():\n    from _pickle import loads", "_pickle is for nobody"),
        ("moe/checkpoint/__init__.py", "import zipfile", "zipfile is for moe/checkpoint/torch_files.py"),
        (
            "moe/checkpoint/__init__.py",
            "from ..parallel import parallelize",
            "moe.checkpoint must not import moe.parallel",
        ),
        (
            "moe/checkpoint/__init__.py",
            "from torch.distributed.checkpoint.filesystem import FileSystemReader",
            "FileSystemReader unpickles",
        ),
        ("launch/train.py", "np.load('x', allow_pickle=True)", "allow_pickle= is banned"),
        ("launch/train.py", "load('x', weights_only=True)", "weights_only= is banned"),
        ("launch/train.py", "eval('1')", "eval() is banned"),
        ("launch/train.py", "exec('1')", "exec() is banned"),
        ("launch/train.py", "run('ls', shell=True)", "shell= is banned"),
        ("moe/layer.py", "x.item()", ".item() waits"),
        ("moe/routing/router.py", "x.sum().tolist()", ".tolist() waits"),
        ("moe/collectives/no_gradient.py", "x.tolist()\ny.tolist()\nz.tolist()", "no_gradient.py:3: .tolist() waits"),
        ("moe/dispatch/all_to_all.py", "x.tolist()", ".tolist() waits"),
        ("moe/dispatch/all_to_all.py", "x.cpu()", ".cpu() waits"),
    ],
)
def test_the_checker_finds_a_planted_violation(file: str, text: str, found: str, tmp_path: Path) -> None:
    report = plant(tmp_path, {file: text})
    assert len(report) == 1 and report[0].startswith(file + ":") and found in report[0], report
