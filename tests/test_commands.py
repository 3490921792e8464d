"""Every command line of the documents and cluster files is accepted by the parser of its command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from equimoe.launch import checkpoint, convert, dryrun, evaluate, generate, mesh, options, placement

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *PAGES, "launch/slurm/train.sbatch")
#: options of DeepSpeed's launcher that the documents use, with the number of their values
DEEPSPEED = {"--hostfile": 1, "--no_local_rank": 0, "--module": 0}
PARSERS = {module.__name__: module._parser for module in (checkpoint, convert, evaluate, generate, mesh, placement)}
STARTS = r"(?:\.venv/bin/)?(?:python -m|torchrun|deepspeed)|make train|[A-Z_]+=\S+ sbatch"


def commands() -> list[tuple[str, str]]:
    """Return (document, command) for every command in an indented block, a comment or a code span."""
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"\\\n#?\s*", "", (ROOT / document).read_text())
        spans = re.findall(rf"^(?:    |#   )((?:{STARTS}) .*)$|`((?:{STARTS}) [^`]*)`", text, re.MULTILINE)
        found += [(document, " ".join((block or span).split("#")[0].split())) for block, span in spans]
    return list(dict.fromkeys(found))


def parse(words: list[str], world: int = 1) -> None:
    """Parse a command for ``world`` ranks, and the command that it starts. Raises what its parser raises."""
    program, *rest = words
    name = program.removeprefix(".venv/bin/")
    if name == "make":
        given = dict(word.partition("=")[::2] for word in rest[1:])
        ours("equimoe.launch.train", shlex.split(given.get("ARGS", "")), 2)
    elif "=" in name:  # the environment of sbatch
        parse(rest)
    elif name == "sbatch":
        script = rest.index("launch/slurm/train.sbatch")
        nodes = int(rest[rest.index("--nodes") + 1]) if "--nodes" in rest else 2
        ours("equimoe.launch.train", [word.replace("%a", "3") for word in rest[script + 1 :]], 8 * nodes)
    elif name == "torchrun":
        started = get_args_parser().parse_args(rest)
        if started.module:
            ranks = int(started.nnodes.split(":")[0]) * int(started.nproc_per_node)
            ours(started.training_script, started.training_script_args, ranks)
    elif name == "deepspeed":
        while rest[0] in DEEPSPEED and rest[0] != "--module":
            rest = rest[1 + DEEPSPEED[rest[0]] :]
        if rest[0] == "--module":
            ours(rest[1], rest[2:], 16)
        else:
            assert not rest[0].startswith("-"), f"add {rest[0]} to DEEPSPEED"
    else:
        assert name == "python", name
        ours(rest[1], rest[2:], world)


def ours(module: str, arguments: list[str], world: int) -> None:
    if module == "equimoe.launch.train":
        if "--init.from" in arguments:  # what the options around it are about is tested with the folder
            place = arguments.index("--init.from")
            arguments = [*arguments[:place], *arguments[place + 2 :]]
        if arguments[:1] != ["--help"]:
            launch = options.parse(arguments)
            degrees = launch.config.degrees(launch.processes or world)
            assert launch.config.micro_batches(degrees.dp) > 0
    elif module == "equimoe.launch.dryrun":
        own, rest = dryrun._own(arguments)
        options.parse(rest).config.degrees(int(own["world"]))
    elif module in PARSERS:
        PARSERS[module]().parse_args(arguments)
    else:
        raise AssertionError(f"test the arguments of {module} here")


@pytest.mark.parametrize(("document", "command"), commands())
def test_parses(document: str, command: str) -> None:
    parse(shlex.split(command))


def test_the_example_for_kubernetes() -> None:
    text = (ROOT / "launch/k8s/train.yaml").read_text()
    ((args, more),) = re.findall(r" args: \[(.*)\] # for example also: (.*)", text)
    for words in (args, f"{args}, {more}"):
        ours("equimoe.launch.train", [str(word) for word in yaml.safe_load(f"[{words}]")], 16)


def test_a_wrong_option_is_found() -> None:
    for command in ("torchrun --nnodes 2 -m equimoe.launch.train --engine dspeed", "make train ARGS=--no.such"):
        with pytest.raises(ValueError):
            parse(shlex.split(command))


def test_commands_are_found() -> None:
    found = commands()
    without = {
        "CONTRIBUTING.md",
        *(f"docs/{name}.md" for name in ("balance", "data", "inference", "kernels", "watching")),
    }
    assert {document for document, _ in found} == set(DOCUMENTS) - without
    assert {"python", "torchrun", "deepspeed"} <= {re.split(r"[ /]", command)[0] for _, command in found}
