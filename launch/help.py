"""The help text of ``python -m equimoe.launch.train``, made from the configuration's classes."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, Literal, get_args, get_origin

from ..moe.train.config import TrainConfig
from .options import ONLY_WITH, RUN_OPTIONS, fields_of, hints_of, section_of, suggest, value_of
from .recipes import RECIPES
from .recipes.table import PUBLISHED, table
from .text import option_text

USAGE = """\
usage: python -m equimoe.launch.train [--recipe NAME] [--config FILE] [--SECTION.FIELD VALUE] ...
(on several machines: torchrun ... -m equimoe.launch.train ...)
Dashes and underscores in option names are interchangeable."""
#: options that most runs set
COMMON = (
    "steps", "seed", "dtype", "engine", "data.path", "data.tokenizer", "data.seq_len", "data.global_batch",
    "data.micro_batch", "model.num_layers", "moe.hidden_size", "moe.num_experts", "moe.top_k", "moe.balance.scope",
    "optim.lr", "parallel.data_parallel", "parallel.ep", "parallel.tp", "parallel.pp", "log.every", "checkpoint.every",
)  # fmt: skip


def help_text(start: TrainConfig, topic: str = "") -> str:
    """Return the help text for a ``topic``, with the defaults of the configuration ``start``.

    "": the options that most runs set, and what sections are about; "all": every option; "recipes": the sizes of
    published models; else the options of the section with this dotted name. Raises ValueError if there is none.
    """
    if topic == "all":
        return "\n".join([*_introduction(), *_section("", TrainConfig, start)])
    if topic == "recipes":
        return table()
    if topic:
        return "\n".join(_topic(topic.replace("-", "_"), start))
    lines = [*_introduction(brief=True), "\noptions that most runs set:", *(_option(name, start) for name in COMMON)]
    lines.append("\nsections:")
    for name, hint in hints_of(TrainConfig).items():
        if section_of(hint):
            lines.append(_entry(name, _title(hint), 15))
    lines.append("\n--help SECTION lists the options of a section, --help all those of all sections.")
    return "\n".join(lines)


def _introduction(brief: bool = False) -> list[str]:
    """Return the lines before the configuration's options; if ``brief``, only the names of published models."""
    lines = [USAGE, ""]
    for name, (hint, text) in RUN_OPTIONS.items():
        placeholder = {bool: ""}.get(hint, _placeholder(hint))
        lines.append(_row(name.replace("_", "-"), "[all|recipes|SECTION]" if name == "help" else placeholder, text))
    lines.append("\nrecipes:")
    for name, recipe in RECIPES.items():
        if not brief or name not in PUBLISHED:
            lines.append(_entry(f"{name}:", (inspect.getdoc(recipe) or "").split("\n\n")[0].replace("\n", " "), 0))
    if brief:
        lines.append(_entry("published models; --help recipes has their sizes:", ", ".join(PUBLISHED), 0))
    return lines


def _topic(name: str, start: TrainConfig) -> Iterator[str]:
    names = fields_of()
    sections = sorted({other[:i] for other in names for i, letter in enumerate(other) if letter == "."})
    if name in sections:
        hint: Any = TrainConfig
        for part in name.split("."):
            hint = hints_of(section_of(hint))[part]
        yield from (line.lstrip("\n") for line in _section(name, hint, value_of(start, name)))
    elif name in names:
        yield _option(name, start)
    else:
        raise ValueError(f"--help={name}: no such section{suggest(name, [*sections, *names])}; --help lists them")


def _section(name: str, hint: Any, current: Any) -> Iterator[str]:
    """Yield the lines of a section, and then those of the sections in it."""
    cls, sections = section_of(hint), []
    yield f"\n{name}: {_title(hint)}" if name else "\nrun:"
    if type(None) in get_args(hint):
        state = "off" if current is None else "on"
        yield _row(name, "none", f"switch this section off; any option of {name} switches it on (default: {state})")
    values = cls() if current is None else current
    for field, kind in hints_of(cls).items():
        inner = f"{name}.{field}".lstrip(".")
        if section_of(kind):
            sections.append((inner, kind, getattr(values, field)))
        else:
            yield _row(inner, _placeholder(kind), _text(inner, cls, field, getattr(values, field)))
    for section in sections:
        yield from _section(*section)


def _option(name: str, start: TrainConfig) -> str:
    """Return the row of the option with this dotted name."""
    cls: Any = TrainConfig
    *path, field = name.split(".")
    for part in path:
        cls = section_of(hints_of(cls)[part])
    return _row(name, _placeholder(hints_of(cls)[field]), _text(name, cls, field, value_of(start, name)))


def _text(name: str, cls: type, field: str, value: Any) -> str:
    """Return an option's description: what it does, when it has an effect, and its default."""
    parts = [field_comments(cls).get(field, "")]
    if name in ONLY_WITH:  # a section's own title says what it needs
        needed, values = ONLY_WITH[name]
        parts.append(f"only with {needed}={' or '.join(map(option_text, values))}")
    return "; ".join(filter(None, (*parts, f"default {option_text(value)}")))


def _title(hint: Any) -> str:
    return (inspect.getdoc(section_of(hint)) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def field_comments(cls: type) -> dict[str, str]:
    """Return the ``#:`` comment above each field, from the class's source; empty if there is no source file."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except OSError:
        return {}
    lines, found = source.splitlines(), {}
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            above = [line.strip() for line in lines[: item.lineno - 1]]
            comment = list(takewhile(lambda line: line.startswith("#:"), reversed(above)))[::-1]
            text = " ".join(line.removeprefix("#:").strip() for line in comment)
            found[item.target.id] = re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")
    return found


def _placeholder(hint: Any) -> str:
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] or [hint]
    if get_origin(hint) is Literal:
        text = "|".join(map(str, get_args(hint)))
    elif bool in kinds:
        text = "true|false"
    else:
        text = {int: "INT", float: "NUMBER", str: "TEXT"}.get(kinds[0], "")
    return "|".join(filter(None, (text, "none" if type(None) in get_args(hint) else "")))


def _row(name: str, placeholder: str, text: str) -> str:
    left = f"  --{name} {placeholder}".rstrip()
    pad = " " * 44
    body = textwrap.fill(text, 116, initial_indent=pad, subsequent_indent=pad)
    return left + body[len(left) :] if len(left) < len(pad) - 1 else f"{left}\n{body}".rstrip()


def _entry(name: str, text: str, width: int) -> str:
    return textwrap.fill(
        f"{name:<{width}} {text}", 116, initial_indent="  ", subsequent_indent=" " * (width + 3 if width else 6)
    )
